"""The ridge map against `torch.linalg.lstsq`, and the error it reports against the activations."""

import logging

import pytest
import torch
from host_reads import HostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grail_hf.methods import ridge as ridge_module
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import Symmetric

few = settings(max_examples=25, deadline=None)
F64 = torch.float64


def draw_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def split(channels: int, kept: int, seed: int) -> tuple[Tensor, Tensor]:
    """Kept and removed channels, in no order."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    return order[:kept], order[kept:]


def moments(gram: Tensor, cross: Tensor | None = None, energy: float = 0.0) -> GramStats:
    return GramStats(Symmetric.of(gram), gram.new_zeros(len(gram)), 1, cross, energy)


def ridge(
    gram: Tensor, kept: Tensor, removed: Tensor, damping: float, name: str = "a group"
) -> tuple[Tensor, float]:
    """B [K, P] of W' = W_S + W_P B^T: what repair makes of the identity's removed rows."""
    identity = torch.eye(len(gram), dtype=gram.dtype)
    weight, used, *_ = ridge_module.ridge(identity, moments(gram), kept, damping, name)
    assert torch.equal(weight[kept], torch.eye(len(kept), dtype=gram.dtype))
    return weight[removed].T, used


def reconstruction_error(
    weight: Tensor, gram: Tensor, kept: Tensor, removed: Tensor, matrix: Tensor | None
) -> float:
    new = weight[:, kept]
    if matrix is not None:
        new = new + weight[:, removed] @ matrix.T
    return ridge_module.reconstruction_error(weight, new, moments(gram), kept)


def stacked_least_squares(x: Tensor, kept: Tensor, removed: Tensor, damping: float) -> Tensor:
    """B of [X_S; sqrt(d) I] B = [X_P; 0]: no Gram is formed."""
    d = damping * x[:, kept].square().sum(0).mean()
    system = torch.cat([x[:, kept], d.sqrt() * torch.eye(kept.numel(), dtype=x.dtype)])
    target = torch.cat([x[:, removed], x.new_zeros(kept.numel(), removed.numel())])
    return torch.linalg.lstsq(system, target, driver="gels").solution


problems = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "kept": st.integers(1, 10),
        "removed": st.integers(0, 6),
        "damping": st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 10.0]),
        "seed": st.integers(0, 2**31),
    }
)


@given(problems)
@few
def test_the_map_is_that_of_the_stacked_least_squares(problem):
    """Also with fewer tokens than channels, and with nothing removed."""
    channels, seed = problem["kept"] + problem["removed"], problem["seed"]
    kept, removed = split(channels, problem["kept"], seed)
    x = draw_normal(problem["tokens"], channels, seed=seed)
    matrix, used = ridge(x.T @ x, kept, removed, problem["damping"])
    assert used == problem["damping"]
    expected = stacked_least_squares(x, kept, removed, used)
    torch.testing.assert_close(matrix, expected, rtol=1e-6, atol=1e-8)


def test_without_damping_the_map_is_plain_least_squares():
    x = draw_normal(60, 12, seed=0)
    kept, removed = split(12, 7, seed=0)
    matrix, used = ridge(x.T @ x, kept, removed, 0.0)
    assert used == 0
    expected = torch.linalg.lstsq(x[:, kept], x[:, removed]).solution
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-11)


def test_the_map_is_in_the_gram_s_dtype():
    x = draw_normal(60, 12, seed=0).float()
    kept, removed = split(12, 7, seed=0)
    matrix, _ = ridge(x.T @ x, kept, removed, 1e-4)
    assert matrix.dtype == torch.float32
    expected = stacked_least_squares(x.double(), kept, removed, 1e-4)
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [3, 5, 9])
def test_low_rank_activations_are_reconstructed_exactly(kept):
    """Rank 3: any three channels or more span the others."""
    x = draw_normal(50, 3, seed=1) @ draw_normal(3, 10, seed=2)
    weight = draw_normal(6, 10, seed=3)
    kept, removed = split(10, kept, seed=4)
    matrix, _ = ridge(x.T @ x, kept, removed, 1e-11)
    torch.testing.assert_close(x[:, kept] @ matrix, x[:, removed], rtol=0, atol=1e-7)
    assert reconstruction_error(weight, x.T @ x, kept, removed, matrix) < 1e-12
    assert reconstruction_error(weight, x.T @ x, kept, removed, None) > 1e-2


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
def test_channels_that_know_nothing_of_each_other_are_plainly_pruned(damping):
    """A diagonal Gram: B = 0, so W' = W_S."""
    gram = torch.diag(torch.tensor([2.0, 1.0, 1.0, 3.0, 0.5], dtype=F64))
    kept, removed = split(5, 3, seed=0)
    matrix, _ = ridge(gram, kept, removed, damping)
    assert torch.equal(matrix, torch.zeros(3, 2, dtype=F64))


