"""Quality: every selector, without repair, as the paper repairs, and as grail_hf does.

    python examples/benchmarks/quality.py                         # the bundled model
    python examples/benchmarks/quality.py --model NAME --calibration c4 --text wikitext2

For each selector and sparsity the model is pruned only; pruned and repaired by the recipe of the
GRAIL paper's code ("reference": both Grams of a layer in one pass before it is changed, so that the
MLP does not see the repaired attention; damping 1e-3; the block's own output as target), which is
written here with this library's parts; and by grail_hf's defaults ("ours"), and with six steps of
refit ("refit"). Prints one table of excess losses (log perplexity minus the dense model's, nats a
token), with the ratio to the best reference, and writes quality.json and quality.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import grail_hf
from grail_hf.calibration import TokenBatches, token_batches, token_windows
from grail_hf.compensation import ridge
from grail_hf.config import GrailConfig
from grail_hf.planning import check_weights, choose_device, plan_compression
from grail_hf.reduction import Reduction
from grail_hf.saving import apply_config_
from grail_hf.stream import stream

EXAMPLES = Path(__file__).parent.parent
TEXTS = EXAMPLES / "text"
REPAIRS = ("none", "reference", "ours", "refit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-llama"))
    parser.add_argument("--calibration", nargs="+", default=[str(TEXTS / "jargon-train.txt")])
    parser.add_argument("--text", nargs="+", default=[str(TEXTS / "jargon-test.txt")])
    parser.add_argument("--selectors", nargs="+", default=["wanda", "gram"])
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = {
        Path(text).stem: token_windows(
            text,
            tokenizer,
            seq_length=arguments.seq_length,
            max_windows=arguments.max_windows,
        )
        for text in arguments.text
    }
    dense = load(arguments.model)
    tokens = calibration_tokens(arguments, tokenizer, dense.config.vocab_size)
    baseline = losses(dense, windows)
    rows = []
    for sparsity in arguments.sparsities:
        for selector in arguments.selectors:
            for repair in arguments.repairs:
                model = load(arguments.model)
                start = time.perf_counter()
                compress(model, tokens, selector, repair, sparsity)
                seconds = time.perf_counter() - start
                excess = {
                    name: loss - baseline[name] for name, loss in losses(model, windows).items()
                }
                rows.append(
                    {
                        "sparsity": sparsity,
                        "selector": selector,
                        "repair": repair,
                        "seconds": seconds,
                        "excess_loss": excess,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    Console(width=110).print(results_table(rows, list(windows)))
    result = {"calibration": tokens.summary(), "dense_loss": baseline, "rows": rows}
    (arguments.output / "quality.json").write_text(json.dumps(result, indent=2))
    plot(rows, next(iter(windows)), arguments.output / "quality.png")


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def calibration_tokens(arguments, tokenizer, vocab_size: int) -> torch.Tensor | TokenBatches:
    """As many windows from each calibration text, `num_samples` together."""
    share = arguments.num_samples // len(arguments.calibration)
    parts = [
        token_batches(
            text,
            tokenizer,
            vocab_size=vocab_size,
            num_samples=share,
            seq_length=arguments.seq_length,
            batch_size=16,
            seed=0,
        )
        for text in arguments.calibration
    ]
    ids = torch.cat([batch["input_ids"] for part in parts for batch in part.batches])
    return token_batches(
        ids, None, vocab_size=vocab_size, num_samples=1, seq_length=2, batch_size=16, seed=0
    )


def losses(model: PreTrainedModel, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: math.log(grail_hf.perplexity(model, None, ids, batch_size=16))
        for name, ids in windows.items()
    }


def compress(
    model: PreTrainedModel, tokens: TokenBatches, selector: str, repair: str, sparsity: float
) -> None:
    settings = {"sparsity": sparsity, "selector": selector}
    if repair == "reference":
        reference_compress(model, tokens, GrailConfig(**settings, ridge=1e-3, target="self"))
        return
    settings |= {
        "none": {"compensate": False},
        "ours": {},
        "refit": {"refit": 6},
    }[repair]
    grail_hf.compress(model, calibration=tokens, **settings)


@torch.no_grad()
def reference_compress(model: PreTrainedModel, tokens: TokenBatches, config: GrailConfig) -> None:
    """The recipe of the paper's code: both Grams first, then both groups."""
    check_weights(model)
    plan = plan_compression(model, config)
    model.eval()
    for block in stream(
        model,
        plan.architecture.layers,
        plan.specs,
        tokens.batches,
        choose_device(model, config.device),
        "self",
        config.seed,
    ):
        moments = [block.collect(group).to(config.torch_dtype) for group in block.groups]
        for group, stats in zip(block.groups, moments, strict=True):
            scores = plan.select(group, stats)
            width = plan.widths[group.kind][block.index]
            reduction = Reduction.keep_top(scores, width, group.partitions)
            kept = reduction.kept_channels(group.columns)
            weight = group.weight.to(config.torch_dtype)
            group.shrink_(reduction)
            group.repair_(ridge(weight, stats, kept, config.ridge, group.name).weight)
    apply_config_(model, plan.config)


def results_table(rows: list[dict], texts: list[str]) -> Table:
    """Excess losses, and their ratio to the best reference at the same sparsity."""
    table = Table("sparsity", "selector", "repair", title="excess loss (of the best reference's)")
    for text in texts:
        table.add_column(text, justify="right")
    table.add_column("seconds", justify="right")
    for row in rows:
        cells = []
        for text in texts:
            best = min(
                (
                    other["excess_loss"][text]
                    for other in rows
                    if other["sparsity"] == row["sparsity"] and other["repair"] == "reference"
                ),
                default=math.nan,
            )
            loss = row["excess_loss"][text]
            cells.append(f"{loss:.3f} ({loss / best:.2f})")
        table.add_row(
            f"{row['sparsity']:g}",
            row["selector"],
            row["repair"],
            *cells,
            f"{row['seconds']:.1f}",
        )
    return table


def plot(rows: list[dict], text: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    selectors = list(dict.fromkeys(row["selector"] for row in rows))
    styles = dict(zip(REPAIRS, (":", "--", "-", "-"), strict=True))
    markers = dict(zip(REPAIRS, ("x", "o", "s", "^"), strict=True))
    for number, selector in enumerate(selectors):
        for repair in REPAIRS:
            points = [
                (1 - row["sparsity"], row["excess_loss"][text])
                for row in rows
                if (row["selector"], row["repair"]) == (selector, repair)
            ]
            if points:
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    linestyle=styles[repair],
                    marker=markers[repair],
                    color=f"C{number}",
                    label=f"{selector}, {repair}",
                )
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("decoder block parameters kept")
    axes.set_ylabel(f"excess loss on {text} (nats a token)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
