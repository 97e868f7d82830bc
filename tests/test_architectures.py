"""Every architecture, from its tiny model: streamed, pruned, repaired, saved, and its refusals.

A model type is tested by being in the table; a type without a tiny model fails.
"""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_saving import LOADER
from tiny_models import (
    ARCHITECTURE_CASES,
    SIZES,
    UNUSUAL,
    all_specs_of,
    assert_state,
    at_tokens,
    batches,
    config_of,
    layers_of,
    logits,
    placement_of,
    random_model,
    relative_error,
    state_of,
    tiny_architecture,
)
from transformers import AutoModelForCausalLM

import grail_hf
from grail_hf import ARCHITECTURES, GrailConfig
from grail_hf.calibration.refit import replaceable_weight, without_biases
from grail_hf.calibration.stream import Stream
from grail_hf.config import ATTENTION, ATTENTION_UNITS, EXPERTS, MLP
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import Repair
from grail_hf.methods.widths import TOLERANCE
from grail_hf.models import architectures
from grail_hf.models.architectures import architectures_table
from grail_hf.models.configs import compressed_config
from grail_hf.models.experts import group_in
from grail_hf.models.schema import LinearRows
from grail_hf.models.surgery import apply_config_
from grail_hf.planning.costs import estimate
from grail_hf.planning.plan import plan_compression

CPU = torch.device("cpu")
SHARES = {ATTENTION: 0.5, MLP: 0.4}  # the second of everything that is not attention

every_case = pytest.mark.parametrize("case", ARCHITECTURE_CASES)
every_unit = pytest.mark.parametrize("unit", ATTENTION_UNITS)


def model_with(case, unit):
    """A case's model; skips the test where this unit is what the first one is."""
    model = tiny_architecture(case)
    first = ATTENTION_UNITS[0]
    if unit != first and all_specs_of(model, unit) == all_specs_of(model, first):
        pytest.skip("both attention units are the same")
    return model


def entry_of(model):
    return ARCHITECTURES[model.config.model_type]


def groups_of(model, unit="kv_group"):
    """Every group of every layer: (layer, Group)."""
    specs = all_specs_of(model, unit)
    return [
        (index, group_in(layer, spec, f"layers.{index}"))
        for index, (layer, of_layer) in enumerate(zip(layers_of(model), specs, strict=True))
        for spec in of_layer
    ]


def offered(model):
    """The kinds of which some layer offers units."""
    return {group.kind for _, group in groups_of(model) if group.spec.offered}


def shares(model):
    """The sparsities of `SHARES`, as far as the type offers anything."""
    kinds = {ATTENTION if kind == ATTENTION else MLP for kind in offered(model)}
    return {f"{kind}_sparsity": SHARES[kind] * (kind in kinds) for kind in SHARES}


def narrower(model, **settings):
    """`compress` by these shares; skips the test where the type offers nothing."""
    if not offered(model):
        pytest.skip("nothing is offered")
    settings = {"multiple_of": 1} | shares(model) | settings
    return grail_hf.compress(model, calibration=batches(), progress=False, **settings)


def streamed(model, target="self"):
    return Stream(
        model, placement_of(model), all_specs_of(model), batches(), target=target, progress=False
    ).blocks()


