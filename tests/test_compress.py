"""What `compress` does to a model, for every architecture and attention unit."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    CASES,
    CASES_AND_UNITS,
    assert_state,
    at_tokens,
    batches,
    layers_of,
    logits,
    relative_error,
    specs_of,
    state_of,
    tiny_config,
    tiny_model,
)
from transformers import AutoModelForCausalLM

import grail_hf
from grail_hf import SELECTORS, Selector
from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.methods.linalg import full_fp32_products

SPARSITY = 0.3

every_case = pytest.mark.parametrize("case", CASES)
every_unit = pytest.mark.parametrize("unit", ATTENTION_UNITS)
every_case_and_unit = pytest.mark.parametrize(("case", "unit"), CASES_AND_UNITS)


# One solve with a known damping, of which more can be said than of what follows it.
ONE_SOLVE = {"ridge": 1e-4, "refit": 0}


def compress(model, unit="kv_group", **settings):
    settings = (
        {"sparsity": SPARSITY, "multiple_of": 1, "allocation": "uniform", "attention_unit": unit}
        | ONE_SOLVE
        | settings
    )
    return grail_hf.compress(model, calibration=batches(), progress=False, **settings)


@pytest.fixture(scope="module", params=CASES_AND_UNITS, ids="-".join)
def done(request):
    """A model before and after, and the report. Not to be changed.

    Its blocks' own outputs are the target, which the dense blocks can be measured for.
    """
    case, unit = request.param
    model = tiny_model(case)
    dense = copy.deepcopy(model)
    report = compress(model, unit, target="self")
    return SimpleNamespace(unit=unit, dense=dense, report=report, model=model)


def consumers(model):
    return [
        layer.get_submodule(spec.consumer) for layer in layers_of(model) for spec in specs_of(model)
    ]


def block_parameters(model):
    """Parameters of the decoder layers less their norms: those of the projections."""
    linears = [m for m in layers_of(model).modules() if isinstance(m, torch.nn.Linear)]
    return sum(p.numel() for linear in linears for p in linear.parameters())


def found_in(rows, table):
    """[len(table)] bool: which rows of `table` occur in `rows`, bit for bit."""
    return (table[:, None] == rows[None]).all(dim=-1).any(dim=1)


def always(monkeypatch, scores_of):
    """Register the selector "fixed", whose scores are `scores_of(group, number of units)`."""

    def fixed(group, stats):
        return scores_of(group, stats.energy.numel() // group.columns)

    monkeypatch.setitem(SELECTORS, "fixed", Selector(fixed))


# Nothing to remove


@every_case_and_unit
def test_sparsity_0_changes_nothing(case, unit):
    model = tiny_model(case)
    state = state_of(model)
    report = compress(model, unit, sparsity=0.0)
    assert_state(model, state)
    assert (report.sparsity, report.groups) == (0, [])
    for kind, units in report.units.items():
        assert set(report.widths[kind]) == {units}


# Pruning


@every_case_and_unit
@pytest.mark.parametrize("times", [1, 2])
def test_pruning_is_zeroing_the_removed_units_consumer_columns(case, unit, times):
    model = tiny_model(case)
    zeroed = copy.deepcopy(model)
    for _ in range(times):
        report = compress(model, unit, selector="wanda", compensate=False)
        assert report.sparsity == pytest.approx(SPARSITY, abs=0.005)
    for dense, pruned in zip(consumers(zeroed), consumers(model), strict=True):
        kept = found_in(pruned.weight.T, dense.weight.T)
        assert kept.sum() == pruned.in_features == pruned.weight.shape[1] < dense.in_features
        dense.weight.data[:, ~kept] = 0
    assert relative_error(logits(model, batches()), logits(zeroed, batches())) < 1e-5


@every_unit
def test_the_units_of_highest_score_in_their_partition_are_kept(monkeypatch, unit):
    def shuffled(units):
        return torch.arange(units) * 7 % units

    always(monkeypatch, lambda group, units: shuffled(units))
    model = tiny_model("qwen3")
    dense = copy.deepcopy(model)
    report = compress(model, unit, selector="fixed", compensate=False)
    widths = {kind: widths[0] for kind, widths in report.widths.items()}
    for before, after in zip(layers_of(dense), layers_of(model), strict=True):
        for spec in specs_of(dense, unit):
            old, new = (
                layer.get_submodule(spec.consumer).weight.T.reshape(units, -1)
                for layer, units in ((before, spec.num_units), (after, widths[spec.kind]))
            )
            ranks = shuffled(spec.num_units).reshape(spec.partitions, -1).argsort(dim=1).argsort()
            expected = ranks >= ranks.shape[1] - widths[spec.kind] // spec.partitions
            assert torch.equal(found_in(new, old), expected.flatten())


@every_case
def test_every_kv_group_keeps_equally_many_query_heads(monkeypatch, case):
    always(monkeypatch, lambda group, units: torch.arange(units))  # in favour of the last groups
    model = tiny_model(case, num_key_value_heads=4)
    config = model.config
    queries = [layer.self_attn.q_proj.weight.clone() for layer in layers_of(model)]
    width = compress(model, "query_head", selector="fixed").widths[ATTENTION][0]
    assert model.config.num_key_value_heads == config.num_key_value_heads == 4
    for before, layer in zip(queries, layers_of(model), strict=True):
        head_dim = len(before) // config.num_attention_heads
        kept = found_in(layer.self_attn.q_proj.weight, before).reshape(4, -1, head_dim)
        assert kept.all(dim=2).sum(dim=1).tolist() == [width // 4] * 4
        assert kept.sum() == width * head_dim < len(before)


@every_case
@pytest.mark.parametrize("kind", [ATTENTION, MLP])
def test_units_that_are_copies_of_others_go_without_loss(case, kind):
    dense = tiny_model(case, intermediate_size=82)
    for layer in layers_of(dense):
        for spec in specs_of(dense):
            for producer in spec.producers if spec.kind == kind else ():
                for tensor in layer.get_submodule(producer.path).parameters():
                    half = tensor.shape[0] // 2
                    tensor.data[half:] = tensor.data[:half]
    sparsity = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 0}
    sparsity[f"{kind}_sparsity"] = 0.5
    repaired, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    report = compress(repaired, selector="obs", ridge=1e-8, **sparsity)
    compress(pruned, selector="obs", compensate=False, **sparsity)
    assert set(report.widths[kind]) == {report.units[kind] / 2}
    expected = logits(dense, batches())
    assert relative_error(logits(repaired, batches()), expected) < 1e-4
    assert relative_error(logits(pruned, batches()), expected) > 0.1


# Repair and report


def test_every_group_is_repaired_better_than_pruned(done):
    specs, layers = specs_of(done.dense, done.unit), layers_of(done.dense)
    assert len(done.report.groups) == len(specs) * len(layers)
    assert all(0 < group.error < group.error_pruned for group in done.report.groups)


@every_case_and_unit
@pytest.mark.parametrize("target", ["dense", "residual"])
def test_any_target_is_met_better_than_by_pruning(case, unit, target):
    report = compress(tiny_model(case), unit, target=target)
    assert all(0 < group.error < group.error_pruned for group in report.groups)


@torch.no_grad()
def test_reported_errors_are_what_the_dense_block_in_the_compressed_model_measures(done):
    def output():
        handle = layer.get_submodule(spec.consumer).register_forward_hook(
            lambda module, args, out: seen.append(out if module.bias is None else out - module.bias)
        )
        for batch in batches():
            done.model(**batch)
        handle.remove()
        return at_tokens([seen.pop(0) for _ in batches()], batches())

    seen, reported = [], iter(done.report.groups)
    for index, layer in enumerate(layers_of(done.model)):
        for spec in specs_of(done.dense, done.unit):
            compressed = output()
            narrow = layer.get_submodule(spec.name)
            setattr(layer, spec.name, layers_of(done.dense)[index].get_submodule(spec.name))
            dense = output()
            setattr(layer, spec.name, narrow)
            group = next(reported)
            assert (group.layer, group.kind) == (index, spec.kind)
            assert group.name.endswith(f"{index}.{spec.name}")
            error = relative_error(compressed, dense) ** 2
            assert group.error == pytest.approx(error, rel=1e-3)


def test_sparsity_and_counts_are_those_of_the_live_model(done):
    before, after = block_parameters(done.dense), block_parameters(done.model)
    assert 1 - after / before == pytest.approx(SPARSITY, abs=0.005)
    assert done.report.sparsity == pytest.approx(1 - after / before)
    assert done.report.projection_parameters == (before, after)
    totals = tuple(model.num_parameters() for model in (done.dense, done.model))
    assert done.report.total_parameters == totals


def test_the_config_says_the_live_shapes(done):
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(done.model.config)
    assert type(fresh) is type(done.model)
    live = {name: tensor.shape for name, tensor in done.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == live
    for module, stock in zip(done.model.modules(), fresh.modules(), strict=True):
        for name, value in vars(stock).items():
            if isinstance(value, int | float | str) and name != "training":
                assert getattr(module, name) == value, f"{name} of {type(module).__name__}"
        assert getattr(module, "config", done.model.config) is done.model.config


def test_generation_with_the_cache_is_generation_without(done):
    prompt = batches()[0]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (
        done.model.generate(**prompt, **settings, use_cache=use) for use in (True, False)
    )
    assert cached.shape[1] == prompt["input_ids"].shape[1] + 6
    assert torch.equal(cached, plain)


def test_tied_embeddings_stay_tied():
    for unit in ATTENTION_UNITS:
        model = tiny_model("llama-tied-scaled-rope")
        compress(model, unit)
        assert model.lm_head.weight is model.model.embed_tokens.weight


# What stays as it was


@every_case_and_unit
@pytest.mark.parametrize("ignored", [ATTENTION, MLP])
def test_ignoring_a_kind_leaves_it_bit_for_bit_and_removes_from_the_other_alone(
    case, unit, ignored
):
    dense = tiny_model(case)
    model, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    shares = {f"{kind}_sparsity": 0.3 * (kind != ignored) for kind in (ATTENTION, MLP)}
    # With its own output as target, a group that loses nothing has nothing to make up for.
    settings = {"selector": "wanda", "target": "self"}
    removed = compress(alone, unit, sparsity=None, **shares, **settings).sparsity
    name = {spec.kind: spec.name for spec in specs_of(model)}[ignored]
    report = compress(model, unit, sparsity=removed, ignore=(name,), **settings)
    assert {group.kind for group in report.groups} == {ATTENTION, MLP} - {ignored}
    for before, after in zip(layers_of(dense), layers_of(model), strict=True):
        old, new = (layer.get_submodule(name).state_dict() for layer in (before, after))
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert_state(model, state_of(alone))


@every_case
def test_a_group_that_keeps_all_makes_up_for_what_others_lost(case):
    """Behind the first that lost something; never one that is ignored."""
    dense = tiny_model(case)
    settings = {"sparsity": None, "mlp_sparsity": 0.5, "attention_sparsity": 0, "ignore": (2,)}
    model = copy.deepcopy(dense)
    report = compress(model, **settings)
    (mended,) = (group for group in report.groups if group.width == group.units)
    assert (mended.layer, mended.kind) == (1, ATTENTION)
    assert mended.error < mended.error_pruned
    outputs = [[layer.self_attn.o_proj for layer in layers_of(m)] for m in (dense, model)]
    changed = [not torch.equal(old.weight, new.weight) for old, new in zip(*outputs, strict=True)]
    assert changed == [False, True, False]
    for other in ({"target": "self"}, {"compensate": False}):
        report = compress(copy.deepcopy(dense), **settings | other)
        assert all(group.width < group.units for group in report.groups)


def test_the_other_kind_takes_the_sparsity_that_an_ignored_one_leaves():
    model = tiny_model("qwen3")
    before = block_parameters(model)
    report = compress(model, ignore=("self_attn",))
    assert set(report.widths[ATTENTION]) == {report.units[ATTENTION]}
    assert 1 - block_parameters(model) / before == pytest.approx(SPARSITY, abs=0.005)


@every_case_and_unit
def test_training_flags_and_requires_grad_stay(case, unit):
    model, evaluated = tiny_model(case), tiny_model(case)
    model.train()
    model.get_input_embeddings().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "down_proj" in name)
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    for each in (model, evaluated):
        compress(each, unit, selector="wanda")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_state(model, state_of(evaluated))  # dropout took no part


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", ["qwen2", "llama"])  # the second moves to another type
def test_tags_and_gradient_checkpointing_stay(case):
    model = tiny_model(case)
    model.add_model_tags(["mine"])
    model.gradient_checkpointing_enable()
    compress(model)
    assert model.model_tags == ["mine", "grail", "structured-pruning"]
    assert all(layer.gradient_checkpointing for layer in layers_of(model))


@every_case_and_unit
def test_a_config_shared_with_another_model_does_not_change(case, unit):
    config = tiny_config(case)
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    other.config = model.config
    said = other.config.to_dict()
    compress(model, unit, selector="wanda")
    assert other.config.to_dict() == said
    assert model.config is not other.config


@every_case_and_unit
def test_bf16_stays_bf16_and_is_repaired(case, unit):
    dense = tiny_model(case)
    repaired, pruned = (copy.deepcopy(dense).to(torch.bfloat16) for _ in range(2))
    compress(repaired, unit)
    compress(pruned, unit, compensate=False)
    tensors = [*repaired.parameters(), logits(repaired, batches())]
    assert {tensor.dtype for tensor in tensors} == {repaired.dtype} == {torch.bfloat16}
    expected = logits(dense, batches())
    errors = [relative_error(logits(model, batches()), expected) for model in (repaired, pruned)]
    assert errors[0] < errors[1]


@pytest.mark.cuda
@every_unit
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_layers_run_on_the_accelerator_and_come_home(unit, home):
    plain = tiny_model("qwen2-mixed")
    model = copy.deepcopy(plain).to(home)
    compress(plain, unit, selector="magnitude", device="cpu")
    compress(model, unit, selector="magnitude", device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {home}
    assert relative_error(logits(model.cpu(), batches()), logits(plain, batches())) < 1e-3


# Arithmetic


@pytest.mark.parametrize("dtype", ["auto", "float32", "float64"])
@pytest.mark.parametrize("widest", ["float32", "float64"])
def test_selection_and_solve_are_in_the_dtype_of_the_config(monkeypatch, dtype, widest):
    """Of "auto", in the widest of the device; the report has that one."""
    monkeypatch.setattr("grail_hf.config.widest_float", lambda device: getattr(torch, widest))
    solved = []

    def seen(group, stats):
        solved.append(stats.gram.dtype)
        return SELECTORS["wanda"](group, stats)

    monkeypatch.setitem(SELECTORS, "seen", Selector(seen))
    report = compress(tiny_model("qwen2"), selector="seen", solve_dtype=dtype)
    expected = widest if dtype == "auto" else dtype
    assert solved == [getattr(torch, expected)] * len(report.groups)
    assert report.config.solve_dtype == expected


@every_case_and_unit
def test_a_seed_gives_one_result_and_another_seed_another(case, unit):
    one, again, other = (tiny_model(case) for _ in range(3))
    for model, seed in ((one, 5), (again, 5), (other, 6)):
        compress(model, unit, selector="random", seed=seed)
    assert_state(again, state_of(one))
    assert not torch.equal(logits(one, batches()), logits(other, batches()))


def test_a_selector_may_be_a_function_of_the_user_s(tmp_path):
    """Given with other settings or in a config, it does what its like in the table does."""
    one, again, named = (tiny_model("qwen3") for _ in range(3))
    seen = []

    class Mine:
        def __call__(self, group, stats):
            seen.append(group.name)
            return SELECTORS["wanda"](group, stats)

        def __deepcopy__(self, memo):
            raise AssertionError("copied, with all that it holds")

    mine = Mine()
    report = compress(one, selector=mine)
    config = grail_hf.GrailConfig(sparsity=0.5, selector=mine)
    settings = {
        "sparsity": SPARSITY,
        "multiple_of": 1,
        "allocation": "uniform",
        "progress": False,
    } | ONE_SOLVE
    grail_hf.compress(again, None, batches(), config, **settings)
    compress(named, selector="wanda")
    assert seen == 2 * [group.name for group in report.groups]
    assert_state(one, state_of(named))
    assert_state(again, state_of(named))
    report.save(tmp_path)
    name = f"{__name__}:{Mine.__qualname__}"
    read = grail_hf.CompressionReport.load(tmp_path)
    assert read.config.selector == name
    assert read.to_dict() == report.to_dict()
    assert f"`{name}`" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="is not known"):
        grail_hf.compress(tiny_model("qwen3"), None, batches(), read.config)


def test_calibration_may_be_sampled_from_the_model_itself():
    """With no data and no tokenizer; from the model in eval mode, which it does not stay in."""

    def compressed(seed=0, train=False):
        model = tiny_model("qwen3").train(train)
        state = torch.get_rng_state()
        settings = {
            "sparsity": SPARSITY,
            "multiple_of": 1,
            "allocation": "uniform",
            "num_samples": 30,
            "seq_length": 16,
        }
        report = grail_hf.compress(
            model, None, "self", progress=False, seed=seed, batch_size=15, **settings
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert {module.training for module in model.modules()} == {train}
        return model, report

    model, report = compressed()
    assert report.calibration["source"].startswith("sampled from the dense model itself: 30 ")
    assert report.calibration["tokens"] == 480
    assert all(group.error < group.error_pruned for group in report.groups)
    again, same = compressed(train=True)
    assert same.calibration == report.calibration
    assert_state(again, state_of(model))
    assert compressed(seed=1)[1].calibration["fingerprint"] != report.calibration["fingerprint"]


@pytest.mark.parametrize("selector", SELECTORS)
@every_unit
def test_what_any_selector_keeps_is_better_repaired_than_pruned(selector, unit):
    report = compress(tiny_model("qwen3"), unit, selector=selector, sparsity=0.5)
    assert all(0 < group.error < group.error_pruned for group in report.groups)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_is_deterministic(selector):
    one, again = tiny_model("qwen3"), tiny_model("qwen3")
    reports = [compress(model, selector=selector) for model in (one, again)]
    assert_state(again, state_of(one))
    assert reports[0].groups == reports[1].groups


@pytest.mark.parametrize(
    ("ridge", "rows", "warned"), [(1e-4, 1, True), (0.1, 1, False), (1e-4, 32, False)]
)
def test_too_few_tokens_are_warned_of(caplog, ridge, rows, warned):
    model = tiny_model("llama")
    ids = torch.arange(24).repeat(rows, 1)
    settings = {
        "multiple_of": 1,
        "allocation": "uniform",
        "sparsity": SPARSITY,
        "ridge": ridge,
        "progress": False,
    }
    grail_hf.compress(model, calibration=ids, **settings)
    assert ("calibration tokens for" in caplog.text) == warned


@every_case
def test_auto_ridge_repairs_every_block_or_prunes_it(case):
    report = compress(tiny_model(case), ridge="auto")
    for group in report.groups:
        assert group.error <= group.error_pruned
        assert (group.error == group.error_pruned) == (group.damping == float("inf"))
    assert any(group.damping < float("inf") for group in report.groups)


@pytest.mark.parametrize("settings", [{}, {"target": "self"}, {"refit": 2}], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_auto_ridge_of_random_tokens_does_no_harm(caplog, tmp_path, settings, rows):
    """So few that a fixed ridge would fit their noise; what is infinite is still valid JSON."""
    dense = tiny_model("qwen2")
    pruned, auto = copy.deepcopy(dense), copy.deepcopy(dense)
    ids = torch.randint(97, (rows, 8), generator=torch.Generator().manual_seed(3))
    common = {
        "sparsity": SPARSITY,
        "multiple_of": 1,
        "allocation": "uniform",
        "selector": "magnitude",
        "progress": False,
    }
    grail_hf.compress(pruned, calibration=ids, compensate=False, **common)
    report = grail_hf.compress(auto, calibration=ids, ridge="auto", **common | settings)
    assert not caplog.records
    assert float("inf") in [group.damping for group in report.groups]
    expected = logits(dense, batches())
    errors = [relative_error(logits(model, batches()), expected) for model in (auto, pruned)]
    assert errors[0] < 1.1 * errors[1]

    report.save(tmp_path)
    text = (tmp_path / "grail.json").read_text()
    read = json.loads(text, parse_constant=pytest.fail)  # Infinity and NaN are not JSON
    assert read["config"]["ridge"] == "auto"
    assert grail_hf.CompressionReport.load(tmp_path).groups == report.groups
    assert "chosen on held-out windows" in (tmp_path / "README.md").read_text()


def test_auto_ridge_does_not_depend_on_the_batches():
    ids = torch.cat([batch["input_ids"][:, :21] for batch in batches()])
    found = []
    for batch_size in (4, 15):
        report = grail_hf.compress(
            tiny_model("qwen3"),
            calibration=ids,
            batch_size=batch_size,
            ridge="auto",
            refit=0,
            sparsity=SPARSITY,
            multiple_of=1,
            allocation="uniform",
            progress=False,
        )
        found.append([group.damping for group in report.groups])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("case", "newly"),
    [("llama", {ATTENTION, MLP}), ("qwen3", {ATTENTION}), ("mistral", set()), ("qwen2", set())],
)
def test_biases_are_fitted_where_the_config_can_say_them(case, newly):
    """In layers that are left whole they are zero, and so the function is the same."""
    biased, plain = tiny_model(case), tiny_model(case)
    shares = {"sparsity": None, "mlp_sparsity": 0.3, "attention_sparsity": 0.5}
    errors = [
        [group.error for group in compress(model, ignore=(1,), **shares, **bias).groups]
        for model, bias in ((biased, {"bias": "auto"}), (plain, {}))
    ]
    for spec in specs_of(biased):
        for index, layer in enumerate(layers_of(biased)):
            bias = layer.get_submodule(spec.consumer).bias
            assert (bias is not None) == (spec.kind in newly)
            if bias is not None:
                assert bool(bias.any()) == (index != 1)
    if newly:  # attention first, which nothing that differs is in front of
        assert errors[0][0] < errors[1][0]


def test_a_bias_that_there_is_is_fitted_and_lowers_the_error():
    biased, plain = (tiny_model("llama-biases") for _ in range(2))
    settings = {"attention_sparsity": 0.5, "sparsity": 0.3}
    errors = [
        compress(model, **settings, **bias).groups[0].error
        for model, bias in ((biased, {"bias": "auto"}), (plain, {}))
    ]
    assert errors[0] < errors[1]
    old, new = (layers_of(model)[0].self_attn.o_proj.bias for model in (plain, biased))
    assert not torch.equal(old, new)
    assert biased.num_parameters() == plain.num_parameters()


def test_a_llama_that_moves_to_another_type_gets_no_biases():
    """Mistral's config could not say them."""
    biased, plain = tiny_model("llama"), tiny_model("llama")
    compress(biased, bias="auto")
    compress(plain)
    assert biased.config.model_type == "mistral"
    assert_state(biased, state_of(plain))


