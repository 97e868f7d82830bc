"""What is refused and with what words, the model as it was; what goes wrong in the middle."""

import logging
from contextlib import contextmanager

import pytest
import torch
from tiny_models import (
    assert_state,
    batches,
    layers_of,
    logits,
    state_of,
    tiny_config,
    tiny_model,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

import grail_hf
from grail_hf import SELECTORS, PartlyCompressedError, Selector
from grail_hf.methods.widths import TOLERANCE


class Untouchable:
    """Calibration that must not be asked for."""

    def __iter__(self):
        raise AssertionError("the calibration was touched")


def compress(model, calibration=None, **settings):
    calibration = batches() if calibration is None else calibration
    settings = {"sparsity": 0.3, "multiple_of": 1, "allocation": "uniform"} | settings
    return grail_hf.compress(model, calibration=calibration, progress=False, **settings)


@contextmanager
def refused(model, error, *words):
    """The block raises exactly `error`, with all `words`, and leaves the model as it was."""
    state = state_of(model)
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for word in words:
        assert word in str(caught.value)
    assert_state(model, state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, ["sparsity=1.0 is outside [0, 1)", "sparsity=0.3"]),
        ({"sparsity": -0.1}, ["sparsity=-0.1 is outside [0, 1)"]),
        ({"sparsity": float("nan")}, ["sparsity=nan is outside"]),
        ({"sparsity": 30}, ["sparsity=30 is outside"]),
        ({"sparsity": None}, ["not given", "sparsity=0.3"]),
        ({"sparsity": None, "mlp_sparsity": 0.3}, ["not given", "attention_sparsity"]),
        (
            {"selector": "wander"},
            ["'wander' is not known", "did you mean 'wanda'?", "selectors.py"],
        ),
        ({"spasity": 0.3}, ["unknown setting 'spasity'", "sparsity, "]),
        ({"attention_unit": "head"}, ["'head'", "kv_group", "query_head"]),
        ({"sparsity": 0.999}, ["sparsity=0.999 cannot be reached", "reachable nearby: "]),
        ({"multiple_of": 64}, ["cannot be reached", "multiple_of=64", "smaller multiple_of"]),
        ({"ignore": ("atention",)}, ["ignore='atention' matches nothing", "layers.0.self_attn"]),
        ({"ignore": ("att",)}, ["ignore='att' matches nothing"]),
        ({"ignore": (3,)}, ["ignore=3 matches nothing", "layers 0 to 2"]),
        ({"device": "cuda:99"}, ["device='cuda:99' cannot be used here"]),
    ],
    ids=str,
)
def test_settings_are_refused_before_calibration(settings, words):
    model = tiny_model("qwen3")
    with refused(model, ValueError, *words):
        compress(model, Untouchable(), **settings)


@pytest.mark.parametrize(
    ("scores", "word"),
    [(torch.ones(83), "shape [83]"), (torch.full((4,), float("nan")), "NaN for 4 units")],
)
def test_scores_that_do_not_fit_are_refused_by_name_and_shapes(scores, word):
    def mine(group, stats):
        return scores

    model = tiny_model("qwen3")
    with refused(model, ValueError, word, "mine'", "layers.0.self_attn", "shape [4]"):
        compress(model, selector=mine)


# Models


def test_an_unknown_architecture_is_refused_with_the_place_to_add_one():
    config = AutoConfig.for_model(
        "codegen", n_embd=12, n_layer=1, n_head=4, rotary_dim=2, vocab_size=97
    )
    model = AutoModelForCausalLM.from_config(config)
    words = (
        "'codegen' is not known",
        "Known: llama, ",
        "ARCHITECTURES in grail_hf/models/architectures.py",
    )
    with refused(model, ValueError, *words):
        compress(model, Untouchable())


