"""Time of greedy elimination, the `obs` selector: blocked against one update a step.

    python examples/benchmarks/selection.py                       # small sizes, on the CPU
    python examples/benchmarks/selection.py --device cuda --channels 4096 11008 14336

Eliminating H channels in front of O outputs takes about (2/3) H^3 + 2 O H^2 operations. One update
of the inverse a step moves H^2 numbers for 2 H^2 operations, so it waits for memory; panels turn
that work into matrix products. Both columns run in one process on the same random Gram and must
remove the channels in the same order. A panel ends early where a channel is cheapest that was not
among its candidates, so that there may be more of them than the fewest. The last column stops when
70% of the channels are left, as in pruning to that width.
"""

from __future__ import annotations

import argparse
import math
import time
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from grail_hf.methods import elimination
from grail_hf.methods.elimination import PANEL, elimination_order_
from grail_hf.methods.linalg import cholesky_inverse_, damped_cholesky


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--outputs", type=int, default=None, help="by default 3/8 of the channels")
    arguments = parser.parse_args()
    table = Table("channels", "outputs", "a step at a time", "blocked", "ratio", "panels", "fewest")
    table.add_column("same order")
    table.add_column("to 70%")
    for channels in arguments.channels:
        outputs = arguments.outputs or 3 * channels // 8
        weight, inverse = problem(channels, outputs, arguments.device)
        single, order = timed(weight, inverse, panel=1)
        with patch.object(elimination, "_greedy", wraps=elimination._greedy) as panels:
            blocked, other = timed(weight, inverse)
        part, _ = timed(weight, inverse, width=7 * channels // 10)
        table.add_row(
            f"{channels:,}",
            f"{outputs:,}",
            f"{single:.2f} s",
            f"{blocked:.2f} s",
            f"{single / blocked:.1f}",
            str(panels.call_count),
            str(math.ceil(channels / PANEL)),
            str(torch.equal(order, other)),
            f"{part:.2f} s",
        )
    Console(width=100).print(table)


def problem(channels: int, outputs: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight [O, H] and the inverse [H, H] of a Gram with correlated channels, fp64."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": torch.float64}
    tokens = torch.randn(4 * channels, channels, **draw)
    tokens = tokens + tokens.roll(1, dims=1)
    factor, _ = damped_cholesky((tokens.T @ tokens).clone, 1e-4, "the problem")
    return torch.randn(outputs, channels, **draw), cholesky_inverse_(factor)


def timed(
    weight: torch.Tensor, inverse: torch.Tensor, panel: int = PANEL, width: int = 0
) -> tuple[float, torch.Tensor]:
    weight, inverse = weight.clone(), inverse.clone()  # both are overwritten
    start = time.perf_counter()
    order = elimination_order_(weight, inverse, columns=1, panel=panel, width=width).cpu()
    return time.perf_counter() - start, order


if __name__ == "__main__":
    main()
