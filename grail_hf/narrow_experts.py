"""What `compress` does to a mixture's experts: each loses units of its own, and is repaired."""

from __future__ import annotations

import logging
import math
from functools import partial

from torch import Tensor

from grail_hf.calibration.block import Block
from grail_hf.config import GrailConfig
from grail_hf.methods.gram import GramStats
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import Repair, ridge_within
from grail_hf.methods.selectors import choose, magnitude
from grail_hf.models.experts import Expert, ExpertsGroup
from grail_hf.planning.plan import Plan
from grail_hf.report import CompressionReport
from grail_hf.runtime import processes

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
    done: list[tuple[Reduction, Tensor]] = []
    scarce: list[int] = []
    for start in range(0, len(group.experts), plan.experts_at_once):
        experts = group.experts[start : start + plan.experts_at_once]
        with block.meter.phase("gram"):
            every = block.collect_experts(group, experts, config.holds_out)
        scarce += [
            expert.index
            for expert, stats in zip(experts, every, strict=True)
            if stats.count < width
        ]
        done += [
            _narrowed(block, expert, stats, width, plan, config, report)
            for expert, stats in zip(experts, every, strict=True)
        ]
        del every  # before the next ones are summed
    reductions, weights = zip(*done, strict=True)
    group.shrink_each_(reductions)
    group.repair_each_(weights)
    if scarce and config.compensate:
        logger.warning(
            "%s: experts %s saw fewer tokens than the %d channels that they keep, and are repaired "
            "with damping %g or more: use more num_samples",
            *(group.name, ", ".join(map(str, scarce)), width, SCARCE_DAMPING),
        )


def _narrowed(
    block: Block,
    expert: Expert,
    stats: GramStats,
    width: int,
    plan: Plan,
    config: GrailConfig,
    report: CompressionReport,
) -> tuple[Reduction, Tensor]:
    """The units that an expert keeps, and its consumer's new weight, in the model's dtype."""
    select = plan.select if stats.count else magnitude
    reduction = processes.once(
        partial(choose, select, expert, stats, width, config.selector_name), expert.name
    )
    weight, kept = expert.weight.to(config.solve_torch_dtype), reduction.kept
    stats, weight = stats.restricted(kept, weight), weight[:, kept]
    repair = Repair(weight)
    if config.compensate:
        least = SCARCE_DAMPING if stats.count < width else 0.0
        least = least if stats.count else math.inf
        settings = config.ridge, expert.name
        solve = partial(ridge_within, expert.weight.dtype, weight, stats, *settings, least=least)
        repair = processes.once(solve, expert.name)
    report.add(block.index, expert, weight, stats, repair)
    if config.refit_steps:
        report.refit("own output")
    return reduction, repair.weight.to(expert.weight.dtype)
