"""Compress a checkpoint that need not fit into memory, from disk to disk, and go on after a stop.

The same loop as in `compress`: only the layers' home is another. The model is a skeleton without
weights; a layer is read from the checkpoint, narrowed, repaired, written and dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.calibration.sampling import SELF, is_sampled
from grail_hf.calibration.stream import Stream
from grail_hf.calibration.tokens import Calibration, TokenBatches, read_calibration
from grail_hf.checkpoints.converter import Parts
from grail_hf.checkpoints.folders import check_room, claimed, empty, put_in_place, stopped_there
from grail_hf.checkpoints.journal import Journal
from grail_hf.checkpoints.layers import CheckpointPlacement, Pace, WritingPlacement
from grail_hf.checkpoints.loading import load_tokenizer
from grail_hf.checkpoints.reader import Checkpoint
from grail_hf.checkpoints.sources import (
    check_revision,
    copy_processor,
    meta_model,
    small_files,
)
from grail_hf.compress import narrow_layers_
from grail_hf.config import AUTO, GrailConfig
from grail_hf.job import Job, fail
from grail_hf.methods.linalg import full_fp32_products
from grail_hf.models.decoder import causal_lm_name, decoder_layers
from grail_hf.models.schema import Architecture
from grail_hf.planning.costs import Estimate, estimate
from grail_hf.planning.plan import Plan, plan_compression
from grail_hf.report import REPORT_FILE, CompressionReport, check_output, versions
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device
from grail_hf.runtime.placement import Place, choose_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
# Settings that say where things are kept and how often, not what comes out.
_IRRELEVANT = {"hidden_states", "checkpoint_every"}
_OUTPUT = "the output folder"


class StoppedError(RuntimeError):
    """A failure after hidden states were written: the run can resume after their layer."""


@torch.no_grad()
def compress_checkpoint(
    source: str | Path,
    output: str | Path,
    calibration: Calibration | TokenBatches = "c4",
    config: GrailConfig | dict[str, Any] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    architecture: Architecture | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> CompressionReport:
    """Compress a checkpoint from disk to disk: neither model is ever whole in memory.

    The result is what `compress` and `save_pretrained` make of the model with `self_samples=0`
    (writing text takes the whole model), in one file per decoder layer. It grows beside `output`,
    in `.<name>.partial`, and takes its place when it is whole. A run that is stopped, or killed,
    can resume after the last layer whose hidden states it had written (`checkpoint_every`): its
    files are then, byte for byte, those of a run that was not stopped, but for the times and the
    memory that `grail.json` reports, and the settings that it may resume with. Several
    processes share the work as in `compress`; the output is in a folder that all of them see. fp32
    matrix products are in fp32, as in `compress`.

    Args:
        source: a folder in safetensors, or a name on the hub.
        output: the new folder.
        calibration: as for `compress`, but not "self", which takes the whole model.
        config: the settings; `overrides` are fields of `GrailConfig` and win over it.
        tokenizer: by default the source's, where it has one.
        revision: of a source on the hub: a branch, a tag or a commit; by default the main branch.
        architecture: the model type's entry where the table has none.
        resume: go on with the run that was stopped; starts one where there is none. Its settings
            (except `hidden_states` and `checkpoint_every`), calibration, source and versions have
            to be the same, and its files unchanged. Returns the report of a run that had ended.
        overwrite: replace an earlier compressed model in `output`.
        progress: show bars on standard error.

    Raises:
        ValueError, TypeError: bad input, before anything is written; a run to resume that was
            another one, naming what differs.
        OSError: a source file that is missing or damaged; an output that exists, cannot be
            written or is being written by another process; a full disk.
        FloatingPointError: NaN or Inf in the source's weights, before anything is written, or in
            the activations of the first layer.
        StoppedError: a failure after hidden states were written, from where the run can go on.
    """
    config = GrailConfig.resolve(config, **overrides)
    processes.silence_copies()
    progress = progress and processes.is_first()
    output = Path(output)
    # Everything that can be refused is refused before weights are fetched from a hub.
    check_revision(source, revision)
    processes.once(partial(check_output, output, overwrite or resume), _OUTPUT)
    model = meta_model(source, revision)
    config = config.resolved_on(choose_device(model, config.device))
    plan_compression(model, config, architecture)
    check_takes_layers(calibration, config)
    folder, commit = small_files(source, revision)
    tokenizer = tokenizer or load_tokenizer(str(folder))
    tokens = read_calibration(model, tokenizer, calibration, config, progress)
    with processes.first_within(claimed(output), _OUTPUT) as work, full_fp32_products():
        identity = _identity(config, model, tokens)
        journal = _stopped_run(work, identity, resume)
        checkpoint = Checkpoint.open(source, commit)
        model = checkpoint.skeleton()
        plan = plan_compression(model, config, architecture)
        parts = Parts(checkpoint, model, decoder_layers(model, plan.architecture))
        digests = processes.once(partial(checkpoint.verify, progress), str(source))
        identity |= {f"sha256 of {name}": digest for name, digest in digests.items()}
        if journal:
            journal.check_identity(identity)
            processes.once(journal.check_files, _OUTPUT)
            journal.sweep()  # what it did after the last hidden states is done again, in that room
        else:
            ended = partial(_ended, output, config, digests, tokens)
            if resume and (report := processes.once(ended, _OUTPUT)):
                return report
            processes.once(partial(check_output, output, overwrite), _OUTPUT)
            processes.once(partial(empty, work), _OUTPUT)
            journal = Journal(work, identity)
        job = _forecast(parts, plan, tokens, config, journal, progress)
        with _says_how_to_go_on(journal):
            report = _compress(job, parts, journal)
            report.source = digests
            finish = partial(_finish, checkpoint, model, report, tokenizer, journal, output)
            processes.once(finish, _OUTPUT)
            report.share()
    return report


def _forecast(
    parts: Parts,
    plan: Plan,
    tokens: TokenBatches,
    config: GrailConfig,
    journal: Journal,
    progress: bool,
) -> Job:
    """The job, after a check that the disk has room for it."""
    device = choose_device(parts.model, config.device)
    costs = estimate(parts.model, plan, config, device, disk_to_disk=True, batches=tokens.batches)
    place = choose_place(config.hidden_states, costs.hidden_bytes, device, journal.own)
    processes.once(partial(_check_space, journal, costs, place), _OUTPUT)
    stream = Stream(
        *(parts.model, CheckpointPlacement(parts, device), plan.specs, tokens.batches, place),
        seed=config.seed,
        progress=progress,
        dtype=config.solve_torch_dtype,
    )
    return Job.forecast(config, plan, stream, tokens, costs)


def _compress(job: Job, parts: Parts, journal: Journal) -> CompressionReport:
    """Write the weights that the journal lacks; the skeleton gets the config to go with them."""
    start = time.perf_counter()
    reading, notes = job.stream.placement, journal.notes.get("report")
    earlier = CompressionReport.from_dict(notes) if notes else None
    with reading.meter.on():
        job = job.measured(earlier)
        report = job.report

        def notes_so_far() -> dict[str, Any]:
            report.seconds = time.perf_counter() - start + (earlier.seconds if earlier else 0.0)
            return {"report": report.to_dict()}

        assert job.stream.place is not None
        pace = Pace(job.config.checkpoint_every)
        writing = WritingPlacement(
            *(parts, reading.device, journal, job.stream.place, pace, notes_so_far)
        )
        writing.meter = reading.meter
        writing.write_rest()
        if job.plan.reduced and journal.layers < len(parts.layers):
            narrow_layers_(replace(job, stream=replace(job.stream, placement=writing)))
        else:
            writing.copy_layers()
        notes_so_far()
    parts.model.config = job.plan.config
    report.measured = reading.meter.measured
    return report


def _finish(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    report: CompressionReport,
    tokenizer: PreTrainedTokenizerBase | None,
    journal: Journal,
    output: Path,
) -> None:
    """Write what makes a checkpoint of the weights, and put it in its place."""
    from transformers import GenerationConfig

    journal.write_index()
    config: Any = model.config
    config.architectures = [causal_lm_name(model, config)]
    config.save_pretrained(journal.folder)
    if model.can_generate():
        with suppress(OSError):  # the source has none of its own
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        model.generation_config.save_pretrained(journal.folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(journal.folder)
    copy_processor(checkpoint.folder, journal.folder)
    report.save(journal.folder)
    put_in_place(journal.folder, output)


def check_takes_layers(calibration: Calibration | TokenBatches, config: GrailConfig) -> None:
    """Raise ValueError where the calibration or a setting takes the whole model in memory."""
    if config.recover:
        raise ValueError(
            "recover=True (--recover) trains the whole model, which is never in memory from disk "
            "to disk: compress without it, then run grail-hf recover"
        )
    for setting, asked in (
        (f"calibration={SELF!r}", is_sampled(calibration)),
        (f"self_samples={config.self_samples}", config.self_samples not in (AUTO, 0)),
    ):
        if asked:
            raise ValueError(
                f"{setting} samples from the whole model, which is never in memory here: give "
                "texts or tokens alone, or use compress"
            )


def _stopped_run(work: Path, identity: dict[str, Any], resume: bool) -> Journal | None:
    """The journal of a run like this one that was stopped; ValueError if it was another one."""
    stopped = processes.once(partial(_stopped, work), _OUTPUT)
    if stopped and not resume:
        raise stopped_there(work)
    if stopped:
        stopped.check_identity(identity)
    return stopped


def _stopped(work: Path) -> Journal | None:
    """The journal of a run that was stopped in this folder."""
    return Journal.read(work) if Journal.exists(work) else None


def _identity(config: GrailConfig, model: PreTrainedModel, tokens: TokenBatches) -> dict[str, Any]:
    """What the result depends on besides the source's weights, as JSON."""
    return {
        **_relevant(config),
        "calibration": tokens.fingerprint,
        "batches": [list(batch["input_ids"].shape) for batch in tokens.batches],
        **{
            f"source's {key}": value
            for key, value in model.config.to_dict().items()
            if key != "_name_or_path"
        },
        "versions": versions(),
    }


