"""`GramStats` against fp64 and against exact integers; `damped_cholesky` on what it may meet."""

import logging

import pytest
import torch
from host_reads import HostReads
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import (
    BLOCK,
    Symmetric,
    cholesky_inverse_,
    damped_cholesky,
    half_square,
    in_two_terms,
    sum_of_products,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_EXACT = 128  # Integers up to this are exact in bf16, and their sums of products in fp32.


def stats_of(*chunks: torch.Tensor) -> GramStats:
    stats = GramStats.zeros(chunks[0].shape[1], chunks[0].device)
    for chunk in chunks:
        stats.update_(chunk)
    return stats


def integers(tokens: int, channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-HALF_EXACT, HALF_EXACT + 1, (tokens, channels), generator=generator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_is_the_fp64_gram_up_to_fp32_rounding(dtype, device):
    """The bound on any order of summation; a bf16, fp16 or TF32 product would miss it."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    stats = stats_of(x[:7], x[7:8], x[8:])
    assert stats.gram.dtype == stats.total.dtype == torch.float32
    assert stats.count == 300

    exact = x.double()
    rounding = (x.shape[0] + 2) * torch.finfo(torch.float32).eps
    bound = rounding * (exact.abs().T @ exact.abs())
    assert ((stats.gram.double() - exact.T @ exact).abs() <= bound).all()
    assert ((stats.total - exact.sum(0)).abs() <= rounding * exact.abs().sum(0)).all()
    torch.testing.assert_close(stats.mean.double(), exact.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.energy.double(), exact.square().sum(0), rtol=1e-5, atol=0)


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 6),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_updates_add_up_to_one_of_all_tokens(dtype, channels, sizes, seed):
    """Integers that half precision holds, so that every sum is exact."""
    chunks = [integers(size, channels, seed + i) for i, size in enumerate(sizes)]
    x = torch.cat(chunks)
    stats = stats_of(*(chunk.to(dtype) for chunk in chunks))
    assert torch.equal(stats.gram.long(), x.T @ x)
    assert torch.equal(stats.total.long(), x.sum(0))
    assert stats.count == x.shape[0]


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_a_symmetric_matrix_in_block_rows_is_what_the_whole_is(size):
    """Integers, so exactly; one block and several, of which the last one is smaller."""
    x, other, weight = (integers(n, size, seed).double() for seed, n in enumerate((20, 7, 4)))
    whole = x.T @ x
    held = Symmetric.zeros(size, dtype=torch.float64)
    held.add_products_(x)
    assert held.flat.numel() == half_square(size) <= size * (size + BLOCK) / 2
    assert torch.equal(held.dense(), whole) and held.dense().dtype == torch.float64
    assert torch.equal(held.diagonal, whole.diagonal())
    assert torch.equal(Symmetric.of(whole).dense(), whole)
    assert torch.equal(held.times(weight), weight @ whole)
    assert held.quadratic(weight) == (weight @ whole * weight).sum()
    minus = held.minus(Symmetric.of(other.T @ other))
    assert torch.equal(minus.dense(), whole - other.T @ other)
    for index in (torch.arange(0, size, 2), torch.arange(size - 1, size), torch.randperm(size)):
        chosen = held.restricted(index)
        assert torch.equal(chosen.dense(), whole[index[:, None], index])
        assert torch.equal(chosen.times(weight[:, index]), weight[:, index] @ chosen.dense())


@pytest.mark.parametrize(("dtype", "same"), [(torch.float64, True), (torch.float32, False)])
def test_in_fp64_the_order_of_the_updates_does_not_matter(dtype, same):
    """As if other processes had made some of them; greedy choices hang on the last bits."""
    generator = torch.Generator().manual_seed(0)
    chunks = [
        (torch.randn(50, 30, generator=generator), torch.randn(50, 4, generator=generator))
        for _ in range(9)
    ]
    forward, backward = (GramStats.zeros(30, outputs=4, dtype=dtype) for _ in range(2))
    for stats, order in ((forward, chunks), (backward, chunks[::-1])):
        for x, y in order:
            stats.update_(x, y)
    for name in ("gram", "total", "cross", "target_total"):
        sums, others = getattr(forward, name), getattr(backward, name)
        assert sums.dtype == dtype
        worst = ((sums - others).abs().max() / sums.abs().max()).item()
        assert (worst < 1e-14) == same


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_activation_is_found_and_the_group_named(value):
    x = torch.randn(6, 5)
    stats_of(x).check_finite("layers.3.mlp")
    x[4, 2] = value
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp.* 1 of 5 channels"):
        stats_of(x).check_finite("layers.3.mlp")


def well_conditioned(size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(8 * size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.T @ x


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    identity = torch.eye(gram.shape[0], dtype=gram.dtype)
    return gram + damping * gram.diagonal().mean() * identity


@pytest.fixture
def warnings(caplog):
    """The messages logged so far."""
    caplog.set_level(logging.WARNING, "grail_hf")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0, 10.0])
def test_a_definite_gram_gets_the_damping_asked(dtype, damping, warnings):
    gram = well_conditioned(12, dtype)
    before = gram.clone()
    factor, used = damped_cholesky(gram.clone, damping, "layers.3.mlp")
    assert used == damping
    assert factor.dtype == dtype
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, damped(gram, damping))
    assert torch.equal(gram, before)
    assert not warnings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_a_singular_gram_gets_more_damping_and_says_so(dtype, tokens, warnings):
    x = torch.randn(tokens, 10, generator=torch.Generator().manual_seed(tokens), dtype=dtype)
    gram = x.T @ x
    factor, used = damped_cholesky(gram.clone, 0.0, "layers.3.mlp")
    # Enough for the factor to be above rounding, not much more.
    eps = torch.finfo(dtype).eps
    assert eps <= used <= 1e3 * eps
    torch.testing.assert_close(factor @ factor.T, damped(gram, used))
    (message,) = warnings()
    assert "layers.3.mlp" in message
    assert f"damping {0:g};" in message
    assert f"{used:g}" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pivot_of_rounding_counts_as_singular(dtype):
    """The factorisation passes, but a solve would divide by nothing but rounding."""
    eps = torch.finfo(dtype).eps
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + eps]], dtype=dtype)
    assert torch.linalg.cholesky_ex(gram).info == 0
    assert damped_cholesky(gram.clone, 0.0, "layers.3.mlp")[1] > 0


def test_damping_that_suffices_for_a_singular_gram_is_not_raised(warnings):
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert damped_cholesky((x.T @ x).clone, 1e-4, "layers.3.mlp")[1] == 1e-4
    assert not warnings()


def test_channels_of_unlike_size_need_no_more_damping(warnings):
    """fp32, and one channel with 1e8 times the energy: scaling channels makes nothing singular."""
    gram = torch.eye(64)
    gram[0, 0] = 1e8
    factor, used = damped_cholesky(gram.clone, 1e-4, "layers.3.mlp")
    assert used == 1e-4
    torch.testing.assert_close(factor @ factor.T, damped(gram, used))
    assert not warnings()


@pytest.mark.parametrize("damping", [0.0, 1e-4, 10.0])
def test_channels_all_dead_get_the_identity(damping, warnings):
    dead = torch.zeros(5, 5, dtype=torch.float64)
    factor, _ = damped_cholesky(dead.clone, damping, "layers.3.mlp")
    assert torch.allclose(factor, factor[0, 0] * torch.eye(5, dtype=torch.float64))
    assert factor[0, 0] >= 1
    assert not warnings()


@pytest.mark.parametrize("damping", [0.0, 3e-4, 1e-4, 0.5])
def test_damping_is_raised_as_far_as_one(damping):
    """Smallest eigenvalue minus half the mean diagonal: what the docstring's limit still holds."""
    gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    factor, used = damped_cholesky(gram.clone, damping, "layers.3.mlp")
    assert 0.5 < used <= 1
    torch.testing.assert_close(factor @ factor.T, damped(gram, used))


@pytest.mark.parametrize(
    "gram",
    [
        torch.diag(torch.tensor([1.0, -5.0])),
        -torch.eye(3),
        torch.tensor([[1.0, 3.0], [3.0, 1.0]]),
        torch.full((2, 2), float("nan")),
    ],
)
@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_what_is_no_gram_is_refused(gram, damping):
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp"):
        damped_cholesky(gram.double().clone, damping, "layers.3.mlp")


def test_targets_are_summed_beside_the_inputs():
    """Integers, so exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 8, (30, 5), generator=generator).float()
    y = torch.randint(-8, 8, (30, 3), generator=generator).float()
    stats = GramStats.zeros(5, outputs=3)
    stats.update_(x[:11], y[:11])
    stats.update_(x[11:], y[11:])
    assert torch.equal(stats.cross, y.T @ x)
    assert torch.equal(stats.target_total, y.sum(0))
    assert torch.equal(stats.gram, x.T @ x)
    assert stats.target_energy == y.square().sum().item()
    weight = torch.ones(3, 5)
    assert torch.equal(stats.cross_of(weight), y.T @ x)
    stats.cross = None
    assert torch.equal(stats.cross_of(weight), weight @ (x.T @ x))


@pytest.mark.parametrize("targeted", [False, True])
def test_moments_about_a_point_are_those_of_the_moved_tokens(targeted):
    """Integers, so exactly."""
    generator = torch.Generator().manual_seed(0)
    x, y, at_x, at_y = (
        torch.randint(-8, 8, shape, generator=generator).float()
        for shape in ((30, 5), (30, 3), (5,), (3,))
    )
    stats, moved = (GramStats.zeros(5, outputs=3 if targeted else None) for _ in range(2))
    stats.update_(x, y if targeted else None)
    moved.update_(x - at_x, y - at_y if targeted else None)
    about = stats.about(at_x, at_y)
    for name in ("gram", "total", "count", "cross", "target_energy", "target_total"):
        one, other = getattr(about, name), getattr(moved, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 3, BLOCK, BLOCK + 1, 2 * BLOCK + 100])
def test_an_inverse_is_that_of_the_factorised_matrix_and_in_its_place(size, device):
    x = torch.randn(2 * size + 3, size, dtype=torch.float64, device=device)
    gram = x.T @ x
    for dtype in (torch.float32, torch.float64):
        factor, _ = damped_cholesky(gram.to(dtype).clone, 0.0, "layers.3.mlp")
        inverse = cholesky_inverse_(factor)
        assert inverse.data_ptr() == factor.data_ptr() and inverse.is_contiguous()
        identity = torch.eye(size, dtype=dtype, device=device)
        error = (inverse.to(gram) @ gram - identity).norm() / size**0.5
        assert error < 100 * torch.linalg.cond(gram) * torch.finfo(dtype).eps
        assert (inverse - inverse.T).norm() <= 1e-6 * inverse.norm()


def test_an_inverse_takes_a_block_row_of_memory_beside_its_matrix():
    """Where torch reports what it allocates inside of an operator, as on a CPU."""
    size = 4 * BLOCK
    x = torch.randn(2 * size, size)
    factor, _ = damped_cholesky((x.T @ x).clone, 0.0, "layers.3.mlp")
    copied = peak(lambda: factor.clone())
    assert copied == size**2 * 4, "a copy is seen"
    assert peak(lambda: cholesky_inverse_(factor)) <= (BLOCK * size + 2 * BLOCK**2) * 4


def peak(function) -> int:
    """The most bytes that a function holds at a time, beside what there was."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_a_sum_of_products_is_read_from_the_device_once(rows):
    """And added in fp64 by the host: in fp32 the small summands after the first would be lost."""
    wide, other = torch.full((rows, 3), 0.5), torch.ones(rows, 3, dtype=torch.bfloat16)
    wide[:64] = 2.0**24
    with HostReads() as reads:
        found = sum_of_products(wide, other)
    assert reads.names == ["tolist"]
    assert found == 3 * (min(rows, 64) * 2**24 + max(rows - 64, 0) / 2)


def test_two_half_precision_terms_are_nearly_as_exact_as_fp32():
    """Each term leaves 2^-8 of what the one before it left."""
    y = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -20, 20, 1000
    )
    high, low = in_two_terms(y)
    assert {high.dtype, low.dtype} == {torch.bfloat16}
    assert ((high.double() + low.double() - y).abs() <= 2.0**-16 * y.abs()).all()
    assert ((high.double() - y).abs() > 2.0**-10 * y.abs()).any()
