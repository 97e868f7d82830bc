"""Entries that are inferred are the table's where it has one, and right where it has none."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    ARCHITECTURE_CASES,
    FULL_HEADS,
    SIZES,
    assert_state,
    batches,
    config_of,
    logits,
    random_model,
    relative_error,
    state_of,
    tiny_architecture,
    tiny_model,
)
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.llama import modeling_llama

import grail_hf
from grail_hf import ARCHITECTURES, Architecture, GrailConfig, infer_architecture
from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.models import architectures
from grail_hf.models.architectures import architectures_table
from grail_hf.models.groups import Group
from grail_hf.models.source import architecture_source
from grail_hf.planning.plan import plan_compression

# Why a case of the table is refused.
MIXTURES = [
    case
    for case, changes in ARCHITECTURE_CASES.items()
    if ARCHITECTURES[changes.get("model_type", case)].experts is not None
]
REFUSED = {
    "gemma4_text": "values for single layers",
    "gemma4": "values for single layers",
    "bloom": "no block .* can be pruned: not its attention, because the layer does not run with",
    **dict.fromkeys(
        MIXTURES, r"experts\.gate_up_proj of shape .* experts and the like are not supported"
    ),
}
# What the table offers and inference does not find.
NOT_FOUND = {
    ("lfm2", MLP): "no key of its config gives its MLP another width",  # it takes two
    ("olmo", ATTENTION): "its output should be linear in",  # values are clipped, by a setting
}
# Types that the table does not know, and what is offered.
UNKNOWN = {
    "persimmon": (FULL_HEADS, {MLP}),
    "vaultgemma": ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                   {ATTENTION, MLP}),
    "ctrl": (FULL_HEADS | {"dff": 83}, {MLP}),
    "doge": ({"attention_dropout": 0.0}, {MLP}),
    "xglm": (FULL_HEADS | {"ffn_dim": 83}, {MLP}),
}  # fmt: skip
SHARES = {ATTENTION: 0.5, MLP: 0.4}


@pytest.fixture(autouse=True)
def table_in_order():
    """Entries that a test takes out of the table come back in their places."""
    entries = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(entries)


inferred_case = pytest.mark.parametrize("case", [c for c in ARCHITECTURE_CASES if c not in REFUSED])


def unknown_model(name):
    return random_model(
        config_of(SIZES | {"model_type": name} | UNKNOWN[name][0]), dtype=torch.float32
    )


def inferred(model, monkeypatch):
    """The inferred entry of a model whose type is taken out of the table, and the table's."""
    entry = ARCHITECTURES[model.config.model_type]
    monkeypatch.delitem(ARCHITECTURES, model.config.model_type)
    return infer_architecture(model), entry


def specs_by(entry, model, unit="kv_group"):
    """Of each decoder layer, its groups."""
    layers = model.base_model.get_submodule(entry.layers)
    return [entry.groups(model.config, layer, unit) for layer in layers]


def offered_by(entry, model):
    return {spec.kind for layer in specs_by(entry, model) for spec in layer if spec.offered}


def narrower(model, entry, **settings):
    kinds = offered_by(entry, model)
    shares = {f"{kind}_sparsity": SHARES[kind] * (kind in kinds) for kind in SHARES}
    return grail_hf.compress(
        model,
        calibration=batches(),
        architecture=entry,
        progress=False,
        **{"multiple_of": 1} | shares | settings,
    )


