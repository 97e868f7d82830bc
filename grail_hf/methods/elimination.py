"""Greedy elimination of units: remove the cheapest unit, given those removed before it.

Eliminating channel j, with r = P_j / sqrt(P_jj), q = W_j / sqrt(P_jj) and c = q^T W, changes

    P by -r^T r,   W by -q r,   S = W^T W by -(r^T d + d^T r),   where d = c - (q^T q) r / 2,

and a unit's channels are eliminated one after the other. A panel of eliminations takes three steps:

1. The host finds them among the candidates, the units that are cheapest at the start, from their
   part of P and S alone.
2. R and D, whose rows are r and d, give the cost of every unit at every step. Where another unit
   was cheaper than the one chosen, the panel ends, so that the order is exact.
3. P and W change by -R^T R and -Q R: matrix products, as in a blocked Cholesky factorisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_hf.methods.reduction import expand_units

# Measured on MLPs of 1536 channels, real ones, and on random ones of up to 4096. Fewer candidates
# end panels early; wider panels take the host longer.
PANEL = 96
# Candidates for each step after the first.
CANDIDATES = 3
# Rows of a matrix that are squared at a time.
ROWS_AT_ONCE = 64


def elimination_order_(
    weight: Tensor,
    inverse: Tensor,
    columns: int,
    partitions: int = 1,
    panel: int = PANEL,
    width: int = 0,
) -> Tensor:
    """Overwrite W and P to find the order in which greedy elimination removes the units.

    For H channels and O outputs this takes about (2/3) H^3 + 2 O H^2 operations in products of
    panel width. The host waits for the device once a panel.

    Args:
        weight: [O, H], W, fp32 or fp64.
        inverse: [H, H], P, the inverse of the damped Gram, in the same dtype.
        columns: C, columns that a unit owns.
        partitions: no partition loses its (n+1)-th unit before every other has lost its n-th.
        panel: channels whose elimination is applied to W and P in one matrix product each.
        width: units that are not removed.

    Returns:
        [units - width] int64, the units from the first removed to the last.

    Raises:
        FloatingPointError: a cost is not finite.
    """
    units = torch.arange(weight.shape[1] // columns)
    run = units // (units.numel() // partitions)
    lost = torch.zeros(partitions, dtype=torch.int64)
    steps = max(1, panel // columns)
    # A partition may have its turn once more than its share of the steps after the first.
    each = 1 - (-CANDIDATES * (steps - 1) // partitions)
    remaining = _Remaining(weight, inverse, columns, run)
    order, chosen = [], units[:0]
    while True:
        joint, candidates, gone = _on_host(*remaining.candidates(each))
        candidates, left = candidates.long(), gone == 0
        count = int(left.sum())
        order.append(units[chosen[: len(units) - count]])
        lost += run[order[-1]].bincount(minlength=partitions)
        if count == width:
            return torch.cat(order).to(weight.device)
        may_go = left[candidates]
        may_go[1:] &= candidates[1:] != candidates[:-1]
        most = min(steps, count - width)
        found, turns, whitening = _greedy(joint, may_go, run[units[candidates]], lost, most)
        # The last units move to the places of those gone, so that all that are left come first.
        holes = (~left[:count]).nonzero().flatten()
        movers = left[count:].nonzero().flatten() + count
        place = torch.arange(len(units))
        place[movers] = holes
        units[holes] = units[movers]
        units, chosen = units[:count], place[candidates[found]]
        remaining.move_(holes, movers, count)
        remaining.eliminate_(chosen, turns, whitening)


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Copy to the host, as the fp64 of the first tensor's numbers, in one transfer."""
    flat = torch.cat([tensor.flatten().to(tensors[0].dtype) for tensor in tensors]).cpu().double()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _greedy(
    joint: Tensor, may_go: Tensor, run: Tensor, lost: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy elimination of up to `steps` units among the candidates alone.

    [P S] is not changed: R and D hold what has to be subtracted, and only the row of the channel
    that is eliminated, and the diagonal blocks, are brought up to date. These are small operations,
    for which NumPy takes a fourth of torch's time.

    Args:
        joint: [m, 2 m], P and S of the candidates' channels, fp64.
        may_go: [candidates] bool; the others are left alone.
        run: [candidates], the partition of each.
        lost: [partitions], the units that each has lost before.
        steps: at least 1.

    Returns:
        [n] the candidates that are eliminated, in order; [n, partitions] bool, those whose turn it
        was; and [n C, n C], the inverse of the lower Cholesky factor of their P.

    Raises:
        FloatingPointError: the first cost is not finite, or the first P is not positive definite.
    """
    size, columns = len(joint), len(joint) // len(may_go)
    p_and_s, run_of = joint.numpy(), run.numpy()
    p_blocks = diagonal_blocks(joint[:, :size], columns).numpy()
    s_blocks = diagonal_blocks(joint[:, size:], columns).numpy()
    factors = np.empty((steps * columns, 2 * size))  # [R D]
    left, lost_by = may_go.numpy().copy(), lost.numpy().copy()
    found: list[int] = []
    turns = []
    filled = 0
    with np.errstate(all="ignore"):  # units that are gone, and lost precision
        while len(found) < steps and left.any():
            turn = lost_by == lost_by.min()
            costs = np.where(left & turn[run_of], _costs(p_blocks, s_blocks), np.inf)
            unit = int(costs.argmin())
            if not np.isfinite(costs[unit]):
                break
            for channel in range(unit * columns, (unit + 1) * columns):
                past, row = factors[:filled], factors[filled]
                r, d = row[:size], row[size:]
                np.subtract(p_and_s[channel], past[:, channel] @ past, out=row)
                d -= past[:, size + channel] @ past[:, :size]
                row /= np.sqrt(r[channel])
                d -= d[channel] / (2 * r[channel]) * r
                by_unit = r.reshape(-1, 1, columns)
                p_blocks -= by_unit.swapaxes(1, 2) * by_unit
                # Not symmetric, but its trace with the symmetric P is.
                s_blocks -= 2 * d.reshape(-1, columns, 1) * by_unit
                filled += 1
            left[unit] = False
            lost_by[run_of[unit]] += 1
            found.append(unit)
            turns.append(torch.from_numpy(turn))
    chosen = torch.tensor(found, dtype=torch.int64)
    factor = torch.from_numpy(factors[:filled])[:, expand_units(chosen, columns)].mT
    sound = int(factor.diagonal().isfinite().sum()) // columns
    if sound == 0:
        raise FloatingPointError("greedy elimination lost its precision: use more damping")
    factor = factor[: sound * columns, : sound * columns]
    eye = torch.eye(len(factor), dtype=factor.dtype)
    whitening = torch.linalg.solve_triangular(factor, eye, upper=False)
    return chosen[:sound], torch.stack(turns[:sound]), whitening


def _costs(p_blocks: NDArray[Any], s_blocks: NDArray[Any]) -> NDArray[Any]:
    """`traces` of arrays, without the time that torch takes to divide numbers."""
    if p_blocks.shape[1] > 1:
        return traces(torch.from_numpy(p_blocks), torch.from_numpy(s_blocks)).numpy()
    costs: NDArray[Any] = s_blocks / p_blocks
    return costs.ravel()


class _Remaining:
    """W and P of the units that are left, on the device.

    Attributes:
        run: [units], the partition of each unit.
        p_blocks, s_blocks: [units, C, C], P_uu and (W^T W)_uu.
        gone: [units] bool, those eliminated last, whose places are still to be filled.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, columns: int, run: Tensor) -> None:
        self.weight, self.inverse, self.columns = weight, inverse, columns
        self.run = run.to(weight.device, copy=True)
        self.partitions = torch.arange(int(run[-1]) + 1, device=weight.device)
        self.gone = torch.zeros_like(self.run, dtype=torch.bool)
        self._read_blocks()

    def _read_blocks(self) -> None:
        self.p_blocks = diagonal_blocks(self.inverse, self.columns)
        self.s_blocks = gram_blocks(self.weight, self.columns)

    def candidates(self, each: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cheapest units, `each` of every partition.

        Returns [P S] of their channels; their indices, ascending, with others and repetitions
        where a partition has fewer; and `gone`.
        """
        costs = traces(self.p_blocks, self.s_blocks)
        costs = torch.where(costs.isnan(), -torch.inf, costs)  # chosen first, and then refused
        own = (self.run == self.partitions[:, None]) & ~self.gone
        by_cost = torch.where(own, costs, torch.inf).sort(dim=1, stable=True).indices
        units = by_cost[:, :each].flatten().sort().values
        channels = expand_units(units, self.columns)
        part = self.weight[:, channels]
        joint = torch.cat([self.inverse[channels[:, None], channels], part.mT @ part], dim=1)
        return joint, units, self.gone

    def move_(self, holes: Tensor, movers: Tensor, count: int) -> None:
        """Overwrite the units `holes` by the units `movers`, and keep the first `count` units."""
        holes, movers = holes.to(self.run.device), movers.to(self.run.device)
        for values in (self.run, self.p_blocks, self.s_blocks):
            values[holes] = values[movers]
        self.run = self.run[:count]
        self.p_blocks, self.s_blocks = self.p_blocks[:count], self.s_blocks[:count]
        onto, moved = expand_units(holes, self.columns), expand_units(movers, self.columns)
        rows = self.inverse[moved]
        rows[:, onto] = rows[:, moved]
        self.inverse[onto], self.inverse[:, onto] = rows, rows.mT
        self.weight[:, onto] = self.weight[:, moved]
        size = count * self.columns
        self.inverse, self.weight = self.inverse[:size, :size], self.weight[:, :size]

    def eliminate_(self, chosen: Tensor, turns: Tensor, whitening: Tensor) -> None:
        """Eliminate the units `chosen`, up to the first that is not the cheapest at its step.

        Args:
            chosen: [n], in order.
            turns: [n, partitions] bool, those whose turn it is at each step.
            whitening: [n C, n C], the inverse of the lower Cholesky factor of their P.
        """
        chosen = chosen.to(self.run.device)
        whitening = whitening.to(self.weight.dtype).to(self.run.device)
        own = expand_units(chosen, self.columns)
        rows = whitening @ self.inverse[own]
        outputs = self.weight[:, own] @ whitening.mT
        exact = self._exact(rows, outputs, chosen, turns.to(self.run.device)[:, self.run])
        rows.masked_fill_(~exact.repeat_interleave(self.columns)[:, None], 0)
        self.inverse.addmm_(rows.mT, rows, alpha=-1)
        self.weight.addmm_(outputs, rows, alpha=-1)
        self.gone = torch.zeros_like(self.run, dtype=torch.bool)
        self.gone[chosen] = exact
        self._read_blocks()

    def _exact(self, rows: Tensor, outputs: Tensor, chosen: Tensor, turns: Tensor) -> Tensor:
        """[n] bool: up to this step, no unit was cheaper than the one chosen, beyond rounding.

        Args:
            rows, outputs: R [n C, H] and Q [O, n C].
            chosen: [n], in order.
            turns: [n, units] bool, the units that may be chosen at each step, if they are left.
        """
        steps = torch.arange(len(chosen), device=chosen.device)
        inner = outputs.mT @ outputs
        d_rows = outputs.mT @ self.weight - (inner.tril() - inner.diag().diag() / 2) @ rows
        # What has changed before every step but the first.
        r, d = (part.view(len(chosen), self.columns, -1, self.columns) for part in (rows, d_rows))
        p_blocks = self.p_blocks - _block_products(r[:-1], r[:-1]).cumsum(dim=0)
        s_blocks = self.s_blocks - _block_products(r[:-1], d[:-1]).cumsum(dim=0).mul_(2)
        costs = traces(p_blocks, s_blocks)
        bound = costs.gather(1, chosen[1:, None])
        bound = bound - bound.abs() * torch.finfo(costs.dtype).eps ** 0.5
        taken = torch.full_like(self.run, len(chosen))
        taken[chosen] = steps
        cheaper = (costs < bound) & turns[1:] & (taken >= steps[1:, None])
        return torch.cat([steps[:1] == 0, ~cheaper.any(dim=1)]).cumprod(dim=0).bool()


def _block_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right within each unit: [n, C, units, C] twice to [n, units, C, C]."""
    if left.shape[1] == 1:
        return (left * right).movedim(1, -1)
    return left.movedim(2, 1).mT @ right.movedim(2, 1)


def elimination_operations(channels: int, outputs: int, kept: int = 0) -> float:
    """Floating-point operations of `elimination_order_` until `kept` channels are left.

    That is where no panel is cut short.
    """
    updates = 2 / 3 * (channels**3 - kept**3) + 2 * outputs * (channels**2 - kept**2)
    return updates + 2 * CANDIDATES**2 * PANEL * outputs * (channels - kept)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[H, H] to its [H // size, size, size] diagonal blocks, copied."""
    count = matrix.shape[0] // size
    blocks = matrix.reshape(count, size, count, size).diagonal(dim1=0, dim2=2)
    return blocks.movedim(-1, 0).clone()


def gram_blocks(weight: Tensor, columns: int) -> Tensor:
    """(W^T W)_uu for every unit: [O, H] to [H // columns, columns, columns]."""
    blocks = weight.new_zeros(weight.shape[1] // columns, columns, columns)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE]
        if columns == 1:
            blocks += part.square().sum(dim=0)[:, None, None]
        else:
            by_unit = part.reshape(len(part), -1, columns).movedim(1, 0)
            blocks.baddbmm_(by_unit.mT, by_unit)
    return blocks


def traces(p_blocks: Tensor, s_blocks: Tensor) -> Tensor:
    """tr(P_uu^-1 (W^T W)_uu) for every unit: [..., C, C] twice to [...]."""
    if p_blocks.shape[-1] == 1:
        return (s_blocks / p_blocks).flatten(-3)
    ratio: Tensor = torch.linalg.solve_ex(p_blocks, s_blocks).result
    return ratio.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
