"""What every step of a compression needs, and what comes before and after the layer loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from grail_hf.calibration.block import Block
from grail_hf.calibration.refit import refit_group_
from grail_hf.calibration.stream import Stream
from grail_hf.calibration.tokens import (
    Calibration,
    TokenBatches,
    read_calibration,
    with_own_samples,
)
from grail_hf.card import TAGS
from grail_hf.config import GrailConfig
from grail_hf.methods.linalg import full_fp32_products
from grail_hf.models.decoder import (
    check_model,
    check_weights,
    decoder_layers,
    evaluation_mode,
    vocabulary_size,
)
from grail_hf.models.groups import Group
from grail_hf.models.quantization import forget_quantization_
from grail_hf.models.schema import Architecture
from grail_hf.models.surgery import apply_config_
from grail_hf.planning.costs import Estimate, estimate
from grail_hf.planning.plan import Plan, group_batches, plan_compression, warn_of_few_tokens
from grail_hf.planning.profiling import measured_plan
from grail_hf.recovery.adapters import check_peft
from grail_hf.recovery.config import RecoveryConfig
from grail_hf.recovery.recover import Lesson, Task, check_trainable, with_rank, work_folder
from grail_hf.report import CompressionReport
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device
from grail_hf.runtime.dispatched import placement_of
from grail_hf.runtime.placement import choose_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class PartlyCompressedError(RuntimeError):
    """A failure after the first layer was changed: the model in memory must be loaded again."""


@dataclass(frozen=True)
class Job:
    """A compression: what is done (`plan`), on what (`stream`), and what comes of it (`report`)."""

    config: GrailConfig
    plan: Plan
    stream: Stream
    report: CompressionReport

    @classmethod
    def forecast(
        cls,
        config: GrailConfig,
        plan: Plan,
        stream: Stream,
        tokens: TokenBatches,
        costs: Estimate,
    ) -> Job:
        """A job before its allocation has measured the widths."""
        report = replace(
            CompressionReport.begin(stream.model, config, plan),
            calibration=tokens.summary(),
            processes=processes.count(),
            estimate=costs.phases_to_dict(),
        )
        return cls(config, plan, stream, report)

    def measured(self, earlier: CompressionReport | None = None) -> Job:
        """The job with the widths that its allocation finds.

        Args:
            earlier: the report of the same run before it stopped, which has the widths already.
        """
        model, plan, config = self.stream.model, self.plan, self.config
        splits: list[dict[str, Any]] = []
        if earlier is not None:
            unit = replace(config, attention_unit=earlier.attention_unit)
            plan = plan_compression(model, unit, plan.architecture, widths=earlier.widths)
        elif plan.measures:
            with evaluation_mode(model):
                plan, splits = measured_plan(self.stream, plan, config)
        report = replace(
            CompressionReport.begin(model, config, plan),
            calibration=self.report.calibration,
            processes=self.report.processes,
            estimate=self.report.estimate,
            splits=splits,
        )
        if earlier is not None:
            report.errors, report.splits = earlier.errors, earlier.splits
            report.groups = earlier.groups
        target = config.target if config.targeted else "self"
        return replace(
            self,
            plan=plan,
            stream=replace(self.stream, specs=plan.specs, target=target),
            report=report,
        )

    def blocks(self) -> Iterator[Block]:
        """Yield each decoder layer that is not done yet, in order, on the device that runs it."""
        if not self.plan.reduced:
            return
        stream, own = self.stream, len(processes.share(len(self.stream.batches)))
        if self.config.compensate:
            tokens = int(self.report.calibration["tokens"])
            warn_of_few_tokens(tokens, self.plan, self.config)
        number = group_batches(self.plan, self.config, own, stream.placement.first)
        with evaluation_mode(stream.model):
            for block in replace(stream, group_batches=number).blocks():
                yield block
                self.report.warn_of_scarce_experts(block.index)

    def refit_(self, block: Block, group: Group) -> None:
        """Refit a repaired group where the settings ask for it, and report what came of it."""
        if self.config.refit_steps:
            intercept = group.kind in self.plan.biased
            before = self.report.last
            outcome = refit_group_(block, group, before, intercept, self.config)
            self.report.refit(group, outcome)


@contextmanager
def begun(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | TokenBatches,
    config: GrailConfig,
    architecture: Architecture | None,
    progress: bool,
) -> Iterator[Job]:
    """The job of compressing a model in memory; inside the context, the layers are narrowed.

    What can be refused is refused first, then the calibration is read, then the widths are
    measured. After the context the model has the config of its checkpoint, and the report is whole.
    """
    check_model(model)
    processes.silence_copies()
    device = choose_device(model, config.device)
    config = config.resolved_on(device)
    plan = plan_compression(model, config, architecture)
    forget_quantization_(model)
    layers = decoder_layers(model, plan.architecture)
    placement = placement_of(model, layers, device, asked=config.device is not None)
    if not plan.reduced:
        report = CompressionReport.begin(model, config, plan)
        yield Job(config, plan, Stream(model, placement, plan.specs, []), report)
        return
    progress = progress and processes.is_first()
    check_weights(model)
    with ExitStack() as stack:
        task = stack.enter_context(recovery(model, plan, config, progress))
        stack.enter_context(full_fp32_products())
        tokens = read_calibration(model, tokenizer, calibration, config, progress)
        tokens = with_own_samples(tokens, model, tokenizer, config, device, progress)
        lesson = task and task.lesson(model, tokenizer, tokens, None, vocabulary_size(model))
        start = time.perf_counter()
        costs = estimate(model, plan, config, device, batches=tokens.batches)
        place = choose_place(config.hidden_states, costs.hidden_bytes, device)
        stream = Stream(
            *(model, placement, plan.specs, tokens.batches, place),
            seed=config.seed,
            progress=progress,
            dtype=config.solve_torch_dtype,
        )
        with placement.meter.on():
            job = Job.forecast(config, plan, stream, tokens, costs).measured()
            with says_what_is_left(job.report):
                yield job
                apply_config_(model, job.plan.config)
        job.report.measured = placement.meter.measured
        job.report.seconds = time.perf_counter() - start
        job.report.share()
        model.add_model_tags(list(TAGS))
        if task and lesson:
            job.report.recovery = outcome_of(task, model, lesson)


@contextmanager
def recovery(
    model: PreTrainedModel, plan: Plan, config: GrailConfig, progress: bool
) -> Iterator[Task | None]:
    """The recovery that is to follow the compression, if the settings ask for one.

    It has the compression's calibration tokens, and its predictions on disk as long as the context
    lasts. Raises ValueError for a model that cannot be trained.
    """
    if not config.recover:
        yield None
        return
    check_trainable(model)
    settings = with_rank(RecoveryConfig.following(config), model, plan.architecture)
    check_peft(settings.rank)
    with work_folder(None) as work:
        yield Task(settings, plan.architecture, work, progress=progress)


def outcome_of(task: Task, model: PreTrainedModel, lesson: Lesson) -> dict[str, Any]:
    """The report of a recovery, or why it failed: then the model is as the compression left it."""
    try:
        return task.learn_(model, lesson).to_dict()
    except Exception as error:
        logger.warning(
            "the recovery failed (%s: %s); the model is compressed, without it",
            *(type(error).__name__, error),
        )
        return {"failed": f"{type(error).__name__}: {error}"}


@contextmanager
def says_what_is_left(report: CompressionReport) -> Iterator[None]:
    """After a failure, say that the model is partly compressed, where it is."""
    try:
        yield
    except BaseException as error:
        if not report.groups:
            raise
        message = (
            f"stopped at {report.groups[-1].name} or just after it; the model in memory is partly "
            "compressed: load it again"
        )
        fail(error, PartlyCompressedError, message)


def fail(error: BaseException, kind: type[RuntimeError], message: str) -> NoReturn:
    """Raise an error as one of a kind, with a message more; an interrupt as it is."""
    if not isinstance(error, Exception):
        logger.error(message)
        raise error
    raise kind(f"{error} ({message})") from error
