"""All that an accelerator has to show, in one command with a budget of minutes.

    python examples/benchmarks/gpu.py --minutes 9
    python examples/benchmarks/gpu.py --dry-run             # small shapes, on the CPU

Runs sections in the order of their importance: CPU and CUDA give the same result; Llama-2-7B's
shapes with the default settings and without refit; the tests that need CUDA; prefill and decoding
of the result against the dense model; hidden states on the accelerator; Llama-3.2-1B's shapes in
each dtype; Llama-2-13B's; and some layers of Llama-3-70B's, whose time is multiplied by the number
of layers. Models have random weights, in host memory; the calibration is 128 x 2048 random tokens,
and half of the blocks' parameters are removed.

A section whose expected time no longer fits is skipped, and one that takes several times as long is
stopped. Expectations follow the pace of the sections before. The JSON is written after every
section, so that little is lost if the run is killed. The exit code is 1 if a section failed or was
stopped. Phases are timed by the device's clock.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    GB,
    Case,
    matmul_rate,
    random_llama,
    synchronize,
    timed,
    write_json,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import grail_hf
from grail_hf.report import versions

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
PATIENCE = 4  # a section may take so many times as long as expected
RESERVE = 5  # seconds of the budget that no section gets
TOLERANCE = 1e-3
console = Console(width=120)

CASES = {
    "1B": Case("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, 128, 2048),
    "7B": Case("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000, 128, 2048),
    "13B": Case("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000, 128, 2048),
    "70B": Case("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, 128, 2048),
}
# Settings, and what they keep, are compared on the bundled model.
ALIKE: dict[str, dict[str, Any]] = {
    "default": {},
    "wanda": {"selector": "wanda", "refit": 0, "target": "self"},
    "error": {"allocation": "error"},
}
HOST = {"hidden_states": "host"}


@dataclass
class Bench:
    """Where the sections run, and what one leaves for another."""

    device: torch.device
    dry: bool
    result: Any = None

    def case(self, name: str) -> Case:
        """A model's shapes; in a dry run, small ones with the same numbers of heads by group."""
        case = CASES[name]
        if not self.dry:
            return case
        groups = case.heads // case.kv_heads
        return replace(
            case,
            layers=3,
            hidden=16 * groups,
            inner=64,
            heads=2 * groups,
            kv_heads=2,
            vocabulary=64,
            samples=4,
            length=16,
        )


@dataclass(frozen=True)
class Section:
    """What is run, and the seconds that it is expected to take (on an H200)."""

    name: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]


# Sections


