"""Mixtures: what each expert is measured by, and what is said and refused of them.

That they are pruned, repaired, saved and loaded like anything else is in `test_architectures.py`.
"""

import copy
import math
from functools import partial

import pytest
import torch
from test_architectures import groups_of, narrower, streamed
from test_refit import Bar
from tiny_models import (
    ARCHITECTURE_CASES,
    all_specs_of,
    assert_state,
    at_tokens,
    batches,
    layers_of,
    relative_error,
    state_of,
    tiny_architecture,
)

import grail_hf
from grail_hf import ARCHITECTURES, CompressionReport, GrailConfig
from grail_hf.calibration.block import Block
from grail_hf.config import EXPERTS, SHARED
from grail_hf.methods.selectors import wanda_plus_plus
from grail_hf.methods.widths import EXPERTS_STEP
from grail_hf.models.capture import captured_call
from grail_hf.models.experts import SCARCE_DAMPING, ExpertsGroup
from grail_hf.planning.costs import estimate
from grail_hf.planning.plan import plan_compression

MIXTURES = [
    case for case in ARCHITECTURE_CASES if case in ARCHITECTURES and ARCHITECTURES[case].experts
]
TIED = "deepseek_v2"

every_mixture = pytest.mark.parametrize("case", MIXTURES)


def experts_of(model):
    return [group for _, group in groups_of(model) if group.spec.experts]


def calls_of(model, module):
    """What a full forward pass calls the module with: its tokens [n, D], their experts [n, k]."""
    found = []
    for batch in batches():
        with captured_call(module) as calls:
            model.base_model(**batch, use_cache=False)
        args, kwargs = calls[0]
        hidden, chosen, _ = (*args, *kwargs.values())
        shape = batch["input_ids"].shape
        found.append((hidden.reshape(*shape, -1), chosen.reshape(*shape, -1)))
    return [at_tokens(side, batches()) for side in zip(*found, strict=True)]


def through(group, expert, x):
    """[n, D] to [n, D]: what transformers' own module outputs where all goes to one expert."""
    weights = torch.ones(len(x), 1)
    return group.consumer(x, torch.full((len(x), 1), expert.index), weights)


# Measured


@every_mixture
@torch.no_grad()
def test_what_is_read_of_an_expert_is_what_transformers_computes(case):
    """This is where a transformers that keeps its experts in another way fails."""
    model = tiny_architecture(case)
    (group, *_) = experts_of(model)
    x = torch.randn(7, model.config.get_text_config().hidden_size)
    for expert in group.parts:
        bias = getattr(group.consumer, "down_proj_bias", torch.zeros(group.spec.experts, 1))
        inner = expert.inner(x)
        assert inner.shape == (7, group.num_units)
        expected = through(group, expert, x)
        assert relative_error(inner @ expert.weight.T + bias[expert.index], expected) < 1e-5


@every_mixture
@torch.no_grad()
def test_an_experts_gram_is_that_of_the_tokens_routed_to_it(case):
    model = tiny_architecture(case)
    for block in streamed(model):
        for group in block.groups:
            if not group.spec.experts:
                continue
            hidden, chosen = calls_of(model, group.consumer)
            every = block.collect_parts(group, group.parts, hold_out=True)
            assert sum(stats.count for stats in every) == chosen.numel()
            for expert, stats in zip(group.parts, every, strict=True):
                own = hidden[[expert.index in row for row in chosen.tolist()]]
                x = expert.inner(own).double()
                assert stats.count == len(own) >= stats.held_out.count
                scale = stats.gram.abs().max().item()
                torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=0, atol=1e-5 * scale)
                total = x.sum(dim=0)
                torch.testing.assert_close(stats.total.double(), total, rtol=1e-4, atol=1e-3)
                assert stats.cross is None
            held_out = sum(stats.held_out.count for stats in every)
            assert 0 < held_out < chosen.numel() / 2


def test_a_selector_is_told_each_units_producers():
    group = experts_of(tiny_architecture("mixtral"))[0]
    gate, up = group.parts[2].producers
    assert torch.equal(torch.cat([gate, up]), group.consumer.gate_up_proj[2])
    group = experts_of(tiny_architecture("gpt_oss"))[0]
    (rows,) = group.parts[2].producers
    weight, bias = group.consumer.gate_up_proj[2], group.consumer.gate_up_proj_bias[2]
    side_by_side = torch.cat([weight, bias[None]]).T.reshape(group.num_units, -1)
    assert torch.equal(rows, side_by_side)
    assert len({expert.seed for expert in group.parts}) == len(group.parts)


