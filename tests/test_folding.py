"""Folding: k-means against brute force, folded blocks against full ones with like units."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import groups_of, narrower
from tiny_models import (
    CASES,
    CASES_AND_UNITS,
    UNUSUAL,
    all_specs_of,
    assert_state,
    batches,
    layers_of,
    logits,
    relative_error,
    specs_of,
    state_of,
    tiny_architecture,
    tiny_model,
)

import grail_hf
from grail_hf import Selector
from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.methods.clustering import k_means
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import Symmetric
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.selectors import choose, find_selector, fold
from grail_hf.models.groups import Group

few = settings(max_examples=25, deadline=None)
every_unit = pytest.mark.parametrize("unit", ATTENTION_UNITS)


def compress(model, unit="kv_group", **changes):
    changes = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "attention_unit": unit,
        "refit": 0,
        **changes,
    }
    return grail_hf.compress(model, calibration=batches(), progress=False, **changes)


def in_turns(group, stats, width):
    """In each partition the units are dealt to the clusters in turns."""
    units, per_run = stats.energy.numel() // group.columns, width // group.partitions
    dealt = torch.arange(units // group.partitions) % per_run
    return Reduction.fold(torch.cat([dealt + 7 * per_run * run for run in range(group.partitions)]))


IN_TURNS = Selector(in_turns, folds=True)


# k-means


def objective(points, labels, weights):
    """Sum of squared distances to the clusters' means; a point of weight 3 is there 3 times."""
    points, labels = (x.repeat_interleave(weights, dim=0) for x in (points, labels))
    return sum(
        (points[labels == label] - points[labels == label].mean(dim=0)).square().sum().item()
        for label in labels.unique()
    )


def clustered(points, weights, clusters, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return k_means(points @ points.T, weights.double(), clusters, generator, **options)


@st.composite
def clouds(draw):
    """A few points in the plane, many of which coincide, of weights 1 to 3."""
    corner = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
    points = torch.tensor(draw(st.lists(corner, min_size=1, max_size=5)), dtype=torch.float64)
    weights = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=5, max_size=5)))
    return points, weights[: len(points)], draw(st.integers(1, len(points)))


@given(clouds(), st.integers(0, 100))
@few
def test_every_cluster_has_points_and_every_point_the_nearest_centre(cloud, seed):
    points, weights, clusters = cloud
    labels = clustered(points, weights, clusters, seed)
    assert sorted(set(labels.tolist())) == list(range(clusters))
    assert torch.equal(clustered(points, weights, clusters, seed), labels)
    shares = [
        ((labels == c) * weights / weights[labels == c].sum()).double() for c in range(clusters)
    ]
    centres = torch.stack(shares) @ points
    distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    own = distances[torch.arange(len(points)), labels]
    assert (own <= distances.min(dim=1).values + 1e-6).all()


@given(clouds(), st.integers(0, 100))
@few
def test_steps_only_better_the_start_and_the_best_of_some_starts_is_near_the_optimum(cloud, seed):
    points, weights, clusters = cloud
    start, end = (
        objective(points, clustered(points, weights, clusters, seed, max_steps=steps), weights)
        for steps in (0, 100)
    )
    every = product(range(clusters), repeat=len(points))
    best = min(objective(points, torch.tensor(labels), weights) for labels in every)
    assert best - 1e-9 <= end <= start + 1e-9
    some = min(
        objective(points, clustered(points, weights, clusters, seed), weights) for seed in range(10)
    )
    assert some <= 1.5 * best + 1e-9


@pytest.mark.parametrize("units", [1, 3])
def test_as_many_clusters_as_kinds_of_points_find_the_kinds(units):
    """However often each occurs; with more clusters, kinds are split, and none is mixed."""
    kinds = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kind = torch.arange(9 * units) * 5 % 9
    weights = 1 + torch.arange(9 * units) % 3
    for clusters in range(9, 9 * units + 1):
        labels = clustered(kinds[kind], weights, clusters)
        assert len(labels.unique()) == clusters
        assert objective(kinds[kind], labels, weights) == pytest.approx(0, abs=1e-20)


def test_no_producer_decides_by_its_scale():
    """Units alike in both producers, one of which is a thousand times as large."""
    model = tiny_model("llama")
    group = Group(layers_of(model)[0], specs_of(model)[1], "layers.0")
    gate, up = group.layer.mlp.gate_proj.weight.data, group.layer.mlp.up_proj.weight.data
    gate[40:80], up[40:80] = gate[:40], up[:40]
    stats = GramStats.zeros(83)
    for scale in (1e3, 1e-3):
        gate *= scale
        labels = fold(group, stats, 43).labels
        assert torch.equal(labels[40:80], labels[:40])
    up[40:80] = -up[:40]
    labels = fold(group, stats, 43).labels
    assert not torch.equal(labels[40:80], labels[:40])