def machine(bench: Bench) -> dict[str, Any]:
    """The device, the rates of its products, and how fast it is reached from the host."""
    size = 256 if bench.dry else 8192
    rates = {
        str(dtype): matmul_rate(dtype, bench.device, size)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    found: dict[str, Any] = {"name": bench.device.type, "operations_a_second": rates}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {"name": properties.name, "bytes": properties.total_memory}
    block = torch.empty(2**20 if bench.dry else 2**30, dtype=torch.uint8)
    held = {"pageable": block, "pinned": block if bench.dry else block.pin_memory()}
    for kind, memory in held.items():
        send = partial(memory.to, bench.device)
        seconds = min(timed(send, bench.device)[1] for _ in range(3))
        found[f"{kind}_bytes_a_second"] = memory.nbytes / seconds
    bf16 = rates[str(torch.bfloat16)] / 1e12
    found["summary"] = f"{found['name']}: {bf16:,.1f} TFLOP/s in bf16, " + (
        f"{found['pinned_bytes_a_second'] / GB:.0f} GB/s from pinned memory"
    )
    return found


def alike(bench: Bench) -> dict[str, Any]:
    """The bundled model, compressed on the CPU and on the device: units, weights, perplexity."""
    folder, text = EXAMPLES / "tiny-llama", EXAMPLES / "text"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if bench.dry:
            model.config.num_hidden_layers = 1
            del model.model.layers[1:]
        return model

    dense, found, checks = load(), {}, {}
    for name, settings in ALIKE.items():
        models = []
        for device in (torch.device("cpu"), bench.device):
            model = load()
            grail_hf.compress(
                *(model, tokenizer, text / "jargon-train.txt"),
                **{"sparsity": 0.5, "num_samples": 4 if bench.dry else 64, "seq_length": 128},
                **{"self_samples": 0, "device": str(device), "progress": False},
                **settings,
            )
            models.append(model)
        found[name] = differences(dense, *models) | {
            "perplexity": [
                grail_hf.perplexity(
                    *(model.to(device), tokenizer, text / "jargon-test.txt"),
                    **{"seq_length": 128, "max_windows": 4 if bench.dry else 64},
                )
                for model, device in zip(models, (torch.device("cpu"), bench.device), strict=True)
            ]
        }
        cpu, own = found[name]["perplexity"]
        checks[f"{name}: the same units"] = not found[name]["other_rows"]
        checks[f"{name}: weights to {TOLERANCE:g}"] = found[name]["weights"] <= TOLERANCE
        checks[f"{name}: perplexity to {TOLERANCE:g}"] = abs(own / cpu - 1) <= TOLERANCE
    worst = max(one["weights"] for one in found.values())
    return found | {"checks": checks, "summary": f"largest relative difference {worst:.1e}"}


def differences(dense: Any, one: Any, other: Any) -> dict[str, Any]:
    """Rows of the dense model that only one of two results keeps, and how far their weights differ.

    gate_proj, q_proj and k_proj are sliced and never fitted, so that their rows tell which units
    stayed. "weights" is the largest relative difference of any weight, in the Frobenius norm;
    infinite where shapes differ.
    """
    others, largest = 0, 0.0
    named = dict(other.named_parameters())
    for name, weight in one.named_parameters():
        theirs = named[name].detach().cpu()
        weight = weight.detach().cpu()
        if name.endswith(("gate_proj.weight", "k_proj.weight", "q_proj.weight")):
            rows = dense.get_parameter(name)
            others += len(kept_rows(rows, weight) ^ kept_rows(rows, theirs))
        if weight.shape != theirs.shape:
            largest = float("inf")
        else:
            largest = max(largest, float((weight - theirs).norm() / weight.norm()))
    return {"other_rows": others, "weights": largest}


def kept_rows(dense: Tensor, weight: Tensor) -> set[int]:
    """The rows of `dense` that `weight` has."""
    rows = {row.numpy().tobytes() for row in weight}
    return {index for index, row in enumerate(dense.detach()) if row.numpy().tobytes() in rows}


def compression(
    name: str,
    settings: dict[str, Any],
    bench: Bench,
    *,
    dtype: str = "bfloat16",
    layers: int | None = None,
    targets: tuple[float, float] | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Compress random weights of a model's shapes: time, peak of CUDA memory, phases, errors.

    Args:
        layers: so many of the model's, for which the time of all of them is computed.
        targets: seconds and bytes that it should take at most.
        keep: keep the result for `generation`.
    """
    case = bench.case(name)
    layers = min(layers or case.layers, case.layers)
    model = random_llama(case, layers, getattr(torch, dtype), bench.device)
    given = {"sparsity": 0.5, "device": str(bench.device)} | settings
    report, seconds, phases = timed(
        lambda: grail_hf.compress(model, calibration=case.tokens(), progress=False, **given),
        bench.device,
    )
    if keep:
        bench.result = model
    kinds = ("accelerator_bytes", "host_bytes")
    peaks = {
        kind: max((cost.get(kind, 0) for cost in report.measured.values()), default=0)
        for kind in kinds
    }
    found = {
        **{"model": case.name, "layers": layers, "of_layers": case.layers, "dtype": dtype},
        **{"settings": given, "seconds": seconds, "phases": phases, "peaks": peaks},
        "measured": report.measured,
        "estimate": report.estimate,
        "widths": report.widths,
        "mean_error": sum(group.error for group in report.groups) / len(report.groups),
    }
    peak = peaks["accelerator_bytes"]
    summary = f"{seconds:.1f} s, {peak / GB:.2f} GB, mean error {found['mean_error']:.4f}"
    if layers < case.layers:
        found["seconds_scaled"] = seconds * case.layers / layers
        summary += f"; {found['seconds_scaled']:.0f} s if all layers take as long"
    if targets:
        found["targets"] = {
            f"at most {targets[0]:g} s": seconds <= targets[0],
            f"at most {targets[1] / GB:g} GB": peak <= targets[1],
        }
    return found | {"summary": summary}


def cuda_tests(bench: Bench) -> dict[str, Any]:
    """The tests that need CUDA, in a process of their own."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.cuda" in path.read_text("utf-8")
    ]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "tests.xml"
        run = [sys.executable, "-m", "pytest", "-m", "cuda and not slow", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*run, f"--junitxml={written}", *files],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not written.exists():
            raise RuntimeError(done.stdout + done.stderr)
        suite = ElementTree.parse(written).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - sum(counts[name] for name in ("failures", "errors", "skipped"))
    return counts | {
        "passed": passed,
        "output": done.stdout[-4000:],
        "checks": {"all pass": done.returncode == 0},
        "summary": ", ".join(f"{number} {name}" for name, number in counts.items()),
    }


@torch.no_grad()
def generation(bench: Bench) -> dict[str, Any]:
    """Tokens a second of the kept result and of the dense model: prefill, and greedy decoding."""
    if bench.result is None:
        raise RuntimeError("the section that leaves a result for this one did not")
    case, device = bench.case("7B"), bench.device
    models = {
        "dense": random_llama(case, case.layers, bench.result.dtype, device).to(device),
        "result": bench.result.to(device),
    }
    prompts, length, new = (2, 8, 4) if bench.dry else (16, 512, 64)
    ids = case.tokens()[:prompts, :length].to(device)

    def generate(model: Any, number: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=number,
            min_new_tokens=number,
            do_sample=False,
            pad_token_id=0,
        )

    rates: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in models
    }
    for turn in range(4):
        for name, model in models.items():
            seconds = timed(lambda: model(ids, use_cache=False), device)[1]  # noqa: B023
            first, all_ = (
                timed(lambda: generate(model, number), device)[1]  # noqa: B023
                for number in (1, 1 + new)
            )
            if turn:  # the first one warms up
                rates[name]["prefill"].append(ids.numel() / seconds)
                rates[name]["decode"].append(prompts * new / (all_ - first))
    bench.result = None
    best = {kind: {name: max(rates[name][kind]) for name in models} for kind in rates["dense"]}
    return {
        **{"prompts": prompts, "prompt_tokens": length, "new_tokens": new},
        "tokens_a_second": rates,
        "summary": "; ".join(
            f"{kind} {one['result']:,.0f} tokens/s, {one['result'] / one['dense']:.2f} times dense"
            for kind, one in best.items()
        ),
    }


