"""The refit of linear producers against least squares on the block's own Jacobian."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    CASES,
    all_specs_of,
    assert_state,
    batches,
    layers_of,
    placement_of,
    state_of,
    tiny_architecture,
    tiny_model,
)

import grail_hf
from grail_hf import GrailConfig
from grail_hf.calibration.refit import in_wider_range, refit_
from grail_hf.calibration.stream import Stream
from grail_hf.planning.plan import plan_compression, refits

CPU = torch.device("cpu")
every_case = pytest.mark.parametrize("case", CASES)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
padded = pytest.mark.parametrize("padding", [False, True], ids=["plain", "left-padded"])


def first_group_and_block(model, kind, inputs, unit="kv_group"):
    """The first layer's group, with a residual target that its block misses by far."""
    options = {"target": "residual", "progress": False}
    block = next(
        Stream(model, placement_of(model), all_specs_of(model, unit), inputs, **options).blocks()
    )
    (group,) = (group for group in block.groups if group.kind == kind)
    for producer in group.spec.producers:  # so that there is something to win back
        group.layer.get_submodule(producer.path).weight.data[::2] *= 0.5
    return group, block


@torch.no_grad()
def shortfall(block, group) -> tuple[torch.Tensor, torch.Tensor]:
    """[n * O]: what the block's output and its target are, padding left out."""
    runs = block.runs(group)
    return (
        torch.cat([run.rows(run.output()).flatten() for run in runs]).double(),
        torch.cat([run.rows(run.target).flatten() for run in runs]).double(),
    )


@padded
@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("case", ["qwen3", "llama-biases"])
def test_many_steps_leave_nothing_to_descend(case, kind, padding):
    """The problem is convex: where the squared miss has no gradient, it is least."""
    model = tiny_model(case).double()
    group, block = first_group_and_block(model, kind, batches(padded=padding)[:1])
    linear = group.layer.get_submodule(group.spec.linear.path)

    def slope() -> float:
        (run,) = block.runs(group)
        miss = run.rows(run.output() - run.target).square().sum()
        return torch.autograd.grad(miss, linear.weight)[0].norm().item()

    before = slope()
    refit_(block, group, steps=150, damping=1e-9)
    assert slope() < 1e-2 * before


