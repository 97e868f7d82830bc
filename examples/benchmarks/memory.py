"""What compressing from disk to disk takes, measured on models of random weights that it makes.

    python examples/benchmarks/memory.py                    # 12, 24 and 48 layers, 4.9 GB at most
    python examples/benchmarks/memory.py --layers 2 4       # a quick look
    python examples/benchmarks/memory.py --processes        # two against one, on a CPU
    python examples/benchmarks/memory.py --cuda             # the shapes of Llama-2-7B, Llama-3-70B

With the default settings a layer takes a minute or two of a CPU; the peak's independence of the
depth shows with quicker ones too (`--selector wanda --ridge 1e-3 --refit 0`).

Each model is written shard by shard and compressed by a process of its own, in whose anonymous
memory neither the model nor the hidden states (mapped from files) are. Its peak is set against
three decoder layers and the Grams of one group, against the estimate that is made before anything
runs, and against the peaks at other depths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import GB, MB, Case
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import grail_hf
from grail_hf.checkpoints.journal import INDEX
from grail_hf.checkpoints.reader import Checkpoint, read_spans
from grail_hf.config import AUTO
from grail_hf.runtime import processes
from grail_hf.runtime.meter import anonymous_bytes, keep_no_freed_blocks

LAYERS_ALLOWED, DEPTH_TOLERANCE, ESTIMATE_TOLERANCE, SPEED_UP = 3, 0.10, 0.15, 1.6
console = Console(width=120)
CUDA_CASES = (
    Case("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000, 128, 2048, limit=4 * GB),
    Case("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, 128, 2048, written=2, limit=12 * GB),
)


def write_model(case: Case, folder: Path) -> None:
    """A checkpoint of random bf16 weights, a file a layer; activations keep their scale."""
    folder.mkdir()
    config = case.config(case.layers)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: parameter.shape
            for name, parameter in LlamaForCausalLM(case.config(1)).named_parameters()
        }
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def write(file: str, names: dict[str, str]) -> None:
        tensors = {}
        for name, like in names.items():
            shape = shapes[like]
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                scale = 0.5 / shape[1] ** 0.5
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
                for part in tensors[name].split(256):
                    part.copy_(torch.randn(part.shape, generator=generator) * scale)
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    of_layer = [name for name in shapes if ".layers.0." in name]
    write("rest.safetensors", {name: name for name in shapes if name not in of_layer})
    written = case.written or case.layers
    for layer in range(written):
        names = {name.replace(".layers.0.", f".layers.{layer}."): name for name in of_layer}
        write(f"layer-{layer:03d}.safetensors", names)
    for layer in range(written, case.layers):
        for name in of_layer:
            mine, other = (f".layers.{n}." for n in (layer, layer % written))
            file = index[name.replace(".layers.0.", other)]
            index[name.replace(".layers.0.", mine)] = file
    size = sum((folder / file).stat().st_size for file in set(index.values()))
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / INDEX).write_text(text)


class Repeating(Checkpoint):
    """A checkpoint whose later layers are the first ones again, under names of their own."""

    @staticmethod
    def stored(name: str, spans: dict[str, Any]) -> str:
        """The name under which the file has a tensor."""
        tail = name.split(".layers.")[-1].partition(".")[2]
        return name if name in spans else next(n for n in spans if n.endswith(f".{tail}"))

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Checkpoint:
        folder = Path(source)
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {name: folder / file for name, file in index.items()}
        spans = {path: read_spans(path) for path in sorted(set(files.values()))}
        for name, path in files.items():
            spans[path][name] = spans[path][cls.stored(name, spans[path])]
        return cls(str(source), folder, files, spans)

    def verify(self, progress: bool = True) -> dict[str, str]:
        return {path.name: "" for path in self.spans}

    def tensors(self, names: Any) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        found = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as file:
                found[name] = file.get_tensor(self.stored(name, dict.fromkeys(file.keys())))
        return found


def measure(case: Case, source: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: compress, and see what that took."""
    tokens = case.tokens()
    keep_no_freed_blocks()  # as the command line does
    warm_up(settings)
    if case.written:
        import grail_hf.disk_to_disk as disk_to_disk

        disk_to_disk.Checkpoint = Repeating  # type: ignore[misc]
    base, peak, stop = anonymous_bytes() or 0, [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], (anonymous_bytes() or 0) - base)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    report = grail_hf.compress_checkpoint(source, output, tokens, progress=False, **settings)
    stop.set()
    thread.join()
    return {
        "seconds": time.perf_counter() - start,
        "peak": peak[0],
        "estimate": report.estimate,
        "measured": report.measured,
        "errors": [group.error for group in report.groups],
    }


