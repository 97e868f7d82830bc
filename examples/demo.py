"""The main job on the bundled model: compress, evaluate, save, reload; a table and a picture.

A small trained Llama loses part of its decoder blocks' parameters by plain Wanda pruning, by Wanda
with GRAIL's repair, and by grail_hf's own `obs` selector with repair. Perplexity is measured on
text that calibration has not seen. Run it with `make demo`; results go to build/demo/.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import grail_hf

EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES.parent / "build" / "demo"
DENSE = EXAMPLES / "tiny-llama"
TRAIN, TEST = EXAMPLES / "text" / "jargon-train.txt", EXAMPLES / "text" / "jargon-test.txt"

SEQ_LENGTH = 256
SHOWN = 0.5
METHODS = {
    "Wanda, pruned only": (
        {"selector": "wanda", "compensate": False, "allocation": "uniform", "random_tokens": 0},
        (0.3, 0.5, 0.7),
    ),
    "Wanda + GRAIL": ({"selector": "wanda"}, (SHOWN,)),
    "obs + GRAIL": ({"selector": "obs"}, (0.3, 0.5, 0.7)),
}
PROMPT = "hacker /n./ [originally, someone who makes furniture with an axe] 1. A person who"

# Run in a process of its own: nothing but transformers is needed to load the result.
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert "grail_hf" not in sys.modules
expected = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(expected["input_ids"]).logits
print(type(model).__name__, "bit-exact" if torch.equal(logits, expected["logits"]) else "DIFFERS")
"""


def main() -> None:
    logging.disable_progress_bar()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=100)
    tokenizer = AutoTokenizer.from_pretrained(DENSE)

    dense = load()
    rows = [measure("dense", 0.0, dense, tokenizer, reference=None)]
    samples = {"dense": continuation(dense, tokenizer)}
    for name, (settings, sparsities) in METHODS.items():
        for sparsity in sparsities:
            console.print(f"{name}, sparsity {sparsity}")
            model = load()
            start = time.perf_counter()
            report = grail_hf.compress(
                model,
                tokenizer,
                TRAIN,
                sparsity=sparsity,
                num_samples=128,
                seq_length=SEQ_LENGTH,
                batch_size=16,
                **settings,
            )
            seconds = time.perf_counter() - start
            row = measure(name, report.sparsity, model, tokenizer, reference=rows[0])
            rows.append(row | {"seconds": seconds})
            if sparsity == SHOWN:
                samples[name] = continuation(model, tokenizer)
                shown, shown_report = model, report

    console.print(results_table([row for row in rows if row["sparsity"] in (0, SHOWN)]))
    for name, text in samples.items():
        console.print(f"{name}: {text}\n", markup=False, highlight=False)

    folder = OUTPUT / "tiny-llama-half"
    shown.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shown_report.save(folder)
    console.print(f"Saved in {folder}; a fresh process loads it: {reload(folder, tokenizer)}")

    (OUTPUT / "demo.json").write_text(json.dumps(rows, indent=2))
    plot(rows, OUTPUT / "demo.png")
    console.print(f"Picture: {OUTPUT / 'demo.png'}")


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32)


def measure(name: str, sparsity: float, model: PreTrainedModel, tokenizer, reference) -> dict:
    """Perplexity on the test text, and what it lost against the dense model, in nats a token."""
    perplexity = grail_hf.perplexity(model, tokenizer, TEST, seq_length=SEQ_LENGTH)
    excess = math.log(perplexity / reference["perplexity"]) if reference else 0.0
    return {
        "name": name,
        "sparsity": round(sparsity, 4),
        "parameters": model.num_parameters(),
        "perplexity": perplexity,
        "excess_loss": excess,
    }


def continuation(model: PreTrainedModel, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def reload(folder: Path, tokenizer) -> str:
    """Load the saved model in a fresh process and hold its logits against this process's."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = {"input_ids": ids, "logits": model(ids).logits}
    torch.save(expected, OUTPUT / "expected.pt")
    command = [sys.executable, "-c", RELOAD, str(folder), str(OUTPUT / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def results_table(rows: list[dict]) -> Table:
    plain = rows[1]["excess_loss"]
    table = Table(title=f"{SHOWN:.0%} of the decoder blocks' parameters removed")
    for column in ("", "parameters", "perplexity", "excess loss", "of plain pruning's", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['perplexity']:.1f}",
            f"{row['excess_loss']:.3f}",
            f"{row['excess_loss'] / plain:.2f}" if row["excess_loss"] else "",
            f"{row['seconds']:.1f}" if "seconds" in row else "",
        )
    return table


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    dense = rows[0]["perplexity"]
    for name, marker in zip(METHODS, "os^", strict=True):
        points = [(r["sparsity"], r["perplexity"]) for r in rows if r["name"] == name]
        if len(points) > 1:
            points.insert(0, (0.0, dense))
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.axhline(dense, color="grey", linestyle=":", label="dense")
    axes.set_yscale("log")
    ticks = [50, 75, 100, 150, 200]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("decoder block parameters removed")
    axes.set_ylabel("perplexity (jargon-test)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
