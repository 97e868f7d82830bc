"""The verbs of `grail-hf`: compress, recover, evaluate, export, inspect, architectures, infer.

Results go to standard output only as `--json`, one object alone, or as what `architectures` and
`infer` print; progress, other tables and messages go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from grail_hf.checkpoints.loading import load_tokenizer, shallow_model
from grail_hf.checkpoints.sources import check_revision, meta_model
from grail_hf.config import AUTO, GrailConfig
from grail_hf.disk_to_disk import StoppedError
from grail_hf.evaluation import evaluate, loaded
from grail_hf.exports.export import FORMATS, export
from grail_hf.exports.gguf import TYPES, ExportError
from grail_hf.forecast import Forecast
from grail_hf.job import PartlyCompressedError
from grail_hf.models.architectures import architectures_table
from grail_hf.models.infer import infer_architecture
from grail_hf.models.source import architecture_source
from grail_hf.options import option, takes_settings
from grail_hf.recover_checkpoint import recover_checkpoint
from grail_hf.recovery.config import RecoveryConfig
from grail_hf.report import CompressionReport, check_output
from grail_hf.run import Run
from grail_hf.runtime import processes

app = typer.Typer(
    help="Make decoder-only language models narrower, and repair them in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True)
Source = Annotated[str, typer.Argument(help="A model folder or a hub name.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option(help="Of a source on the hub: a branch, a tag or a commit.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Load quantised weights (FP8, MXFP4, …) as floats.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="A text file or a .jsonl file of conversations (repeat for more), a corpus name, "
        'or "self". Default: c4.'
    ),
]
# What the user can mend.
_MENDABLE = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    ExportError,
    PartlyCompressedError,
    StoppedError,
    processes.ProcessGroupError,
    torch.OutOfMemoryError,
)


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """What the user can mend is one line and exit status 1; anything else is a traceback."""
    try:
        yield
    except _MENDABLE as error:
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        number = processes.count()
        where = f" in process {processes.index()} of {number}" if number > 1 else ""
        console.print(f"error{where}: {error}", style="red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error  # as shells report it


@app.command("compress")
@_errors_in_a_line()
@takes_settings
def compress_command(
    source: Source,
    output: Annotated[Path, typer.Argument(help="The new model's folder.", show_default=False)],
    config: GrailConfig,
    calibration: Calibration = None,
    revision: Revision = None,
    eval_text: Annotated[
        str | None, typer.Option("--eval", help="Text to measure perplexity on, before and after.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier compressed model in the output folder.")
    ] = False,
    disk_to_disk: Annotated[
        bool | None,
        typer.Option(
            "--disk-to-disk/--in-memory",
            help="Never hold the whole model; the default where it fills half the free memory.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with a run from disk to disk that was stopped.")
    ] = False,
    dequantize: Dequantize = False,
    as_json: Json = False,
) -> None:
    """Compress a model and save it as an ordinary checkpoint."""
    processes.join(config.device)
    processes.silence_copies()
    check_revision(source, revision)
    processes.once(partial(check_output, output, overwrite or resume), "the output folder")
    texts = _texts(calibration)
    if resume and disk_to_disk is False:
        raise ValueError("--resume goes on with a run from disk to disk: drop --in-memory")
    if dequantize and (disk_to_disk or resume):
        raise ValueError(
            "--dequantize loads the whole model, which is never in memory from disk to disk: "
            "drop --disk-to-disk and --resume, or save the dequantised model and compress that"
        )
    run = Run(source, output, texts, config, revision, eval_text, dequantize, resume, overwrite)
    report = run.execute(disk_to_disk)
    if not processes.is_first():
        return
    _show(report, output)
    if as_json:
        _print_json(report.to_dict() | {"output": str(output)})


def _texts(calibration: list[str] | None) -> str | list[Path]:
    """One name may be a corpus; several are files."""
    if calibration is None or len(calibration) < 2:
        return calibration[0] if calibration else "c4"
    return [Path(name) for name in calibration]


def _show(report: CompressionReport, output: Path) -> None:
    """Print what was done, where the result is, and how it loads where that is unusual."""
    _console.print(report.table())
    if report.rehomed:
        _console.print(
            f"Saved as {report.new_model_type}: it computes the same function, and a stock "
            f"{report.model_type} config cannot represent the new number of heads."
        )
    if not report.uniform:
        _console.print(
            "The layers differ in width: load it after `import grail_hf`, or with "
            "trust_remote_code=True; `grail-hf export --format padded` writes it for other "
            "programs."
        )
    _console.print(f"Saved in {output} ({report.seconds:.1f} s of compression).")


@app.command("recover")
@_errors_in_a_line()
@takes_settings
def recover_command(
    folder: Annotated[Path, typer.Argument(help="A compressed model.", show_default=False)],
    teacher: Annotated[
        str, typer.Option(help="The dense model: a folder or a hub name.", show_default=False)
    ],
    config: RecoveryConfig,
    calibration: Calibration = None,
    watch: Annotated[
        str | None,
        typer.Option(help="A second text, on which the model must become better too."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the divergence by step in this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a compressed model towards the dense one's predictions, without labels, in place."""
    processes.join(config.device)
    processes.silence_copies()
    texts = _texts(calibration)
    report = recover_checkpoint(folder, teacher, texts, config, watch=watch, resume=resume)
    if not processes.is_first():
        return
    _console.print(report.table())
    if plot is not None:
        report.plot(plot)
    if as_json:
        _print_json(report.to_dict() | {"output": str(folder)})