def sections() -> list[Section]:
    """In the order of importance."""
    quick, there = HOST | {"refit": 0}, {"hidden_states": "accelerator"}
    of = partial(partial, compression)
    return [
        Section("machine", 10, machine),
        Section("CPU and CUDA alike", 60, alike),
        Section("7B, default", 60, of("7B", HOST, targets=(45, 4 * GB))),
        Section("7B, refit=0", 40, of("7B", quick, targets=(25, 4 * GB), keep=True)),
        Section("tests", 60, cuda_tests),
        Section("7B, generation", 40, generation),
        Section("7B, hidden states there", 60, of("7B", there)),
        Section("70B, 2 layers, default", 40, of("70B", HOST, layers=2)),
        Section("1B, bfloat16", 15, of("1B", HOST)),
        Section("1B, float16", 15, of("1B", HOST, dtype="float16")),
        Section("1B, solve_dtype=float32", 15, of("1B", HOST | {"solve_dtype": "float32"})),
        Section("1B, solve_dtype=float64", 15, of("1B", HOST | {"solve_dtype": "float64"})),
        Section("13B, default", 100, of("13B", HOST)),
        Section("13B, refit=0", 60, of("13B", quick)),
        Section("70B, 2 layers, refit=0", 30, of("70B", quick, layers=2)),
        Section("1B, float32", 20, of("1B", HOST, dtype="float32")),
        Section("1B, hidden states there", 15, of("1B", there)),
        Section("7B, refit=0, hidden states there", 40, of("7B", there | {"refit": 0})),
    ]