@given(problems, st.booleans())
@few
def test_the_error_is_that_of_the_outputs(problem, repaired):
    """For any map, not only the best one."""
    channels, seed = problem["kept"] + problem["removed"], problem["seed"]
    kept, removed = split(channels, problem["kept"], seed)
    x, weight = (
        draw_normal(problem["tokens"], channels, seed=seed),
        draw_normal(5, channels, seed=1),
    )
    matrix = draw_normal(kept.numel(), removed.numel(), seed=2) if repaired else None

    narrowed = weight[:, kept]
    if matrix is not None:
        narrowed = narrowed + weight[:, removed] @ matrix.T
    dense = x @ weight.T
    expected = (dense - x[:, kept] @ narrowed.T).square().sum() / dense.square().sum()
    error = reconstruction_error(weight, x.T @ x, kept, removed, matrix)
    assert error == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


@given(problems)
@few
def test_repair_never_does_worse_than_pruning(problem):
    channels, seed = problem["kept"] + problem["removed"], problem["seed"]
    kept, removed = split(channels, problem["kept"], seed)
    x, weight = (
        draw_normal(problem["tokens"], channels, seed=seed),
        draw_normal(5, channels, seed=1),
    )
    gram = x.T @ x
    matrix, _ = ridge(gram, kept, removed, problem["damping"])
    pruned = reconstruction_error(weight, gram, kept, removed, None)
    assert reconstruction_error(weight, gram, kept, removed, matrix) <= pruned * (1 + 1e-9)


def test_repair_does_better_than_pruning_where_channels_are_correlated():
    x = draw_normal(80, 8, seed=0) @ draw_normal(8, 12, seed=1) + 0.1 * draw_normal(80, 12, seed=2)
    kept, removed = split(12, 8, seed=3)
    matrix, _ = ridge(x.T @ x, kept, removed, 1e-4)
    weight = draw_normal(5, 12, seed=4)
    pruned = reconstruction_error(weight, x.T @ x, kept, removed, None)
    assert reconstruction_error(weight, x.T @ x, kept, removed, matrix) < 0.1 * pruned


@given(problems)
@few
def test_another_target_is_met_as_stacked_least_squares_meets_it(problem):
    """[X_S; sqrt(d) I] V^T = [Y; sqrt(d) W_S^T]: damping pulls towards plain pruning."""
    channels, seed = problem["kept"] + problem["removed"], problem["seed"]
    kept, _ = split(channels, problem["kept"], seed)
    x, y, weight = (
        draw_normal(problem["tokens"], channels, seed=seed),
        draw_normal(problem["tokens"], 4, seed=seed + 1),
        draw_normal(4, channels, seed=seed + 2),
    )
    stats = moments(x.T @ x, y.T @ x, y.square().sum().item())
    new, used, *_ = ridge_module.ridge(weight, stats, kept, problem["damping"])
    d = (used * x[:, kept].square().sum(0).mean()).sqrt()
    system = torch.cat([x[:, kept], d * torch.eye(kept.numel(), dtype=F64)])
    stacked = torch.cat([y, d * weight[:, kept].T])
    expected = torch.linalg.lstsq(system, stacked, driver="gels").solution.T
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-7)

    error = ridge_module.reconstruction_error(weight, new, stats, kept)
    direct = (y - x[:, kept] @ new.T).square().sum() / y.square().sum()
    assert error == pytest.approx(direct.item(), rel=1e-6, abs=1e-9)
    pruned = ridge_module.reconstruction_error(weight, weight[:, kept], stats, kept)
    assert error <= pruned * (1 + 1e-9)