@torch.no_grad()
def seen_by_hooks(model, modules):
    """What a full forward pass puts into and gets out of the modules: two lists of [tokens, H]."""
    seen = {module: ([], []) for module in modules}

    def look(module, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output
        into = args[0] if args else kwargs["hidden_states"]
        for side, tensor in zip(seen[module], (into, output), strict=True):
            side.append(tensor.clone().reshape(shape[0], shape[1], -1))

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    for batch in batches():
        shape = batch["input_ids"].shape
        model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [[at_tokens(sides[way], batches()) for sides in seen.values()] for way in (0, 1)]


def test_every_type_has_a_tiny_model():
    types = {case.get("model_type", name) for name, case in ARCHITECTURE_CASES.items()}
    assert types == set(ARCHITECTURES)


# Streaming


@every_case
def test_streamed_states_and_grams_are_the_full_models(case):
    model = tiny_architecture(case)
    fronts, backs = seen_by_hooks(model, layers_of(model))
    consumers = [
        group.consumer
        for _, group in groups_of(model)
        if group.spec.num_units and not group.spec.experts
    ]
    inputs = iter(seen_by_hooks(model, consumers)[0])
    for block in streamed(model):
        hidden = at_tokens([batch.hidden for batch in block.batches], batches())
        assert torch.equal(hidden, fronts[block.index])
        for group in block.groups:
            if group.num_units and not group.spec.experts:
                x = next(inputs).double()
                stats = block.collect(group)
                assert stats.gram.shape[0] == group.num_units * group.columns
                assert relative_error(stats.gram.double(), x.T @ x) < 1e-5
    assert next(inputs, None) is None
    block.advance()
    hidden = at_tokens([batch.hidden for batch in block.batches], batches())
    assert torch.equal(hidden, backs[-1])


@every_case
@torch.no_grad()
def test_a_block_that_meets_the_residual_target_leads_the_stream_back(case):
    """Where nothing but a factor lies between block and stream; else the target is the dense
    output."""
    model = tiny_architecture(case)
    layers, (_, after) = layers_of(model), seen_by_hooks(model, layers_of(model))
    consumers = [group.consumer for _, group in groups_of(model)]
    dense = dict(zip(consumers, seen_by_hooks(model, consumers)[1], strict=True))
    for block in streamed(model, "residual"):
        *earlier, last = block.groups
        if last.spec.experts:
            assert all(stats.cross is None for stats in block.collect_parts(last, last.parts))
            continue
        assert last.kind != ATTENTION
        if block.index:
            runs, done = block.runs(last), []
            for run in runs:
                handle = last.consumer.register_forward_hook(lambda *_, run=run: run.target)
                done.append(
                    run.batch.through(layers[block.index], block.index, run.batch.hidden, CPU)
                )
                handle.remove()
            if last.spec.residual_scale is None:
                target = [r.target.reshape(*r.batch.hidden.shape[:2], -1) for r in runs]
                assert relative_error(at_tokens(target, batches()), dense[last.consumer]) < 1e-6
            else:
                error = relative_error(at_tokens(done, batches()), after[block.index])
                assert error < 1e-5
        for group in earlier if block.index else block.groups:  # from here on the paths differ
            for parameter in group.consumer.parameters():
                parameter.data *= 0.6
        if block.index == 1:
            break


# Pruning and repair


@every_case
def test_sparsity_0_changes_nothing(case):
    model = tiny_architecture(case)
    state = state_of(model)
    report = grail_hf.compress(model, calibration=batches(), sparsity=0.0, progress=False)
    assert_state(model, state)
    assert (report.sparsity, report.groups) == (0, [])


def consumer_pairs(group, other):
    """The consumers' weights of a group and of its twin: of experts, one each."""
    both = group.weight, other.weight
    return zip(*both, strict=True) if group.spec.experts else [both]


@every_case
@every_unit
def test_pruning_is_zeroing_what_the_removed_units_feed(case, unit):
    model = model_with(case, unit)
    zeroed, parameters = copy.deepcopy(model), model.num_parameters()
    report = narrower(model, attention_unit=unit, selector="wanda", compensate=False)
    assert report.total_parameters == (parameters, model.num_parameters())
    assert {group.kind for group in report.groups} == offered(zeroed)
    live = {(index, group.kind): group for index, group in groups_of(model, unit)}
    for index, group in groups_of(zeroed, unit):
        kept = live[index, group.kind]
        if not group.spec.offered:
            continue
        assert kept.num_units == report.widths[group.kind][index] < group.num_units
        for dense, pruned in consumer_pairs(group, kept):
            columns = (dense.T[:, None] == pruned.T[None]).all(dim=-1).any(dim=1)
            assert columns.sum() == kept.num_units * group.columns
            dense[:, ~columns] = 0
    assert relative_error(logits(model, batches()), logits(zeroed, batches())) < 1e-5
    with torch.device("meta"):
        fresh = type(model)(model.config)
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    for module, stock in zip(model.modules(), fresh.modules(), strict=True):
        for name, value in vars(stock).items():
            if isinstance(value, int | float | str) and name != "training":
                assert vars(module)[name] == value, f"{name} of {type(module).__name__}"


@torch.no_grad()
def is_linear(block, group):
    """Whether the block's output, without biases, is linear in the group's linear rows."""
    run, linear = block.runs(group)[0], group.linear
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(linear.weight.shape, generator=generator) for _ in range(2))
    outputs = []
    with (
        replaceable_weight(linear.projection, linear.index) as put,
        without_biases(linear, group.consumer),
    ):
        for weight in (torch.zeros_like(one), one, other, one - 2 * other):
            put(weight)
            outputs.append(run.output())
    nothing, of_one, of_other, of_both = outputs
    return (
        nothing.norm() < 1e-5 * of_one.norm()
        and relative_error(of_both, of_one - 2 * of_other) < 1e-4
        and relative_error(of_other, of_one) > 1e-2
    )


