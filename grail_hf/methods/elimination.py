"""Greedy elimination of units: remove the cheapest unit, given those removed before it."""

from __future__ import annotations

import torch
from torch import Tensor

from grail_hf.methods.reduction import expand_units

PANEL = 128
# Rows of a matrix that are copied at a time.
ROWS_AT_ONCE = 64


def elimination_order_(
    weight: Tensor, inverse: Tensor, columns: int, partitions: int = 1, panel: int = PANEL
) -> Tensor:
    """Overwrite W and P to find the order in which greedy elimination removes the units.

    For H channels and O outputs this takes about (2/3) H^3 + O H^2 operations in products of panel
    width and reads W once per step. The steps of a panel run without waiting for the host.

    Args:
        weight: [O, H], W, fp32 or fp64, contiguous.
        inverse: [H, H], P, the inverse of the damped Gram, in the same dtype, contiguous.
        columns: C, columns that a unit owns.
        partitions: no partition loses its (n+1)-th unit before every other has lost its n-th.
        panel: channels whose elimination is applied to W and P in one matrix product each.

    Returns:
        [units] int64, the units from the first removed to the last.

    Raises:
        FloatingPointError: a cost is not finite.
    """
    alive = torch.arange(weight.shape[1] // columns, device=weight.device)
    run = alive // (alive.numel() // partitions)
    every = torch.arange(partitions, device=weight.device)
    lost = torch.zeros_like(every)
    steps = max(1, panel // columns)
    order = []
    while (count := alive.numel()) > 0:
        pending = _Panel(weight, inverse, columns, min(steps, count))
        for _ in range(min(steps, count)):
            turn = (lost == lost.min())[run] & ~pending.gone
            cost = torch.where(turn, pending.costs, torch.inf)
            unit = cost.argmin()
            pending.remove_(unit)
            lost += every == run[unit]
            order.append(torch.where(cost[unit].isfinite(), alive[unit], -1))
        left = (~pending.gone).nonzero().flatten()
        weight, inverse = pending.applied_(left)
        alive, run = alive[left], run[left]
        del pending  # before the next one is allocated
    result = torch.stack(order)
    if (result < 0).any():
        raise FloatingPointError("greedy elimination lost its precision: use more damping")
    return result


class _Panel:
    """Consecutive eliminations, as factors that are applied to W and P together at the end.

    Eliminating unit u with P_uu = L L^T, r = L^-1 P_u and q = W_u L^-T changes P by -r^T r and W by
    -q r. As in a blocked Cholesky factorisation, the panel collects these factors. Until they are
    applied, only what the choice of a unit needs is kept current: P_uu and (W^T W)_uu.

    Attributes:
        rows, outputs: R [panel, H] and Q [O, panel]; the current P is `inverse` - R^T R, and the
            current W is `weight` - Q R.
        p_blocks, w_blocks: [units, C, C], the current P_uu and (W^T W)_uu.
        gone: [units] bool, the eliminated units.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, columns: int, steps: int) -> None:
        self.weight, self.inverse, self.columns = weight, inverse, columns
        self.rows = weight.new_zeros(steps * columns, weight.shape[1])
        self.outputs = weight.new_zeros(weight.shape[0], steps * columns)
        self.p_blocks = diagonal_blocks(inverse, columns)
        self.w_blocks = gram_blocks(weight, columns)
        self.units = torch.arange(len(self.p_blocks), device=weight.device)
        self.gone = torch.zeros_like(self.units, dtype=torch.bool)
        self.filled = 0

    @property
    def costs(self) -> Tensor:
        """[units], the error that removing each unit would add; meaningless for those gone."""
        return traces(self.p_blocks, self.w_blocks)

    def remove_(self, unit: Tensor) -> None:
        """Eliminate a unit, given by its index [] on the device."""
        columns, rows, outputs = self.columns, self.rows, self.outputs
        own = unit * columns + torch.arange(columns, device=unit.device)
        past, new = slice(0, self.filled), slice(self.filled, self.filled + columns)

        factor = torch.linalg.cholesky_ex(self.p_blocks[unit]).L
        p_rows = self.inverse[own] - rows[past, own].mT @ rows[past]
        row = torch.linalg.solve_triangular(factor, p_rows, upper=False)
        w_columns = self.weight[:, own] - outputs[:, past] @ rows[past, own]
        output = torch.linalg.solve_triangular(factor, w_columns.mT, upper=False).mT
        cross = output.mT @ self.weight - (output.mT @ outputs[:, past]) @ rows[past]

        r = row.reshape(columns, -1, columns).movedim(1, 0)
        rv = r.mT @ cross.reshape(columns, -1, columns).movedim(1, 0)
        self.p_blocks -= r.mT @ r
        self.w_blocks += r.mT @ (output.mT @ output) @ r - rv - rv.mT
        rows[new], outputs[:, new] = row, output
        self.gone |= self.units == unit
        self.filled += columns

    def applied_(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite W and P by those of the units `left`, and return them."""
        keep = expand_units(left, self.columns)
        self.rows = rows = self.rows[:, keep]
        inverse = _compacted_(self.inverse, keep, keep).addmm_(rows.mT, rows, alpha=-1)
        every = torch.arange(len(self.weight), device=left.device)
        weight = _compacted_(self.weight, every, keep).addmm_(self.outputs, rows, alpha=-1)
        return weight, inverse


def elimination_operations(channels: int, outputs: int) -> float:
    """Floating-point operations of `elimination_order_`."""
    return 4 / 3 * channels**3 + 4 * outputs * channels**2


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
        by_unit = part.reshape(len(part), -1, columns).movedim(1, 0)
        blocks.baddbmm_(by_unit.mT, by_unit)
    return blocks


def _compacted_(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move rows and columns, of ascending indices, to the front of a contiguous matrix's memory.

    Returns that front as a matrix. It reads ahead of where it writes.
    """
    front = matrix.view(-1)[: rows.numel() * columns.numel()].view(rows.numel(), columns.numel())
    for start in range(0, len(rows), ROWS_AT_ONCE):
        front[start : start + ROWS_AT_ONCE] = matrix[
            rows[start : start + ROWS_AT_ONCE, None], columns
        ]
    return front


def traces(p_blocks: Tensor, w_blocks: Tensor) -> Tensor:
    """tr(P_uu^-1 (W^T W)_uu) for every unit: [units, C, C] twice to [units]."""
    if p_blocks.shape[-1] == 1:
        return (w_blocks / p_blocks).flatten()
    ratio: Tensor = torch.linalg.solve_ex(p_blocks, w_blocks).result
    return ratio.diagonal(dim1=1, dim2=2).sum(dim=1)
