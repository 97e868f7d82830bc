"""How long a compression takes: against the paper's loop, against the arithmetic, and by size.

    python examples/benchmarks/speed.py                     # three or four minutes of one core
    python examples/benchmarks/speed.py --hidden 1024 --inner 4096 --layers 8 --samples 64 \\
        --length 512 --repeats 1 --growth 0
    python examples/benchmarks/speed.py --model NAME --text FILE --samples 64 --length 512 \\
        --repeats 1 --growth 0

Three ways to compress the same model on the same tokens take turns, in one process: the recipe of
the GRAIL paper's code, written plainly below ("paper"); grail_hf with that recipe's choices
("quick": `wanda, refit=0, target="self", allocation="uniform"`); and with its defaults ("default").

The limit of each is the time that its floating-point operations would take at the rate at which the
same device multiplies two large matrices of the same dtype: products, Cholesky factors and solves
are counted while a first, untimed run goes on, by phase and dtype; the rate is the highest of those
measured before each turn. "Divergence" is the mean KL
divergence from the dense model, in nats a token, on four more windows. Growth is the exponent of
the time in the number of tokens, the width and the number of layers: the slope of log time over log
size from a quarter or a half of the shape to all of it, on random weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Case,
    Operations,
    counted_operations,
    matmul_rate,
    random_llama,
    timed,
    write_json,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import grail_hf
from grail_hf.report import versions

QUICK = {"selector": "wanda", "refit": 0, "target": "self", "allocation": "uniform"}
WAYS: dict[str, dict[str, Any]] = {"paper": {}, "quick": QUICK, "default": {}}
HELD_OUT = 4  # windows
DAMPING = 1e-3

Rates = dict[torch.dtype, float]  # operations a second


# The paper's loop


@torch.no_grad()
def paper_loop(
    model: Any, tokens: Tensor, kept: dict[str, Sequence[int]], batch: int, device: torch.device
) -> None:
    """The recipe of the GRAIL paper's code for a Llama with any number of KV heads, in place.

    Layer by layer: run it on all tokens for the fp32 Grams X^T X of the inputs of o_proj and
    down_proj; keep the units of highest Wanda score; map the consumer's weight by ridge regression
    on what is left; run the narrowed layer for the next one's inputs.

    Args:
        model: a `LlamaForCausalLM`; it stays on `device`.
        tokens: ids [windows, length].
        kept: "attention" -> KV heads and "mlp" -> channels that stay, a number a layer.
        batch: windows in one forward pass.
    """
    decoder, head = model.to(device).model, model.config.head_dim
    hidden = [decoder.embed_tokens(ids.to(device)) for ids in tokens.split(batch)]
    rotary = decoder.rotary_emb(hidden[0], torch.arange(tokens.shape[1], device=device)[None])
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        wide = head * attention.num_key_value_groups  # query channels that share a KV head
        groups = {  # consumer -> units that stay, its columns by unit, rows of each producer
            attention.o_proj: (
                *(kept["attention"][index], wide),
                {attention.q_proj: wide, attention.k_proj: head, attention.v_proj: head},
            ),
            mlp.down_proj: (kept["mlp"][index], 1, {mlp.gate_proj: 1, mlp.up_proj: 1}),
        }
        grams = {consumer: gram_hook(consumer) for consumer in groups}
        for states in hidden:
            layer(states, position_embeddings=rotary)
        for consumer, (number, size, producers) in groups.items():
            gram, hook = grams[consumer]
            hook.remove()
            scores = wanda(consumer, gram).view(-1, size).sum(1)
            if number == len(scores):
                continue
            units = scores.topk(number).indices.sort().values
            repair_(consumer, gram, channels(units, size))
            for producer, rows in producers.items():
                slice_(producer, channels(units, rows))
        hidden = [layer(states, position_embeddings=rotary) for states in hidden]


def gram_hook(linear: nn.Linear) -> tuple[Tensor, Any]:
    """A Gram [H, H] to which every forward pass of the projection adds, and the hook's handle."""
    width, device = linear.in_features, linear.weight.device
    gram = torch.zeros(width, width, device=device)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        gram.addmm_(x.T, x)

    return gram, linear.register_forward_pre_hook(add)


