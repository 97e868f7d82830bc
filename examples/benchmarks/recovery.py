"""Recovery: what is won back of a compression's loss by learning the dense model's predictions.

    python examples/benchmarks/recovery.py                        # the bundled model
    python examples/benchmarks/recovery.py --model NAME --calibration c4 --text wikitext2

For each sparsity the model is compressed by grail_hf's defaults, on `--num-samples` windows of the
calibration texts, and then recovered on `--learned` windows: of the same texts ("texts"), and of
text that the dense model writes, without any data ("self"). Prints one table of excess losses (log
perplexity minus the dense model's, nats a token) on each test text, with the ratio to the
compressed model's, and writes recovery.json and a picture of each course. Compressed models are
kept in the output folder, and taken from there if they are of the same settings.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from quality import EXAMPLES, TEXTS, calibration_tokens, labels, load, losses
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import grail_hf
from grail_hf.calibration.tokens import TokenBatches
from grail_hf.calibration.windows import token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-llama"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--calibration", nargs="+", default=[str(TEXTS / "jargon-train.txt")])
    parser.add_argument("--text", nargs="+", default=[str(TEXTS / "jargon-test.txt")])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--allocation", default="auto", choices=["auto", *grail_hf.ALLOCATIONS])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--learned", type=int, default=1024)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--ranks", nargs="+", default=["full"])
    parser.add_argument("--learning-rate", default="auto")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--self-samples", type=float, default=0.25)
    parser.add_argument("--sources", nargs="+", default=["texts", "self"])
    parser.add_argument("--output", type=Path, default=Path("build/recovery"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = {
        label: token_windows(
            text, tokenizer, seq_length=arguments.seq_length, max_windows=arguments.max_windows
        )
        for label, text in labels(arguments.text).items()
    }
    dense = load(arguments)
    baseline = losses(dense, windows, arguments.batch_size)
    tokens = calibration_tokens(arguments, tokenizer, dense.config.vocab_size, 0.1)
    more = argparse.Namespace(**vars(arguments) | {"num_samples": arguments.learned})
    learned = {
        "texts": calibration_tokens(more, tokenizer, dense.config.vocab_size, 0.0),
        "self": "self",
    }
    rows = []

    def measure(model: torch.nn.Module, **row: object) -> None:
        found = losses(model, windows, arguments.batch_size)
        excess = {name: loss - baseline[name] for name, loss in found.items()}
        rows.append({**row, "excess_loss": excess})
        print(json.dumps(rows[-1]), flush=True)
        result = {"settings": vars(arguments), "dense_loss": baseline, "rows": rows}
        (arguments.output / "recovery.json").write_text(json.dumps(result, indent=2, default=str))

    for sparsity in arguments.sparsities:
        folder, seconds = compressed(arguments, sparsity, tokens, tokenizer)
        small = argparse.Namespace(**vars(arguments) | {"model": folder})
        measure(load(small), sparsity=sparsity, source="none", rank="", seconds=seconds)
        for rank in arguments.ranks:
            for source in arguments.sources:
                model = load(small)
                start = time.perf_counter()
                report = grail_hf.recover(
                    model,
                    dense,
                    tokenizer,
                    learned[source],
                    rank=rank if rank == "full" else int(rank),
                    learning_rate=rate(arguments.learning_rate),
                    epochs=arguments.epochs,
                    num_samples=arguments.learned,
                    seq_length=arguments.seq_length,
                    batch_size=arguments.batch_size,
                    accumulation=arguments.accumulation,
                    self_samples=arguments.self_samples,
                )
                seconds = time.perf_counter() - start
                report.plot(arguments.output / f"{sparsity:g}-{source}-{rank}.png")
                facts = {"learning_rate": report.learning_rate, "steps": report.steps}
                row = {"sparsity": sparsity, "source": source, "rank": rank, "seconds": seconds}
                measure(model, **row, **facts, tokens=report.tokens, kept=report.kept)
    Console(width=110).print(results_table(rows, list(windows)))


def rate(text: str) -> float | str:
    return text if text == "auto" else float(text)


def compressed(
    arguments: argparse.Namespace,
    sparsity: float,
    tokens: TokenBatches,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, float]:
    """The folder of the compressed model, which is made where it is missing, and its seconds."""
    config = grail_hf.GrailConfig(sparsity=sparsity, allocation=arguments.allocation)
    folder = arguments.output / f"{sparsity:g}-{arguments.allocation}"
    if (folder / "grail.json").exists():
        report = grail_hf.CompressionReport.load(folder)
        if report.calibration["source"].startswith(tokens.source):
            return str(folder), report.seconds
    model = load(arguments)
    report = grail_hf.compress(model, tokenizer, tokens, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report.save(folder)
    return str(folder), report.seconds


def results_table(rows: list[dict], texts: list[str]) -> Table:
    """Excess losses, and their ratio to the compressed model's at the same sparsity."""
    table = Table(
        "removed", "learned from", "rank", title="excess loss (of the compressed model's)"
    )
    for name in (*texts, "tokens", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        plain = next(one for one in rows if one["sparsity"] == row["sparsity"])["excess_loss"]
        table.add_row(
            f"{row['sparsity']:.0%}",
            row["source"],
            str(row["rank"]),
            *(
                f"{row['excess_loss'][t]:.3f} ({row['excess_loss'][t] / plain[t]:.2f})"
                for t in texts
            ),
            f"{row.get('tokens', 0):,}",
            f"{row['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