def test_a_misspelt_architecture_gets_the_nearest_name():
    model = tiny_model("qwen3")
    model.config.model_type = "qwen3x"
    with refused(model, ValueError, "did you mean 'qwen3'?"):
        compress(model, Untouchable())


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model(
        "t5", d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=97
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with refused(model, ValueError, "'t5' is an encoder-decoder", "decoder-only"):
        compress(model, Untouchable())


def packed_buffer(model):
    """As in GPTQ's layers: 4-bit numbers in a buffer of whole ones."""
    linear = model.model.layers[1].mlp.up_proj
    del linear.weight
    linear.register_buffer("qweight", torch.zeros(6, 83, dtype=torch.int32))


def eight_bits(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


def own_kind(model):
    """As bitsandbytes' and torchao's tensors, of a class of its own."""

    class Packed(torch.nn.Parameter):
        pass

    linear = model.model.layers[1].mlp.up_proj
    linear.weight = Packed(linear.weight.detach())


@pytest.mark.parametrize("place", ["config", "quantizer"])
@pytest.mark.parametrize("quantise", [packed_buffer, eight_bits, own_kind])
def test_a_quantised_model_is_refused(quantise, place):
    model = tiny_model("llama")
    quantise(model)
    if place == "config":
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    else:
        model.hf_quantizer = object()
    with refused(model, ValueError, "quantised", "full-precision"):
        compress(model, Untouchable())


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_a_sharded_model_is_refused(kind, tiny_llama_dir, monkeypatch):
    """The first of two processes, the other of which is pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            tiny_llama_dir, distributed_config={f"{kind}_size": 2}
        )
        with pytest.raises(ValueError, match=r"sharded over processes.*device_map='auto'"):
            compress(model, Untouchable())
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_with_adapters_is_refused():
    """`add_adapter` leaves the model of its class.

    A release of transformers may ask for a PEFT that is not released yet.
    """
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"]))
    with refused(model, ValueError, "PEFT adapters", "merge"):
        compress(model, Untouchable())


def test_what_is_no_linear_is_named_with_its_module():
    class Linear(torch.nn.Module):
        """As PEFT's, a namesake."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = tiny_model("llama")
    mlp = layers_of(model)[1].mlp
    mlp.up_proj = Linear(mlp.up_proj)
    words = ("up_proj of model.layers.1.mlp", f"{__name__}.", "not a torch.nn.Linear")
    with refused(model, TypeError, *words):
        compress(model, Untouchable())


@pytest.mark.parametrize("shared", ["layer", "weight", "module"])
def test_decoder_layers_that_share_a_parameter_are_refused(shared):
    model = tiny_model("llama")
    layers = layers_of(model)
    if shared == "layer":
        layers[2] = layers[0]
    elif shared == "weight":
        layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    else:
        layers[2].self_attn.q_proj = layers[0].self_attn.q_proj
    with refused(model, ValueError, "layers 0 and 2 share a parameter", "a copy of its own"):
        compress(model, Untouchable())


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: model.state_dict()])
def test_what_is_no_transformers_model_is_refused(wrap):
    model = tiny_model("llama")
    with refused(model, TypeError, "is not a transformers model", "from_pretrained"):
        compress(wrap(model), Untouchable())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_that_is_no_causal_lm_keeps_its_type(auto):
    """And therefore keeps 6 heads, not 9, which a llama's config cannot represent."""
    model = auto.from_config(tiny_config("llama"))
    before = type(model)
    report = compress(model, batches())
    assert (type(model), model.config.model_type) == (before, "llama")
    assert model.config.num_attention_heads == 6
    assert abs(report.sparsity - 0.3) <= TOLERANCE


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device"):
        compress(model, Untouchable())
    assert model.config.intermediate_size == 83


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.layers.2.self_attn.q"]
)
def test_a_weight_that_is_not_finite_is_named(name, value):
    model = tiny_model("qwen2")
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.startswith(name))
    parameter.data.flatten()[-1] = value
    with refused(model, FloatingPointError, f"{name} holds NaN or Inf", "not been changed"):
        compress(model, Untouchable())


# Calibration


@pytest.mark.parametrize(
    ("calibration", "settings", "words"),
    [
        (["some text"], {}, ["text needs a tokenizer"]),
        (torch.full((2, 5), 97), {}, ["token id 97", "[0, 97)"]),
        (torch.full((2, 5), -1), {}, ["token id -1"]),
        ([], {}, ["zero batches"]),
        ([{"input_ids": torch.ones(2, 5, dtype=torch.long)}, {}], {}, ["batch 1 has no"]),
    ],
    ids=["no tokenizer", "id too large", "id negative", "no batch", "no ids"],
)
def test_calibration_is_refused_before_anything_changes(calibration, settings, words):
    model = tiny_model("llama")
    with refused(model, ValueError, *words):
        compress(model, calibration, **settings)


def test_text_shorter_than_a_window_is_refused(tiny_llama, tokenizer):
    with refused(tiny_llama, ValueError, "fewer than one window of seq_length=64"):
        compress(tiny_llama, ["A short text."], tokenizer=tokenizer, seq_length=64, multiple_of=8)


# Failures while layers are visited


def plant_overflow(model, layer, kind):
    """Make the activations before a consumer Inf: finite weights, finite residual stream."""
    name = {"attention": "self_attn.v_proj", "mlp": "mlp.up_proj"}[kind]
    layers_of(model)[layer].get_submodule(name).weight.data *= 3e38


@pytest.mark.parametrize("reduced", ["attention", "mlp"])
def test_overflow_in_the_first_group_leaves_the_model_as_it_was(reduced):
    model = tiny_model("llama")
    plant_overflow(model, 0, reduced)
    shares = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 0}
    shares[f"{reduced}_sparsity"] = 0.25
    name = {"attention": "self_attn", "mlp": "mlp"}[reduced]
    with refused(model, FloatingPointError, f"model.layers.0.{name} are NaN or Inf", "bfloat16"):
        compress(model, **shares)


