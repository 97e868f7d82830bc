"""Compress a model: the whole algorithm on one page. Read this first.

A *group* is all units (MLP channels, attention heads) upstream of one *consumer*: the channels that
the gate and up projections produce and `down_proj` consumes, or the heads that q, k and v produce
and `o_proj` consumes. Over N calibration tokens let X [N, H] be the consumer's inputs, W [O, H] its
weight, and Y [N, O] what it should output. The units S are kept, and ridge regression of Y on what
is left gives the consumer's new weight (GRAIL, arXiv 2602.23795):

    G = X^T X,   C = Y^T X
    W' = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1

Where Y is the consumer's own output, Y = X W^T, this is the paper's W' = W_S + W_P B^T with the map
B = (G_SS + d I)^-1 G_SP from the kept units to the removed ones, P. By default Y is the output that
brings the residual stream back to the dense model's, so that a group also repairs what those before
it lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from grail_hf.calibration.block import Block
from grail_hf.calibration.statistics import Solution, Statistics
from grail_hf.calibration.tokens import Calibration, TokenBatches
from grail_hf.config import GrailConfig
from grail_hf.job import Job, begun
from grail_hf.models.groups import Group
from grail_hf.models.schema import Architecture
from grail_hf.report import CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """Make `model` narrower in place and repair it. No training, no labels.

    Where the program has joined several processes, by accelerate (`PartialState`, `Accelerator`) or
    by torch.distributed (`init_process_group`), they share the calibration's batches: all of them
    must make this call, with the same model and settings, and all end with the same model and
    report. The calibration of the first counts. While it works, fp32 matrix products of the process
    are in fp32, whatever it allows otherwise (TF32, bf16).

    Args:
        model: a decoder-only `AutoModelForCausalLM` of a type in `grail_hf.ARCHITECTURES`, or of
            any other with `architecture`; loaded with `device_map` and offloaded, too.
        tokenizer: needed where `calibration` is text or conversations.
        calibration: a path or a list of paths to text; "wikitext2", "c4", "ptb" or any
            `name/config:split:column` that `datasets` loads; a list of strings; a list of
            conversations, each a list of messages {role, content}, or a .jsonl file with such
            `messages` in each line, for the tokenizer's chat template; an [N, T] integer tensor of
            token ids; or batches `{input_ids, attention_mask}`. Padding never counts.
            "self" needs no data: the tokens are sampled from the model, where the model is.
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
    with begun(model, tokenizer, calibration, config, architecture, progress) as job:
        narrow_layers_(job)
    return job.report


def narrow_layers_(job: Job) -> None:
    """Narrow each decoder layer, on the hidden states that the layers before it now produce."""
    plan = job.plan
    for block in job.blocks():
        for group in block.groups:  # attention first, then the MLP on what attention has become
            if plan.changes(block.index, group.kind):
                narrow_(block, group, job)
            if group.kind in plan.newly_biased:
                group.add_biases_()


def narrow_(block: Block, group: Group, job: Job) -> None:
    """Reduce a group to the planned number of units, repair its consumer, and refit it.

    A group that keeps all its units is repaired too, where groups before it have lost some.
    """
    intercept = group.kind in job.plan.biased
    every = block.statistics(group, job.config)  # G and C; of a mixture, those of each expert
    block.narrow_(group, *[solved(statistics, intercept, job) for statistics in every])
    job.refit_(block, group)  # the producers that the output is linear in (v, up), then W' again


def solved(statistics: Statistics, intercept: bool, job: Job) -> Solution:
    """The units S that stay, and the consumer's new weight W'."""
    width = job.plan.widths[statistics.group.kind][statistics.block.index]
    reduction = statistics.select(job.plan.select, width)  # S
    left = statistics.reduced_(reduction)  # G_SS, C_S and W_S
    repair = left.solve(intercept)  # W' = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1
    job.report.add(left, repair)
    return reduction, repair.stored_as(statistics.part.weight.dtype)