# Repaired


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_each_expert_is_fitted_to_its_own_tokens_by_least_squares(case):
    model = tiny_architecture(case)
    dense = experts_of(copy.deepcopy(model))[0]
    hidden, chosen = calls_of(model, experts_of(model)[0].consumer)
    narrower(model, ridge=1e-7, attention_sparsity=0.0)
    for old, new in zip(dense.parts, experts_of(model)[0].parts, strict=True):
        rows, left = old.producers[0], new.producers[0]
        kept = (rows[:, None] == left[None]).all(dim=-1).any(dim=1)
        x = old.inner(hidden[(chosen == old.index).any(dim=-1)]).double()
        fitted = torch.linalg.lstsq(x[:, kept], x @ old.weight.T.double()).solution.T
        assert kept.sum() == new.num_units < old.num_units
        assert relative_error(new.weight.double(), fitted) < 1e-3
        assert relative_error(old.weight[:, kept].double(), fitted) > 0.05


@pytest.mark.parametrize("at_once", [1, 3])
def test_experts_in_turns_come_out_the_same(at_once, monkeypatch):
    together, in_turns = (tiny_architecture("mixtral") for _ in range(2))
    narrower(together, selector="obs", ridge=1e-4)
    collect, numbers = Block.collect_parts, []

    def counted(self, group, parts, *others, **options):
        numbers.append(len(parts) * (group.kind == EXPERTS))
        return collect(self, group, parts, *others, **options)

    monkeypatch.setattr(Block, "collect_parts", counted)
    monkeypatch.setattr(ExpertsGroup, "at_once", lambda self, item: at_once)
    bars = []
    monkeypatch.setattr(
        "grail_hf.calibration.stream.Bar",
        lambda **options: bars.append(Bar(options["total"])) or bars[-1],
    )
    narrower(in_turns, selector="obs", ridge=1e-4)
    (bar,) = bars
    assert bar.done == bar.total
    assert_state(in_turns, state_of(together))
    total = len(experts_of(together)[0].parts)
    assert max(numbers) == at_once < total
    assert sum(numbers) == total * len(layers_of(together))


@every_mixture
def test_no_more_grams_are_held_than_weights(case):
    for group in experts_of(tiny_architecture(case)):
        weights = group.num_parameters * 4
        gram = group.num_units**2  # of fewer units than have a part of their own
        numbers = [group.at_once(item) for item in (1, 8, 10**9)]
        assert numbers[0] == len(group.parts) and numbers[2] == 1
        assert numbers[1] * 8 * gram <= weights < (numbers[1] + 1) * 8 * gram or (
            numbers[1] == len(group.parts)
        )


# Few tokens


@pytest.fixture(scope="module")
def unbalanced():
    """A model in whose first layer expert 0 gets no token and expert 1 gets five."""
    model = tiny_architecture("gpt_oss")
    router = layers_of(model)[0].mlp.router
    group = experts_of(model)[0]
    with torch.no_grad():
        router.bias[0] = -1e6
        hidden, _ = calls_of(model, group.consumer)
        scores = torch.nn.functional.linear(hidden, router.weight, router.bias)
        second = scores[:, 2:].topk(2).values[:, 1]
        router.bias[1] -= (scores[:, 1] - second).topk(6).values[-2:].mean()
    return model


def magnitudes(expert):
    return expert.weight.square().sum(dim=0)


@pytest.mark.parametrize("ridge", ["auto", 1e-6])
def test_experts_with_few_tokens_are_repaired_with_care_and_named(unbalanced, ridge, caplog):
    model = copy.deepcopy(unbalanced)
    dense = experts_of(unbalanced)[0]
    report = narrower(model, ridge=ridge, attention_sparsity=0.0)
    idle, rare, *others = (g for g in report.groups if g.layer == 0 and g.kind == EXPERTS)
    assert (idle.tokens, rare.tokens) == (0, 5)
    assert idle.damping == math.inf and rare.damping >= SCARCE_DAMPING
    kept = experts_of(model)[0].parts[0].weight
    strongest = magnitudes(dense.parts[0]).topk(idle.width).indices.sort().values
    assert torch.equal(kept, dense.parts[0].weight[:, strongest])
    assert {idle.name, rare.name} == {n for n in report.scarce_experts if "layers.0." in n}
    assert all(not group.scarce for group in others)
    assert idle.name in report.card() and rare.name in report.card()
    assert f"{dense.name.replace('layers.0', 'model.layers.0')}: experts 0, 1 saw" in caplog.text
    assert CompressionReport.from_dict(report.to_dict()).scarce_experts == report.scarce_experts


# Widths