@pytest.mark.parametrize(("layer", "kind"), [(0, "mlp"), (1, "attention"), (1, "mlp"), (2, "mlp")])
def test_overflow_later_names_the_group_and_asks_to_load_the_model_again(layer, kind):
    model = tiny_model("qwen2").train()
    plant_overflow(model, layer, kind)
    with pytest.raises(PartlyCompressedError) as caught:
        compress(model)
    block = {"attention": "self_attn", "mlp": "mlp"}[kind]
    assert f"model.layers.{layer}.{block} are NaN or Inf" in str(caught.value)
    assert "load it again" in str(caught.value)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_repair_that_overflows_the_models_dtype_takes_more_damping(caplog):
    model = tiny_model("qwen2", intermediate_size=82, dtype=torch.float16)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weight = model.model.layers[0].mlp.get_submodule(name).weight
            weight *= 1e-2  # so that what the block outputs is in range
            weight[41:] = weight[:41]
        model.model.layers[0].mlp.down_proj.weight.fill_(40_000)  # two of them exceed 65,504
    shares = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 0.5, "target": "self"}
    report = compress(model, **shares, ridge=1e-4)
    assert "repaired model.layers.0.mlp overflows torch.float16; solved with damping" in caplog.text
    assert 1e-4 < report.groups[0].damping < float("inf")
    assert report.groups[0].error < report.groups[0].error_pruned
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_dense_output_that_overflows_is_named_before_anything_changes():
    model = tiny_model("qwen2", dtype=torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(40_000)
    shares = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 0.5}
    with refused(model, FloatingPointError, "output of model.layers.0.mlp is NaN or Inf"):
        compress(model, target="residual", **shares)


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupt_stays_an_interrupt_and_is_logged_once_the_model_has_changed(
    monkeypatch, caplog, after
):
    calls = []

    def interrupted(group, stats):
        calls.append(group.name)
        if len(calls) > after:
            raise KeyboardInterrupt
        return SELECTORS["wanda"](group, stats)

    monkeypatch.setitem(SELECTORS, "interrupted", Selector(interrupted))
    model = tiny_model("qwen2").train()
    with caplog.at_level(logging.ERROR), pytest.raises(KeyboardInterrupt):
        compress(model, selector="interrupted")
    logged = [record.getMessage() for record in caplog.records]
    if after:
        assert len(logged) == 1 and "load it again" in logged[0] and calls[after - 1] in logged[0]
    else:
        assert logged == []
    assert all(module.training for module in model.modules())


def test_a_failure_brings_the_layer_back_at_once():
    model = tiny_model("qwen2")
    plant_overflow(model, 1, "mlp")
    moves = {layer: [] for layer in layers_of(model)}
    for layer, devices in moves.items():
        layer.to = devices.append
    with pytest.raises(PartlyCompressedError) as caught:
        compress(model)
    # `caught` holds the traceback, as a notebook does: cleaning up must not wait for its end.
    assert caught and [len(devices) for devices in moves.values()] == [2, 2, 0]


# Degenerate, but no failure


def test_fewer_tokens_than_channels_warns_with_the_groups_name_and_finishes(caplog):
    model = tiny_model("qwen2")
    with caplog.at_level(logging.WARNING):
        report = compress(model, torch.arange(12).reshape(2, 6), ridge=0, selector="magnitude")
    for group in report.groups:
        assert group.damping > 0
        assert any(
            group.name in r.getMessage() and "singular" in r.getMessage() for r in caplog.records
        )
    assert torch.isfinite(logits(model, batches())).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dead", ["some channels", "whole layer"])
def test_dead_channels_do_no_harm(selector, dead):
    model = tiny_model("qwen2")
    gate = layers_of(model)[1].mlp.gate_proj.weight
    gate.data[: 20 if dead == "some channels" else None] = 0
    report = compress(model, selector=selector)
    assert all(0 <= group.error <= group.error_pruned < 2 for group in report.groups)
    assert torch.isfinite(logits(model, batches())).all()


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "random"])
def test_dead_channels_that_nothing_reads_go_first(selector):
    model = tiny_model("qwen2")
    for layer in layers_of(model):
        layer.mlp.gate_proj.weight.data[7:32] = 0
        layer.mlp.down_proj.weight.data[:, 7:32] = 0
    expected = logits(model, batches())
    shares = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 25 / 83}
    compress(model, selector=selector, ridge=1e-3, refit=0, **shares)
    torch.testing.assert_close(logits(model, batches()), expected, rtol=1e-4, atol=1e-4)