@app.command("evaluate")
@_errors_in_a_line()
def evaluate_command(
    source: Source,
    text: Annotated[
        str | None, typer.Option(help="A text file or a corpus name, for perplexity.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens in a window; by default the model's, at most 2048.")
    ] = None,
    batch_size: Annotated[int, option("batch_size")] = 8,
    max_windows: Annotated[int | None, typer.Option(help="Measure on at most this many.")] = None,
    bos: Annotated[bool | None, option("bos")] = None,
    limit: Annotated[float | None, typer.Option(help="Of lm-eval: examples per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Of lm-eval.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Of lm-eval: a folder of further tasks.")
    ] = None,
    revision: Revision = None,
    device: Annotated[str | None, option("device")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on text, and run lm-eval's tasks."""
    if text is None and not tasks.strip(" ,"):
        raise ValueError("nothing to evaluate: give --text, --tasks, or both")
    check_revision(source, revision)
    with loaded(source, device, revision) as model:
        result = evaluate(
            model,
            load_tokenizer(source, revision),
            text=text,
            tasks=tasks,
            seq_length=seq_length,
            batch_size=batch_size,
            max_windows=max_windows,
            bos=AUTO if bos is None else bos,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
        )
    _console.print(_measurements(source, result))
    if as_json:
        _print_json(result)


def _measurements(source: str, result: dict[str, Any]) -> Table:
    table = Table("measured", "value", title=source)
    for name, value in result.items():
        if name != "tasks":
            table.add_row(name, str(value) if isinstance(value, bool) else f"{value:.6g}")
    for task, metrics in result.get("tasks", {}).items():
        for name, value in metrics.items():
            table.add_row(f"{task} {name}", f"{value:.6g}")
    return table


@app.command("export")
@_errors_in_a_line()
def export_command(
    source: Annotated[Path, typer.Argument(help="A saved model's folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The new folder.", show_default=False)],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "stock",
    gguf_type: Annotated[
        str, typer.Option(help=f"Of matrices in GGUF: auto (as saved) or {', '.join(TYPES)}.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a saved model in another format that other programs load, and check that it is one."""
    result = export(source, output, format, gguf_type=gguf_type)
    _console.print(
        f"Saved in {output} as {result.model_type} (format {format}); it computes what {source} "
        f"does, to a relative error of {result.error:.1g}."
    )
    if as_json:
        _print_json(asdict(result) | {"output": str(output)})


@app.command("inspect")
@_errors_in_a_line()
@takes_settings
def inspect_command(
    source: Source,
    config: GrailConfig,
    revision: Revision = None,
    dequantize: Dequantize = False,
    as_json: Json = False,
) -> None:
    """Forecast what compressing will do and take, from the config alone: no weights are read."""
    check_revision(source, revision)
    forecast = Forecast.of(meta_model(source, revision, dequantize), config)
    for table in forecast.tables(source):
        _console.print(table)
    if as_json:
        _print_json(forecast.to_dict())


@app.command("architectures")
def architectures_command() -> None:
    """List the known model types and what can be pruned in each, as a Markdown table."""
    sys.stdout.write(architectures_table() + "\n")


@app.command("infer")
@_errors_in_a_line()
def infer_command(source: Source, revision: Revision = None) -> None:
    """Propose the architecture of an unknown model type, as Python, from its config alone."""
    check_revision(source, revision)
    entry = infer_architecture(shallow_model(source, revision))
    sys.stdout.write(architecture_source(entry) + "\n")


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
