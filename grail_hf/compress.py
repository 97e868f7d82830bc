"""Compress a model: the whole algorithm on one page. Read this first.

Each decoder layer is visited once, in order. In it, attention first and then the MLP, each group
of units is scored on what the already compressed model feeds it, its producers are sliced to the
units that stay, and a ridge regression on the Gram of the consumer's inputs gives the linear map
from what is left to what was there, which the consumer absorbs (GRAIL, arXiv 2602.23795).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.architectures import Architecture
from grail_hf.calibration import (
    Calibration,
    TokenBatches,
    check_token_ids,
    token_batches,
)
from grail_hf.compensation import ridge
from grail_hf.config import GrailConfig
from grail_hf.evaluation import evaluation_mode
from grail_hf.planning import (
    Plan,
    check_weights,
    choose_device,
    context_length,
    plan_compression,
    vocabulary_size,
)
from grail_hf.reduction import Reduction
from grail_hf.refit import refit_, refit_passes
from grail_hf.report import TAGS, CompressionReport
from grail_hf.saving import apply_config_
from grail_hf.selectors import check_scores
from grail_hf.stream import stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# With 2 tokens a channel and little ridge, repair did worse than plain pruning on held-out text of
# the bundled model; with 8 it did much better.
TOKENS_PER_CHANNEL = 4


class PartlyCompressedError(RuntimeError):
    """A failure after the first layer was changed: the model in memory must be loaded again."""


@torch.no_grad()
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
    """Make `model` narrower in place and repair it. No gradients, no labels.

    Args:
        model: a decoder-only `AutoModelForCausalLM` of a type in `grail_hf.ARCHITECTURES`, or of
            any other with `architecture`.
        tokenizer: needed where `calibration` is text.
        calibration: a path or a list of paths to text; "wikitext2", "c4", "ptb" or any
            `name/config:split:column` that `datasets` loads; a list of strings; an [N, T] integer
            tensor of token ids; or batches `{input_ids, attention_mask}`. Padding never counts.
            "self" needs no data: the tokens are sampled from the model, in batches of
            `config.batch_size` and where the model is (put it on an accelerator first).
        config: the settings; `overrides` are fields of `GrailConfig` and win over it.
        architecture: the model type's entry where the table has none, see `infer_architecture`.
        progress: show a bar on standard error.

    Returns:
        What was done and what it cost. `model.save_pretrained(d)` and `report.save(d)` write a
        checkpoint that plain transformers loads.

    Raises:
        ValueError, TypeError: bad input, before anything is changed.
        FloatingPointError: NaN or Inf in weights or in the first activations, before anything is
            changed.
        PartlyCompressedError: a failure after the first group was changed.
    """
    config = GrailConfig.resolve(config, **overrides)
    plan = plan_compression(model, config, architecture)
    report = CompressionReport.begin(model, config, plan)
    if not plan.reduced:
        return report
    device = choose_device(model, config.device)
    check_weights(model)
    tokens = read_calibration(model, tokenizer, calibration, config, progress)
    report.calibration = tokens.summary()
    if config.compensate:
        warn_of_few_tokens(tokens, plan, config)
    start = time.perf_counter()

    with evaluation_mode(model), says_what_is_left(report):
        layers = plan.architecture.layers
        target = config.target if config.compensate else "self"
        passes = 1 + (refit_passes(config.refit) + 1 if config.refit else 0)
        for block in stream(
            model,
            layers,
            plan.specs,
            tokens.batches,
            device,
            target,
            config.seed,
            progress,
            group_passes=len(plan.reduced) * passes,
            returns_tuple=plan.architecture.returns_tuple,
        ):
            for group in block.groups:
                width = plan.widths[group.kind][block.index]
                if width == group.num_units:
                    continue
                stats = block.collect(group).to(config.torch_dtype)
                scores = check_scores(plan.select(group, stats), group, config.selector_name)
                reduction = Reduction.keep_top(scores, width, group.partitions)
                kept = reduction.kept_channels(group.columns)
                weight = group.weight.to(config.torch_dtype)
                repair = (
                    ridge(weight, stats, kept, config.ridge, group.name)
                    if config.compensate
                    else None
                )
                report.add(block.index, group, stats, kept, repair)
                group.shrink_(reduction)
                group.repair_(repair.weight if repair else group.weight[:, kept])
                if repair and config.refit:
                    refit_(block, group, config.refit)
                    stats = block.collect(group).to(config.torch_dtype)
                    kept = torch.arange(kept.numel(), device=kept.device)
                    weight = group.weight.to(config.torch_dtype)
                    repair = ridge(weight, stats, kept, config.ridge, group.name)
                    report.refit(stats, repair)
                    group.repair_(repair.weight)
        apply_config_(model, plan.config)

    model.add_model_tags(list(TAGS))
    report.seconds = time.perf_counter() - start
    return report


def warn_of_few_tokens(tokens: TokenBatches, plan: Plan, config: GrailConfig) -> None:
    """Warn where a consumer has so many channels that the solve would fit the tokens' noise."""
    channels = max(plan.widths[spec.kind][i] * spec.columns for i, spec in plan.reduced)
    if tokens.num_tokens < TOKENS_PER_CHANNEL * channels and config.ridge < 0.1:
        logger.warning(
            "%d calibration tokens for %d channels are fewer than %d a channel: the repair may do "
            "harm on other text; use more num_samples, or ridge=0.1",
            *(tokens.num_tokens, channels, TOKENS_PER_CHANNEL),
        )


def read_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | TokenBatches,
    config: GrailConfig,
    progress: bool = True,
) -> TokenBatches:
    """The calibration tokens for a model.

    It may be on the meta device, unless the tokens are sampled from it ("self").
    """
    if isinstance(calibration, TokenBatches):
        for batch in calibration.batches:
            check_token_ids(batch["input_ids"], vocabulary_size(model), calibration.source)
        return calibration
    with evaluation_mode(model):
        return token_batches(
            calibration,
            tokenizer,
            vocab_size=vocabulary_size(model),
            num_samples=config.num_samples,
            seq_length=config.seq_length,
            batch_size=config.batch_size,
            seed=config.seed,
            max_length=context_length(model),
            model=model,
            progress=progress,
        )


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
        if not isinstance(error, Exception):
            logger.error(message)
            raise
        raise PartlyCompressedError(f"{error} ({message})") from error