@every_case
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_each_step_brings_the_block_nearer_and_touches_one_weight(case, kind):
    misses = []
    for steps in (0, 1, 4):
        model = tiny_model(case)
        group, block = first_group_and_block(model, kind, batches(padded=True))
        before = copy.deepcopy(model.state_dict())
        refit_(block, group, steps)
        output, target = shortfall(block, group)
        misses.append((output - target).square().sum().item())
        changed = {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        linear = f"layers.0.{group.spec.linear.path}.weight"
        assert all(name.endswith(linear) for name in changed)
        assert bool(changed) == bool(steps)
        assert all(p.requires_grad for p in layers_of(model)[0].parameters())
    assert misses[2] < misses[1] < misses[0]


@pytest.mark.parametrize(
    ("case", "kind", "unit"),
    [
        *((case, "mlp", "kv_group") for case in ("phi3", "glm", "glm4")),
        *((case, "attention", "kv_group") for case in ("phi3", "gpt2", "gpt_neox")),
        *((case, "attention", "kv_group") for case in ("falcon", "falcon-new", "falcon-alibi")),
        ("phi3", "attention", "query_head"),
    ],
)
def test_of_a_fused_projection_the_linear_rows_alone_are_refitted(case, kind, unit):
    """Whether they lie in one run, in each unit's place, or in columns."""
    misses, states = [], []
    for steps in (0, 1, 4):
        model = tiny_architecture(case)
        group, block = first_group_and_block(model, kind, batches(), unit)
        refit_(block, group, steps)
        output, target = shortfall(block, group)
        misses.append((output - target).square().sum().item())
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert misses[2] < misses[1] < misses[0]
    before, _, after = states
    (name,) = (name for name in before if not torch.equal(before[name], after[name]))
    assert name.endswith(f"0.{group.spec.linear.path}.weight")
    old, new = (
        state[name].T if group.spec.transposed else state[name] for state in (before, after)
    )
    changed = (old != new).any(dim=1).nonzero().flatten()
    own = torch.arange(len(old))[group.linear.index]
    assert set(changed.tolist()) <= set(own.tolist()) and len(changed) > 0.9 * len(own)


@pytest.mark.parametrize("case", ["phi3", "glm4"])
def test_a_model_with_fused_projections_gains_by_a_refit(case, monkeypatch):
    # On all of the calibration, so that the error is what was minimised.
    monkeypatch.setattr("grail_hf.calibration.refit.QUICK_STEPS", 0)
    settings = {
        "sparsity": 0.4,
        "multiple_of": 1,
        "allocation": "uniform",
        "ridge": 1e-3,
        "progress": False,
    }
    errors = [
        [
            group.error
            for group in grail_hf.compress(
                tiny_architecture(case), calibration=batches(), refit=refit, **settings
            ).groups
            if group.layer == 0
        ]
        for refit in (0, 4)
    ]
    assert len(errors[0]) == 2
    assert all(refitted < 0.99 * repaired for repaired, refitted in zip(*errors, strict=True))


def test_compress_with_refit_is_nearer_to_the_dense_model(monkeypatch):
    # On all of the calibration, so that the distance is what was minimised.
    monkeypatch.setattr("grail_hf.calibration.refit.QUICK_STEPS", 0)
    dense, inputs = tiny_model("llama"), batches()
    errors = []

    def distance(refit):
        model = copy.deepcopy(dense)
        report = grail_hf.compress(
            model,
            calibration=inputs,
            sparsity=0.5,
            multiple_of=1,
            allocation="uniform",
            ridge=1e-4,
            refit=refit,
            progress=False,
        )
        errors.append([group.error for group in report.groups if group.layer == 0])
        with torch.no_grad():
            pairs = [(model(**batch).logits, dense(**batch).logits) for batch in inputs]
        return sum((a - b).square().sum().item() for a, b in pairs)

    assert distance(6) < 0.9 * distance(0)
    assert all(refitted < before for refitted, before in zip(*errors, strict=True))


def test_a_refit_that_is_not_finite_is_said_and_changes_nothing():
    model = tiny_model("qwen3")
    group, block = first_group_and_block(model, "mlp", batches())
    for batch in block.batches:
        batch.outputs[1][..., 0] = float("inf")
    before = group.layer.get_submodule(group.spec.linear.path).weight.clone()
    with pytest.raises(FloatingPointError, match="the refitted weight is not finite"):
        refit_(block, group, steps=2)
    assert torch.equal(group.layer.get_submodule(group.spec.linear.path).weight, before)


def raises_(error):
    def fail(*_):
        raise error

    return fail


def scales_(factor):
    def scale(block, group, steps):
        projection = group.projection(group.spec.linear.path)
        projection.put_(projection.weight * factor)

    return scale


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (raises_(FloatingPointError("it is not finite")), "it is not finite"),
        (raises_(ZeroDivisionError("float division by zero")), "division by zero"),
        (scales_(0.0), "leaves an error of"),
        (scales_(float("nan")), "are NaN or Inf"),
        (scales_(1e38), "are NaN or Inf"),
    ],
    ids=["not finite", "by zero", "worse", "NaN", "overflow"],
)
def test_a_refit_that_fails_leaves_the_repaired_group(failing, reason, monkeypatch, caplog):
    """And warns of each; the model is what it is without a refit."""
    settings = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "ridge": 1e-3,
        "progress": False,
        "bias": "auto",
    }
    plain, failed = tiny_model("qwen2"), tiny_model("qwen2")
    expected = grail_hf.compress(plain, calibration=batches(), refit=0, **settings)
    monkeypatch.setattr("grail_hf.calibration.refit.refit_", failing)
    report = grail_hf.compress(failed, calibration=batches(), **settings)
    assert_state(failed, state_of(plain))
    assert [group.error for group in report.groups] == [group.error for group in expected.groups]
    for group in report.groups:
        (warning,) = [line for line in caplog.messages if line.startswith(f"{group.name} ")]
        assert "not refitted" in warning and reason in warning
        assert group.refit == "undone"


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("flushed", [False, True], ids=["denormal", "flushed"])
def test_a_dead_block_has_nothing_to_refit(name, flushed):
    """Whether or not the machine has numbers so small that a preconditioner of zeros has roots."""
    model = tiny_model("llama")
    layers_of(model)[0].get_submodule(name).weight.data.zero_()
    settings = {
        "sparsity": 0.4,
        "multiple_of": 1,
        "allocation": "uniform",
        "ridge": 1e-3,
        "progress": False,
    }
    torch.set_flush_denormal(flushed)
    try:
        report = grail_hf.compress(model, calibration=batches(), **settings)
    finally:
        torch.set_flush_denormal(False)
    assert report.sparsity == pytest.approx(0.4, abs=0.005)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@halves
def test_half_precision_gains_as_well(dtype):
    model = tiny_model("llama", dtype=dtype)
    group, block = first_group_and_block(model, "mlp", batches())
    output, target = shortfall(block, group)
    before = (output - target).square().sum()
    refit_(block, group, steps=3)
    output, target = shortfall(block, group)
    assert (output - target).square().sum() < before
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_half_precision_ends_where_fp32_does(tiny_llama, tokenizer, jargon_train):
    """On a trained model, whose gradients over many tokens exceed float16's range."""
    ids = tokenizer(jargon_train.read_text("utf-8")[:16_000], return_tensors="pt").input_ids
    inputs = ids[:, : 8 * 256].reshape(8, 256)
    settings = {"sparsity": 0.5, "selector": "wanda", "ridge": 1e-3, "batch_size": 8}
    del tiny_llama.model.layers[1:]
    errors = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = copy.deepcopy(tiny_llama).to(dtype)
        report = grail_hf.compress(model, calibration=inputs, progress=False, **settings)
        errors[dtype] = [group.error for group in report.groups]
    expected = errors.pop(torch.float32)
    assert all(found == pytest.approx(expected, rel=0.02) for found in errors.values())