def assert_reloads(model, report, folder):
    model.save_pretrained(folder)
    report.save(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert relative_error(logits(again, batches()), logits(model, batches())) < 1e-6


# What no module or config key of the model at hand shows: biases that its config could switch on,
# and (in the table, not always) which norm follows a block.
UNSEEN = ("bias_key", "post_norm")


@inferred_case
def test_what_is_inferred_is_the_table_s_entry(case, monkeypatch):
    model = tiny_architecture(case)
    found, entry = inferred(model, monkeypatch)
    assert found.layers == entry.layers
    missing = {kind for name, kind in NOT_FOUND if name == case}
    assert offered_by(found, model) == offered_by(entry, model) - missing
    assert bool(found.per_layer) == bool(entry.per_layer)
    for unit in ATTENTION_UNITS:
        for ours, known in zip(
            specs_by(found, model, unit), specs_by(entry, model, unit), strict=True
        ):
            for spec, expected in zip(ours, known, strict=True):
                assert (spec.kind, spec.consumer) == (expected.kind, expected.consumer)
                assert spec.residual_scale == expected.residual_scale
                if spec.offered:
                    seen = (replace(s, **dict.fromkeys(UNSEEN)) for s in (spec, expected))
                    assert next(seen) == next(seen)
                elif expected.offered:
                    assert NOT_FOUND[case, spec.kind] in spec.refusal


# Types with less than the table offers, and one for each layout of the projections. In the others
# the groups are the table's, and those are compressed in `test_architectures`.
@pytest.mark.parametrize("case", ["lfm2", "olmo", "llama", "phi3", "gpt2", "falcon", "gemma2"])
def test_an_inferred_type_is_compressed_and_reloads(case, monkeypatch, tmp_path):
    model = tiny_architecture(case)
    found, _ = inferred(model, monkeypatch)
    report = narrower(model, found, selector="wanda")
    assert report.model_type == report.new_model_type == model.config.model_type
    narrowed = {group.kind for group in report.groups if group.width < group.units}
    assert narrowed == offered_by(found, model)
    assert_reloads(model, report, tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_a_case_that_cannot_be_inferred_is_refused_with_the_reason(case, monkeypatch):
    model = tiny_architecture(case)
    monkeypatch.delitem(ARCHITECTURES, model.config.model_type)
    with pytest.raises(ValueError, match=REFUSED[case]):
        infer_architecture(model)


@pytest.mark.parametrize("name", UNKNOWN)
@torch.no_grad()
def test_a_type_that_the_table_does_not_know(name, tmp_path):
    """Pruning it is zeroing what the removed units feed, and the checkpoint loads."""
    model = unknown_model(name)
    assert name not in ARCHITECTURES
    with pytest.raises(ValueError, match=rf"'{name}' is not known.*infer_architecture\(model\)"):
        grail_hf.compress(model, calibration=batches(), sparsity=0.3)
    entry = infer_architecture(model)
    assert offered_by(entry, model) == UNKNOWN[name][1]
    zeroed, whole = copy.deepcopy(model), copy.deepcopy(model)
    report = narrower(model, entry, selector="wanda", compensate=False)
    layers = [m.base_model.get_submodule(entry.layers) for m in (zeroed, model)]
    for dense, cut, specs in zip(*layers, specs_by(entry, zeroed), strict=True):
        for spec in specs:
            if spec.offered:
                before, after = Group(dense, spec, "").weight, Group(cut, spec, "").weight
                kept = (before.T[:, None] == after.T[None]).all(dim=-1).any(dim=1)
                assert kept.sum() == after.shape[1] < before.shape[1]
                before[:, ~kept] = 0
    assert relative_error(logits(model, batches()), logits(zeroed, batches())) < 1e-5
    assert_reloads(model, report, tmp_path / "pruned")
    report = narrower(whole, entry)
    assert all(0 < group.error <= group.error_pruned for group in report.groups)
    assert any(group.error < group.error_pruned for group in report.groups)
    assert_reloads(whole, report, tmp_path / "repaired")


def test_layers_of_an_inferred_type_may_differ_in_width(monkeypatch, tmp_path):
    model = tiny_architecture("llama")
    found, _ = inferred(model, monkeypatch)
    report = narrower(model, found, ignore=(0,))
    assert not report.uniform
    assert_reloads(model, report, tmp_path)


# Nothing but the structure counts


def test_the_model_is_left_as_it_was():
    model = unknown_model("persimmon").train()
    state, random = state_of(model), torch.get_rng_state()
    infer_architecture(model)
    assert_state(model, state)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("case", ["llama", "granite", "gemma2"])
def test_weights_and_dtype_do_not_matter(case):
    model = tiny_architecture(case)
    expected = infer_architecture(model)
    assert infer_architecture(model.bfloat16()) == expected
    for parameter in model.parameters():
        parameter.data.zero_()
    assert infer_architecture(model) == expected


# As Python


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_entrys_source_is_the_entry(name):
    entry = ARCHITECTURES[name]
    source = architecture_source(entry)
    assert eval(source, vars(architectures)) == replace(entry, exports={}, gguf=())
    # A string is not split.
    assert all(len(line) <= 100 or line.count('"') == 2 for line in source.splitlines())


def test_an_entry_of_defaults_is_its_name():
    assert architecture_source(Architecture("mistral")) == 'Architecture("mistral")'


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_inferred_entry_can_be_added_to_the_table(name, monkeypatch):
    model = unknown_model(name)
    entry = infer_architecture(model)
    evaluated = eval(architecture_source(entry), vars(architectures))
    assert evaluated == entry
    monkeypatch.setitem(ARCHITECTURES, name, evaluated)
    assert f"| {name} | yes |" in architectures_table()
    config = GrailConfig(mlp_sparsity=0.4, attention_sparsity=0.0, multiple_of=1)
    assert plan_compression(model, config).specs == plan_compression(model, config, entry).specs


# What the check is for


def rolled_mlp(self, x):
    """Each channel is read in its neighbour's place."""
    return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).roll(1, -1))