@every_case
@every_unit
def test_the_linear_rows_are_and_no_others(case, unit):
    """A block that an entry calls linear in nothing is not linear in the last rows of any input."""
    model = model_with(case, unit)
    settings = {"target": "dense", "progress": False}
    block = next(
        Stream(
            model, placement_of(model), all_specs_of(model, unit), batches(), **settings
        ).blocks()
    )
    for group in block.groups:
        if group.spec.experts or not group.num_units:
            assert group.spec.linear is None
        elif group.spec.linear is not None:
            assert is_linear(block, group), group.name
        else:
            for producer in group.spec.producers:
                group.spec = replace(
                    group.spec, linear=LinearRows(producer.path, producer.rows[-1])
                )
                assert not is_linear(block, group), producer.path


@every_case
def test_a_plan_needs_no_weights_and_is_carried_out(case):
    model = tiny_architecture(case)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    config = GrailConfig(**shares(model), multiple_of=1, num_samples=8, seq_length=24)
    plan = plan_compression(skeleton, config)
    costs = estimate(skeleton, plan, config)
    assert costs.operations["forward"] > 0 and costs.accelerator_bytes > 0
    assert ("gram" in costs.operations) == bool(offered(model)) == bool(plan.reduced)
    if plan.reduced:
        report = narrower(model, selector="magnitude", compensate=False)
        assert report.widths == plan.widths and report.units == plan.units
        assert report.total_parameters == plan.total_parameters
        assert {(group.layer, group.kind) for group in report.groups} == {
            (index, spec.kind) for index, spec in plan.reduced
        }
        # What stays whole counts: the same share of everything asks for the same widths.
        asked = {"sparsity": plan.sparsity, "mlp_sparsity": None}
        assert plan_compression(skeleton, replace(config, **asked)).widths == plan.widths


# Saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case's model, repaired and saved; what a process of plain transformers makes of it.

    What a case raises is kept for its own tests: it does not fail those of the others.
    """
    saved = SimpleNamespace(models={}, reports={}, raised={}, found={})
    folder = tmp_path_factory.mktemp("saved")
    for case in ARCHITECTURE_CASES:
        try:
            model = tiny_architecture(case)
            report = narrower(model)
            model.save_pretrained(folder / case)
            with torch.no_grad():
                expected = [model(**batch, use_cache=False).logits for batch in batches()]
        except pytest.skip.Exception:
            continue
        except Exception as error:
            saved.raised[case] = error
            continue
        saved.models[case], saved.reports[case] = model, report
        torch.save({"batches": batches(), "logits": expected}, folder / case / "expected.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOADER, folder, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert run.returncode == 0, run.stderr
    saved.found = json.loads(run.stdout.splitlines()[-1])["found"]
    return saved


def of_case(saved, case):
    if case in saved.raised:
        raise saved.raised[case]
    if case not in saved.models:
        pytest.skip("nothing is offered, or transformers does not know it")
    return saved.models[case], saved.reports[case]


@every_case
def test_plain_transformers_loads_it(saved, case):
    model, _ = of_case(saved, case)
    found = saved.found[case]
    assert found["problems"] == {}
    # Not to the last bit: a grouped matrix product rounds as its operands are aligned in memory.
    assert max(found["errors"]) < 1e-6
    assert found["class"] == type(model).__name__
    assert found["model_type"] == model.config.model_type


@every_case
def test_repair_is_better_than_pruning_for_every_group(saved, case):
    """But where held-out windows have it leave the block as it was pruned."""
    _, report = of_case(saved, case)
    assert any(group.error < group.error_pruned for group in report.groups)
    for group in report.groups:
        pruned = pytest.approx(group.error_pruned)
        left = group.damping == float("inf") and group.error == pruned
        assert left or 0 < group.error < group.error_pruned


@every_case
def test_generation_with_the_cache_is_generation_without(saved, case):
    model, _ = of_case(saved, case)
    prompt = batches()[0]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    cached, plain = (model.generate(**prompt, **settings, use_cache=use) for use in (True, False))
    assert cached.shape[1] == prompt["input_ids"].shape[1] + 6
    assert torch.equal(cached, plain)


# Widths that differ between layers


def differing_(model):
    """Narrow the layers of a model, each by another width; the dense model that computes the same.

    Whatever is offered becomes narrower.
    """
    masked, specs = copy.deepcopy(model), all_specs_of(model)
    twins = {(index, group.kind): group for index, group in groups_of(masked)}
    kinds = dict.fromkeys(spec.kind for layer in specs for spec in layer)

    def width(index, spec):
        if not spec.offered:
            return spec.num_units
        if spec.experts or spec.tied_to:
            return spec.num_units * (3 - index % 3) // 5
        return max(1, spec.num_units // 2 - index)

    widths = {
        kind: [
            sum(width(index, spec) for spec in layer if spec.kind == kind)
            for index, layer in enumerate(specs)
        ]
        for kind in kinds
    }
    config = compressed_config(model.config, specs, widths, entry_of(model).rehome)
    for index, group in groups_of(model):
        if group.spec.experts:
            chosen = []
            for expert, twin in zip(group.parts, twins[index, group.kind].parts, strict=True):
                scores = torch.rand(group.num_units, generator=torch.Generator().manual_seed(index))
                chosen.append(Reduction.keep_top(scores.roll(expert.index), widths[EXPERTS][index]))
                twin.weight[:, chosen[-1].removed] = 0
            kept = [e.weight[:, r.kept] for e, r in zip(group.parts, chosen, strict=True)]
            group.narrow_(*zip(chosen, map(Repair, kept), strict=True))
        elif group.spec.offered:
            scores = torch.rand(group.num_units, generator=torch.Generator().manual_seed(index))
            reduction = Reduction.keep_top(scores, widths[group.kind][index])
            columns = reduction.removed_channels(group.columns)
            twins[index, group.kind].weight[:, columns] = 0
            group.shrink_(reduction)
            group.repair_(group.weight[:, reduction.kept_channels(group.columns)])
    apply_config_(model, config)
    return masked


@every_case
def test_layers_may_differ_in_width_unless_refused_with_the_reason(case, tmp_path):
    model = tiny_architecture(case)
    entry = entry_of(model)
    if not offered(model):
        pytest.skip("nothing is offered")
    if entry.per_layer:
        for settings in ({"ignore": (0,)}, {"allocation": "flap"}):
            with pytest.raises(ValueError, match=r"differ, which a .* cannot represent because"):
                narrower(model, **settings)
        return
    masked = differing_(model)
    assert relative_error(logits(model, batches()), logits(masked, batches())) < 1e-5
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert relative_error(logits(again, batches()), logits(model, batches())) < 1e-6


@pytest.mark.parametrize("case", [*UNUSUAL, "olmo_hybrid"])
def test_a_rule_by_layer_leaves_whole_what_is_not_offered(case):
    model = tiny_architecture(case)
    specs, share = all_specs_of(model), 0.15
    if case == "gemma2":  # its config takes few numbers of heads
        settings = {"sparsity": None, "attention_sparsity": 0.0, "mlp_sparsity": share}
    else:
        settings = {"sparsity": share}
    settings |= {"allocation": "error", "attention_unit": "kv_group", "multiple_of": 1}
    report = grail_hf.compress(model, calibration=batches(), progress=False, **settings)
    assert report.sparsity == pytest.approx(share, abs=TOLERANCE) or case == "gemma2"
    for index, layer in enumerate(specs):
        for spec in layer:
            width = report.widths[spec.kind][index]
            assert 0 < width <= spec.num_units or width == spec.num_units == 0
            assert spec.offered or width == spec.num_units
    assert not report.uniform
    for index, group in groups_of(model):
        assert group.num_units == report.widths[group.kind][index]


# Biases


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "falcon", "phi", "opt", "starcoder2"])
def test_biases_that_there_are_are_fitted(case):
    plain, biased = tiny_architecture(case), tiny_architecture(case)
    settings = {"ridge": 1e-3, "refit": 0, "target": "self", "attention_sparsity": 0.0}
    errors = [
        narrower(model, **settings, **bias).groups[0].error
        for model, bias in ((biased, {"bias": "auto"}), (plain, {}))
    ]
    assert errors[0] < errors[1]
    assert biased.num_parameters() == plain.num_parameters()
    for (_, new), (_, old) in zip(groups_of(biased), groups_of(plain), strict=True):
        assert torch.equal(new.bias, old.bias) == (new.kind == ATTENTION)


# Refusals


@every_case
def test_what_is_not_offered_is_refused_with_the_reason(case):
    model = tiny_architecture(case)
    state = state_of(model)
    for kind in (kind for kind in SHARES if not shares(model)[f"{kind}_sparsity"]):
        (other,) = SHARES.keys() - {kind}
        reason = next(g.spec.refusal for _, g in groups_of(model) if g.kind == kind)
        with pytest.raises(ValueError, match=f"^{kind}_sparsity=0.3 cannot be reached") as error:
            grail_hf.compress(
                model, calibration=None, **{f"{kind}_sparsity": 0.3, f"{other}_sparsity": 0.0}
            )
        assert reason in str(error.value)
        assert_state(model, state)


def test_a_type_that_offers_nothing_is_refused_with_every_reason():
    with pytest.raises(ValueError, match=r"sparsity=0.2 cannot be reached.*heads.*four times"):
        grail_hf.compress(tiny_architecture("bloom"), calibration=None, sparsity=0.2)


def test_heads_that_a_config_cannot_represent_give_way_to_the_nearest(caplog):
    """Of four units, three would be 0.25."""
    model = tiny_architecture("gemma2")
    narrower(model, attention_sparsity=0.25)
    assert model.config.num_key_value_heads == 2
    assert "attention_sparsity=0.25 is rounded to whole units: 0.5 is reached" in caplog.text


def test_shared_keys_and_values_are_refused():
    model = tiny_architecture("gemma4_text")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="cannot be compressed because layers that share keys"):
        grail_hf.compress(model, calibration=None, sparsity=0.2)


def test_a_layer_that_its_entry_does_not_describe_is_refused():
    model = tiny_architecture("mistral")
    model.config.model_type = "olmo2"
    layers_of(model)[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"MistralDecoderLayer has none of mlp\.down_proj"):
        grail_hf.compress(model, calibration=None, sparsity=0.2)


def test_layers_that_differ_already_are_refused():
    model = tiny_architecture("qwen3")
    narrower(model, ignore=(1,), compensate=False)
    with pytest.raises(ValueError, match="compress the dense model"):
        narrower(model)


# The table


def test_the_table_shows_the_entries():
    rows = {line.split(" |")[0][2:]: line for line in architectures_table().splitlines()[2:]}
    assert rows.keys() == ARCHITECTURES.keys()
    assert rows["qwen3"] == "| qwen3 | yes | yes | yes |  |"
    assert rows["bloom"].startswith("| bloom | no | no | no | ")
    assert rows["phi"].startswith("| phi | yes | in part | yes | no heads unless `qk_layernorm=F")
    assert rows["gpt2"].startswith("| gpt2 | yes | no | yes | no heads: its attention assumes")


def test_the_documented_example_adds_a_type(monkeypatch):
    """Fifteen lines at most; the type is not in the table."""
    assert "persimmon" not in ARCHITECTURES
    (example,) = re.findall(r"\n(    ARCHITECTURES.*?\n    \))\n", architectures.__doc__, re.DOTALL)
    assert len(example.splitlines()) <= 15
    monkeypatch.setitem(ARCHITECTURES, "persimmon", None)  # taken out again after the test
    exec(textwrap.dedent(example), dict(vars(architectures)))
    config = config_of(SIZES | {"model_type": "persimmon", "head_dim": None})
    model = random_model(config, dtype=torch.float32)
    before, zeroed = offered(model), copy.deepcopy(model)
    assert before == {MLP}
    report = narrower(model, selector="wanda", compensate=False)
    for (_, dense), (_, pruned) in zip(groups_of(zeroed), groups_of(model), strict=True):
        kept = (dense.weight.T[:, None] == pruned.weight.T[None]).all(dim=-1).any(dim=1)
        dense.weight[:, ~kept] = 0
    assert report.groups
    assert relative_error(logits(model, batches()), logits(zeroed, batches())) < 1e-5