def wanda(linear: nn.Linear, gram: Tensor) -> Tensor:
    """mean_i |W_ij| ||X_j|| for each channel j, [H]."""
    return linear.weight.float().abs().mean(0) * gram.diagonal().sqrt()


def channels(units: Tensor, size: int) -> Tensor:
    """The channels of units that own `size` neighbours each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def repair_(linear: nn.Linear, gram: Tensor, kept: Tensor) -> None:
    """W' = W M^T, where M = (G_PP + d I)^-1 G_PH maps the kept channels P to all of them, H."""
    damped = gram[kept][:, kept]
    damped.diagonal().add_(DAMPING * (damped.diagonal().mean() + 1e-3))
    map_ = torch.linalg.solve(damped, gram[kept])
    linear.weight = nn.Parameter((linear.weight.float() @ map_.T).to(linear.weight.dtype), False)
    linear.in_features = len(kept)


def slice_(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight[rows], False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows], False)
    linear.out_features = len(rows)


# What is compared


@dataclass
class Problem:
    """A model, its calibration, and how it is compressed."""

    model: Any
    tokens: Tensor
    held_out: Tensor
    device: torch.device
    sparsity: float
    batch: int
    kept: dict[str, Sequence[int]] = field(default_factory=dict)

    def compress_(self, model: Any, way: str) -> Any:
        """Compress a copy of the model; grail_hf's report of it."""
        if way == "paper":
            return paper_loop(model, self.tokens, self.kept, self.batch, self.device)
        report = grail_hf.compress(
            model,
            calibration=self.tokens,
            progress=False,
            sparsity=self.sparsity,
            batch_size=self.batch,
            device=str(self.device),
            **WAYS[way],
        )
        if way == "quick":  # the paper's loop keeps as many of each
            self.kept = report.widths
        return report

    def timed(self, way: str) -> tuple[float, dict[str, float]]:
        """Seconds of a compression, and of its phases."""
        model = copy.deepcopy(self.model)
        _, seconds, phases = timed(lambda: self.compress_(model, way), self.device)
        return seconds, phases

    @torch.no_grad()
    def divergence(self, model: Any) -> float:
        """Mean KL divergence from the dense model on the held-out windows, in nats a token."""
        total = 0.0
        for ids in self.held_out.split(1):
            dense, narrow = (
                one.to(self.device)(ids.to(self.device), use_cache=False)
                .logits.float()
                .log_softmax(-1)
                for one in (self.model, model)
            )
            total += (dense.exp() * (dense - narrow)).sum(-1).mean().item()
        self.model.cpu()
        return total / len(self.held_out)

    @torch.no_grad()
    def dense_operations(self) -> int:
        """Of one forward pass of the dense model over the calibration tokens."""
        ids = self.tokens[: self.batch].to(self.device)
        with counted_operations() as counts:
            self.model.to(self.device)(ids, use_cache=False)
        self.model.cpu()
        return sum(counts.values()) * len(self.tokens) // len(ids)


def limit(counts: Operations, rates: Rates) -> float:
    """The seconds that operations take at the rates of matrix products."""
    return sum(operations / rates[dtype] for (_, dtype), operations in counts.items())


def counted(problem: Problem, way: str) -> tuple[Operations, dict[str, Any]]:
    """The operations of a compression, and what its result is like."""
    model = copy.deepcopy(problem.model)
    with counted_operations() as counts:
        report = problem.compress_(model, way)
    found = {"operations": sum(counts.values()), "divergence": problem.divergence(model)}
    if report:
        estimated = {phase: cost["operations"] for phase, cost in report.estimate.items()}
        found |= {"sparsity": report.sparsity, "estimated": estimated}
    return counts, found


