"""The ridge solves that repair a consumer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grail_hf.gram import damped_cholesky


class RidgeMap(NamedTuple):
    """B [K, P], from the kept channels to the removed ones, and the damping that it took."""

    matrix: Tensor
    damping: float


def ridge(
    gram: Tensor, kept: Tensor, removed: Tensor, damping: float, name: str = "the group"
) -> RidgeMap:
    """The linear map from the kept channels to the removed ones that calibration supports best.

    Minimises ||X_S B - X_P||^2 + d ||B||^2 over B, with d = damping * mean(diag G_SS):

        B = (G_SS + d I)^-1 G_SP

    (GRAIL, arXiv 2602.23795, with the kept columns' own map held at the identity rather than
    shrunk, so that damping pulls towards plain pruning and never towards zero output.)

    Args:
        gram: [H, H], X^T X of the consumer's inputs, fp32 or fp64.
        kept: [K] int64, S.
        removed: [P] int64, P.
        damping: relative to the mean diagonal, >= 0.
        name: of the group, for messages.

    Returns:
        B in the Gram's dtype. More damping than asked is used, with a warning, where the Gram
        is singular (`damped_cholesky`).

    Raises:
        FloatingPointError: no damping up to 1 makes G_SS positive definite.
    """
    factor, used = damped_cholesky(gram[kept[:, None], kept], damping, name)
    return RidgeMap(torch.cholesky_solve(gram[kept[:, None], removed], factor), used)


def reconstruction_error(
    weight: Tensor, gram: Tensor, kept: Tensor, removed: Tensor, matrix: Tensor | None
) -> float:
    """||X W^T - X_S W'^T||^2 / ||X W^T||^2 on the calibration tokens.

    Args:
        weight: [O, H], W.
        gram: [H, H], X^T X.
        kept, removed: [K], [P] int64.
        matrix: [K, P], B of W' = W_S + W_P B^T; None for plain pruning.
    """
    weight = weight.to(gram.dtype)
    difference = torch.zeros_like(weight)
    difference[:, removed] = weight[:, removed]
    if matrix is not None:
        difference[:, kept] = -weight[:, removed] @ matrix.T
    energy = _energy(weight, gram)
    return (_energy(difference, gram) / energy).item() if energy > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    """||X W^T||^2 = tr(W G W^T); rounding may take an exact zero below it."""
    return torch.sum((weight @ gram) * weight).clamp_min(0)