def test_buffers_and_arguments_of_float16_go_along():
    """The mask and the rotary tables of an eager attention, and a buffer of its own."""
    model = tiny_model("llama", dtype=torch.float16, attn_implementation="eager")
    group, block = first_group_and_block(model, "attention", batches())
    module = group.layer.self_attn
    module.register_buffer("scale", torch.ones((), dtype=torch.float16))
    module.register_forward_hook(lambda module, _, output: (output[0] * module.scale, *output[1:]))
    tensors = [*module.parameters(), *module.buffers()]
    with in_wider_range(module) as dtype:
        assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {torch.bfloat16}
        for run in block.runs(group):
            assert replace(run, dtype=dtype).output().dtype == torch.bfloat16
    assert all(
        a is b for a, b in zip(tensors, [*module.parameters(), *module.buffers()], strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refit": 0},
        {"refit": 3},
        {"compensate": False, "selector": "fold"},
        {"ignore": ("layers.1",)},
        {"target": "self"},
        {"selector": "fold"},
        {"selector": "fold", "target": "self"},
    ],
)
def test_the_bar_ends_when_the_work_does(monkeypatch, settings):
    """As many passes are announced as are made."""
    bars = []
    monkeypatch.setattr(
        "grail_hf.calibration.stream.Bar",
        lambda **options: bars.append(Bar(options["total"])) or bars[-1],
    )
    # Where `ridge="auto"` finds plain pruning to be best, nothing is refitted, and time is saved.
    settings = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "ridge": 1e-4,
    } | settings
    grail_hf.compress(tiny_model("qwen3"), calibration=batches(), **settings)
    (bar,) = bars
    assert bar.done == bar.total


class Bar:
    """Counts as tqdm does."""

    def __init__(self, total):
        self.total, self.done = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, number=1):
        self.done += number

    def set_postfix_str(self, text):
        pass


def test_a_refit_keeps_the_damping_that_was_chosen_without_its_tokens():
    dampings = []
    for refit in (0, 2):
        report = grail_hf.compress(
            tiny_model("qwen3"),
            calibration=batches(),
            sparsity=0.3,
            multiple_of=1,
            allocation="uniform",
            refit=refit,
            progress=False,
        )
        dampings.append(report.groups[0].damping)
    assert dampings[0] == dampings[1]


@pytest.mark.parametrize(
    ("case", "outcomes"),
    [
        ("phi3", {"attention": "done", "mlp": "done"}),
        ("nemotron", {"attention": "done", "mlp": "not linear"}),
        ("mixtral", {"attention": "done", "experts": "own output"}),
    ],
)
def test_what_is_refitted_is_said(case, outcomes, monkeypatch):
    """By the plan before, and by the report and its table after."""
    monkeypatch.setattr("grail_hf.calibration.refit.QUICK_STEPS", 0)
    model, settings = (
        tiny_architecture(case),
        {"sparsity": 0.3, "multiple_of": 1, "allocation": "uniform", "ridge": 1e-3},
    )
    config = GrailConfig(**settings)
    plan = plan_compression(model, config)
    layers = len(layers_of(model))
    assert refits(plan, config) == {
        kind: (layers * (outcome == "done"), layers) for kind, outcome in outcomes.items()
    }
    assert refits(plan, GrailConfig(**settings, refit=0)) == {}
    report = grail_hf.compress(model, calibration=batches(), progress=False, **settings)
    assert {group.kind: group.refit for group in report.groups if group.layer == 0} == outcomes
    for kind in outcomes:
        (line,) = [line for line in str(report).splitlines() if f" {kind} refits:" in line]
        assert outcomes[kind] in line
    assert grail_hf.CompressionReport.from_dict(report.to_dict()).groups == report.groups


def test_where_plain_pruning_is_best_nothing_is_refitted(monkeypatch):
    monkeypatch.setattr("grail_hf.methods.ridge.DAMPINGS", ())
    repaired, pruned = tiny_model("qwen3"), tiny_model("qwen3")
    settings = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "selector": "magnitude",
        "progress": False,
    }
    report = grail_hf.compress(repaired, calibration=batches(), **settings)
    assert all(group.damping == float("inf") for group in report.groups)
    assert {group.refit for group in report.groups} == {"plain pruning"}
    grail_hf.compress(pruned, calibration=batches(), compensate=False, **settings)
    assert_state(repaired, state_of(pruned))
