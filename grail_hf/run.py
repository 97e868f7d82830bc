"""`Run`: one compression from a source to an output folder, measured before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail_hf.calibration.sampling import SELF
from grail_hf.calibration.tokens import read_calibration
from grail_hf.checkpoints.folders import (
    check_not_stopped,
    check_room,
    replaced_when_whole,
    save_or_rescue,
)
from grail_hf.checkpoints.loading import load_model, load_tokenizer
from grail_hf.checkpoints.sources import (
    copy_processor,
    has_safetensors,
    meta_model,
    processor_folder,
)
from grail_hf.compress import compress
from grail_hf.config import GrailConfig
from grail_hf.disk_to_disk import check_takes_layers, compress_checkpoint
from grail_hf.evaluation import EvaluationWindows, loaded, perplexity
from grail_hf.models.architectures import find_architecture
from grail_hf.models.decoder import check_weights, decoder_layers
from grail_hf.planning.costs import estimate
from grail_hf.planning.plan import plan_compression, window_length
from grail_hf.report import CompressionReport
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device
from grail_hf.runtime.dispatched import whole_on_device
from grail_hf.runtime.meter import keep_no_freed_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
_OUTPUT = "the output folder"


@dataclass(frozen=True)
class Run:
    """One compression from a source to an output folder, measured before and after.

    Attributes:
        source: a model's folder, or a name on the hub.
        output: the new model's folder.
        texts: the calibration: a name, or files.
        config: the settings.
        revision: of a source on the hub.
        eval_text: text to measure perplexity on, if any: a file or a corpus name.
        dequantize: load quantised weights as floats.
        resume: go on with a run from disk to disk that was stopped.
        overwrite: replace an earlier compressed model in `output`.
    """

    source: str
    output: Path
    texts: str | list[Path]
    config: GrailConfig
    revision: str | None = None
    eval_text: str | None = None
    dequantize: bool = False
    resume: bool = False
    overwrite: bool = False

    def execute(self, disk_to_disk: bool | None = None) -> CompressionReport:
        """Compress, measure and save.

        Without `disk_to_disk` the source decides: its weights pass through memory layer by layer
        if they fill more than half of what is free. Raises as `compress` and `compress_checkpoint`
        do.
        """
        # The shapes on the meta device, then the texts, then the weights: cheap refusals first.
        skeleton = meta_model(self.source, self.revision, self.dequantize)
        plan = plan_compression(skeleton, self.config)
        if disk_to_disk is None:
            large = processes.once(partial(self._is_large, skeleton), "the source")
            disk_to_disk = self.resume or (self.texts != SELF and large and not self.dequantize)
        if disk_to_disk:
            check_takes_layers(self.texts, self.config)
            return self._from_disk(skeleton)
        return self._in_memory(skeleton, estimate(skeleton, plan, self.config).disk_bytes)

    def _is_large(self, skeleton: PreTrainedModel) -> bool:
        """Whether the weights fill over half of the free memory and can go from disk to disk."""
        import psutil

        num_bytes = sum(parameter.nbytes for parameter in skeleton.parameters())
        if num_bytes <= int(psutil.virtual_memory().available) // 2:
            return False
        return has_safetensors(self.source, self.revision)

    def _in_memory(self, skeleton: PreTrainedModel, needed: int) -> CompressionReport:
        config = self.config
        with processes.first_within(replaced_when_whole(self.output), _OUTPUT) as folder:
            processes.once(partial(check_room, folder, needed), _OUTPUT)
            tokenizer = load_tokenizer(self.source, self.revision)
            # Of the commit that the config came from, where that was the hub.
            commit = getattr(skeleton.config, "_commit_hash", None)
            processor = processor_folder(self.source, commit)
            tokens = None
            if self.texts != SELF:
                tokens = read_calibration(skeleton, tokenizer, self.texts, config)
            windows = None
            if self.eval_text:
                windows = self._windows(self.eval_text, skeleton, tokenizer)
            model = load_model(self.source, self.revision, self.dequantize)
            if tokens is None:
                check_weights(model)
                with _on_device(model, config):
                    tokens = read_calibration(model, tokenizer, self.texts, config)
            measured: dict[str, Any] = {}
            if windows is not None:
                measured |= windows.description()
                measured["perplexity before"] = _perplexity(model, windows, config)
            report = compress(model, tokenizer, tokens, config)
            if windows is not None:
                measured["perplexity after"] = _perplexity(model, windows, config)
            report.evaluation = measured
            save = partial(_save, model, tokenizer, processor, report)
            processes.once(partial(save_or_rescue, save, folder, self.output), _OUTPUT)
        return report

    def _from_disk(self, skeleton: PreTrainedModel) -> CompressionReport:
        keep_no_freed_blocks()
        start = partial(
            compress_checkpoint,
            config=self.config,
            revision=self.revision,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        if not self.eval_text or self.texts == SELF:  # which is refused
            return start(self.source, self.output, self.texts)
        # Measured now, because the output may take the source's place.
        if not self.resume:
            processes.once(partial(check_not_stopped, self.output), _OUTPUT)
        tokenizer = load_tokenizer(self.source, self.revision)
        tokens = read_calibration(skeleton, tokenizer, self.texts, self.config)
        windows = self._windows(self.eval_text, skeleton, tokenizer)

        def measure(folder: str, revision: str | None = None) -> float:
            one = partial(_perplexity_of, folder, revision, windows, self.config)
            return processes.once(one, "the evaluation")

        measured: dict[str, Any] = dict(windows.description())
        measured["perplexity before"] = measure(self.source, self.revision)
        report = start(self.source, self.output, tokens)
        measured["perplexity after"] = measure(str(self.output))
        report.evaluation |= measured
        processes.once(partial(report.save, self.output), _OUTPUT)
        return report

    def _windows(
        self, text: str, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> EvaluationWindows:
        """The text to measure on, in windows as long as those of the calibration."""
        length = window_length(skeleton, self.config)
        return EvaluationWindows.read(text, tokenizer, length, self.config.bos)


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


def _perplexity(model: PreTrainedModel, windows: EvaluationWindows, config: GrailConfig) -> float:
    """Perplexity where layers would run, measured by the first process."""

    def measure() -> float:
        with _on_device(model, config):
            return perplexity(model, None, windows.ids, batch_size=config.batch_size)

    return processes.once(measure, "the evaluation")


def _perplexity_of(
    folder: str, revision: str | None, windows: EvaluationWindows, config: GrailConfig
) -> float:
    """Perplexity of a checkpoint."""
    with loaded(folder, config.device, revision) as model:
        return perplexity(model, None, windows.ids, batch_size=config.batch_size)


@contextmanager
def _on_device(model: PreTrainedModel, config: GrailConfig) -> Iterator[None]:
    """The whole model computes where layers would, as far as it fits there."""
    layers = decoder_layers(model, find_architecture(model.config.model_type))
    with whole_on_device(model, layers, choose_device(model, config.device)):
        yield
