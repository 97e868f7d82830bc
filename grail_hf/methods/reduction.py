"""`Reduction`: the units of a group that are kept, or the clusters that are folded together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_hf.config import widest_float


@dataclass(frozen=True)
class Reduction:
    """The units of a group that are kept, or the clusters of units that become one unit each.

    Attributes:
        kept: [width] int64, ascending unit indices; the first unit of each cluster if folding.
        num_units: units before the reduction.
        labels: [num_units] int64, the cluster of each unit; kept[c] is the first unit of cluster c.
            None if units are removed and not folded.
        shares: [num_units], the weight of each unit in the mean of its cluster; they sum to 1 in
            each cluster.
    """

    kept: Tensor
    num_units: int
    labels: Tensor | None = None
    shares: Tensor | None = None

    @classmethod
    def keep_top(cls, scores: Tensor, width: int, partitions: int = 1) -> Reduction:
        """Keep the `width` units of highest score, equally many from each partition.

        Args:
            scores: [units], any real dtype; ties go to the lower index.
            width: units to keep, a multiple of `partitions`.
            partitions: number of equal consecutive runs of units.

        Raises:
            FloatingPointError: a score is NaN.
        """
        return cls(best_first(scores, partitions)[:width].sort().values, scores.numel())

    @classmethod
    def fold(cls, labels: Tensor, weights: Tensor | None = None) -> Reduction:
        """Fold all units of the same label into one unit.

        Args:
            labels: [units], any integers; clusters are renumbered in the order of their first unit.
            weights: [units], positive, of the units in the mean of their cluster; equal by default.
        """
        names, labels = torch.unique(labels, return_inverse=True)
        units = torch.arange(labels.numel(), device=labels.device)
        first = units.new_full((names.numel(),), labels.numel())
        kept, order = first.scatter_reduce(0, labels, units, "amin").sort()
        labels = order.argsort()[labels]
        if weights is None:
            dtype = widest_float(labels.device)
            weights = torch.ones(labels.shape, dtype=dtype, device=labels.device)
        shares = weights / sum_clusters(weights, labels)[labels]
        return cls(kept, labels.numel(), labels, shares)

    @property
    def folds(self) -> bool:
        """Whether units are folded together, rather than removed."""
        return self.labels is not None

    def of_producer(self, rows: Tensor, per_unit: int) -> Tensor:
        """[num_units * per_unit, ..] to [width * per_unit, ..]: a producer's weight or bias.

        The rows of the kept units, or the mean of each cluster. Means are taken position by
        position within units, so that each position keeps its meaning, such as the frequency of a
        rotary embedding.
        """
        return self._reduce(rows, per_unit, self.shares)

    def of_consumer(self, weight: Tensor, per_unit: int) -> Tensor:
        """[O, num_units * per_unit] to [O, width * per_unit]: the consumer without repair.

        The columns of the kept units, or the sum over each cluster, whose units now have one
        output.
        """
        return self._reduce(weight.mT, per_unit).mT

    def _reduce(self, rows: Tensor, per_unit: int, shares: Tensor | None = None) -> Tensor:
        if self.labels is None:
            return rows[self.kept_channels(per_unit).to(rows.device)]
        units = rows.reshape(-1, per_unit, *rows.shape[1:])
        if shares is not None:
            # In fp32 or wider, because products in half precision would be rounded.
            wide = torch.promote_types(rows.dtype, torch.float32)
            units = units * shares.to(rows.device, wide).reshape(-1, *[1] * rows.ndim)
        sums = sum_clusters(units, self.labels.to(rows.device))
        return sums.flatten(0, 1).to(rows.dtype)

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
    """[units] int64, units from the highest score to the lowest, alternating between partitions.

    Args:
        scores: [units], any real dtype; ties go to the lower index.
        partitions: number of equal consecutive runs of units.

    Raises:
        FloatingPointError: a score is NaN.
    """
    if torch.isnan(scores).any():
        raise FloatingPointError("a unit's score is NaN")
    runs = scores.reshape(partitions, -1)
    order = runs.argsort(dim=1, descending=True, stable=True)
    offsets = torch.arange(partitions, device=scores.device)[:, None] * runs.shape[1]
    return (order + offsets).T.flatten()


def sum_clusters(x: Tensor, labels: Tensor) -> Tensor:
    """[n, ..] to [clusters, ..]: the sum over each cluster, in fp32 or wider.

    Args:
        x: [n, ..].
        labels: [n] int64 in [0, clusters); each cluster has a member.
    """
    rows = x[labels.argsort(stable=True)].to(torch.promote_types(x.dtype, torch.float32))
    # Unlike `index_add_`, this is deterministic on accelerators.
    return torch.segment_reduce(rows, "sum", lengths=labels.bincount(), axis=0)