def test_the_error_of_no_output_is_zero():
    kept, removed = split(6, 4, seed=0)
    gram = torch.zeros(6, 6, dtype=F64)
    matrix, _ = ridge(gram, kept, removed, 1e-4)
    assert torch.equal(matrix, torch.zeros(4, 2, dtype=F64))
    assert reconstruction_error(draw_normal(3, 6, seed=0), gram, kept, removed, matrix) == 0


def test_rounding_takes_no_error_below_zero():
    """Two channels alike, but for a Gram that rounding has made indefinite."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 2**-53]], dtype=F64)
    weight, repair = torch.tensor([[0.0, 1.0]], dtype=F64), torch.ones(1, 1, dtype=F64)
    kept, removed = torch.tensor([0]), torch.tensor([1])
    assert reconstruction_error(weight, gram, kept, removed, repair) == 0


@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_a_dead_channel_neither_helps_nor_needs_help(damping):
    x = draw_normal(40, 8, seed=0)
    x[:, [1, 6]] = 0
    kept, removed = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])
    matrix, used = ridge(x.T @ x, kept, removed, damping, "layers.3.mlp")
    assert (used > damping) == (damping == 0)
    assert torch.equal(matrix[1], torch.zeros(4, dtype=F64))
    assert torch.equal(matrix[:, 2], torch.zeros(4, dtype=F64))
    live = kept[kept != 1]
    expected = stacked_least_squares(x, live, removed, used * live.numel() / kept.numel())
    torch.testing.assert_close(matrix[kept != 1], expected, rtol=1e-6, atol=1e-9)


def test_fewer_tokens_than_kept_channels_without_damping(caplog):
    """Singular: the warning names the group, and the calibration tokens are reconstructed."""
    x = draw_normal(5, 14, seed=0)
    kept, removed = split(14, 9, seed=0)
    with caplog.at_level(logging.WARNING, "grail_hf"):
        matrix, used = ridge(x.T @ x, kept, removed, 0.0, "layers.3.mlp")
    assert 0 < used < 1e-10
    assert "layers.3.mlp" in caplog.text
    torch.testing.assert_close(x[:, kept] @ matrix, x[:, removed], rtol=0, atol=1e-4)


def test_what_is_no_gram_is_refused_by_the_group_s_name():
    kept, removed = split(4, 3, seed=0)
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp"):
        ridge(-torch.eye(4, dtype=F64), kept, removed, 1e-4, "layers.3.mlp")


def activation_moments(x: Tensor, y: Tensor | None = None) -> GramStats:
    cross, energy = (None, 0.0) if y is None else (y.T @ x, y.square().sum().item())
    total = None if y is None else y.sum(0)
    return GramStats(Symmetric.of(x.T @ x), x.sum(0), len(x), cross, energy, total)


def draw_split(tokens: int, channels: int, targeted: bool, seed: int):
    """Correlated activations, perhaps targets, and their moments with those of a quarter apart."""
    x = draw_normal(tokens, 3, seed=seed) @ draw_normal(3, channels, seed=seed + 1)
    x += 0.5 * draw_normal(tokens, channels, seed=seed + 2)
    weight = draw_normal(4, channels, seed=seed + 3)
    y = x @ weight.T + draw_normal(tokens, 4, seed=seed + 4) if targeted else None
    stats = activation_moments(x, y)
    late = slice(tokens - tokens // 4, None)
    stats.held_out = activation_moments(x[late], None if y is None else y[late])
    return weight, x, x @ weight.T if y is None else y, stats


@given(st.integers(8, 60), st.booleans(), st.booleans(), st.integers(0, 1000))
@few
def test_auto_damping_is_what_explicit_solves_find_best_on_the_held_out_tokens(
    tokens, targeted, intercept, seed
):
    """Least squares on the activations themselves, and nothing but plain pruning beside it.

    With an intercept, moving inputs and targets by their means first leaves the same; plain pruning
    has none.
    """
    weight, x, y, stats = draw_split(tokens, 12, targeted, seed)
    kept, _ = split(12, 8, seed)
    number = tokens - tokens // 4
    energy = y[number:].square().sum()
    plain = y[number:] - x[number:][:, kept] @ weight[:, kept].T
    errors = {(float("inf"), False): (plain.square().sum() / energy).item()}
    if intercept:
        x, y = x - x[:number].mean(0), y - y[:number].mean(0)
    scale = x[:number][:, kept].square().sum(0).mean()
    for damping in (*ridge_module.DAMPINGS, float("inf")):
        new = weight[:, kept]
        if damping != float("inf"):
            d = (damping * scale).sqrt()
            system = torch.cat([x[:number][:, kept], d * torch.eye(8, dtype=F64)])
            stacked = torch.cat([y[:number], d * new.T])
            new = torch.linalg.lstsq(system, stacked, driver="gels").solution.T
        miss = y[number:] - x[number:][:, kept] @ new.T
        errors[damping, intercept] = (miss.square().sum() / energy).item()
    repair = ridge_module.ridge(weight, stats, kept, "auto", intercept=intercept)
    damping, moved, error = ridge_module.choose_damping(weight, stats, kept, intercept)
    assert (damping, moved) == (repair.damping, repair.bias is not None)
    assert error == pytest.approx(min(errors.values()), rel=1e-5)
    assert errors[damping, moved] == pytest.approx(min(errors.values()), rel=1e-5)
    whole = ridge_module.ridge(weight, stats, kept, damping, intercept=moved)
    assert torch.equal(repair.weight, whole.weight)


def test_auto_damping_reads_its_errors_from_the_device_at_once():
    """Besides whether each factorisation is sound; singular ones are among them."""
    weight, *_, stats = draw_split(9, 12, True, 0)
    with HostReads() as reads:
        ridge_module.choose_damping(weight, stats)
    assert reads.names == [*["__bool__"] * len(ridge_module.DAMPINGS), "tolist"]


@pytest.mark.parametrize("targeted", [False, True])
def test_auto_damping_prunes_without_a_bias_where_any_bias_is_of_noise(targeted):
    """Channels that know nothing of each other, and other means among the held-out tokens."""
    x, weight = draw_normal(16, 40, seed=0), draw_normal(5, 40, seed=1)
    kept, removed = split(40, 38, seed=2)
    x[:, removed] *= 1e-2
    x[:12, removed], x[12:, removed] = x[:12, removed] + 1, x[12:, removed] - 1
    y = x @ weight.T if targeted else None
    stats = activation_moments(x, y)
    stats.held_out = activation_moments(x[12:], None if y is None else y[12:])
    repair = ridge_module.ridge(weight, stats, kept, "auto", intercept=True)
    assert (repair.damping, repair.bias) == (float("inf"), None)
    assert torch.equal(repair.weight, weight[:, kept])


def test_auto_damping_prunes_plainly_where_channels_know_nothing_of_each_other():
    """Fewer tokens than channels: any fit is of noise. The Gram is singular, and nobody warned."""
    x, weight = draw_normal(16, 40, seed=0), draw_normal(5, 40, seed=1)
    stats = activation_moments(x)
    stats.held_out = activation_moments(x[12:])
    kept, _ = split(40, 30, seed=2)
    repair = ridge_module.ridge(weight, stats, kept, "auto")
    assert repair.damping == float("inf")
    assert torch.equal(repair.weight, weight[:, kept])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_auto_damping_of_a_rank_deficient_gram_generalises(dtype, caplog):
    """Rank 3 and a little noise, fewer tokens than channels."""
    mixing = draw_normal(3, 40, seed=1)
    x, fresh = (draw_normal(n, 3, seed=n) @ mixing for n in (24, 500))
    x += 1e-2 * draw_normal(24, 40, seed=3)
    weight = draw_normal(5, 40, seed=4)
    stats = activation_moments(x.to(dtype))
    stats.held_out = activation_moments(x[18:].to(dtype))
    kept, _ = split(40, 30, seed=2)
    new = ridge_module.ridge(weight.to(dtype), stats, kept, "auto").weight.double()
    error = ridge_module.reconstruction_error(weight, new, activation_moments(fresh), kept)
    assert error < 1e-3
    assert not caplog.records


def test_auto_damping_of_dead_channels_is_plain_pruning():
    stats = moments(torch.zeros(6, 6, dtype=F64))
    stats.held_out = moments(torch.zeros(6, 6, dtype=F64))
    kept, _ = split(6, 4, seed=0)
    weight = draw_normal(3, 6, seed=0)
    assert torch.equal(ridge_module.ridge(weight, stats, kept, "auto").weight, weight[:, kept])


def test_auto_damping_needs_held_out_tokens():
    kept, _ = split(6, 4, seed=0)
    with pytest.raises(ValueError, match="hold_out=True"):
        identity = moments(torch.eye(6, dtype=F64))
        ridge_module.ridge(draw_normal(3, 6, seed=0), identity, kept, "auto")


@given(
    st.integers(2, 40), st.sampled_from([0.0, 1e-4, 1e-2, 10.0]), st.booleans(), st.integers(0, 99)
)
@few
def test_an_intercept_is_that_of_least_squares_with_a_column_of_ones(
    tokens, damping, targeted, seed
):
    """The column is not damped; the others are, relative to what they vary by."""
    if damping == 0:
        tokens += 10  # more than there are unknowns
    weight, x, y, _ = draw_split(tokens, 8, targeted, seed)
    x, moved = x + draw_normal(8, seed=seed), y + (5 if targeted else 0)
    y = moved if targeted else x @ weight.T
    stats, (kept, _) = activation_moments(x, y if targeted else None), split(8, 5, seed)
    repair = ridge_module.ridge(weight, stats, kept, damping, intercept=True)
    variation = (x - x.mean(0))[:, kept].square().sum(0).mean()
    d = (repair.damping * variation).sqrt()
    ones, nothing = torch.ones(tokens, 1, dtype=F64), torch.zeros(5, 1, dtype=F64)
    system = torch.cat(
        [torch.cat([x[:, kept], ones], 1), torch.cat([d * torch.eye(5, dtype=F64), nothing], 1)]
    )
    stacked = torch.cat([y, d * weight[:, kept].T])
    expected = torch.linalg.lstsq(system, stacked, driver="gelsd").solution
    torch.testing.assert_close(repair.weight, expected[:5].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(repair.bias, expected[5], rtol=1e-5, atol=1e-6)
    error = ridge_module.reconstruction_error(weight, repair.weight, stats, kept, repair.bias)
    miss = y - x[:, kept] @ repair.weight.T - repair.bias
    direct = (miss.square().sum() / y.square().sum()).item()
    assert error == pytest.approx(direct, rel=1e-6, abs=1e-9)


@given(
    st.integers(2, 12), st.integers(1, 6), st.sampled_from([0.0, 1e-4, 1e-2]), st.integers(0, 99)
)
@few
def test_the_error_curve_is_the_error_of_each_repair(channels, outputs, damping, seed):
    """Up to what damping adds: with none, exactly."""
    x, weight = draw_normal(40, channels, seed=seed), draw_normal(outputs, channels, seed=seed + 1)
    order, _ = split(channels, channels, seed)
    stats = moments(x.T @ x)
    curve = ridge_module.error_curve(weight, stats, order, damping)
    assert curve.shape == (channels + 1,) and curve[channels] == 0
    energy = (x @ weight.T).square().sum()
    assert curve[0].item() == pytest.approx(energy.item(), rel=max(3 * channels * damping, 1e-9))
    for width in range(1, channels):
        kept = order[:width]
        repaired = ridge_module.ridge(weight, stats, kept, damping).weight
        error = (x @ weight.T - x[:, kept] @ repaired.T).square().sum()
        slack = 2 * damping * stats.gram.diagonal().mean() * weight.square().sum()
        assert abs(curve[width] - error) <= slack + 1e-9 * energy
