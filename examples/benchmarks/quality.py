"""Quality: every selector, without repair, as the paper repairs, and as grail_hf does.

    python examples/benchmarks/quality.py                         # the bundled model
    python examples/benchmarks/quality.py --model NAME --calibration c4 --text wikitext2

For each selector and sparsity the model is pruned (or folded) only ("none"); pruned and repaired by
the recipe of the GRAIL paper's code ("reference": both Grams of a layer in one pass before it is
changed, so that the MLP does not see the repaired attention; damping 1e-3; the block's own output
as target), which is written here with this library's parts; by grail_hf's defaults ("ours"); with
widths that differ by layer ("error": `allocation="error"`); and with these by measured divergence
and six steps of refit ("best": `allocation="search"`, `refit=6`). The first two keep the same
fraction of both kinds and calibrate on the text as it is; for the others, a part of the text is
random and a part is written by the model. "flap-global" is FLAP with its own widths, of
standardised scores sorted over the whole model, in every column. Prints one table of excess losses
(log perplexity minus the dense model's, nats a token), with the ratio to the best reference at that
sparsity, and writes quality.json and quality.png. A run goes on from the quality.json that it
finds, if that is of the same model, texts and numbers of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import grail_hf
from grail_hf.calibration.stream import Stream
from grail_hf.calibration.tokens import TokenBatches, token_batches
from grail_hf.calibration.windows import token_windows
from grail_hf.config import GrailConfig
from grail_hf.methods.ridge import fold_linearly, ridge
from grail_hf.methods.selectors import choose
from grail_hf.models.decoder import check_weights, decoder_layers
from grail_hf.models.surgery import apply_config_
from grail_hf.planning.plan import plan_compression
from grail_hf.planning.profiling import measured_plan
from grail_hf.runtime.devices import choose_device
from grail_hf.runtime.layers import LayerPlacement

EXAMPLES = Path(__file__).parent.parent
TEXTS = EXAMPLES / "text"
REPAIRS = ("none", "reference", "ours", "error", "best")
PLAIN = {"allocation": "uniform", "random_tokens": 0, "multiple_of": 8}
SETTINGS = {
    "none": PLAIN | {"compensate": False},
    "reference": PLAIN | {"ridge": 1e-3, "target": "self", "fold": "linear"},
    "ours": {},
    "error": {"allocation": "error"},
    "best": {"allocation": "search", "refit": 6},
}
# What every row of one quality.json has in common.
COMMON = ("model", "dtype", "calibration", "text", "num_samples", "seq_length", "max_windows")
# The selectors of the paper, whose references are the ones to beat.
PAPER = ("magnitude", "wanda", "wanda++", "flap", "flap-global", "slimgpt", "fold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-llama"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--calibration", nargs="+", default=[str(TEXTS / "jargon-train.txt")])
    parser.add_argument("--text", nargs="+", default=[str(TEXTS / "jargon-test.txt")])
    parser.add_argument("--selectors", nargs="+", default=[*grail_hf.SELECTORS, "flap-global"])
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    kept = arguments.output / "quality.json"
    common = {name: getattr(arguments, name) for name in COMMON}
    rows = []
    if kept.exists():
        found = json.loads(kept.read_text())
        if found.get("settings") != common:
            parser.error(
                f"{kept} is of another run, with {found.get('settings', 'unknown settings')}: "
                "give the same, or another --output"
            )
        rows = found["rows"]
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = {
        label: token_windows(
            text,
            tokenizer,
            seq_length=arguments.seq_length,
            max_windows=arguments.max_windows,
        )
        for label, text in labels(arguments.text).items()
    }
    dense = load(arguments)
    # With and without random tokens, as the settings ask.
    tokens = {
        fraction: calibration_tokens(arguments, tokenizer, dense.config.vocab_size, fraction)
        for fraction in {config_of("wanda", repair, 0.5).random_tokens for repair in REPAIRS}
    }
    baseline = losses(dense, windows, arguments.batch_size)
    for sparsity in arguments.sparsities:
        for selector in arguments.selectors:
            for repair in arguments.repairs:
                if (sparsity, selector, repair) in {
                    (row["sparsity"], row["selector"], row["repair"]) for row in rows
                }:
                    continue
                model = load(arguments)
                config = config_of(selector, repair, sparsity)
                start = time.perf_counter()
                compress(model, tokens[config.random_tokens], config, repair)
                seconds = time.perf_counter() - start
                measured = losses(model, windows, arguments.batch_size)
                excess = {name: loss - baseline[name] for name, loss in measured.items()}
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
                result = {
                    "settings": common,
                    "calibration": [batches.summary() for batches in tokens.values()],
                    "dense_loss": baseline,
                    "rows": rows,
                }
                kept.write_text(json.dumps(result, indent=2))
    Console(width=110).print(results_table(rows, list(windows)))
    plot(rows, baseline, arguments.output / "quality.png")


def labels(texts: list[str]) -> dict[str, str]:
    """A column's name -> its text: the stem, or all of the path where two texts have one stem."""
    stems = Counter(Path(text).stem for text in set(texts))
    return {
        stem if stems[stem] == 1 else text: text for text in texts for stem in [Path(text).stem]
    }


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)