@pytest.mark.parametrize("partitions", [1, 3])
def test_clusters_stay_in_their_partition(partitions):
    model = tiny_model("llama", num_attention_heads=12, num_key_value_heads=partitions)
    spec = specs_of(model, "query_head")[0]
    group = Group(layers_of(model)[0], spec, "layers.0", seed=3)
    group.layer.self_attn.q_proj.weight.data[:] = 1  # nothing to tell the units by
    for width in range(partitions, 12, partitions):
        reduction = choose(find_selector("fold"), group, GramStats.zeros(120), width, "fold")
        runs = reduction.labels.reshape(partitions, -1)
        assert [len(run.unique()) for run in runs] == [width // partitions] * partitions
        assert len(reduction.labels.unique()) == width


# The reduction


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 3))
@few
def test_a_fold_averages_producers_and_sums_consumers(labels, per_unit):
    reduction = Reduction.fold(torch.tensor(labels))
    names = list(dict.fromkeys(labels))  # in the order of their first units
    members = [[u for u, label in enumerate(labels) if label == name] for name in names]
    assert reduction.folds
    assert reduction.kept.tolist() == [units[0] for units in members]
    assert reduction.labels.tolist() == [names.index(label) for label in labels]
    x = torch.randn(len(labels) * per_unit, 2, dtype=torch.float64)
    for cluster, units in enumerate(members):
        for position in range(per_unit):
            rows = torch.stack([x[u * per_unit + position] for u in units])
            at = cluster * per_unit + position
            torch.testing.assert_close(reduction.of_producer(x, per_unit)[at], rows.mean(0))
            torch.testing.assert_close(
                reduction.of_producer(x[:, 0], per_unit)[at], rows[:, 0].mean(0)
            )
            torch.testing.assert_close(reduction.of_consumer(x.T, per_unit)[:, at], rows.sum(0))


def test_a_mean_may_be_weighted_and_one_of_half_precision_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator).bfloat16()
    weights = torch.rand(100, generator=generator, dtype=torch.float64) + 0.1
    reduction = Reduction.fold(torch.zeros(100, dtype=torch.int64), weights)
    expected = (weights / weights.sum()) @ x.double().reshape(100, -1)
    assert torch.equal(reduction.of_producer(x, 3), expected.reshape(3, 2).bfloat16())


def test_a_pruning_takes_rows_and_columns():
    reduction = Reduction.keep_top(torch.tensor([1.0, 3.0, 2.0]), 2)
    x = torch.randn(6, 4)
    assert not reduction.folds
    assert torch.equal(reduction.of_producer(x, 2), x[2:])
    assert torch.equal(reduction.of_consumer(x.T, 2), x.T[:, 2:])


@pytest.mark.parametrize("case", ["llama", *UNUSUAL])
@every_unit
def test_a_group_is_reduced_for_a_while(case, unit):
    """And as it was after a failure."""
    model = tiny_architecture(case)
    layer = layers_of(model)[-2]
    state, plain = state_of(model), [dict(vars(module)) for module in layer.modules()]
    for spec in all_specs_of(model, unit)[-2]:
        group = Group(layer, spec, "layers.0")
        width = group.num_units - group.partitions
        if width <= 0:
            continue
        reduction = in_turns(group, GramStats.zeros(group.weight.shape[1]), width)
        with pytest.raises(KeyError), group.reduced(reduction):
            assert group.weight.shape[1] == width * group.columns
            raise KeyError
    assert_state(model, state)
    assert [dict(vars(module)) for module in layer.modules()] == plain


def folded(*labels):
    return Reduction.fold(torch.tensor(labels))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([0, 0, 1, 1], "a list that folds nothing"),
        (Reduction(torch.tensor([0, 2]), 4), "a Reduction that folds nothing"),
        (folded(0, 0, 1), "3 labels"),
        (folded(0, 1, 2, 3), "4 clusters"),
        (folded(0, 0, 0, 1), "2 clusters ([1, 2]"),
        (folded(0, 1, 0, 1), "2 clusters ([2, 2]"),
    ],
)
def test_what_does_not_fold_each_partition_is_refused(given, words):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2)
    group = Group(layers_of(model)[0], specs_of(model, "query_head")[0], "layers.0")
    with pytest.raises(ValueError) as error:
        choose(Selector(lambda *_: given, folds=True), group, GramStats.zeros(40), 2, "mine")
    for part in (words, "'mine'", "layers.0.self_attn", "4 labels with 2 clusters"):
        assert part in str(error.value)


# Folded models


