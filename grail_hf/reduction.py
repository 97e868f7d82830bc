"""`Reduction`: which units of a group are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """The kept units of a group.

    Attributes:
        kept: [width] int64, ascending unit indices.
        num_units: units before the reduction.
    """

    kept: Tensor
    num_units: int

    @classmethod
    def keep_top(cls, scores: Tensor, width: int, partitions: int = 1) -> Reduction:
        """Keep the `width` units of highest score, equally many from each partition.

        Args:
            scores: [units], any real dtype; of equal scores the lower index is kept.
            width: units to keep, a multiple of `partitions`.
            partitions: the units are this many equal consecutive runs.

        Raises:
            FloatingPointError: a score is NaN.
        """
        return cls(best_first(scores, partitions)[:width].sort().values, scores.numel())

    @property
    def removed(self) -> Tensor:
        """[num_units - width] int64, ascending."""
        mask = torch.ones(self.num_units, dtype=torch.bool, device=self.kept.device)
        mask[self.kept] = False
        return mask.nonzero().flatten()

    def kept_channels(self, per_unit: int) -> Tensor:
        """[width * per_unit] int64: channels (rows, columns) of the kept units."""
        return expand_units(self.kept, per_unit)

    def removed_channels(self, per_unit: int) -> Tensor:
        """[(num_units - width) * per_unit] int64: channels of the removed units."""
        return expand_units(self.removed, per_unit)


def expand_units(units: Tensor, per_unit: int) -> Tensor:
    """Unit indices [n] to channel indices [n * per_unit]."""
    within = torch.arange(per_unit, device=units.device)
    return (units[:, None] * per_unit + within).flatten()


def best_first(scores: Tensor, partitions: int = 1) -> Tensor:
    """[units] int64, units from the highest score to the lowest, the partitions in turns.

    Args:
        scores: [units], any real dtype; of equal scores the lower index comes first.
        partitions: the units are this many equal consecutive runs.

    Raises:
        FloatingPointError: a score is NaN.
    """
    if torch.isnan(scores).any():
        raise FloatingPointError("a unit's score is NaN")
    runs = scores.reshape(partitions, -1)
    order = runs.argsort(dim=1, descending=True, stable=True)
    offsets = torch.arange(partitions, device=scores.device)[:, None] * runs.shape[1]
    return (order + offsets).T.flatten()