def warm_up(settings: dict[str, Any]) -> None:
    """Have the libraries load what they load when they are first used."""
    config = Case("small", 1, 64, 512, 8, 4, 64, 4, 32).config(2)
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    small = settings | {"sparsity": 0.25, "multiple_of": 1, "hidden_states": "host"}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).bfloat16().save_pretrained(Path(folder) / "small")
        grail_hf.compress_checkpoint(
            Path(folder) / "small", Path(folder) / "smaller", tokens, progress=False, **small
        )


def in_processes(
    case: Case, folder: Path, settings: dict[str, Any], threads: int, processes: int = 1
) -> dict[str, Any]:
    """Write the case's model, and `measure` it in processes of so many threads."""
    source, output = folder / f"{case.layers}-layers", folder / f"{case.layers}-layers-out"
    write_model(case, source)
    size = sum(path.stat().st_size for path in source.iterdir())
    task = {"case": vars(case), "source": str(source), "output": str(output), "settings": settings}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TMPDIR": str(folder)}
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, __file__, "--task", json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    for made in (source, output):
        for path in made.iterdir():
            path.unlink()
        made.rmdir()
    return {**json.loads(done.stdout.splitlines()[-1]), "size": size}


def host_memory(arguments: argparse.Namespace, folder: Path) -> bool:
    """Peaks at several depths: the table, and whether they are what they should be."""
    case = Case(
        *("random", 0, arguments.hidden, arguments.inner, arguments.heads, arguments.kv_heads),
        *(512, arguments.samples, arguments.length),
    )
    settings = {
        **{"sparsity": 0.3, "batch_size": 1, "device": "cpu", "hidden_states": "disk"},
        **{"selector": arguments.selector, "solve_dtype": arguments.dtype},
        "refit": arguments.refit,
        "ridge": AUTO if arguments.ridge is None else arguments.ridge,
    }
    allowed = LAYERS_ALLOWED * case.layer_bytes + case.gram_bytes
    table = Table(
        *("layers", "on disk", "time", "peak", "of allowed", "estimate", "ratio"),
        title=f"{arguments.selector}, {arguments.dtype}: a layer {case.layer_bytes / MB:.0f} MB, a "
        f"group's Grams {case.gram_bytes / MB:.0f} MB, allowed {allowed / MB:.0f} MB",
    )
    phases = Table("phase", *(f"{n} layers" for n in arguments.layers), title="estimate / measured")
    peaks, ratios, columns = [], [], []
    for layers in arguments.layers:
        found = in_processes(replace(case, layers=layers), folder, settings, arguments.threads)
        estimate = max(cost["host_bytes"] for cost in found["estimate"].values())
        peaks.append(found["peak"])
        ratios.append(estimate / found["peak"])
        table.add_row(
            *(str(layers), f"{found['size'] / GB:.2f} GB", f"{found['seconds']:.0f} s"),
            *(f"{found['peak'] / MB:.0f} MB", f"{found['peak'] / allowed:.2f}"),
            *(f"{estimate / MB:.0f} MB", f"{ratios[-1]:.2f}"),
        )
        columns.append(found)
    for phase in columns[0]["measured"]:
        cells = [
            f"{found['estimate'][phase]['host_bytes'] / MB:.0f} / "
            f"{found['measured'][phase]['host_bytes'] / MB:.0f} MB"
            for found in columns
        ]
        phases.add_row(phase, *cells)
    console.print(table, phases)
    depths = []
    if len(peaks) > 1:
        depths.append(
            check(
                f"peaks at all depths within {DEPTH_TOLERANCE:.0%}",
                max(peaks) <= (1 + DEPTH_TOLERANCE) * min(peaks),
            )
        )
    return all(
        [
            *depths,
            check(f"peak <= {LAYERS_ALLOWED} layers + the Grams of a group", max(peaks) <= allowed),
            check(
                f"estimate within {ESTIMATE_TOLERANCE:.0%} of the measurement",
                all(abs(ratio - 1) <= ESTIMATE_TOLERANCE for ratio in ratios),
            ),
        ]
    )


