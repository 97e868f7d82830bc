"""What an allocation goes by, against the full model with one group replaced, and its use."""

import copy
from functools import partial

import pytest
import torch
from tiny_models import (
    CASES,
    UNUSUAL,
    all_specs_of,
    assert_state,
    at_tokens,
    batches,
    layers_of,
    logits,
    placement_of,
    specs_of,
    state_of,
    tiny_architecture,
    tiny_model,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import grail_hf
from grail_hf import ALLOCATIONS
from grail_hf.calibration.stream import Stream
from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP, GrailConfig
from grail_hf.methods.allocation import error
from grail_hf.methods.budget import Budget
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import Symmetric
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import ridge
from grail_hf.methods.selectors import obs
from grail_hf.methods.widths import TOLERANCE
from grail_hf.models.capture import captured_input, captured_outputs
from grail_hf.planning import profiling
from grail_hf.planning.plan import plan_compression
from grail_hf.planning.profiling import enough, held_out, profile, widths_to_measure

MEASURED = [name for name, rule in ALLOCATIONS.items() if rule.measures]


def streamed(model, plan, inputs):
    return Stream(model, placement_of(model), plan.specs, inputs, progress=False)


def profiles_of(model, inputs, **settings):
    config = GrailConfig(**{"sparsity": 0.4, "multiple_of": 1, "allocation": "search"} | settings)
    plan = plan_compression(model, config)
    (profiles,), _ = profile(streamed(model, plan, inputs), [plan], config)
    return plan, profiles


def consumer_inputs(model, module, inputs):
    """[tokens, H] fp64, what the module of the full model gets, without padding."""
    seen = []
    for batch in inputs:
        with captured_input(module) as found:
            model(**batch, use_cache=False)
        seen += found
    return at_tokens(seen, inputs).double()


@pytest.mark.parametrize("case", [*CASES, "gpt2", "falcon", "lfm2", "phi3"])
@torch.no_grad()
def test_divergences_are_those_of_the_full_model_with_one_group_reduced(case, monkeypatch):
    """The whole model, with one consumer's columns removed and the others repaired by hand."""
    monkeypatch.setattr(profiling, "HELD_OUT_TOKENS", 100)
    model, inputs = (tiny_model if case in CASES else tiny_architecture)(case), batches()
    state = state_of(model)
    share = 0.2 if case == "lfm2" else 0.4  # most of its parameters are no units
    plan, profiles = profiles_of(model, inputs, ignore=1, sparsity=share)
    assert_state(model, state)
    layers = range(len(plan.specs))
    assert set(profiles) == {
        (spec.kind, layer)
        for layer in layers
        for spec in plan.specs[layer]
        if spec.offered and layer != 1
    }

    fit, held = held_out(inputs)
    dense = logits(model, held).log_softmax(-1)
    for layer in layers:
        for spec in plan.specs[layer]:
            if (spec.kind, layer) not in profiles:
                continue
            found = profiles[spec.kind, layer]
            assert sorted(found.divergences) == widths_to_measure(
                plan.budgets[spec.kind], plan.sparsity
            )
            for width in list(found.divergences)[:2]:
                variant = copy.deepcopy(model)
                consumer = layers_of(variant)[layer].get_submodule(spec.consumer)
                x = consumer_inputs(
                    model, layers_of(model)[layer].get_submodule(spec.consumer), fit
                )
                stats = GramStats(Symmetric.of(x.T @ x), x.sum(0), len(x))
                kept = Reduction.keep_top(found.scores, width, spec.partitions)
                kept = kept.kept_channels(spec.columns)
                weight = consumer.weight.T if spec.transposed else consumer.weight
                new = torch.zeros_like(weight)
                new[:, kept] = ridge(weight.double(), stats, kept, 1e-4).weight.float()
                weight.copy_(new)
                q = logits(variant, held).log_softmax(-1)
                divergence = F.kl_div(q, dense, reduction="none", log_target=True).sum(-1).mean()
                assert found.divergences[width] == pytest.approx(divergence.item(), rel=1e-3)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@torch.no_grad()
def test_errors_are_what_repair_leaves_of_the_stream_behind_the_block(case):
    model, inputs = tiny_model(case), batches()
    _, profiles = profiles_of(model, inputs, allocation="flap", selector="flap")
    specs = specs_of(model)
    plan = plan_compression(model, GrailConfig(sparsity=0.4, multiple_of=1))
    for block in Stream(model, placement_of(model), plan.specs, inputs, progress=False).blocks():
        behind = at_tokens([batch.hidden for batch in block.batches], inputs).double()
        for group, spec in zip(block.groups, specs, strict=True):
            x = consumer_inputs(model, group.consumer, inputs)
            weight = group.weight.double()
            bias = 0 if group.consumer.bias is None else group.consumer.bias.double()
            behind = behind + x @ weight.T + bias
            found = profiles[spec.kind, block.index]
            assert found.errors[spec.num_units] == 0
            for width in {1, spec.num_units // 2} - {0}:
                kept = Reduction.keep_top(found.scores, width, spec.partitions)
                kept = kept.kept_channels(spec.columns)
                stats = GramStats(Symmetric.of(x.T @ x), x.sum(0), len(x))
                left = x @ weight.T - x[:, kept] @ ridge(weight, stats, kept, 1e-4).weight.T
                error = left.square().sum() / behind.square().sum()
                assert found.errors[width].item() == pytest.approx(error.item(), rel=2e-2)


@pytest.mark.parametrize("case", ["llama", *UNUSUAL])
@torch.no_grad()
def test_energies_are_the_stream_s_as_the_consumer_s_output_reaches_it(case):
    """A small change of the last consumer's output by a factor, and what the layer makes of it."""
    model, inputs = tiny_architecture(case), batches()
    for block in Stream(
        model, placement_of(model), all_specs_of(model), inputs, progress=False
    ).blocks():
        _, energy = block.collect_all()[-1]
        consumer = block.groups[-1].consumer
        norm = block.groups[-1].spec.post_norm
        sums = dict.fromkeys(("behind", "given", "added"), 0.0)
        reader = block.layer.get_submodule(norm) if norm else consumer
        for batch in block.batches:
            with captured_outputs([consumer, reader][: 1 + bool(norm)]) as seen:
                behind = batch.through(block.layer, block.index, batch.hidden, block.device)
            for name, x in (("behind", behind), ("given", seen[0]), ("added", seen[-1])):
                sums[name] += batch.rows(x).double().square().sum().item()
        factor = 1.0 if norm else getattr(model.config, "residual_multiplier", 1.0)
        gain = factor**2 * sums["added"] / sums["given"]
        assert energy == pytest.approx(sums["behind"] / gain, rel=1e-4)


@pytest.mark.parametrize("rule", MEASURED)
def test_a_measured_allocation_is_reached_saved_and_reloaded(rule, tmp_path):
    model, inputs = tiny_model("mistral"), batches()
    report = grail_hf.compress(
        model,
        calibration=inputs,
        sparsity=0.3,
        selector="flap" if ALLOCATIONS[rule].compares_scores else "obs",
        allocation=rule,
        attention_unit="kv_group",
        multiple_of=1,
        progress=False,
    )
    assert report.sparsity == pytest.approx(0.3, abs=TOLERANCE)
    assert report.uniform == (not ALLOCATIONS[rule].per_layer)
    for layer, heads, channels in zip(
        layers_of(model), report.widths[ATTENTION], report.widths[MLP], strict=True
    ):
        assert layer.mlp.down_proj.in_features == channels
        assert layer.self_attn.k_proj.out_features == heads * model.config.head_dim
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_a_layer_that_hardly_speaks_loses_most():
    """Its output is a thousandth of what it was: nearly all of it can go."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    for rule in ("error", "search"):
        report = grail_hf.compress(
            copy.deepcopy(model),
            calibration=batches(),
            sparsity=0.2,
            allocation=rule,
            multiple_of=1,
            progress=False,
        )
        widths = report.widths[MLP]
        assert widths[1] < 0.1 * min(widths[0], widths[2])


def test_a_fold_s_widths_follow_from_elimination():
    report = grail_hf.compress(
        tiny_model("llama"),
        calibration=batches(),
        sparsity=0.3,
        selector="fold",
        allocation="error",
        multiple_of=1,
        progress=False,
    )
    assert not report.uniform and report.sparsity == pytest.approx(0.3, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("selector", "name"),
    [("obs", "obs"), ("random", "random"), ("fold", "fold"), (partial(obs, damping=1), "obs")],
)
def test_scores_that_only_order_one_group_are_not_compared_with_another_s(selector, name):
    config = GrailConfig(sparsity=0.3, allocation="flap", selector=selector)
    with pytest.raises(ValueError, match=rf"{name}' only orders the units.*selector='flap'"):
        plan_compression(tiny_model("llama"), config)


def test_nan_in_the_activations_is_found_before_anything_changes():
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *args: args[-1] * float("nan"))
    state = state_of(model)
    with pytest.raises(FloatingPointError, match=r"layers\.2"):
        grail_hf.compress(
            model, calibration=batches(), sparsity=0.3, allocation="error", progress=False
        )
    assert_state(model, state)


@pytest.mark.parametrize(
    ("sizes", "length", "expected"),
    [
        ((16,), 64, 2),  # an eighth
        ((3, 5, 8), 64, 2),
        ((100, 100), 256, 16),  # every 12th: enough for the tokens wanted
        ((4,), 8192, 1),
    ],
)
def test_whole_windows_are_held_out_and_none_serves_twice(sizes, length, expected):
    windows = torch.arange(sum(sizes))[:, None].expand(-1, length)
    inputs = [{"input_ids": part} for part in windows.split(sizes)]
    fit, held = ([b["input_ids"][:, 0] for b in part] for part in held_out(inputs))
    assert torch.cat(held).numel() == expected
    assert torch.cat([*fit, *held]).sort().values.equal(torch.arange(sum(sizes)))
    assert torch.cat(held).numel() * length >= min(
        profiling.HELD_OUT_TOKENS, length * sum(sizes) // 8
    )


def test_where_too_few_windows_are_given_all_serve_for_both():
    inputs = [{"input_ids": torch.zeros(3, 10, dtype=torch.int64)}]
    fit, held = held_out(inputs)
    assert fit == held == inputs


@pytest.mark.parametrize("rule", ["auto", "error"])
@pytest.mark.parametrize("unit", ATTENTION_UNITS)
def test_attention_loses_the_units_that_cost_least(unit, rule):
    """A third of the query heads are not read: those of one KV group, or one of each group."""
    model = tiny_model("mistral", num_key_value_heads=3)
    dead = [0, 1, 2, 3] if unit == "kv_group" else [0, 4, 8]
    with torch.no_grad():
        for layer in layers_of(model):
            columns = layer.self_attn.o_proj.weight.view(48, 12, 10)
            columns[:, dead] = 0
    report = grail_hf.compress(
        model,
        calibration=batches(),
        sparsity=0.19 if unit == "kv_group" else 0.12,
        allocation=rule,
        multiple_of=1,
        refit=0,
        progress=False,
    )
    assert report.attention_unit == unit
    width = 2 if unit == "kv_group" else 9
    if rule == "auto":
        assert set(report.widths[ATTENTION]) == {width}
    else:
        assert width in report.widths[ATTENTION]
    assert report.allocation == ("uniform-split" if rule == "auto" else rule)
    if report.splits:
        best = min(report.splits, key=lambda split: split["divergence"])
        assert best["attention_unit"] == unit
        assert best["widths"] == {kind: widths[0] for kind, widths in report.widths.items()}


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_candidate_s_divergence_is_that_of_the_model_with_all_groups_reduced(case):
    model, inputs = (tiny_model if case in CASES else tiny_architecture)(case), batches()
    config = GrailConfig(sparsity=0.3, multiple_of=1, allocation="uniform-split")
    plan = plan_compression(model, config)
    (profiles,), (found,) = profile(streamed(model, plan, inputs), [plan], config, [plan])
    fit, held = held_out(inputs, profiling.FEW_HELD_OUT_TOKENS)
    fit = enough(fit, [plan])
    dense, variant = logits(model, held).log_softmax(-1), copy.deepcopy(model)
    for layer, specs in enumerate(plan.specs):
        for spec in specs:
            if not spec.offered:
                continue
            module = layers_of(model)[layer].get_submodule(spec.consumer)
            x = consumer_inputs(model, module, fit)
            stats = GramStats(Symmetric.of(x.T @ x), x.sum(0), len(x))
            kept = Reduction.keep_top(
                profiles[spec.kind, layer].scores, plan.widths[spec.kind][layer], spec.partitions
            ).kept_channels(spec.columns)
            weight = layers_of(variant)[layer].get_submodule(spec.consumer).weight
            new = torch.zeros_like(weight)
            new[:, kept] = ridge(weight.double(), stats, kept, 1e-4).weight.float()
            weight.copy_(new)
    q = logits(variant, held).log_softmax(-1)
    divergence = F.kl_div(q, dense, reduction="none", log_target=True).sum(-1).mean()
    assert found == pytest.approx(divergence.item(), rel=1e-3)


def test_the_report_says_what_one_width_a_kind_would_lose():
    report = grail_hf.compress(
        tiny_model("mistral"),
        calibration=batches(),
        sparsity=0.4,
        allocation="error",
        multiple_of=1,
        attention_unit="kv_group",
        refit=0,
        progress=False,
    )
    own, other = report.errors
    assert own < other
    assert f"{other / own:.2f} times" in report.card()
    assert report.table().caption == report.alternative
    assert type(report).from_dict(report.to_dict()).errors == report.errors


@torch.no_grad()
def test_a_group_s_sensitivity_is_its_measured_divergence_for_its_error():
    _, single = profiles_of(tiny_model("llama"), batches(), allocation="error")
    for profile_ in single.values():
        ((width, divergence),) = profile_.divergences.items()
        expected = divergence / profile_.errors[width].item()
        assert profile_.sensitivity == pytest.approx(expected)
        assert error(profile_, Budget(len(profile_.scores), 1))[width] == pytest.approx(divergence)


def test_nothing_is_measured_where_there_is_nothing_to_choose():
    for settings in (
        {"mlp_sparsity": 0.3, "attention_sparsity": 0.25},
        {"sparsity": 0.2724, "mlp_sparsity": 0.3},
        {"sparsity": 0.3, "ignore": "self_attn"},
        {"sparsity": 0},
    ):
        plan = plan_compression(tiny_model("llama"), GrailConfig(**{"multiple_of": 1} | settings))
        assert (plan.allocation, plan.measures) == ("uniform", False)
    for case in ("mixtral", "gpt2"):  # experts are not measured; gpt2 keeps its heads
        config = GrailConfig(sparsity=0.17, multiple_of=8 if case == "mixtral" else 1)
        plan = plan_compression(tiny_architecture(case), config)
        assert (plan.allocation, plan.measures) == ("uniform", False)
    plan = plan_compression(tiny_model("llama"), GrailConfig(sparsity=0.3))
    assert (plan.allocation, plan.measures) == ("uniform-split", True)
    assert plan.attention_units == ATTENTION_UNITS


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "units"),
    [(12, 4, ATTENTION_UNITS), (12, 12, ("kv_group",)), (12, 1, ("query_head",))],
)
def test_an_attention_unit_is_considered_where_it_leaves_a_choice(heads, key_value_heads, units):
    model = tiny_model("mistral", num_attention_heads=heads, num_key_value_heads=key_value_heads)
    plan = plan_compression(model, GrailConfig(sparsity=0.3))
    assert (plan.attention_units, plan.attention_unit) == (units, units[0])


@pytest.mark.parametrize(
    ("hidden", "channels", "heads", "key_value_heads", "layers", "multiple"),
    [
        (4096, 11008, 32, 32, 32, 128),  # Llama 2 7B
        (8192, 28672, 64, 8, 80, 128),  # Llama 3 70B
        (2048, 8192, 32, 8, 16, 64),  # Llama 3.2 1B
        (576, 1536, 9, 3, 30, 16),  # SmolLM2 135M
        (256, 1024, 8, 4, 6, 8),
    ],
)
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.55])
def test_widths_are_as_round_as_costs_nothing(
    hidden, channels, heads, key_value_heads, layers, multiple, sparsity
):
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=channels,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=layers,
        vocab_size=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = plan_compression(model, GrailConfig(sparsity=sparsity))
    assert plan.budgets[MLP].step == multiple
    assert all(width % multiple == 0 for width in plan.widths[MLP])
    assert plan.sparsity == pytest.approx(sparsity, abs=TOLERANCE)


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_neox", "phi3", "lfm2"])
def test_one_pass_gives_every_group_its_moments_and_the_next_layer_its_inputs(case):
    model, inputs = (tiny_model if case in CASES else tiny_architecture)(case), batches()
    following = None
    for block in Stream(
        model, placement_of(model), all_specs_of(model), inputs, progress=False
    ).blocks():
        if following is not None:
            for batch, hidden in zip(block.batches, following, strict=True):
                torch.testing.assert_close(batch.hidden, hidden, rtol=0, atol=0)
        expected = [block.collect(group) for group in block.groups]
        found = block.collect_all()
        following = block.after([batch.hidden for batch in block.batches])
        for one, (other, _) in zip(expected, found, strict=True):
            assert one.count == other.count
            for mine, theirs in zip(one.sums, other.sums, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
