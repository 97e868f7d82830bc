"""Linear algebra on matrices that may fill the accelerator: triangles, Cholesky, in place.

Methods and functions that end in an underscore overwrite what they are given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_DAMPING_STEP = 10.0
_LARGEST_DAMPING = 1.0
# Rows of moments that are stored, summed and converted at a time.
BLOCK = 256
# Rows of other matrices that are converted at a time.
ROWS_AT_ONCE = 64


def half_square(size: int) -> int:
    """The number of elements that a `Symmetric` [size, size] stores."""
    return _numbers(_ends(size))


def _ends(size: int) -> list[int]:
    """Ends of block rows of `BLOCK` rows each."""
    return [*range(BLOCK, size, BLOCK), size]


def _numbers(ends: Sequence[int]) -> int:
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """Compute fp32 matrix products in fp32 inside the context.

    TF32 and bf16, which a program may allow for speed (`torch.set_float32_matmul_precision`), keep
    10 and 7 bits of the mantissa, and a Gram matrix of such products need not be positive definite.
    The setting applies to the whole process, and is restored after the context.
    """
    # Since torch 2.9 each backend has a setting besides the old one. The old one overwrites them,
    # and cannot be read while they contradict it.
    found: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in found if hasattr(backend, "fp32_precision")]
    each: list[str] = [backend.fp32_precision for backend in backends]
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        for backend, precision in zip(backends, each, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True)
class Symmetric:
    """A symmetric matrix [H, H], stored and summed as block rows of its lower triangle.

    This takes half the memory and half the arithmetic of the full matrix.

    Attributes:
        flat: all block rows in sequence, in one allocation that is freed as a whole.
        ends: last row of each block, exclusive; block row i is [ends[i] - ends[i - 1], ends[i]].
        dtype: of the matrices that are computed from it; `flat` may be stored in a smaller one.
    """

    flat: Tensor
    ends: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def empty(
        cls, ends: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> Symmetric:
        """Uninitialised, with the given block ends."""
        size = _numbers(ends)
        return cls(torch.empty(size, dtype=dtype, device=device), tuple(ends), dtype)

    @classmethod
    def zeros(
        cls,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Symmetric:
        """[size, size], all zero."""
        matrix = cls.empty(_ends(size), dtype, device)
        matrix.flat.zero_()
        return matrix

    @classmethod
    def of(cls, whole: Tensor) -> Symmetric:
        """A copy of a full symmetric matrix [H, H]."""
        matrix = cls.empty(_ends(len(whole)), whole.dtype, whole.device)
        for start, end, rows in matrix.spans:
            rows.copy_(whole[start:end, :end])
        return matrix

    def __len__(self) -> int:
        return self.ends[-1]

    def rounded(self) -> Symmetric:
        """The same matrix, stored in fp32."""
        return replace(self, flat=self.flat.float())

    @property
    def spans(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, end, block row) for the rows from `start` to `end`, which are [rows, :end]."""
        start = place = 0
        for end in self.ends:
            size = (end - start) * end
            yield start, end, self.flat[place : place + size].view(end - start, end)
            start, place = end, place + size

    def converted(self, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """`spans` in `dtype` on a device; each block row overwrites the one before it."""
        if (self.flat.dtype, self.flat.device) == (self.dtype, device):
            yield from self.spans
            return
        size = max(rows.numel() for _, _, rows in self.spans)
        place = torch.empty(size, dtype=self.dtype, device=device)
        for start, end, rows in self.spans:
            yield start, end, place[: rows.numel()].view(rows.shape).copy_(rows)

    def add_products_(self, x: Tensor) -> None:
        """Add X^T X of the tokens x [n, H], with products in fp32 for any dtype of x."""
        x = x if _on_matrix_units(x) else x.float()
        for start, end, rows in self.spans:
            rows += fp32_product(x[:, start:end].T, x[:, :end])

    def dense(self) -> Tensor:
        """[H, H], the full matrix, a new tensor."""
        whole = torch.empty(len(self), len(self), dtype=self.dtype, device=self.flat.device)
        for start, end, rows in self.spans:
            whole[start:end, :end] = rows
            whole[:start, start:end] = rows[:, :start].T
        return whole

    @property
    def diagonal(self) -> Tensor:
        """[H], the diagonal."""
        parts = [rows[:, start:].diagonal() for start, _, rows in self.spans]
        return torch.cat(parts).to(self.dtype)

    def restricted(self, index: Tensor) -> Symmetric:
        """[K, K], the rows and columns `index` [K] int64, on the device of the index."""
        device = index.device
        if (index.diff() <= 0).any():
            return Symmetric.of(self.dense().to(device)[index[:, None], index])
        ends = torch.searchsorted(index, torch.tensor(self.ends, device=device)).tolist()
        part = Symmetric.empty(ends, self.flat.dtype, device)
        for (first, last, mine), (start, _, rows) in zip(part.spans, self.spans, strict=True):
            mine.copy_(rows.to(device)[(index[first:last] - start)[:, None], index[:last]])
        return replace(part, dtype=self.dtype)

    def minus(self, other: Symmetric) -> Symmetric:
        """The difference to a matrix of the same size."""
        return replace(self, flat=self.flat.to(self.dtype, copy=True).sub_(other.flat))

    def plus_outer(self, x: Tensor, y: Tensor, z: Tensor) -> Symmetric:
        """G + x y^T + z x^T, which must be symmetric, for x, y, z [H] in `dtype`."""
        moved = replace(self, flat=self.flat.to(self.dtype, copy=True))
        for start, end, rows in moved.spans:
            rows.addr_(x[start:end], y[:end]).addr_(z[start:end], x[:end])
        return moved

    def times(self, weight: Tensor) -> Tensor:
        """[O, H], W G, for W [O, H] in `dtype`."""
        product = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        for start, end, rows in self.converted(weight.device):
            product[:, start:end].addmm_(weight[:, :end], rows.T)
            product[:, :start].addmm_(weight[:, start:end], rows[:, :start])
        return product

    def quadratic(self, weight: Tensor) -> Tensor:
        """[], tr(W G W^T), for W [O, H] in `dtype`."""
        total = weight.new_zeros(())
        for start, end, rows in self.converted(weight.device):
            own = weight[:, start:end].T
            half = rows[:, :start] @ weight[:, :start].T
            total += ((2 * half).addmm_(rows[:, start:], own) * own).sum()
        return total


def _on_matrix_units(x: Tensor) -> bool:
    """Whether products of two matrices like this one are computed fast and exactly enough.

    Products of half-precision numbers are exact in fp32, so tensor cores on CUDA, which take half
    inputs and accumulate in fp32, lose nothing and are many times as fast as fp32.
    """
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices of one dtype, accumulated in fp32; fp32 too."""
    if _on_matrix_units(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def terms_for(x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [n, H] and y [n, O], as one or two terms in the dtype of x, for products Y^T X.

    Of an fp32 y, two bf16 terms are exact to 2^-16 of it, and two products on matrix units are
    faster than one in fp32. float16 does not have the range.
    """
    if not _on_matrix_units(x) or x.dtype != torch.bfloat16:
        return x.float(), (y.float(),)
    return x, in_two_terms(y)


def in_two_terms(y: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is y, fp32, to 2^-16 of it."""
    high = y.to(torch.bfloat16)
    return high, (y - high.float()).to(torch.bfloat16)


def columns(matrix: Tensor, index: Tensor) -> Tensor:
    """[O, K], the columns `index` [K] of a matrix [O, H], on the device of the index."""
    chosen = matrix.new_empty(len(matrix), len(index), device=index.device)
    for mine, part in zip(torch.split(chosen, BLOCK), torch.split(matrix, BLOCK), strict=True):
        mine.copy_(part.to(index.device)[:, index])
    return chosen


def add_(to: Tensor, other: Tensor, factor: float = 1.0) -> Tensor:
    """Add a matrix of another dtype, times a factor, to `to`, without converting it as a whole."""
    for mine, part in zip(
        torch.split(to, ROWS_AT_ONCE), torch.split(other, ROWS_AT_ONCE), strict=True
    ):
        mine.add_(part, alpha=factor)
    return to


def sum_of_products(wide: Tensor, other: Tensor) -> float:
    """Sum of the elementwise products of two matrices, in the dtype of the first."""
    summands: list[float] = products(wide, other).tolist()
    return sum(summands)


def products(wide: Tensor, other: Tensor) -> Tensor:
    """[ceil(R / `ROWS_AT_ONCE`)], the summands of `sum_of_products` of [R, C], not read yet.

    Each is over so many rows. They stay apart because the host adds them in fp64 for any dtype.
    """
    pairs = zip(torch.split(wide, ROWS_AT_ONCE), torch.split(other, ROWS_AT_ONCE), strict=True)
    return torch.stack([(mine * part.to(mine.dtype)).sum() for mine, part in pairs])


def damped_cholesky(gram: Callable[[], Tensor], damping: float, name: str) -> tuple[Tensor, float]:
    """The lower Cholesky factor of G + d mean(diag G) I, and the d that was used.

    Starts from d = `damping`. While the matrix is singular, for example with fewer tokens than
    channels, d grows tenfold, with a warning that names the group. If all channels are dead, the
    factor is that of the identity.

    Args:
        gram: returns G [H, H], fp32 or fp64, positive semi-definite up to rounding; the factor
            overwrites it.
        damping: relative to the mean diagonal, >= 0.
        name: of the group, for messages.

    Raises:
        FloatingPointError: d = 1 does not suffice, so G is not a Gram matrix.
    """
    system = gram()
    scale = system.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    dead = not system.diagonal().any()
    used = 1.0 if dead else damping
    while (factor := sound_cholesky_(system, used * scale)) is None:
        if used >= _LARGEST_DAMPING:
            raise FloatingPointError(
                f"the Gram of {name} cannot be factorised even with damping {used:g}"
            )
        used = min(max(used * _DAMPING_STEP, torch.finfo(scale.dtype).eps), _LARGEST_DAMPING)
        del system
        system = gram()
    if used > damping and not dead:
        logger.warning(
            "%s: the Gram is singular with damping %g; solved with damping %g", name, damping, used
        )
    return factor, used


def sound_cholesky_(gram: Tensor, shift: Tensor) -> Tensor | None:
    """Overwrite G by the lower Cholesky factor of G + shift I, and return it.

    Returns None if rounding would dominate its solves.

    Args:
        gram: [H, H], fp32 or fp64.
        shift: [], in the Gram's dtype.
    """
    diagonal = gram.diagonal() + shift
    factor, positive = cholesky_(gram, shift)
    # A pivot at the level of rounding, relative to its own channel, passes the factorisation but
    # makes solves meaningless.
    pivots = factor.diagonal().square() / diagonal
    sound = positive & (pivots.min() > 8 * torch.finfo(gram.dtype).eps * len(gram) ** 0.5)
    return factor if sound else None


def cholesky_(gram: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite G [H, H] by the lower Cholesky factor of G + diag(shift), shift [H] or [].

    Returns it, and whether the matrix was positive definite, [] bool; if not, it is not a factor.
    """
    gram.diagonal().add_(shift)
    # LAPACK's matrices are column-major: transposed, the factorisation runs in place.
    factor = gram.mT
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info == 0


def cholesky_solve_(b: Tensor, factor: Tensor, left: bool = False) -> Tensor:
    """Overwrite B [O, H], contiguous, by B (L L^T)^-1, and return it.

    With `left`, by (L L^T)^-1 B for B [H, O].
    """
    for lower in (left, not left):
        half = factor if lower else factor.mT
        torch.linalg.solve_triangular(half, b, upper=not lower, left=left, out=b)
    return b


def cholesky_inverse_(factor: Tensor) -> Tensor:
    """Overwrite a lower factor L [H, H], as `sound_cholesky_` leaves it, by (L L^T)^-1.

    Returns it. LAPACK's potri by block rows, with memory for one more of them: M = L^-1 from the
    top down, then M^T M. Since L is zero above the diagonal, each step is one dense product. On a
    CPU `torch.cholesky_inverse` is in place too, and as fast; on CUDA it copies L and solves
    against the identity, which takes H^2 more numbers and twice the arithmetic.
    """
    size = len(factor)
    buffer = factor.new_empty(min(BLOCK, size) * size)
    spans = [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
    for start, end in spans:
        rows = buffer[: (end - start) * end].view(end - start, end)
        torch.mm(factor[start:end, :start], factor[:start, :start], out=rows[:, :start])
        torch.eye(end - start, out=rows[:, start:]).neg_()
        own = factor[start:end, start:end]
        torch.linalg.solve_triangular(own, rows, upper=False, out=rows)
        torch.neg(rows, out=factor[start:end, :end])
    for start, end in spans:
        rows = buffer[: (end - start) * end].view(end - start, end)
        torch.mm(factor[start:, start:end].mT, factor[start:, :end], out=rows)
        factor[start:end, :end] = rows
        factor[:start, start:end] = rows[:, :start].mT
    return factor.mT