def normed_mlp(self, x):
    """Each channel depends on all."""
    x = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(x / x.square().mean(-1, keepdim=True).sqrt())


@pytest.mark.parametrize("forward", [rolled_mlp, normed_mlp])
def test_units_that_cannot_be_cut_alone_stay(forward, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    entry = infer_architecture(tiny_model("llama"))
    assert (entry.mlp.kind, entry.mlp.path) == (MLP, "mlp")
    assert "cutting a unit changes the outputs of the others" in entry.mlp.reason
    assert entry.attention == replace(ARCHITECTURES["llama"].attention, bias_key=None)


def test_a_config_that_lies_about_the_heads_is_found_out(monkeypatch):
    """Shapes that fit are not enough: the layer of the new config must compute the same."""
    build = modeling_llama.LlamaAttention.__init__

    def scaled(self, config, layer_idx):
        build(self, config, layer_idx)
        self.scaling = 1 / config.num_attention_heads

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", scaled)
    entry = infer_architecture(tiny_model("llama"))
    assert entry.attention.refused[0].reason.startswith("no values of its config give it fewer")
    assert entry.mlp == replace(ARCHITECTURES["llama"].mlp, bias_key=None)


def test_layers_that_share_more_than_the_stream_are_refused(monkeypatch):
    forward, seen = modeling_llama.LlamaDecoderLayer.forward, []

    def remembers(self, hidden_states, **kwargs):
        seen.append(hidden_states.mean())
        return forward(self, hidden_states, **kwargs) + sum(seen[-2:])

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", remembers)
    with pytest.raises(ValueError, match="depends on more than its arguments"):
        infer_architecture(tiny_model("llama"))


# Models that no entry describes


def test_an_encoder_decoder_is_refused():
    sizes = {"vocab_size": 97, "d_model": 12, "d_kv": 4, "d_ff": 13, "num_layers": 1}
    model = AutoModelForSeq2SeqLM.from_config(
        config_of(sizes | {"model_type": "t5", "num_heads": 3, "decoder_start_token_id": 0})
    )
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        infer_architecture(model)


def test_a_model_without_decoder_layers_is_refused():
    sizes = {"embedding_size": 8, "hidden_size": 12, "intermediate_size": 13}
    config = AlbertConfig(vocab_size=97, num_hidden_layers=3, num_attention_heads=3, **sizes)
    with pytest.raises(ValueError, match="decoder layers of 'albert' cannot be identified: 0 li"):
        infer_architecture(AlbertForMaskedLM(config))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", r"layers\.0\.mlp\.experts\.gate_up_proj of shape \[8, 166, 48\] is not the"),
        ("mamba", "layer 0 has 0 blocks"),
        ("openai-gpt", "a Block returns a list"),
    ],
)
def test_layers_of_other_blocks_are_refused(name, message):
    model = random_model(config_of(SIZES | {"model_type": name, "head_dim": None}))
    with pytest.raises(ValueError, match=message):
        infer_architecture(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(ValueError, match="meta device"):
        infer_architecture(model)


def test_an_entry_of_another_type_is_refused():
    with pytest.raises(ValueError, match="an entry for 'mistral' and the model is a 'llama'"):
        grail_hf.compress(
            tiny_model("llama"),
            calibration=batches(),
            architecture=ARCHITECTURES["mistral"],
            sparsity=0.3,
        )