def two_processes(arguments: argparse.Namespace, folder: Path) -> bool:
    """Two processes of one thread against one: the time of each phase, and the results."""
    case = Case(
        *("random", 1, arguments.hidden, arguments.inner, arguments.heads, arguments.kv_heads),
        *(512, 4 * arguments.samples, 4 * arguments.length),
    )
    settings = {
        **{"sparsity": 0.3, "batch_size": 1, "device": "cpu", "selector": "wanda"},
        **{"ridge": 1e-3, "refit": 0},
    }
    one, two = (in_processes(case, folder, settings, 1, number) for number in (1, 2))
    table = Table(
        *("phase", "one process", "two", "times as fast"),
        title=f"one layer, {case.samples} x {case.length} tokens, one thread a process",
    )
    for phase, cost in one["measured"].items():
        seconds = [cost["seconds"], two["measured"][phase]["seconds"]]
        table.add_row(phase, *(f"{s:.1f} s" for s in seconds), f"{seconds[0] / seconds[1]:.2f}")
    console.print(table)
    gram = [found["measured"]["gram"]["seconds"] for found in (one, two)]
    differences = [abs(a / b - 1) for a, b in zip(one["errors"], two["errors"], strict=True) if b]
    return all(
        [
            check(
                f"the Gram phase is at least {SPEED_UP} times as fast",
                gram[0] >= SPEED_UP * gram[1],
            ),
            check("all groups' errors are within 1e-5", max(differences) <= 1e-5),
        ]
    )


def cuda_memory(folder: Path) -> bool:
    """Peaks of CUDA memory for the shapes of two well-known models."""
    table = Table("model", "time", "peak", "limit", "estimate", title="CUDA memory")
    settings = {"sparsity": 0.3, "batch_size": 1, "device": "cuda", "hidden_states": "host"}
    good = []
    for case in CUDA_CASES:
        own = settings | ({"solve_dtype": "float32"} if case.written else {})
        found = in_processes(case, folder, own, os.cpu_count() or 1)
        peak, estimate = (
            max(phase["accelerator_bytes"] for phase in found[kind].values())
            for kind in ("measured", "estimate")
        )
        table.add_row(
            *(case.name, f"{found['seconds']:.0f} s", f"{peak / GB:.2f} GB"),
            *(f"{case.limit / GB:.0f} GB", f"{estimate / GB:.2f} GB"),
        )
        good.append((f"{case.name}: peak <= {case.limit / GB:.0f} GB", peak <= case.limit))
    console.print(table)
    return all([check(*one) for one in good])


def check(what: str, holds: bool) -> bool:
    console.print(f"{'yes' if holds else 'NO '}  {what}")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5504)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--selector", default="obs")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--ridge", type=float, help="by default chosen for each block")
    parser.add_argument("--refit", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="for the models, which are deleted afterwards")
    parser.add_argument("--processes", action="store_true", help="compare two with one")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task = arguments.task
        case = Case(**task["case"])
        found = measure(case, Path(task["source"]), Path(task["output"]), task["settings"])
        if processes.is_first():
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.cuda:
            good = cuda_memory(Path(folder))
        elif arguments.processes:
            good = two_processes(arguments, Path(folder))
        else:
            good = host_memory(arguments, Path(folder))
        if not good:
            sys.exit(1)


if __name__ == "__main__":
    main()