def calibration_tokens(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    random_tokens: float,
) -> TokenBatches:
    """As many windows from each calibration text, `num_samples` together."""
    share = arguments.num_samples // len(arguments.calibration)
    parts = [
        token_batches(
            text,
            tokenizer,
            vocab_size=vocab_size,
            num_samples=share,
            seq_length=arguments.seq_length,
            batch_size=arguments.batch_size,
            seed=0,
            random_tokens=random_tokens,
        )
        for text in arguments.calibration
    ]
    batches = tuple(batch for part in parts for batch in part.batches)
    return TokenBatches(
        batches,
        source="; ".join(part.source for part in parts),
        fingerprint=" ".join(part.fingerprint for part in parts),
        bos=parts[0].bos,
        text=all(part.text for part in parts),
    )


def losses(
    model: PreTrainedModel, windows: dict[str, torch.Tensor], batch_size: int
) -> dict[str, float]:
    return {
        name: math.log(grail_hf.perplexity(model, None, ids, batch_size=batch_size))
        for name, ids in windows.items()
    }


def config_of(selector: str, repair: str, sparsity: float) -> GrailConfig:
    settings = SETTINGS[repair] | {"sparsity": sparsity, "selector": selector}
    if selector == "flap-global":
        settings |= {"selector": "flap", "allocation": "flap"}
    return GrailConfig(**settings)


def compress(
    model: PreTrainedModel, tokens: TokenBatches, config: GrailConfig, repair: str
) -> None:
    if repair == "reference":
        reference_compress(model, tokens, config)
    else:
        grail_hf.compress(model, calibration=tokens, config=config, progress=False)


@torch.no_grad()
def reference_compress(model: PreTrainedModel, tokens: TokenBatches, config: GrailConfig) -> None:
    """The recipe of the paper's code: both Grams first, then both groups."""
    check_weights(model)
    device = choose_device(model, config.device)
    config = config.resolved_on(device)
    plan = plan_compression(model, config)
    model.eval()
    placement = LayerPlacement(decoder_layers(model, plan.architecture), device)
    stream = Stream(
        *(model, placement, plan.specs, tokens.batches),
        seed=config.seed,
        progress=False,
        dtype=config.solve_torch_dtype,
    )
    if plan.measures:
        plan, _ = measured_plan(stream, plan, config)
    for block in stream.blocks():
        moments = [block.collect(group) for group in block.groups]
        for group, stats in zip(block.groups, moments, strict=True):
            width = plan.widths[group.kind][block.index]
            if width == group.num_units:
                continue
            if plan.select.needs_gradient:
                group.gradient = block.regional_gradient(group)
            reduction = choose(plan.select, group, stats, width, config.selector_name)
            weight = group.weight.to(config.solve_torch_dtype)
            kept = reduction.kept_channels(group.columns)
            if reduction.folds:
                stats = fold_linearly(weight, stats, reduction, group.columns)
                weight = reduction.of_consumer(weight, group.columns)
                kept = torch.arange(kept.numel())
            group.shrink_(reduction)
            group.repair_(ridge(weight, stats, kept, config.ridge, group.name).weight)
    apply_config_(model, plan.config)


def best_reference(rows: list[dict], sparsity: float, text: str) -> float:
    """The least excess loss of the paper's recipe with any of its own selectors."""
    return min(
        (
            row["excess_loss"][text]
            for row in rows
            if row["sparsity"] == sparsity
            and row["repair"] == "reference"
            and row["selector"] in PAPER
        ),
        default=math.nan,
    )


def results_table(rows: list[dict], texts: list[str]) -> Table:
    """Excess losses, and their ratio to the best reference at the same sparsity."""
    table = Table("sparsity", "selector", "repair", title="excess loss (of the best reference's)")
    for text in texts:
        table.add_column(text, justify="right")
    table.add_column("seconds", justify="right")
    for row in rows:
        losses = (
            (row["excess_loss"][text], best_reference(rows, row["sparsity"], text))
            for text in texts
        )
        table.add_row(
            f"{row['sparsity']:g}",
            row["selector"],
            row["repair"],
            *(f"{loss:.3f} ({loss / best:.2f})" for loss, best in losses),
            f"{row['seconds']:.1f}",
        )
    return table


def plot(rows: list[dict], dense: dict[str, float], path: Path) -> None:
    """Perplexity against kept parameters, a panel a text: the best selector's, and all others'."""
    figure, panels = plt.subplots(
        1, len(dense), figsize=(4.2 * len(dense), 4.0), layout="constrained", squeeze=False
    )
    for axes, (text, loss) in zip(panels[0], dense.items(), strict=True):
        for number, repair in enumerate(REPAIRS):
            by_sparsity: dict[float, list[float]] = {}
            for row in rows:
                if row["repair"] == repair and row["selector"] != "random":
                    perplexity = math.exp(loss + row["excess_loss"][text])
                    by_sparsity.setdefault(row["sparsity"], []).append(perplexity)
            if by_sparsity:
                kept = [1 - sparsity for sparsity in sorted(by_sparsity)]
                found = [by_sparsity[sparsity] for sparsity in sorted(by_sparsity)]
                lowest, highest = ([end(values) for values in found] for end in (min, max))
                axes.fill_between(kept, lowest, highest, color=f"C{number}", alpha=0.15, lw=0)
                axes.plot(kept, lowest, "o-", color=f"C{number}", ms=4, label=repair)
        axes.axhline(math.exp(loss), color="0.5", lw=0.8, ls=":", label="dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({1 - row["sparsity"] for row in rows}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("decoder block parameters kept")
        axes.set_title(text, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("perplexity")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
