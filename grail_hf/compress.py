"""Compress a model: the whole algorithm on one page. Read this first.

Each decoder layer is visited once, in order. In it, attention first and then the MLP, each group
of units is scored on what the already compressed model feeds it, its producers are sliced to the
units that stay (or averaged over clusters of units), and a ridge regression on the Gram of the
consumer's inputs gives the linear map from what is left to what was there, which the consumer
absorbs (GRAIL, arXiv 2602.23795).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from grail_hf.calibration.block import Block
from grail_hf.calibration.refit import refit_group_
from grail_hf.calibration.stream import stream
from grail_hf.calibration.tokens import Calibration, TokenBatches, read_calibration
from grail_hf.card import TAGS
from grail_hf.config import GrailConfig
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import full_fp32_products
from grail_hf.methods.ridge import Repair, fold_linearly, ridge_within
from grail_hf.methods.selectors import choose
from grail_hf.models.decoder import check_model, check_weights, decoder_layers, evaluation_mode
from grail_hf.models.experts import ExpertsGroup
from grail_hf.models.groups import Group
from grail_hf.models.quantization import forget_quantization_
from grail_hf.models.schema import Architecture
from grail_hf.models.surgery import apply_config_
from grail_hf.narrow_experts import narrow_experts_
from grail_hf.planning.costs import estimate
from grail_hf.planning.plan import Plan, group_batches, plan_compression, warn_of_few_tokens
from grail_hf.planning.profiling import measured_plan
from grail_hf.report import CompressionReport
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device
from grail_hf.runtime.dispatched import placement_of
from grail_hf.runtime.layers import LayerPlacement
from grail_hf.runtime.placement import Place, choose_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class PartlyCompressedError(RuntimeError):
    """A failure after the first layer was changed: the model in memory must be loaded again."""


@torch.no_grad()
@full_fp32_products()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | TokenBatches = "c4",
    config: GrailConfig | dict[str, Any] | None = None,
    *,
    architecture: Architecture | None = None,
    progress: bool = True,
    **overrides: Any,
) -> CompressionReport:
    """Make `model` narrower in place and repair it. No training, no labels.

    Where the program has joined several processes, by accelerate (`PartialState`, `Accelerator`) or
    by torch.distributed (`init_process_group`), they share the calibration's batches: all of them
    must make this call, with the same model and settings, and all end with the same model and
    report. The calibration of the first counts. This call joins none: under a launcher such as
    `torchrun`, processes that have not joined each do all the work.

    While it works, fp32 matrix products of the process are in fp32, whatever it allows otherwise
    (TF32, bf16).

    Args:
        model: a decoder-only `AutoModelForCausalLM` of a type in `grail_hf.ARCHITECTURES`, or of
            any other with `architecture`; loaded with `device_map` and offloaded, too.
        tokenizer: needed where `calibration` is text or conversations.
        calibration: a path or a list of paths to text; "wikitext2", "c4", "ptb" or any
            `name/config:split:column` that `datasets` loads; a list of strings; a list of
            conversations, each a list of messages {role, content}, or a .jsonl file with such
            `messages` in each line, for the tokenizer's chat template; an [N, T] integer tensor of
            token ids; or batches `{input_ids, attention_mask}`. Padding never counts.
            "self" needs no data: the tokens are sampled from the model, in batches of
            `config.batch_size` and where the model is (put it on an accelerator first).
            Several processes need a batch each.
        config: the settings; `overrides` are fields of `GrailConfig` and win over it.
        architecture: the model type's entry where the table has none, see `infer_architecture`.
        progress: show a bar on standard error, of the first process alone.

    Returns:
        What was done and what it cost. `model.save_pretrained(d)` and `report.save(d)` write a
        checkpoint that plain transformers loads.

    Raises:
        ValueError, TypeError: bad input, before anything is changed.
        FloatingPointError: NaN or Inf in weights or in the first activations, before anything is
            changed.
        PartlyCompressedError: a failure after the first group was changed.
        ProcessGroupError: another process has ended, before anything is changed.
    """
    config = GrailConfig.resolve(config, **overrides)
    check_model(model)
    processes.silence_copies()
    device = choose_device(model, config.device)
    config = config.resolved_on(device)
    plan = plan_compression(model, config, architecture)
    forget_quantization_(model)
    if not plan.reduced:
        return CompressionReport.begin(model, config, plan)
    progress = progress and processes.is_first()
    check_weights(model)
    tokens = read_calibration(model, tokenizer, calibration, config, progress)
    start = time.perf_counter()
    layers = decoder_layers(model, plan.architecture)
    placement = placement_of(model, layers, device, asked=config.device is not None)
    costs = estimate(model, plan, config, device, batches=tokens.batches)
    place = choose_place(config.hidden_states, costs.hidden_bytes, device)
    with placement.meter.on():
        plan, report = settle(model, plan, tokens, config, placement, place, progress)
        with says_what_is_left(report):
            narrow_layers_(model, plan, tokens, config, placement, place, report, progress)
            apply_config_(model, plan.config)
    report.estimate = costs.phases_to_dict()
    report.measured = placement.meter.measured

    model.add_model_tags(list(TAGS))
    report.seconds = time.perf_counter() - start
    report.share()
    return report


def settle(
    model: PreTrainedModel,
    plan: Plan,
    tokens: TokenBatches,
    config: GrailConfig,
    placement: LayerPlacement,
    place: Place,
    progress: bool,
    earlier: CompressionReport | None = None,
) -> tuple[Plan, CompressionReport]:
    """The plan with the widths that its allocation measures, and its report.

    An `earlier` report of the same run has the widths already.
    """
    splits: list[dict[str, Any]] = []
    if earlier is not None:
        unit = replace(config, attention_unit=earlier.attention_unit)
        plan = plan_compression(model, unit, plan.architecture, widths=earlier.widths)
    elif plan.measures:
        with evaluation_mode(model):
            plan, splits = measured_plan(
                model, plan, tokens.batches, config, placement, place, progress
            )
    report = CompressionReport.begin(model, config, plan)
    report.splits = splits
    if earlier is not None:
        report.errors, report.splits = earlier.errors, earlier.splits
        report.groups = earlier.groups
    report.calibration = tokens.summary()
    report.processes = processes.count()
    return plan, report


def narrow_layers_(
    model: PreTrainedModel,
    plan: Plan,
    tokens: TokenBatches,
    config: GrailConfig,
    placement: LayerPlacement,
    place: Place | None,
    report: CompressionReport,
    progress: bool = True,
) -> None:
    """Cut and repair the groups of every decoder layer that is not done yet, in their order."""
    if config.compensate:
        warn_of_few_tokens(tokens.num_tokens, plan, config)
    with evaluation_mode(model):
        for block in stream(
            model,
            placement,
            plan.specs,
            tokens.batches,
            place,
            config.target if config.targeted else "self",
            config.seed,
            progress,
            group_batches=group_batches(
                plan, config, len(processes.share(len(tokens.batches))), placement.first
            ),
            dtype=config.solve_torch_dtype,
        ):
            for group in block.groups:
                width = plan.widths[group.kind][block.index]
                if width < group.num_units or (block.index, group.kind) in plan.mended:
                    if isinstance(group, ExpertsGroup):
                        with block.meter.phase("solve"):
                            narrow_experts_(block, group, width, plan, config, report)
                    else:
                        narrow_(block, group, width, plan, config, report)
                if group.kind in plan.newly_biased:
                    group.add_biases_()


def narrow_(
    block: Block,
    group: Group,
    width: int,
    plan: Plan,
    config: GrailConfig,
    report: CompressionReport,
) -> None:
    """Cut or fold a group to `width` units, repair its consumer, and refit it.

    A group that keeps them all is repaired too, where groups in front of it have lost some.
    """
    with block.meter.phase("solve"):
        damping = repair_(block, group, width, plan, config, report)
    if not config.refit_steps:
        return
    if group.spec.linear is None:
        report.refit("not linear")
    elif damping is None or math.isinf(damping):
        report.refit("plain pruning")  # nothing fitted to these tokens holds on others
    else:
        with block.meter.phase("refit"):
            intercept = group.kind in plan.biased
            error = report.groups[-1].error
            refitted = refit_group_(block, group, damping, intercept, error, config)
        report.refit("done" if refitted else "undone", refitted)


def repair_(
    block: Block,
    group: Group,
    width: int,
    plan: Plan,
    config: GrailConfig,
    report: CompressionReport,
) -> float | None:
    """Cut or fold a group to `width` units, and repair its consumer.

    Returns the damping that the repair took, if there was one.
    """
    dtype, hold_out = config.solve_torch_dtype, config.holds_out
    intercept = group.kind in plan.biased

    with block.meter.phase("gram"):
        stats = block.collect(group, hold_out)
    with block.meter.phase("select"):
        reduction = block.once(
            group, partial(choose, plan.select, group, stats, width, config.selector_name)
        )
    weight, kept = group.weight, reduction.kept_channels(group.columns)
    linear = None
    if reduction.folds:
        linear = fold_linearly(weight.to(dtype), stats, reduction, group.columns)
        del stats  # before others are summed
        with block.meter.phase("gram"):
            stats = block.collect_folded(group, reduction, hold_out)
        weight = reduction.of_consumer(weight.to(dtype), group.columns)
        kept = torch.arange(kept.numel(), device=kept.device)
    # What was removed is done with: its moments are not held during the solve.
    stats = stats.restricted(kept, weight.to(dtype))
    weight = weight[:, kept].to(dtype)

    def solve(stats: GramStats) -> Repair:
        settings = config.ridge, group.name, intercept
        solution = partial(ridge_within, group.weight.dtype, weight, stats, *settings)
        return processes.once(solution, group.name)

    repair = solve(stats) if config.compensate else Repair(weight)
    report.add(block.index, group, weight, stats, repair)
    if config.compensate and linear:
        other = solve(linear)
        report.fold(weight, stats, other, used=config.fold == "linear")
        repair = other if config.fold == "linear" else repair

    group.shrink_(reduction)
    group.repair_(repair.weight, repair.bias)
    return repair.damping


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
