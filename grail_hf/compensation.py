"""The ridge solve that repairs a consumer."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grail_hf.gram import GramStats, damped_cholesky
from grail_hf.reduction import Reduction


class Repair(NamedTuple):
    """A consumer's new weight [O, K], and the damping that it took."""

    weight: Tensor
    damping: float


def ridge(
    weight: Tensor, stats: GramStats, kept: Tensor, damping: float, name: str = "the group"
) -> Repair:
    """The weight on the kept channels that calibration supports best.

    Minimises ||Y - X_S V^T||^2 + d ||V - W_S||^2 over V, with d = damping * mean(diag G_SS):

        V = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1,    C = Y^T X, G = X^T X

    Where the target is the consumer's own output, Y = X W^T, this is V = W_S + W_P B^T with
    B = (G_SS + d I)^-1 G_SP (GRAIL, arXiv 2602.23795), except that damping pulls towards plain
    pruning and not towards zero output.

    Args:
        weight: [O, H], W, in the dtype of the statistics.
        stats: of the consumer's inputs and targets, fp32 or fp64.
        kept: [K] int64, S.
        damping: relative to the mean diagonal, >= 0.
        name: of the group, for messages.

    Returns:
        V. More damping than asked is used, with a warning, where the Gram is singular
        (`damped_cholesky`).
    """
    gram = stats.gram[kept[:, None], kept]
    missing = stats.cross_of(weight)[:, kept] - weight[:, kept] @ gram
    factor, used = damped_cholesky(gram, damping, name)
    return Repair(weight[:, kept] + torch.cholesky_solve(missing.mT, factor).mT, used)


def reconstruction_error(weight: Tensor, new: Tensor, stats: GramStats, kept: Tensor) -> float:
    """||Y - X_S V^T||^2 / ||Y||^2 on the calibration tokens.

    Args:
        weight: [O, H], W, the dense consumer, in the dtype of the statistics.
        new: [O, K], V.
        stats: of the consumer's inputs and targets.
        kept: [K] int64, S.
    """
    cross = stats.cross_of(weight)
    energy = (
        (cross * weight).sum() if stats.cross is None else cross.new_tensor(stats.target_energy)
    )
    fitted = new @ stats.gram[kept[:, None], kept] - 2 * cross[:, kept]
    error = energy + (fitted * new).sum()
    # Rounding may take an exact zero below it.
    return (error.clamp_min(0) / energy).item() if energy > 0 else 0.0


def error_curve(
    weight: Tensor, stats: GramStats, order: Tensor, damping: float, name: str = "the group"
) -> Tensor:
    """[H + 1]: entry k is what repair leaves of ||X W^T||^2 when the first k channels are kept.

    In the given order, let G + d I = L L^T. The trailing block of L is a Cholesky factor of the
    Schur complement of the kept channels, so one factorisation serves every k:

        E_k = sum_{j >= k} ||(W L)_j||^2

    This is the error of the repaired consumer, up to what the damping adds, for the target "self".

    Args:
        weight: [O, H], W, in the dtype of the statistics.
        stats: of the consumer's inputs, fp32 or fp64.
        order: [H] int64, the channel that is kept longest first.
        damping: relative to the mean diagonal, >= 0.
        name: of the group, for messages.
    """
    factor, _ = damped_cholesky(stats.gram[order[:, None], order], damping, name)
    lost = (weight[:, order] @ factor).square().sum(dim=0)
    return torch.cat([lost.flip(0).cumsum(dim=0).flip(0), lost.new_zeros(1)])


def fold_linearly(
    weight: Tensor, stats: GramStats, reduction: Reduction, columns: int
) -> GramStats:
    """The statistics [K] after a fold, as if averaging producers averaged what they put out.

    With R [K, H] the mean over each cluster, Z = X R^T, and so Z^T Z = R G R^T, Y^T Z = C R^T: the
    form in which GRAIL (arXiv 2602.23795) folds, B = G R^T (R G R^T + d I)^-1. It holds for a
    projection alone; behind a gate or an attention it is an approximation.

    Args:
        weight: [O, H], W, the dense consumer, in the dtype of the statistics.
        stats: of the consumer's inputs and targets before the fold.
        reduction: that folds.
        columns: that a unit owns.
    """

    def mean(x: Tensor) -> Tensor:
        return reduction.of_producer(x, columns)

    cross = stats.cross_of(weight)
    energy = (cross * weight).sum().item() if stats.cross is None else stats.target_energy
    return replace(
        stats,
        gram=mean(mean(stats.gram).mT),
        total=mean(stats.total),
        cross=mean(cross.mT).mT,
        target_energy=energy,
    )