# The precision of fp32 products


def legacy_():
    torch.set_float32_matmul_precision("medium")


def by_backend_():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("one setting for all backends, before torch 2.9")
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def both_():
    by_backend_()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def precisions():
    """What can be read of it: torch refuses to tell where two settings contradict each other."""
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ):
        try:
            found.append(read())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error))
    return found


@pytest.fixture
def precision_as_it_was():
    before = precisions()
    with full_fp32_products():  # which is tested below to put it back
        yield
    assert precisions() == before


@pytest.mark.parametrize("allow_", [legacy_, by_backend_])
@pytest.mark.parametrize("disk_to_disk", [False, True], ids=["in memory", "disk to disk"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_products_are_in_fp32_whatever_the_program_allows(
    allow_, disk_to_disk, fails, precision_as_it_was, tmp_path
):
    seen = []

    def selector(group, stats):
        seen.append(precisions())
        if fails:
            raise ZeroDivisionError
        return stats.energy.reshape(-1, group.columns).sum(1)

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    settings = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "selector": selector,
        "progress": False,
    }
    settings |= {"refit": 0, "ridge": 1e-3}
    allow_()
    before = precisions()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        if disk_to_disk:
            folders = tmp_path / "dense", tmp_path / "out"
            grail_hf.compress_checkpoint(*folders, calibration=batches(), **settings)
        else:
            grail_hf.compress(model, calibration=batches(), **settings)
    assert precisions() == before
    for legacy, tf32, *backends in seen:
        assert legacy == "highest" and tf32 is False
        assert set(backends) <= {"ieee", AttributeError}
    assert seen


def test_the_model_writes_its_calibration_in_fp32(precision_as_it_was):
    legacy_()
    model, seen = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda *_: seen.append(precisions()[0]))
    settings = {"sparsity": 0.3, "multiple_of": 1, "allocation": "uniform", "progress": False}
    grail_hf.compress(model, calibration="self", num_samples=4, seq_length=8, refit=0, **settings)
    assert set(seen) == {"highest"}


def test_settings_that_contradict_each_other_stay_out_of_the_way(precision_as_it_was):
    both_()
    with full_fp32_products():
        assert precisions()[0] == "highest"
    assert precisions()[2] in ("ieee", AttributeError)
