"""What the calibration tokens say of one group: which units to keep, and the repair of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grail_hf.config import GrailConfig
from grail_hf.methods.gram import GramStats
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import Repair, fold_linearly, reconstruction_error, ridge_within
from grail_hf.methods.selectors import WITHOUT_TOKENS, Selector, choose
from grail_hf.models.groups import Group, Part
from grail_hf.runtime import processes

if TYPE_CHECKING:
    from grail_hf.calibration.block import Block


Solution = tuple[Reduction, Repair]
"""What a part keeps, and its consumer's new weight."""


@dataclass
class Statistics:
    """What a part's consumer reads, and should output, on the calibration tokens.

    With X [N, H] its inputs, Y [N, O] its targets and W [O, H] its weight, `moments` are
    G = X^T X and C = Y^T X, and `weight` is W. Of several processes, the first one chooses and
    solves, and the others get what it found.

    Attributes:
        block: the layer that they are of.
        group: of the layer.
        part: of the group: the group itself, or an expert.
        config: the settings.
        moments: None once `reduced_` has used them up.
        weight: [O, K], what a reduction has left of the consumer, in the dtype of the solve; None
            before one.
        linear: of folded units, the moments under the assumption that folding is linear.
        solutions: of folded units, the repairs by `moments` ("measured") and by `linear`.
    """

    block: Block
    group: Group
    part: Part
    config: GrailConfig
    moments: GramStats | None
    weight: Tensor | None = None
    linear: GramStats | None = None
    solutions: dict[str, Repair] = field(default_factory=dict)

    def select(self, selector: Selector, width: int) -> Reduction:
        """The units that stay, or that are folded together, so that `width` are left.

        A part that no token reached has only its weights to go by.
        """
        part, moments = self.part, self.moments
        assert moments is not None
        selector = selector if moments.count else WITHOUT_TOKENS
        with self.block.meter.phase("select"):
            if selector.needs_gradient and width < part.num_units:
                part.gradient = self.block.regional_gradient(self.group)
            name = self.config.selector_name
            try:
                return processes.once(
                    partial(choose, selector, part, moments, width, name), part.name
                )
            finally:
                part.gradient = None

    def reduced_(self, reduction: Reduction) -> Statistics:
        """The statistics of what a reduction leaves: G_SS, C_S and W_S.

        Averaging producers does not average their outputs once a gate or an attention follows, so
        what folded units output is measured in another pass. These statistics are used up: both
        would not fit into memory at once.
        """
        moments, self.moments = self.moments, None
        assert moments is not None
        part, dtype = self.part, self.block.dtype
        weight, linear = part.weight, None
        kept = reduction.kept_channels(part.columns)
        if reduction.folds:
            linear = fold_linearly(weight.to(dtype), moments, reduction, part.columns)
            del moments  # before others are summed
            with self.block.meter.phase("gram"):
                moments = self.block.collect_folded(self.group, reduction, self.config.holds_out)
            weight = reduction.of_consumer(weight.to(dtype), part.columns)
            kept = torch.arange(kept.numel(), device=kept.device)
        weight = weight.to(dtype)
        left = moments.restricted(kept, weight)
        return replace(self, moments=left, weight=weight[:, kept], linear=linear)

    def solve(self, intercept: bool = False) -> Repair:
        """W' = W_S + (C_S - W_S G_SS) (G_SS + d I)^-1; W_S where nothing is to be repaired.

        Args:
            intercept: fit a bias too.
        """
        assert self.weight is not None and self.moments is not None
        if not self.config.compensate:
            return Repair(self.weight)
        if self.linear is None:
            return self._ridge(self.moments, intercept)
        self.solutions = {
            name: self._ridge(moments, intercept)
            for name, moments in (("measured", self.moments), ("linear", self.linear))
        }
        return self.solutions[self.config.fold]

    def _ridge(self, moments: GramStats, intercept: bool) -> Repair:
        assert self.weight is not None
        name, count = self.part.name, moments.count
        least = self.part.scarce_damping if count < self.weight.shape[1] else 0.0
        least = least if count else math.inf
        settings = self.config.ridge, name, intercept, least
        solution = partial(ridge_within, self.part.weight.dtype, self.weight, moments, *settings)
        return processes.once(solution, name)

    def error(self, repair: Repair) -> float:
        """||Y - Z W'^T||^2 / ||Y||^2 over the calibration tokens, Z the inputs that are left."""
        assert self.weight is not None and self.moments is not None
        return reconstruction_error(self.weight, repair.weight, self.moments, bias=repair.bias)