@pytest.mark.parametrize(("case", "unit"), CASES_AND_UNITS)
def test_folding_is_giving_every_unit_of_a_cluster_its_mean_producers(case, unit):
    """Rotary embeddings, biases, masks and grouped heads included."""
    model = tiny_model(case)
    full = copy.deepcopy(model)
    report = compress(model, unit, selector=IN_TURNS, compensate=False)
    for layer in layers_of(full):
        for spec in specs_of(full, unit):
            group, width = Group(layer, spec, ""), report.widths[spec.kind][0]
            assert width < group.num_units
            labels = in_turns(group, GramStats.zeros(group.consumer.in_features), width).labels
            same = (labels[:, None] == labels).double()
            mean = same / same.sum(dim=1, keepdim=True)
            for producer in spec.producers:
                for tensor in layer.get_submodule(producer.path).parameters():
                    units = tensor.data.double().reshape(group.num_units, -1)
                    tensor.data = (mean @ units).to(tensor.dtype).reshape(tensor.shape)
    assert relative_error(logits(model, batches()), logits(full, batches())) < 1e-5


@pytest.mark.parametrize("unit", ATTENTION_UNITS)
@pytest.mark.parametrize("case", UNUSUAL)
def test_each_section_of_a_producer_is_averaged(case, unit):
    """And so are the norms that shrink with it; rows after the sections stay."""
    model = tiny_architecture(case)
    full = copy.deepcopy(model)
    report = narrower(model, attention_unit=unit, selector=IN_TURNS, compensate=False)
    for index, group in groups_of(full, unit):
        width = report.widths[group.kind][index]
        if width == group.num_units:
            continue
        channels = group.num_units * group.columns
        labels = in_turns(group, GramStats.zeros(channels), width).labels
        same = (labels[:, None] == labels).double()
        mean = same / same.sum(dim=1, keepdim=True)
        for producer in (*group.spec.producers, *group.spec.norms):
            for tensor in group.layer.get_submodule(producer.path).parameters():
                turned = group.spec.transposed and tensor.ndim == 2
                rows = tensor.data.T if turned else tensor.data
                start = 0
                for per_unit in producer.rows:
                    section = rows[start : start + group.num_units * per_unit]
                    averaged = mean @ section.double().reshape(group.num_units, -1)
                    section.copy_(averaged.reshape(section.shape))
                    start += len(section)
    assert relative_error(logits(model, batches()), logits(full, batches())) < 1e-5


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_folded_units_put_out_is_measured_whatever_the_layout(case):
    report = narrower(tiny_architecture(case), selector="fold", ridge=1e-9, refit=0)
    for group in report.groups:
        if group.width < group.units:
            assert 0 < group.error_measured < min(group.error_linear, group.error_pruned)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(
    ("case", "unit", "kind"),
    [(case, "kv_group", kind) for case in CASES for kind in (ATTENTION, MLP)]
    + [(case, "query_head", ATTENTION) for case in ("llama-biases", "qwen3")],
)
def test_units_that_are_copies_of_others_are_folded_without_loss(case, unit, kind, compensate):
    """Without repair too, and repair changes nothing then."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2} if unit == "query_head" else {}
    dense = tiny_model(case, intermediate_size=82, **heads)
    for layer in layers_of(dense):
        for spec in specs_of(dense, unit):
            for producer in spec.producers if spec.kind == kind else ():
                for tensor in layer.get_submodule(producer.path).parameters():
                    runs = tensor.data.view(spec.partitions, 2, -1)
                    runs[:, 1] = runs[:, 0]
    model = copy.deepcopy(dense)
    sparsity = {"sparsity": None, "attention_sparsity": 0, "mlp_sparsity": 0}
    sparsity[f"{kind}_sparsity"] = 0.5
    report = compress(model, unit, selector="fold", compensate=compensate, **sparsity)
    assert set(report.widths[kind]) == {report.units[kind] / 2}
    assert max(group.error_pruned for group in report.groups) < 1e-5
    assert relative_error(logits(model, batches()), logits(dense, batches())) < 1e-4


def consumer_ends(model, spec):
    """What goes into and comes out of the first layer's consumer, [tokens, H] and [tokens, O]."""
    module = layers_of(model)[0].get_submodule(spec.consumer)
    inputs, outputs = [], []

    def see(module, args, output):
        tokens = batch["attention_mask"].bool()
        bias = 0 if module.bias is None else module.bias
        inputs.append(args[0][tokens].double())
        outputs.append((output - bias)[tokens].double())

    handle = module.register_forward_hook(see)
    for batch in batches():
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


