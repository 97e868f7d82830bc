"""The ridge solve that repairs a consumer, and the choice of its damping.

Damping is relative: a damping of d adds d * mean(diag G) to the diagonal of the Gram matrix G of
the solve. `GrailConfig.ridge` is the damping of a repair, or "auto" to choose it on held-out
tokens. Infinite damping means no repair, which is plain pruning or folding.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import (
    Symmetric,
    cholesky_solve_,
    damped_cholesky,
    products,
    sound_cholesky_,
    sum_of_products,
)
from grail_hf.methods.reduction import Reduction

logger = logging.getLogger(__name__)

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Rows of a weight that are solved at a time while dampings are tried.
ROWS_TRIED = 512


class Repair(NamedTuple):
    """A consumer's new weight [O, K], the damping that was used, and what is added to its bias [O].

    The damping is None if nothing was solved.
    """

    weight: Tensor
    damping: float | None = None
    bias: Tensor | None = None

    def stored_as(self, dtype: torch.dtype) -> Repair:
        """The same with the weight in the dtype in which the model holds it."""
        return self._replace(weight=self.weight.to(dtype))


def ridge(
    weight: Tensor,
    stats: GramStats,
    kept: Tensor | None,
    damping: float | str,
    name: str = "the group",
    intercept: bool = False,
    least: float = 0.0,
) -> Repair:
    """Repair a consumer: the weight on the kept channels that fits the calibration targets best.

    Minimises ||Y - X_S V^T||^2 + d ||V - W_S||^2 over V, with d = damping * mean(diag G_SS):

        V = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1,    C = Y^T X, G = X^T X

    If the target is the consumer's own output, Y = X W^T, and P are the removed channels, this is
    V = W_S + W_P B^T with B = (G_SS + d I)^-1 G_SP (GRAIL, arXiv 2602.23795), except that damping
    pulls towards plain pruning and not towards zero output.

    In fp32 the solution is not refined: residuals that are computed in fp32 too, from the Gram that
    was rounded to it, leave the distance to the fp64 solution between 0.8 and 1.6 times what it was
    (K = 256 and 1024, condition numbers of 1e2 to 1e6).

    Args:
        weight: [O, H], W, in the dtype of the statistics.
        stats: of the consumer's inputs and targets, fp32 or fp64.
        kept: [K] int64, S; None for all channels, which needs a cross moment.
        damping: >= 0 and possibly infinite. "auto" chooses it, and whether there is an intercept,
            on the held-out tokens (`choose_damping`), and fits to all tokens.
        name: of the group, for messages.
        intercept: fit Y - X_S V^T - 1 b^T. V is computed from moments about the means, to which
            the damping is relative, and the bias b = mean y - V mean x_S is not damped.
        least: lower bound of the damping.

    Returns:
        V, and b if there is an intercept. If the Gram is singular, `damped_cholesky` uses more
        damping, with a warning.
    """
    if kept is not None:
        stats, weight = stats.restricted(kept, weight), weight[:, kept]
    if isinstance(damping, str):
        damping, intercept, _ = choose_damping(weight, stats, intercept=intercept)
    damping = max(damping, least)
    if intercept:
        x, y = stats.mean, stats.target_total_of(weight) / stats.count
        repair = ridge(weight, stats.about(x, y), None, damping, name)
        return repair._replace(bias=y - repair.weight @ x)
    if math.isinf(damping):
        return Repair(weight, damping)
    missing = stats.missing_of(weight)
    factor, used = damped_cholesky(stats.moments.dense, damping, name)
    return Repair(cholesky_solve_(missing, factor).add_(weight), used)


def ridge_within(
    dtype: torch.dtype,
    weight: Tensor,
    stats: GramStats,
    damping: float | str,
    name: str,
    intercept: bool = False,
    least: float = 0.0,
) -> Repair:
    """`ridge` on all channels, with a result in the range of `dtype`.

    While the result overflows, as it may in float16, damping grows tenfold, up to plain pruning,
    which leaves W_S as it is. A warning names the group.
    """
    repair = ridge(weight, stats, None, damping, name, intercept, least)
    overflows = False
    while not _fits(repair, dtype):
        overflows, used = True, repair.damping or torch.finfo(stats.dtype).eps
        if used >= DAMPINGS[-1]:
            repair = Repair(weight, math.inf)
            break
        repair = ridge(weight, stats, None, 10 * used, name, repair.bias is not None)
    if overflows:
        logger.warning(
            "the repaired %s overflows %s; solved with damping %g instead: bfloat16 and float32 "
            "have the range",
            *(name, dtype, repair.damping),
        )
    return repair


def _fits(repair: Repair, dtype: torch.dtype) -> bool:
    """Whether a repair is within the range of `dtype` and has no NaN."""
    largest = torch.finfo(dtype).max
    return all(
        bool(extreme.abs() <= largest)
        for part in (repair.weight, repair.bias)
        if part is not None
        for extreme in part.aminmax()
    )


def choose_damping(
    weight: Tensor, stats: GramStats, kept: Tensor | None = None, intercept: bool = False
) -> tuple[float, bool, float]:
    """The damping in `DAMPINGS`, or infinity, of least error on the held-out tokens.

    With the moments G, C of the tokens that are not held out, and G', C', E' of the held-out ones,
    it minimises over d

        (E' - 2 tr(V C'^T) + tr(V G' V^T)) / E',    V = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1

    where d is relative to mean(diag G_SS). Infinity is V = W_S and, without an intercept, plain
    pruning, so the choice is never worse than that on the held-out tokens. Dampings that leave G_SS
    singular are skipped.

    Each damping takes a Cholesky factorisation and its solves, K^3 / 3 + 4 O K^2. One
    eigendecomposition for all of them costs more by itself than the eight factorisations (1.4, 1.9
    and 2.3 times for K = 512, 1024 and 2048, fp64 on one CPU thread) and saves most of the solves:
    with O = 0.74 K, Cholesky takes 1.3, 1.1 and 0.9 times as long in all. It also finds a singular
    Gram by itself.

    Args:
        weight: [O, H], W, in the dtype of the statistics.
        stats: of the consumer's inputs and targets, with a held-out part.
        kept: [K] int64, S; None as in `ridge`.
        intercept: every candidate but plain pruning has an intercept: about the means of the tokens
            that are not held out, the expression above is the error with it.

    Returns:
        The damping, whether it comes with an intercept, and the error, relative to the uncentred
        E'.

    Raises:
        ValueError: no tokens are held out.
    """
    held_out = stats.held_out
    if held_out is None:
        raise ValueError("ridge='auto' needs held-out tokens: collect with hold_out=True")
    if kept is not None:
        held_out = held_out.restricted(kept, weight)
        stats, weight = stats.restricted(kept, weight), weight[:, kept]
    fitted, energy = stats.fitted(), held_out.target_energy
    terms = {(math.inf, False): _error_terms([weight], held_out)}
    if intercept:
        count = max(fitted.count, 1)
        x, y = fitted.total / count, fitted.target_total_of(weight) / count
        fitted, held_out = fitted.about(x, y), held_out.about(x, y)
        terms[math.inf, True] = _error_terms([weight], held_out)
    missing, scale = fitted.missing_of(weight), fitted.energy.mean()
    fitted.cross = None
    for damping in DAMPINGS:
        factor = sound_cholesky_(fitted.moments.dense(), damping * scale)
        if factor is not None:
            pairs = zip(
                torch.split(missing, ROWS_TRIED), torch.split(weight, ROWS_TRIED), strict=True
            )
            parts = (cholesky_solve_(part.clone(), factor).add_(own) for part, own in pairs)
            terms[damping, intercept] = _error_terms(parts, held_out)
        del factor  # before the next one is allocated
    errors = dict(zip(terms, _read(terms.values()), strict=True))
    best = min(errors, key=errors.__getitem__)
    return *best, _relative(errors[best], energy)


def reconstruction_error(
    weight: Tensor,
    new: Tensor,
    stats: GramStats,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
) -> float:
    """||Y - X_S V^T - 1 b^T||^2 / ||Y||^2 on the calibration tokens.

    Args:
        weight: [O, H], W, the dense consumer, in the dtype of the statistics.
        new: [O, K], V.
        stats: of the consumer's inputs and targets.
        kept: [K] int64, S; None as in `ridge`.
        bias: [O], b.
    """
    if kept is not None:
        stats = stats.restricted(kept, weight)
    (error,) = _read([_error_terms([new], stats)])
    if bias is not None:
        shortfall = stats.target_total_of(weight) - new @ stats.total
        error += (bias @ (stats.count * bias - 2 * shortfall)).item()
    return _relative(error, stats.target_energy)


class _ErrorTerms(NamedTuple):
    """||Y - X V^T||^2 = E + sum (tr(V G V^T) - 2 sum(summands of tr(V C^T))), not read yet.

    The sum is over parts of consecutive rows of V, of each of which there is a vector with the
    trace and the summands.
    """

    energy: float
    parts: list[Tensor]


def _error_terms(parts: Iterable[Tensor], stats: GramStats) -> _ErrorTerms:
    """The squared error of V [O, K], given in parts of consecutive rows."""
    assert stats.cross is not None
    terms, start = _ErrorTerms(stats.target_energy, []), 0
    for part in parts:
        cross = stats.cross[start : start + len(part)]
        terms.parts.append(
            torch.cat([stats.moments.quadratic(part).reshape(1), products(part, cross)])
        )
        start += len(part)
    return terms


def _read(every: Collection[_ErrorTerms]) -> list[float]:
    """The squared errors, which the host reads from the device at once.

    Clamped at 0 against rounding.
    """
    vectors = [vector for terms in every for vector in terms.parts]
    numbers = iter(torch.cat(vectors).tolist())
    errors = []
    for error, parts in every:
        for vector in parts:
            trace, *summands = itertools.islice(numbers, len(vector))
            error += trace - 2 * sum(summands)
        errors.append(max(error, 0.0))
    return errors


def _relative(error: float, energy: float) -> float:
    """An error relative to ||Y||^2, clamped at 0 against rounding; 0 without energy."""
    return max(error, 0.0) / energy if energy > 0 else 0.0


def error_curve(
    weight: Tensor, stats: GramStats, order: Tensor, damping: float, name: str = "the group"
) -> Tensor:
    """[H + 1]: entry k is the error after repair, of ||X W^T||^2, if the first k channels are kept.

    In the given order, let G + d I = L L^T. The trailing block of L is a Cholesky factor of the
    Schur complement of the kept channels, so one factorisation gives the error for every k:

        E_k = sum_{j >= k} ||(W L)_j||^2

    This is the error of the repaired consumer, up to what the damping adds, for the target "self".

    Args:
        weight: [O, H], W, in the dtype of the statistics.
        stats: of the consumer's inputs, fp32 or fp64.
        order: [H] int64, channels from the last removed to the first.
        damping: >= 0.
        name: of the group, for messages.
    """
    order = order.to(weight.device)
    factor, _ = damped_cholesky(stats.moments.restricted(order).dense, damping, name)
    lost = (weight[:, order] @ factor).square().sum(dim=0)
    return torch.cat([lost.flip(0).cumsum(dim=0).flip(0), lost.new_zeros(1)])


def fold_linearly(
    weight: Tensor, stats: GramStats, reduction: Reduction, columns: int
) -> GramStats:
    """The statistics [K] after a fold, as if averaging producers averaged their outputs.

    With R [K, H] the mean over each cluster, Z = X R^T, Z^T Z = R G R^T and Y^T Z = C R^T. GRAIL
    (arXiv 2602.23795) folds in this form, B = G R^T (R G R^T + d I)^-1. It is exact if nothing but
    the producers lies between, and an approximation once a gate or attention follows them.

    Args:
        weight: [O, H], W, the dense consumer, in the dtype of the statistics.
        stats: of the consumer's inputs and targets before the fold.
        reduction: one that folds.
        columns: consumer columns that a unit owns.
    """

    def mean(x: Tensor) -> Tensor:
        return reduction.of_producer(x, columns)

    cross = stats.cross_of(weight)
    return GramStats(
        Symmetric.of(mean(mean(stats.gram).mT)),
        mean(stats.total),
        stats.count,
        mean(cross.mT).mT,
        sum_of_products(cross, weight) if stats.cross is None else stats.target_energy,
        stats.target_total_of(weight),
        stats.held_out
        and fold_linearly(
            weight,
            stats.held_out.moved(lambda tensor: tensor.to(weight.device)),
            reduction,
            columns,
        ),
    )