def compare(problem: Problem, repeats: int, measure_rates: Callable[[], Rates]) -> dict[str, Any]:
    """Each way's operations, then times in turns; with the phases of grail_hf's."""
    dense = problem.dense_operations()
    # Quick first, since the paper's loop takes its widths.
    both = {way: counted(problem, way) for way in ("quick", "paper", "default")}
    taken: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in WAYS}
    rates = []
    for _ in range(repeats):
        for way in WAYS:
            rates.append(measure_rates())
            taken[way].append(problem.timed(way))
    highest = {dtype: max(one[dtype] for one in rates) for dtype in rates[0]}
    papers = [seconds for seconds, _ in taken["paper"]]
    ways = {}
    for way in WAYS:
        counts, found = both[way]
        seconds = [own for own, _ in taken[way]]
        median = statistics.median(seconds)
        found |= {
            "seconds": seconds,
            "ratio": statistics.median(a / b for a, b in zip(seconds, papers, strict=True)),
            "forward_passes": found["operations"] / dense,
            "limit_seconds": limit(counts, highest),
            "of_limit": limit(counts, highest) / median,
        }
        found["phases"] = {
            phase: {
                "estimated": found["estimated"].get(phase, 0),
                "share": statistics.median(phases[phase] for _, phases in taken[way]) / median,
            }
            | phase_of(phase, counts, [phases[phase] for _, phases in taken[way]], highest)
            for phase in taken[way][0][1]
        }
        ways[way] = found
    return {
        "rates": [{str(dtype): rate for dtype, rate in one.items()} for one in rates],
        "dense_operations": dense,
        "ways": ways,
    }


def phase_of(phase: str, counts: Operations, times: list[float], rates: Rates) -> dict[str, float]:
    """A phase's median seconds, and its arithmetic against the limit."""
    seconds = statistics.median(times)
    own = {key: operations for key, operations in counts.items() if key[0] == phase}
    return {
        "seconds": seconds,
        "operations": sum(own.values()),
        "of_limit": limit(own, rates) / seconds,
    }