@pytest.mark.parametrize("target", ["self", "dense", "residual"])
@pytest.mark.parametrize("form", ["measured", "linear"])
@pytest.mark.parametrize(
    ("case", "unit", "kind"),
    [
        ("llama-biases", "kv_group", MLP),
        ("qwen3", "kv_group", ATTENTION),
        ("qwen2", "query_head", ATTENTION),
    ],
)
def test_the_first_block_is_fitted_to_what_folded_producers_put_out(case, unit, kind, form, target):
    """By least squares, of which both reported errors are the residuals."""
    model = tiny_model(case)
    dense = copy.deepcopy(model)
    spec = next(spec for spec in specs_of(model, unit) if spec.kind == kind)
    others = [s.name for s in specs_of(model, unit) if s.kind != kind]
    share = {"sparsity": None, "attention_sparsity": 0.0, "mlp_sparsity": 0.0}
    share[f"{kind}_sparsity"] = 0.5
    report = compress(
        model, unit, selector="fold", fold=form, target=target, ignore=others, ridge=1e-9, **share
    )
    x, y = consumer_ends(dense, spec)
    z, fitted = consumer_ends(model, spec)
    group = report.groups[0]
    assert z.shape[1] == group.width * spec.columns < x.shape[1]
    error = ((fitted - y).square().sum() / y.square().sum()).item()
    assert group.error == pytest.approx(error, rel=1e-3)
    assert {"measured": group.error_measured, "linear": group.error_linear}[form] == group.error
    best = z @ torch.linalg.lstsq(z, y, driver="gelsd").solution - y
    assert group.error_measured == pytest.approx(
        (best.square().sum() / y.square().sum()).item(), rel=1e-3
    )
    assert group.error_measured < group.error_linear
    assert group.error_measured < group.error_pruned


def test_a_fitted_bias_is_part_of_what_a_fold_leaves():
    """Both reported errors, whichever form the model holds, against models that hold the two."""
    groups, errors = [], {}
    only_mlp = {"sparsity": None, "attention_sparsity": 0.0, "mlp_sparsity": 0.5}
    only_mlp |= {"ignore": ("self_attn",), "target": "self", "selector": "fold"}
    for form in ("measured", "linear"):
        model = tiny_model("llama-biases")
        mlp = layers_of(model)[0].mlp
        mlp.gate_proj.bias.data += 1  # so that the inputs have a mean, of which the bias takes care
        dense = copy.deepcopy(model)
        report = compress(model, fold=form, bias="auto", ridge=1e-3, **only_mlp)
        groups.append(report.groups[0])
        spec = next(spec for spec in specs_of(dense) if spec.kind == MLP)
        (_, y), (_, fitted) = consumer_ends(dense, spec), consumer_ends(model, spec)
        gained = mlp.down_proj.bias.detach() - layers_of(dense)[0].mlp.down_proj.bias.detach()
        miss = (fitted + gained - y).square().sum()
        errors[form] = (miss / y.square().sum()).item()
    for group in groups:
        assert group.error_measured == pytest.approx(errors["measured"], rel=1e-3)
        assert group.error_linear == pytest.approx(errors["linear"], rel=1e-3)


def test_the_linear_form_is_the_paper_s():
    """W B with B = G R^T (R G R^T)^-1; without damping, which pulls elsewhere than the paper's."""
    from grail_hf.methods.ridge import fold_linearly, ridge

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 3, 1])
    gram = x.T @ x
    mean = torch.zeros(4, 6, dtype=torch.float64)
    mean[labels, torch.arange(6)] = 1
    mean = torch.kron(mean / mean.sum(1, keepdim=True), torch.eye(2, dtype=torch.float64))
    expected = weight @ gram @ mean.T @ torch.linalg.inv(mean @ gram @ mean.T)

    reduction = Reduction.fold(labels)
    for cross, energy in ((None, 0.0), (weight @ gram, 1.0)):
        stats = GramStats(Symmetric.of(gram), x.sum(0), 50, cross, energy)
        folded = fold_linearly(weight, stats, reduction, columns=2)
        start = reduction.of_consumer(weight, 2)
        new = ridge(start, folded, torch.arange(8), 0.0).weight
        torch.testing.assert_close(new, expected)
        torch.testing.assert_close(folded.total, (x @ mean.T).sum(0))


@every_unit
def test_a_refit_does_better_than_the_fold_that_it_starts_from(unit, monkeypatch):
    # On all of the calibration, so that the error is what was minimised.
    monkeypatch.setattr("grail_hf.calibration.refit.QUICK_STEPS", 0)
    report = compress(tiny_model("qwen3"), unit, selector="fold", refit=4, ridge=1e-4)
    assert all(group.error < group.error_measured for group in report.groups)


def test_bf16_stays_bf16():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    report = compress(model, selector="fold")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(0 < group.error < group.error_pruned for group in report.groups)
