"""The verbs of `grail-hf`: compress, evaluate, export, inspect, architectures, infer.

Results go to standard output only as `--json`, one object alone, or as what `architectures` and
`infer` print; progress, other tables and messages go to standard error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from grail_hf.calibration.sampling import SELF
from grail_hf.calibration.tokens import read_calibration
from grail_hf.calibration.windows import BOS_FIRST, bos_token, token_windows
from grail_hf.checkpoints.folders import (
    check_not_stopped,
    check_room,
    replaced_when_whole,
    save_or_rescue,
)
from grail_hf.checkpoints.reader import damage_named
from grail_hf.checkpoints.sources import (
    check_revision,
    copy_processor,
    has_safetensors,
    has_tokenizer,
    meta_model,
    processor_folder,
)
from grail_hf.compress import compress
from grail_hf.config import AUTO, GrailConfig
from grail_hf.disk_to_disk import StoppedError, compress_checkpoint
from grail_hf.evaluation import evaluate, perplexity
from grail_hf.exports.export import FORMATS, export
from grail_hf.exports.gguf import TYPES, ExportError
from grail_hf.job import PartlyCompressedError
from grail_hf.methods.allocation import ALLOCATIONS
from grail_hf.methods.selectors import SELECTORS
from grail_hf.models.architectures import architectures_table, find_architecture
from grail_hf.models.decoder import auto_class, check_weights, decoder_layers
from grail_hf.models.infer import infer_architecture
from grail_hf.models.quantization import dequantizing
from grail_hf.models.source import architecture_source
from grail_hf.planning.costs import Estimate, estimate
from grail_hf.planning.plan import plan_compression, refits, window_length
from grail_hf.report import CompressionReport, check_output, size, width_range
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device, usable_device
from grail_hf.runtime.dispatched import whole_on_device
from grail_hf.runtime.meter import keep_no_freed_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
app = typer.Typer(
    help="Make decoder-only language models narrower, and repair them in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True)
Source = Annotated[str, typer.Argument(help="A model folder or a hub name.", show_default=False)]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Fraction of the decoder blocks' projection parameters to remove."),
]
MlpSparsity = Annotated[float | None, typer.Option(help="Fraction of the MLP channels to remove.")]
AttentionSparsity = Annotated[
    float | None, typer.Option(help="Fraction of the attention units to remove.")
]
SelectorName = Annotated[str, typer.Option(help=f"One of {', '.join(SELECTORS)}.")]
AllocationName = Annotated[
    str,
    typer.Option("--allocation", help=f"How widths are chosen: auto, {', '.join(ALLOCATIONS)}."),
]
Compensate = Annotated[bool, typer.Option(help="Repair by ridge regression.")]
Target = Annotated[
    str, typer.Option(help="What a repaired block should put out: self, dense or residual.")
]
Refit = Annotated[
    int, typer.Option(help="Conjugate gradient steps of further repair; 6 is thorough.")
]
Ridge = Annotated[
    str, typer.Option(help='Damping of the repair; "auto" chooses it on held-out windows.')
]
NumSamples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLength = Annotated[int, typer.Option(help="Tokens in a window.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Start each window of text with BOS; by default if the tokenizer adds one by itself.",
    ),
]
RandomTokens = Annotated[
    float, typer.Option(help="Fraction of a calibration text's tokens to replace by random ones.")
]
BatchSize = Annotated[int, typer.Option(help="Windows in one forward pass.")]
MultipleOf = Annotated[
    str, typer.Option(help='MLP widths are multiples of this; "auto": as large as costs nothing.')
]
AttentionUnit = Annotated[
    str,
    typer.Option(
        help='"kv_group", "query_head" (as many from every group), or "auto": as measured.'
    ),
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="A group to leave whole, for example self_attn; repeat.")
]
Rehome = Annotated[
    bool, typer.Option(help="Allow another stock model type where this one cannot say the shape.")
]
SolveDtype = Annotated[
    str,
    typer.Option(
        "--solve-dtype",
        help="Of selection and solve: float64, float32, or auto: float64 where the device has it.",
    ),
]
Device = Annotated[str | None, typer.Option(help="Where layers run; by default an accelerator.")]
HiddenStates = Annotated[
    str, typer.Option(help="Where hidden states are kept: auto, accelerator, host or disk.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Load quantised weights (FP8, MXFP4, …) as floats.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Revision = Annotated[
    str | None, typer.Option(help="Of a source on the hub: a branch, a tag or a commit.")
]
Seed = Annotated[int, typer.Option(help="Of the windows drawn.")]
Bias = Annotated[
    str | None, typer.Option(help='"auto" fits biases too, where the stock config has them.')
]
Fold = Annotated[
    str, typer.Option(help="What the repair of folded units goes by: measured or linear.")
]
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
_DEFAULTS = GrailConfig(sparsity=0.0)


@app.command("compress")
def compress_command(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, typer.Argument(help="The new model's folder.", show_default=False)],
    sparsity: Sparsity = None,
    mlp_sparsity: MlpSparsity = None,
    attention_sparsity: AttentionSparsity = None,
    selector: SelectorName = _DEFAULTS.selector_name,
    allocation: AllocationName = _DEFAULTS.allocation,
    compensate: Compensate = _DEFAULTS.compensate,
    target: Target = _DEFAULTS.target,
    refit: Refit = _DEFAULTS.refit,
    fold: Fold = _DEFAULTS.fold,
    ridge: Ridge = str(_DEFAULTS.ridge),
    bias: Bias = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file or a .jsonl file of conversations (repeat for more), a corpus name, "
            'or "self". Default: c4.'
        ),
    ] = None,
    revision: Revision = None,
    num_samples: NumSamples = _DEFAULTS.num_samples,
    seq_length: SeqLength = _DEFAULTS.seq_length,
    bos: Bos = None,
    random_tokens: RandomTokens = _DEFAULTS.random_tokens,
    batch_size: BatchSize = _DEFAULTS.batch_size,
    seed: Seed = _DEFAULTS.seed,
    multiple_of: MultipleOf = str(_DEFAULTS.multiple_of),
    attention_unit: AttentionUnit = _DEFAULTS.attention_unit,
    ignore: Ignore = None,
    rehome: Rehome = _DEFAULTS.rehome,
    device: Device = None,
    dtype: SolveDtype = _DEFAULTS.dtype,
    hidden_states: HiddenStates = _DEFAULTS.hidden_states,
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
    with _errors_in_a_line():
        config = _config(context)
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
        # The shapes on the meta device, then the texts, then the weights: cheap refusals first.
        skeleton = meta_model(source, revision, dequantize)
        plan = plan_compression(skeleton, config)
        if disk_to_disk is None:
            large = processes.once(partial(_is_large, skeleton, source, revision), "the source")
            disk_to_disk = resume or (texts != SELF and large and not dequantize)
        if disk_to_disk:
            report = _compress_from_disk(
                skeleton, source, revision, output, texts, config, eval_text, resume, overwrite
            )
        else:
            needed = estimate(skeleton, plan, config).disk_bytes
            report = _compress_in_memory(
                skeleton, needed, source, revision, output, texts, config, eval_text, dequantize
            )
    if not processes.is_first():
        return
    _console.print(report.table())
    if report.rehomed:
        _console.print(
            f"Saved as {report.new_model_type}: it computes the same function, and a stock "
            f"{report.model_type} config cannot say the new number of heads."
        )
    if not report.uniform:
        _console.print(
            "The layers differ in width: load it after `import grail_hf`, or with "
            "trust_remote_code=True; `grail-hf export --format padded` writes it for other "
            "programs."
        )
    _console.print(f"Saved in {output} ({report.seconds:.1f} s of compression).")
    if as_json:
        _print_json(report.to_dict() | {"output": str(output)})


def _compress_in_memory(
    skeleton: PreTrainedModel,
    needed: int,
    source: str,
    revision: str | None,
    output: Path,
    texts: str | list[Path],
    config: GrailConfig,
    eval_text: str | None,
    dequantize: bool,
) -> CompressionReport:
    with processes.first_within(replaced_when_whole(output), "the output folder") as folder:
        processes.once(partial(check_room, folder, needed), "the output folder")
        tokenizer = _tokenizer(source, revision)
        # Of what the hub named when it gave the config, if it was the hub.
        processor = processor_folder(source, getattr(skeleton.config, "_commit_hash", None))
        tokens = None if texts == SELF else read_calibration(skeleton, tokenizer, texts, config)
        windows = None
        if eval_text:
            length = window_length(skeleton, config)
            windows = token_windows(eval_text, tokenizer, seq_length=length, bos=config.bos)
        model = _model(source, dequantize, revision=revision)
        if tokens is None:
            check_weights(model)
            with _on_device(model, config):
                tokens = read_calibration(model, tokenizer, texts, config)
        measured: dict[str, Any] = {}
        if windows is not None and eval_text:
            measured |= _measured_on(eval_text, windows, _has_bos(tokenizer, config))
            measured["perplexity before"] = _perplexity(model, windows, config)
        report = compress(model, tokenizer, tokens, config)
        if windows is not None:
            measured["perplexity after"] = _perplexity(model, windows, config)
        report.evaluation = measured
        save = partial(_save, model, tokenizer, processor, report)
        processes.once(partial(save_or_rescue, save, folder, output), "the output folder")
    return report


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: Path,
    report: CompressionReport,
    folder: Path,
) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_processor(processor, folder)
    report.save(folder)


def _compress_from_disk(
    skeleton: PreTrainedModel,
    source: str,
    revision: str | None,
    output: Path,
    texts: str | list[Path],
    config: GrailConfig,
    eval_text: str | None,
    resume: bool,
    overwrite: bool,
) -> CompressionReport:
    keep_no_freed_blocks()
    run = partial(
        compress_checkpoint, config=config, revision=revision, resume=resume, overwrite=overwrite
    )
    if not eval_text or texts == SELF:  # which is refused
        return run(source, output, texts)
    # The source is measured while it is there: the output may take its place.
    if not resume:
        processes.once(partial(check_not_stopped, output), "the output folder")
    tokenizer = _tokenizer(source, revision)
    tokens = read_calibration(skeleton, tokenizer, texts, config)
    length = window_length(skeleton, config)
    windows = token_windows(eval_text, tokenizer, seq_length=length, bos=config.bos)

    def measure(folder: str | Path, revision: str | None = None) -> float:
        one = partial(_perplexity_of, str(folder), revision, windows, config)
        return processes.once(one, "the evaluation")

    measured: dict[str, Any] = dict(_measured_on(eval_text, windows, _has_bos(tokenizer, config)))
    measured["perplexity before"] = measure(source, revision)
    report = run(source, output, tokens)
    measured["perplexity after"] = measure(output)
    report.evaluation |= measured
    processes.once(partial(report.save, output), "the output folder")
    return report


def _is_large(skeleton: PreTrainedModel, source: str, revision: str | None) -> bool:
    """Whether the weights fill more than half of the free memory and can go from disk to disk."""
    import psutil

    num_bytes = sum(parameter.nbytes for parameter in skeleton.parameters())
    if num_bytes <= int(psutil.virtual_memory().available) // 2:
        return False
    return has_safetensors(source, revision)


@app.command("evaluate")
def evaluate_command(
    source: Source,
    text: Annotated[
        str | None, typer.Option(help="A text file or a corpus name, for perplexity.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens in a window; by default the model's, at most 2048.")
    ] = None,
    batch_size: BatchSize = 8,
    max_windows: Annotated[int | None, typer.Option(help="Measure on at most this many.")] = None,
    bos: Bos = None,
    limit: Annotated[float | None, typer.Option(help="Of lm-eval: examples per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Of lm-eval.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Of lm-eval: a folder of further tasks.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on text, and run lm-eval's tasks."""
    with _errors_in_a_line():
        if text is None and not tasks.strip(" ,"):
            raise ValueError("nothing to evaluate: give --text, --tasks, or both")
        check_revision(source, revision)
        with _loaded(source, device, revision) as model:
            result = evaluate(
                model,
                _tokenizer(source, revision),
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
    table = Table("measured", "value", title=source)
    for name, value in result.items():
        if name != "tasks":
            table.add_row(name, str(value) if isinstance(value, bool) else f"{value:.6g}")
    for task, metrics in result.get("tasks", {}).items():
        for name, value in metrics.items():
            table.add_row(f"{task} {name}", f"{value:.6g}")
    _console.print(table)
    if as_json:
        _print_json(result)


@app.command("export")
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
    with _errors_in_a_line():
        result = export(source, output, format, gguf_type=gguf_type)
    _console.print(
        f"Saved in {output} as {result.model_type} (format {format}); it computes what {source} "
        f"does, to a relative error of {result.error:.1g}."
    )
    if as_json:
        _print_json(asdict(result) | {"output": str(output)})


@app.command("inspect")
def inspect_command(
    context: typer.Context,
    source: Source,
    sparsity: Sparsity = None,
    mlp_sparsity: MlpSparsity = None,
    attention_sparsity: AttentionSparsity = None,
    selector: SelectorName = _DEFAULTS.selector_name,
    allocation: AllocationName = _DEFAULTS.allocation,
    compensate: Compensate = _DEFAULTS.compensate,
    target: Target = _DEFAULTS.target,
    refit: Refit = _DEFAULTS.refit,
    fold: Fold = _DEFAULTS.fold,
    ridge: Ridge = str(_DEFAULTS.ridge),
    bias: Bias = None,
    revision: Revision = None,
    num_samples: NumSamples = _DEFAULTS.num_samples,
    seq_length: SeqLength = _DEFAULTS.seq_length,
    bos: Bos = None,
    random_tokens: RandomTokens = _DEFAULTS.random_tokens,
    batch_size: BatchSize = _DEFAULTS.batch_size,
    seed: Seed = _DEFAULTS.seed,
    multiple_of: MultipleOf = str(_DEFAULTS.multiple_of),
    attention_unit: AttentionUnit = _DEFAULTS.attention_unit,
    ignore: Ignore = None,
    rehome: Rehome = _DEFAULTS.rehome,
    device: Device = None,
    dtype: SolveDtype = _DEFAULTS.dtype,
    hidden_states: HiddenStates = _DEFAULTS.hidden_states,
    dequantize: Dequantize = False,
    as_json: Json = False,
) -> None:
    """Say what compressing will do and take, from the config alone: no weights are read."""
    with _errors_in_a_line():
        config = _config(context)
        check_revision(source, revision)
        model = meta_model(source, revision, dequantize)
        # It need not be a device of this machine.
        where = torch.device(config.device) if config.device else choose_device(model, None)
        config = config.resolved_on(where)
        plan = plan_compression(model, config)
        costs = estimate(model, plan, config, where)
        from_disk = estimate(model, plan, config, where, disk_to_disk=True)
    table = Table("", "before", "after", title=f"{source}: {100 * plan.sparsity:.2f}% removed")
    for kind, units in plan.units.items():
        table.add_row(f"{kind} units per layer", f"{units:,}", width_range(plan.widths[kind]))
    for title, (before, after) in (
        ("projection parameters", plan.projection_parameters),
        ("total parameters", plan.total_parameters),
    ):
        table.add_row(title, f"{before:,}", f"{after:,}")
    table.add_row("model type", model.config.model_type, plan.config.model_type)
    if plan.measures:
        table.caption = (
            f"a forecast: the widths are measured (allocation {plan.allocation}, attention unit "
            f"{' or '.join(plan.attention_units)})"
        )
    refitted = refits(plan, config)
    for kind, (number, repaired) in refitted.items():
        table.add_row(f"{kind} groups refitted", "", f"{number} of {repaired}")
    table.add_section()
    table.add_row("calibration tokens", "", f"{costs.tokens:,}")
    table.add_row(f"hidden states ({config.hidden_states})", "", size(costs.hidden_bytes))
    table.add_row("dense weights", "", size(costs.weights_bytes))
    _console.print(table)
    for title, one in (("in memory", costs), ("disk to disk", from_disk)):
        _console.print(_costs_table(title, one))
    if as_json:
        _print_json(
            {
                "model_type": model.config.model_type,
                "new_model_type": plan.config.model_type,
                "sparsity": plan.sparsity,
                "allocation": plan.allocation,
                "attention_units": plan.attention_units,
                "units": plan.units,
                "widths": plan.widths,
                "refits": refitted,
                "projection_parameters": plan.projection_parameters,
                "total_parameters": plan.total_parameters,
                "estimate": costs.to_dict(),
                "estimate_disk_to_disk": from_disk.to_dict(),
            }
        )


@app.command("architectures")
def architectures_command() -> None:
    """List the known model types and what is offered for each, as a Markdown table."""
    sys.stdout.write(architectures_table() + "\n")


@app.command("infer")
def infer_command(source: Source, revision: Revision = None) -> None:
    """Propose the architecture of a type that is not known, as Python, from its config alone."""
    with _errors_in_a_line():
        check_revision(source, revision)
        entry = infer_architecture(_shallow_model(source, revision))
    sys.stdout.write(architecture_source(entry) + "\n")


def _shallow_model(source: str, revision: str | None) -> PreTrainedModel:
    """A random model with as few of the layers as have every kind among them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [""]
    depth = min(text.num_hidden_layers, max(1 + max(map(kinds.index, kinds)), 2))
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    model: PreTrainedModel = auto_class(config.model_type).from_config(config)
    return model


def _model(source: str, dequantize: bool = False, **settings: Any) -> PreTrainedModel:
    from transformers import AutoConfig

    with damage_named(f"a file of weights of {source}"):
        config = AutoConfig.from_pretrained(source, revision=settings.get("revision"))
        if dequantize and (floats := dequantizing(config)):
            settings["quantization_config"] = floats
        model: PreTrainedModel = auto_class(config.model_type).from_pretrained(
            source, dtype="auto", **settings
        )
    return model


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The source's, or None for a folder without one: what needs it says so."""
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    return tokenizer


def _texts(calibration: list[str] | None) -> str | list[Path]:
    """One name may be a corpus; several are files."""
    if calibration is None or len(calibration) < 2:
        return calibration[0] if calibration else "c4"
    return [Path(name) for name in calibration]


def _has_bos(tokenizer: PreTrainedTokenizerBase | None, config: GrailConfig) -> bool:
    """Whether windows of text start with BOS."""
    return tokenizer is not None and bos_token(tokenizer, config.bos) is not None


def _measured_on(text: str, windows: Tensor, has_bos: bool = False) -> dict[str, str]:
    """What a report says of the text of an evaluation: of a path only the last name."""
    name, colon, rest = text.partition(":")
    public = Path(name).name if Path(name).exists() else name
    count, length = windows.shape
    return {
        "evaluation text": public + colon + rest,
        "evaluation windows": f"{count} x {length} tokens{BOS_FIRST if has_bos else ''}",
    }


def _perplexity_of(
    folder: str, revision: str | None, windows: Tensor, config: GrailConfig
) -> float:
    """Perplexity of a checkpoint."""
    with _loaded(folder, config.device, revision) as model:
        return perplexity(model, None, windows, batch_size=config.batch_size)


@contextmanager
def _loaded(source: str, device: str | None, revision: str | None) -> Iterator[PreTrainedModel]:
    """A model for evaluation: on the device, or by default wherever and on disk as it fits."""
    where = "auto" if device is None else {"": usable_device(device)}
    with tempfile.TemporaryDirectory() as scratch:
        yield _model(source, revision=revision, device_map=where, offload_folder=scratch)


def _perplexity(model: PreTrainedModel, windows: Tensor, config: GrailConfig) -> float:
    """Perplexity where layers would run, measured by the first process."""

    def measure() -> float:
        with _on_device(model, config):
            return perplexity(model, None, windows, batch_size=config.batch_size)

    return processes.once(measure, "the evaluation")


@contextmanager
def _on_device(model: PreTrainedModel, config: GrailConfig) -> Iterator[None]:
    """The whole model computes where layers would, as far as it fits there."""
    layers = decoder_layers(model, find_architecture(model.config.model_type))
    with whole_on_device(model, layers, choose_device(model, config.device)):
        yield


def _config(context: typer.Context) -> GrailConfig:
    """The config that a command's options spell: they are named after its fields."""
    known = {field.name for field in fields(GrailConfig)}
    settings = {name: value for name, value in context.params.items() if name in known}
    settings["ignore"] = tuple(
        int(entry) if entry.lstrip("-").isdigit() else entry for entry in settings["ignore"] or ()
    )
    with suppress(KeyError, ValueError):  # "auto" stays, and what is no number is refused below
        settings["ridge"] = float(settings["ridge"])
    with suppress(ValueError):
        settings["multiple_of"] = int(settings["multiple_of"])
    settings["bias"] = settings.get("bias") or False
    settings["bos"] = AUTO if settings["bos"] is None else settings["bos"]
    return GrailConfig(**settings)


def _costs_table(title: str, costs: Estimate) -> Table:
    """What a way of compressing takes, by phase."""
    host = "host memory" + (", the accelerator's with it" if costs.one_memory else "")
    table = Table("", "accelerator memory", host, "arithmetic", title=f"peaks, {title}")
    for phase, cost in costs.phases.items():
        table.add_row(
            phase,
            size(cost.accelerator_bytes),
            size(cost.host_bytes),
            f"{cost.operations / 1e12:.3g} TFLOP",
        )
    table.add_section()
    totals = f"{sum(costs.operations.values()) / 1e12:.3g} TFLOP"
    with_weights = " with the dense weights" if costs.weights_bytes else ""
    peak = f"{size(costs.host_bytes)}{with_weights}"
    table.add_row("at the peak", size(costs.accelerator_bytes), peak, totals)
    table.caption = f"on disk: {size(costs.disk_bytes)}"
    return table


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


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
