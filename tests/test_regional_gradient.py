"""The gradient inside one layer against differentiating the layer on one sample at a time."""

import pytest
import torch
from tiny_models import (
    UNUSUAL,
    all_specs_of,
    batches,
    placement_of,
    relative_error,
    tiny_architecture,
    tiny_model,
)

import grail_hf
from grail_hf import SELECTORS, Selector
from grail_hf.calibration.stream import Stream


def blocks_of(model, inputs, unit="kv_group"):
    specs = all_specs_of(model, unit)
    return Stream(model, placement_of(model), specs, inputs, progress=False).blocks()


def one_by_one(inputs):
    """Every sample alone and without its padding."""
    for batch in inputs:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, tokens in zip(batch["input_ids"], mask, strict=True):
            yield {"input_ids": row[tokens][None]}


@torch.no_grad()
def calls_of(model, layer, samples):
    """The arguments of `layer` in the model's pass over each sample."""
    calls = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    for sample in samples:
        model(**sample, use_cache=False)
    handle.remove()
    return calls


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("case", ["llama-biases", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_it_is_the_root_mean_square_of_every_sample_s_own_gradient(case, padded):
    """Of the weight's, which the streamed gradient never forms from a micro-batch at once."""
    check_gradients(tiny_model(case), batches(padded))


@pytest.mark.parametrize("case", UNUSUAL)
def test_whatever_the_layout(case):
    check_gradients(tiny_architecture(case), batches(padded=False))


def check_gradients(model, inputs):
    for block in blocks_of(model, inputs):
        calls = calls_of(model, block.layer, one_by_one(inputs))
        for group in block.groups:
            if not group.num_units:
                continue
            expected = torch.zeros_like(group.consumer.weight)
            for args, kwargs in calls:
                with torch.enable_grad():
                    after = block.layer(*args, **kwargs)
                    norm = (after[0] if isinstance(after, tuple) else after).norm()
                    (gradient,) = torch.autograd.grad(norm, group.consumer.weight)
                expected += gradient.square() / len(calls)
            found = block.regional_gradient(group)
            assert found.samples == len(calls) == 15
            expected = expected.T if group.spec.transposed else expected
            assert relative_error(found.rms, expected.sqrt()) < 1e-4


@torch.no_grad()
def test_it_is_the_quotient_of_small_differences():
    """Not too small, since norms are taken in fp32 whatever the model's dtype."""
    model = tiny_model("qwen3", dtype=torch.float64)
    sample = batches(padded=False)[1]["input_ids"][:1]
    for block in blocks_of(model, [{"input_ids": sample}]):
        ((args, kwargs),) = calls_of(model, block.layer, [{"input_ids": sample}])
        for group in block.groups:
            gradient, weight = block.regional_gradient(group).rms, group.consumer.weight
            for place in gradient.flatten().topk(3).indices.tolist():
                i, j = divmod(place, gradient.shape[1])
                norms = []
                for step in (1e-3, -1e-3):
                    weight[i, j] += step
                    norms.append(block.layer(*args, **kwargs).norm())
                    weight[i, j] -= step
                quotient = (norms[0] - norms[1]).abs().item() / 2e-3
                assert gradient[i, j].item() == pytest.approx(quotient, rel=1e-3)


def test_how_samples_are_batched_does_not_matter():
    model, inputs = tiny_model("llama"), batches()
    rows = [
        {k: v[n : n + 1] for k, v in b.items()} for b in inputs for n in range(len(b["input_ids"]))
    ]
    for whole, single in zip(blocks_of(model, inputs), blocks_of(model, rows), strict=True):
        for one, other in zip(whole.groups, single.groups, strict=True):
            found, expected = whole.regional_gradient(one), single.regional_gradient(other)
            assert found.samples == expected.samples
            assert relative_error(found.rms, expected.rms) < 1e-4


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_no_parameter_keeps_a_gradient(unit):
    model = tiny_model("llama-biases")
    model.model.layers[1].requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = grail_hf.compress(
        model,
        calibration=batches(),
        sparsity=0.3,
        multiple_of=1,
        allocation="uniform",
        attention_unit=unit,
        selector="wanda++",
        progress=False,
    )
    assert len(report.groups) == 6
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def compress(selector):
    return grail_hf.compress(
        tiny_model("qwen2"),
        calibration=batches(),
        sparsity=0.3,
        multiple_of=1,
        allocation="uniform",
        selector=selector,
        progress=False,
    )


def test_a_selector_that_needs_it_finds_it_computed():
    seen = []

    def mine(group, stats):
        seen.append((group.name, group.regional_gradient.rms.shape == group.weight.shape))
        return SELECTORS["wanda++"](group, stats)

    report = compress(Selector(mine, needs_gradient=True))
    assert seen == [(group.name, True) for group in report.groups]


def test_a_selector_that_does_not_say_so_is_told_how():
    """A plain function, for which nothing is computed that it might not read."""
    with pytest.raises(RuntimeError, match=r"layers\.0.*Selector\(function, needs_gradient=True\)"):
        compress(lambda group, stats: group.regional_gradient.rms.sum(dim=0))