# Growth


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of seconds ~ size^p, by least squares on the logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, seconds))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def scaled(case: Case, what: str, part: int) -> Case:
    """The case with `what` divided by `part`."""
    if what == "tokens":
        return replace(case, samples=case.samples // part)
    if what == "layers":
        return replace(case, layers=case.layers // part)
    return replace(case, hidden=case.hidden // part, inner=case.inner // part)


def growth(
    case: Case, arguments: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Any]]:
    """For tokens, width and layers: seconds of each way at three sizes, and the exponents."""
    found: dict[str, dict[str, Any]] = {}
    for what in ("tokens", "width", "layers"):
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for part in (4, 2, 1):
            problem = random_problem(scaled(case, what, part), arguments, device)
            for way in ("quick", "paper", "default"):
                times[way].append(problem.timed(way)[0])
        found[what] = {
            way: {"seconds": seconds, "exponent": slope((1, 2, 4), seconds)}
            for way, seconds in times.items()
        }
    return found


def random_problem(case: Case, arguments: argparse.Namespace, device: torch.device) -> Problem:
    """A model of random weights, and random tokens."""
    dtype = getattr(torch, arguments.dtype)
    tokens = replace(case, samples=case.samples + HELD_OUT).tokens()
    return Problem(
        random_llama(case, case.layers, dtype, device),
        *(tokens[: case.samples], tokens[case.samples :]),
        *(device, arguments.sparsity, arguments.batch_size),
    )


def real_problem(arguments: argparse.Namespace, device: torch.device) -> Problem:
    """A checkpoint, and the beginning of a text."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(Path(arguments.text).read_text("utf-8"), return_tensors="pt").input_ids[0]
    needed = (arguments.samples + HELD_OUT) * arguments.length
    if len(ids) < needed:
        raise SystemExit(f"{arguments.text} has {len(ids)} tokens, and {needed} are needed")
    windows = ids[:needed].view(-1, arguments.length)
    return Problem(
        model.eval(),
        *(windows[: arguments.samples], windows[arguments.samples :]),
        *(device, arguments.sparsity, arguments.batch_size),
    )


# Tables


def compared_table(compared: dict[str, Any]) -> Table:
    table = Table("", "time", "spread", "of the paper's", title="in turns")
    for column in ("dense passes", "limit", "limit / time", "divergence"):
        table.add_column(column, justify="right")
    for way in WAYS:
        one = compared["ways"][way]
        table.add_row(
            way,
            f"{statistics.median(one['seconds']):.2f} s",
            f"{min(one['seconds']):.2f} - {max(one['seconds']):.2f}",
            f"{one['ratio']:.2f}",
            f"{one['forward_passes']:.2f}",
            f"{one['limit_seconds']:.2f} s",
            f"{one['of_limit']:.0%}",
            f"{one['divergence']:.4f}",
        )
    return table


def phases_table(way: str, phases: dict[str, Any]) -> Table:
    table = Table("phase", "time", "share", "operations", "estimate / counted", title=way)
    table.add_column("limit / time", justify="right")
    for name, one in phases.items():
        estimate = f"{one['estimated'] / one['operations']:.2f}" if one["operations"] else ""
        table.add_row(
            *(name, f"{one['seconds']:.2f} s", f"{one['share']:.0%}"),
            *(f"{one['operations']:.2e}", estimate, f"{one['of_limit']:.0%}"),
        )
    return table


def growth_table(grown: dict[str, dict[str, Any]]) -> Table:
    table = Table("exponent of", *WAYS, title="growth: seconds at a quarter, a half, all")
    for what, ways in grown.items():
        cells = (
            f"{ways[way]['exponent']:.2f}  ({', '.join(f'{s:.2f}' for s in ways[way]['seconds'])})"
            for way in WAYS
        )
        table.add_row(what, *cells)
    return table


def rates_table(device: torch.device, size: int, rates: list[dict[str, float]]) -> Table:
    table = Table("dtype", "lowest", "highest", title=f"products of {size} x {size} on {device}")
    for dtype in rates[0]:
        ends = (end(one[dtype] for one in rates) for end in (min, max))
        table.add_row(dtype, *(f"{rate / 1e9:,.1f} GFLOP/s" for rate in ends))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint, of a Llama; by default random weights")
    parser.add_argument("--text", help="a file with the calibration text, with --model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="of the CPU; by default as torch has them")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", type=int, default=1, choices=[0, 1], help="0 leaves it out")
    parser.add_argument("--rate-size", type=int, help="of the products that give the rate")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.text):
        parser.error("--model and --text belong together")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    case = Case(
        *("random", arguments.layers, arguments.hidden, arguments.inner, arguments.heads),
        *(arguments.kv_heads, 512, arguments.samples, arguments.length),
    )
    size = arguments.rate_size or (1024 if device.type == "cpu" else 8192)
    dtypes = dict.fromkeys((torch.float64, torch.float32, getattr(torch, arguments.dtype)))
    problem = (
        real_problem(arguments, device)
        if arguments.model
        else random_problem(case, arguments, device)
    )
    compared = compare(
        *(problem, arguments.repeats),
        lambda: {dtype: matmul_rate(dtype, device, size) for dtype in dtypes},
    )
    grown = growth(case, arguments, device) if arguments.growth else {}

    console = Console(width=110)
    console.print(rates_table(device, size, compared["rates"]), compared_table(compared))
    for way in ("quick", "default"):
        console.print(phases_table(way, compared["ways"][way]["phases"]))
    if grown:
        console.print(growth_table(grown))
    if arguments.output:
        write_json(
            arguments.output,
            {
                "settings": {name: str(value) for name, value in vars(arguments).items()},
                "threads": torch.get_num_threads(),
                "versions": versions(),
                **compared,
                "growth": grown,
            },
        )


if __name__ == "__main__":
    main()