def _relevant(config: GrailConfig) -> dict[str, Any]:
    """The settings on which the result depends."""
    return {name: value for name, value in config.to_dict().items() if name not in _IRRELEVANT}


def _ended(
    output: Path, config: GrailConfig, digests: dict[str, str], tokens: TokenBatches
) -> CompressionReport | None:
    """The report of a like run that had ended, if there is one."""
    if not (output / REPORT_FILE).is_file():
        return None
    report = CompressionReport.load(output)
    same = (
        _relevant(report.config) == _relevant(config)
        and report.source == digests
        and report.calibration == tokens.summary()
    )
    return report if same else None


def _check_space(journal: Journal, costs: Estimate, place: Place) -> None:
    """Raise OSError where the disk has no room for what is still to be written."""
    needed = costs.disk_bytes - journal.bytes_written
    if place.folder == journal.own:
        needed += costs.hidden_bytes
    check_room(journal.folder, needed)


@contextmanager
def _says_how_to_go_on(journal: Journal) -> Iterator[None]:
    """After a failure, say what is kept; without a layer done, nothing is."""
    try:
        yield
    except BaseException as error:
        if not journal.folder.exists():
            raise  # it is in the output's place
        if not journal.layers:
            if processes.is_first():
                empty(journal.folder)
            raise
        message = (
            f"stopped with {journal.layers} of the layers done; they are kept in {journal.folder}: "
            "resume=True (on the command line --resume) resumes after them"
        )
        fail(error, StoppedError, message)
