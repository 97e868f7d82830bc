"""What `compress` does to a mixture's experts: each loses units of its own, and is repaired."""

from __future__ import annotations

import logging
import math
from functools import partial

from grail_hf import processes
from grail_hf.compensation import Repair, ridge
from grail_hf.config import GrailConfig
from grail_hf.experts import ExpertsGroup
from grail_hf.planning import Plan
from grail_hf.report import CompressionReport
from grail_hf.selectors import choose, magnitude
from grail_hf.stream import Block

logger = logging.getLogger(__name__)

# With fewer tokens than channels an expert's Gram is singular, and any small damping fits noise.
SCARCE_DAMPING = 0.1


def narrow_experts_(
    block: Block,
    group: ExpertsGroup,
    width: int,
    plan: Plan,
    config: GrailConfig,
    report: CompressionReport,
) -> None:
    """Cut every expert of a group to `width` units of its own, and repair its consumer.

    An expert that no token came to has only its weights to go by, and no repair.
    """
    reductions, weights, scarce = [], [], []
    with block.meter.phase("gram"):
        every = block.collect_experts(group, config.holds_out)
    for expert, stats in zip(group.experts, every, strict=True):
        select = plan.select if stats.count else magnitude
        reduction = processes.once(
            partial(choose, select, expert, stats, width, config.selector_name), expert.name
        )
        weight, kept = expert.weight.to(config.torch_dtype), reduction.kept
        least = 0.0
        if stats.count < width:
            least = SCARCE_DAMPING if stats.count else math.inf
            scarce.append(expert.index)
        stats, weight = stats.restricted(kept, weight), weight[:, kept]
        repair = Repair(weight)
        if config.compensate:
            solve = partial(ridge, weight, stats, None, config.ridge, expert.name, least=least)
            repair = processes.once(solve, expert.name)
        report.add(block.index, expert, weight, stats, repair)
        reductions.append(reduction)
        weights.append(repair.weight)
    group.shrink_each_(reductions)
    group.repair_each_(weights)
    if scarce and config.compensate:
        logger.warning(
            "%s: experts %s saw fewer tokens than the %d channels that they keep, and are repaired "
            "with damping %g or more: use more num_samples",
            *(group.name, ", ".join(map(str, scarce)), width, SCARCE_DAMPING),
        )