@every_mixture
def test_all_experts_of_all_layers_have_one_width_that_grouped_products_take(case):
    model = tiny_architecture(case)
    report = narrower(model, compensate=False, selector="magnitude")
    (width,) = set(report.widths[EXPERTS]) - {0}
    assert width % EXPERTS_STEP == 0
    for group in experts_of(model):
        assert group.weight.shape[2] == width


def test_shared_experts_with_the_same_key_keep_the_same_fraction():
    model = tiny_architecture(TIED)
    units = {spec.kind: spec.num_units for spec in all_specs_of(model)[-1]}
    report = narrower(model, compensate=False, selector="magnitude")
    widths = report.widths
    assert units[SHARED] == 2 * units[EXPERTS]
    assert [2 * width for width in widths[EXPERTS]] == list(widths[SHARED])


@pytest.mark.parametrize("entry", ["shared_experts", "layers.1.mlp.experts"])
def test_shared_experts_with_the_same_key_are_not_left_alone(entry):
    model = tiny_architecture(TIED)
    state = state_of(model)
    with pytest.raises(ValueError, match=r"have one width in the config.*put both in ignore"):
        narrower(model, ignore=(entry,))
    assert_state(model, state)


# Refusals


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"selector": "fold"}, "folds units together, which is not offered for experts"),
        ({"selector": "wanda++"}, "needs a gradient, which is not computed for experts"),
        *(
            ({"allocation": name}, "use allocation='uniform'")
            for name in ("error", "search", "flap", "uniform-split")
        ),
    ],
)
def test_what_is_not_offered_for_experts_is_refused_before_calibration(settings, reason):
    model = tiny_architecture("mixtral")
    state = state_of(model)
    with pytest.raises(ValueError, match=reason):
        grail_hf.compress(model, calibration=None, sparsity=0.3, **settings)
    assert_state(model, state)


def test_a_selector_with_other_arguments_is_refused_as_it_is_without():
    model = tiny_architecture("mixtral")
    select = partial(wanda_plus_plus, alpha=10)
    with pytest.raises(ValueError, match="needs a gradient, which is not computed for experts"):
        plan_compression(model, GrailConfig(sparsity=0.3, selector=select))


@pytest.mark.parametrize(("multiple", "offered"), [(1, False), (8, False), (16, True)])
def test_a_smaller_multiple_is_offered_where_experts_steps_can_be_shorter(multiple, offered):
    model = tiny_architecture("mixtral")
    config = GrailConfig(sparsity=0.95, multiple_of=multiple)
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        plan_compression(model, config)
    assert ("a smaller multiple_of" in str(caught.value)) == offered


def test_attention_of_a_mixture_may_be_folded():
    report = narrower(tiny_architecture("mixtral"), selector="fold", mlp_sparsity=0.0)
    assert {group.kind for group in report.groups} == {"attention"}


def test_experts_that_are_not_fused_are_refused(monkeypatch):
    model = tiny_architecture("mixtral")
    monkeypatch.delattr(type(layers_of(model)[0].mlp.experts), "_apply_gate")
    with pytest.raises(TypeError, match="does not hold all experts in gate_up_proj and down_proj"):
        grail_hf.compress(model, calibration=None, sparsity=0.3)


# Estimates


def test_an_expert_is_counted_for_its_share_of_the_tokens(monkeypatch):
    costs = {}
    for experts in (5, 10):
        monkeypatch.setitem(ARCHITECTURE_CASES["mixtral"], "num_local_experts", experts)
        model = tiny_architecture("mixtral")
        shares = {"attention_sparsity": 0.0, "mlp_sparsity": 0.4, "target": "self", "ridge": 1e-4}
        config = GrailConfig(num_samples=8, seq_length=24, **shares)
        costs[experts] = estimate(model, plan_compression(model, config), config)
    few, many = costs[5].operations, costs[10].operations
    assert many["solve"] == 2 * few["solve"]
    for phase in ("gram", "forward"):  # the router alone
        assert many[phase] == pytest.approx(few[phase], rel=0.02)
    grams = [costs[experts].phases["gram"].accelerator_bytes for experts in (5, 10)]
    assert grams[1] > grams[0]


# Exported


def test_a_mixture_is_exported_as_it_is_but_not_padded(tmp_path):
    for name, settings in (("alike", {}), ("differing", {"ignore": (1,)})):
        model = tiny_architecture("mixtral")
        narrower(model, compensate=False, selector="magnitude", **settings)
        model.save_pretrained(tmp_path / name)
    assert grail_hf.export(tmp_path / "alike", tmp_path / "stock", "stock").error < 1e-6
    with pytest.raises(ValueError, match="padding is not offered for a mixture of experts"):
        grail_hf.export(tmp_path / "differing", tmp_path / "padded", "padded")
