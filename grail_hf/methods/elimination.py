"""Greedy elimination of units: which one costs least given that those before it are gone."""

from __future__ import annotations

import torch
from torch import Tensor

from grail_hf.methods.reduction import expand_units

PANEL = 128
# Rows of a matrix that are copied at a time.
ROWS_AT_ONCE = 64


def elimination_order_(
    weight: Tensor, inverse: Tensor, columns: int, partitions: int = 1
) -> Tensor:
    """Overwrite W and P to find the order in which greedy elimination removes the units.

    Returns [units] int64, the cheapest first.

    Eliminating unit u with P_uu = L L^T, r = L^-1 P_u and q = W_u L^-T changes P by -r^T r and W
    by -q r. Both changes are kept as factors for a panel of steps and applied to P and W at its
    end in one matrix product each, as a blocked Cholesky factorisation does; in between only
    what the choice needs is kept current: P_uu and (W^T W)_uu for every unit. For H channels and
    O outputs this takes about (2/3) H^3 + O H^2 operations in products of panel width and reads
    W once a step; nothing waits for the host.

    Args:
        weight: [O, H], W, fp32 or fp64, contiguous.
        inverse: [H, H], P, the inverse of the damped Gram, in the same dtype, contiguous.
        columns: C, columns a unit owns.
        partitions: no run loses its (n+1)-th unit before every run has lost its n-th.
    """
    device, panel = weight.device, max(1, PANEL // columns)
    alive = torch.arange(weight.shape[1] // columns, device=device)
    run = alive // (alive.numel() // partitions)
    lost = torch.zeros(partitions, dtype=torch.int64, device=device)
    within = torch.arange(columns, device=device)
    order = []
    while (count := alive.numel()) > 0:
        steps = min(panel, count)
        # P = inverse - rows^T rows and W = weight - outputs rows, during the panel.
        rows = weight.new_zeros(steps * columns, weight.shape[1])
        outputs = weight.new_zeros(weight.shape[0], steps * columns)
        p_blocks = diagonal_blocks(inverse, columns)
        w_blocks = gram_blocks(weight, columns)
        gone = torch.zeros(count, dtype=torch.bool, device=device)
        for step in range(steps):
            turn = (lost == lost.min())[run] & ~gone
            cost = torch.where(turn, traces(p_blocks, w_blocks), torch.inf)
            unit = cost.argmin()
            own = unit * columns + within
            past = slice(0, step * columns)
            new = slice(step * columns, (step + 1) * columns)

            factor = torch.linalg.cholesky_ex(p_blocks[unit]).L
            p_rows = inverse[own] - rows[past, own].mT @ rows[past]
            row = torch.linalg.solve_triangular(factor, p_rows, upper=False)
            w_columns = weight[:, own] - outputs[:, past] @ rows[past, own]
            output = torch.linalg.solve_triangular(factor, w_columns.mT, upper=False).mT
            cross = output.mT @ weight - (output.mT @ outputs[:, past]) @ rows[past]

            r = row.reshape(columns, count, columns).movedim(1, 0)
            rv = r.mT @ cross.reshape(columns, count, columns).movedim(1, 0)
            p_blocks -= r.mT @ r
            w_blocks += r.mT @ (output.mT @ output) @ r - rv - rv.mT

            rows[new], outputs[:, new] = row, output
            gone |= torch.arange(count, device=device) == unit
            lost += torch.arange(partitions, device=device) == run[unit]
            order.append(torch.where(cost[unit].isfinite(), alive[unit], -1))
        left = (~gone).nonzero().flatten()
        keep = expand_units(left, columns)
        rows = rows[:, keep]
        inverse = _compacted_(inverse, keep, keep).addmm_(rows.mT, rows, alpha=-1)
        every = torch.arange(len(weight), device=device)
        weight = _compacted_(weight, every, keep).addmm_(outputs, rows, alpha=-1)
        alive, run = alive[left], run[left]
    result = torch.stack(order)
    if (result < 0).any():
        raise FloatingPointError("greedy elimination lost its precision: use more damping")
    return result


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

    Returns that front as a matrix. What is read next lies behind what has been written.
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