# The run


class Stopped(BaseException):
    """A section's time is over; no Exception, which code between here and there may catch."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise Stopped inside the context, between two steps of Python, once the time is over."""

    def stop(*_: Any) -> None:
        raise Stopped(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again, should a destructor swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(section: Section, bench: Bench, limit: float) -> dict[str, Any]:
    """What a section found, or why it did not; "status" is done, failed or stopped."""
    start = time.perf_counter()
    try:
        with stopped_after(limit):
            found = section.run(bench)
        synchronize(bench.device)
        wrong = [what for what, holds in found.get("checks", {}).items() if not holds]
        status = "failed" if wrong else "done"
        if wrong:
            found["summary"] += "; NOT " + ", ".join(wrong)
    except (Exception, Stopped) as error:
        status = "stopped" if isinstance(error, Stopped) else "failed"
        found = {"error": traceback.format_exc(), "summary": f"{type(error).__name__}: {error}"}
    return {"status": status, "took": time.perf_counter() - start} | found


def run_all(
    chosen: list[Section], bench: Bench, budget: float, written: dict[str, Any], path: Path
) -> bool:
    """Run what fits, and write the JSON after each section; whether nothing failed."""
    begin, pace = time.perf_counter(), 1.0
    results = written["sections"] = {}
    for section in chosen:
        left = budget - RESERVE - (time.perf_counter() - begin)
        expected = section.seconds * pace
        if expected > left:
            summary = f"would take about {expected:.0f} s, of which {max(left, 0):.0f} s are left"
            found = {"status": "skipped", "summary": summary}
        else:
            limit = min(left, PATIENCE * max(expected, section.seconds))
            found = outcome(section, bench, limit)
            if ("phases" in found or found["status"] == "stopped") and not bench.dry:
                pace = found["took"] / section.seconds
        results[section.name] = found
        console.print(f"{section.name}: {found['status']}, {found['summary']}", markup=False)
        write_json(path, written)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return all(found["status"] in ("done", "skipped") for found in results.values())


def results_table(results: dict[str, Any]) -> Table:
    table = Table("section", "status", "took", "found")
    for name, found in results.items():
        took = f"{found['took']:.0f} s" if "took" in found else ""
        targets = "".join(
            f"\n{'yes' if holds else 'NO'}: {what}"
            for what, holds in found.get("targets", {}).items()
        )
        table.add_row(name, found["status"], took, found["summary"] + targets)
    return table


def phases_table(results: dict[str, Any]) -> Table:
    """Seconds of each phase, by the device's clock."""
    having = {name: found["phases"] for name, found in results.items() if "phases" in found}
    names = dict.fromkeys(phase for phases in having.values() for phase in phases)
    table = Table("seconds", *names, title="phases")
    for section, phases in having.items():
        table.add_row(section, *(f"{phases.get(name, 0):.1f}" for name in names))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry-run", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="run these alone")
    parser.add_argument("--output", type=Path, default=Path("build/gpu.json"))
    arguments = parser.parse_args()
    device = torch.device("cpu") if arguments.dry_run else arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run works without one")
    known = {section.name: section for section in sections()}
    for name in arguments.sections or ():
        if name not in known:
            parser.error(f"no section {name!r}; there are: {'; '.join(known)}")
    logging.disable_progress_bar()
    chosen = [known[name] for name in arguments.sections or known]
    written: dict[str, Any] = {
        "dry_run": arguments.dry_run,
        "minutes": arguments.minutes,
        "device": str(device),
        "versions": versions(),
    }
    bench = Bench(device, arguments.dry_run)
    good = run_all(chosen, bench, 60 * arguments.minutes, written, arguments.output)
    console.print(results_table(written["sections"]), phases_table(written["sections"]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
