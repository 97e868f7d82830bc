"""`GramStats`: second moments of a consumer's inputs and targets over the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grail_hf.methods.linalg import BLOCK, Symmetric, add_, columns, sum_of_products


@dataclass
class GramStats:
    """Sums over N tokens of a consumer's inputs x [H] and of what it should put out, y [O].

    Attributes:
        moments: X^T X = sum x x^T.
        total: [H], sum x.
        count: N.
        cross: [O, H], Y^T X = sum y x^T, in fp32 after `round_`; None where y is the consumer's own
            output W x, whose sums follow from the Gram.
        target_energy: sum ||y||^2, where there is a cross moment.
        target_total: [O], sum y, likewise.
        held_out: the same sums over those of the N tokens on which a damping is judged.
    """

    moments: Symmetric
    total: Tensor
    count: int = 0
    cross: Tensor | None = None
    target_energy: float = 0.0
    target_total: Tensor | None = None
    held_out: GramStats | None = None

    @classmethod
    def zeros(
        cls,
        channels: int,
        device: torch.device | str = "cpu",
        outputs: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GramStats:
        """Empty statistics of `channels` inputs and, where given, `outputs` targets.

        Of `dtype`: fp32, or fp64 for sums that do not depend on the order of the updates.
        """

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        stats = cls(Symmetric.zeros(channels, device, dtype), empty(channels))
        if outputs is not None:
            stats.cross, stats.target_total = empty(outputs, channels), empty(outputs)
        return stats

    @property
    def dtype(self) -> torch.dtype:
        """Of what is selected and solved by the sums."""
        return self.moments.dtype

    @property
    def gram(self) -> Tensor:
        """[H, H], X^T X, made anew."""
        return self.moments.dense()

    @property
    def sums(self) -> Iterator[Tensor]:
        """Every tensor that is a sum over tokens: over processes they are added up in place."""
        yield from (self.moments.flat, self.total)
        yield from (sums for sums in (self.cross, self.target_total) if sums is not None)
        if self.held_out is not None:
            yield from self.held_out.sums

    def update_(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the tokens x [n, H], with their targets y [n, O] where there is a cross moment.

        Products are in fp32 whatever the dtypes, and added in the dtype of the statistics.
        """
        self.moments.add_products_(x)
        self.total += x.sum(dim=0, dtype=self.total.dtype)
        self.count += x.shape[0]
        if self.cross is not None and y is not None:
            x, y = x.float(), y.float()
            for rows, targets in zip(
                torch.split(self.cross, BLOCK), torch.split(y, BLOCK, dim=1), strict=True
            ):
                rows += targets.T @ x
            self.target_energy += y.square().sum().item()
        if self.target_total is not None and y is not None:
            self.target_total += y.sum(dim=0, dtype=self.target_total.dtype)

    def merge_(self, other: GramStats) -> None:
        """Add the tokens that `other` has seen."""
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs
        self._count_(other)

    def _count_(self, other: GramStats) -> None:
        self.count += other.count
        self.target_energy += other.target_energy
        if self.held_out is not None and other.held_out is not None:
            self.held_out._count_(other.held_out)

    def round_(self) -> GramStats:
        """Hold the matrices in fp32 from now on, and return the statistics.

        They are sums of fp32 products, whose rounding is no smaller; what summing in fp64 has won,
        that their order does not matter, stays. Half the memory is free for the solve.
        """
        self.moments = self.moments.rounded()
        if self.cross is not None:
            self.cross = self.cross.float()
        if self.held_out is not None:
            self.held_out.round_()
        return self

    def moved(self, move: Callable[[Tensor], Tensor]) -> GramStats:
        """The same, its matrices put where `move` puts them."""
        return replace(
            self,
            moments=replace(self.moments, flat=move(self.moments.flat)),
            cross=None if self.cross is None else move(self.cross),
        )

    def restricted(self, kept: Tensor, weight: Tensor) -> GramStats:
        """Of the kept inputs [K] alone, with the moments of the targets that `weight` stands for.

        Args:
            kept: [K] int64.
            weight: [O, H], the consumer's.

        Returns:
            Them on the weight's device, wherever the matrices lie.
        """
        kept = kept.to(weight.device)
        cross, energy = self.cross, self.target_energy
        if cross is None:
            cross = self.cross_of(weight)
            energy = sum_of_products(cross, weight)
        return GramStats(
            self.moments.restricted(kept),
            self.total[kept],
            self.count,
            columns(cross, kept),
            energy,
            self.target_total_of(weight),
            self.held_out and self.held_out.restricted(kept, weight),
        )

    def fitted(self) -> GramStats:
        """Of the tokens that are not held out; what is held out must have explicit targets."""
        held = self.held_out
        assert held is not None and held.cross is not None and held.target_total is not None
        assert self.cross is not None and self.target_total is not None
        return GramStats(
            self.moments.minus(held.moments),
            self.total - held.total,
            self.count - held.count,
            self.cross.to(self.dtype, copy=True).sub_(held.cross),
            self.target_energy - held.target_energy,
            self.target_total - held.target_total,
        )

    def missing_of(self, weight: Tensor) -> Tensor:
        """[O, H], Y^T X - W G, where `weight` falls short of least squares; there is a target."""
        assert self.cross is not None
        return add_(self.moments.times(weight).neg_(), self.cross)

    def cross_of(self, weight: Tensor) -> Tensor:
        """[O, H], Y^T X; for the weight's own output it is W G."""
        return self.moments.times(weight) if self.cross is None else self.cross.to(self.dtype)

    def target_total_of(self, weight: Tensor) -> Tensor:
        """[O], sum y; for the weight's own output it is W sum x."""
        return weight @ self.total if self.target_total is None else self.target_total

    def about(self, x: Tensor, y: Tensor) -> GramStats:
        """The sums over inputs moved by -x [H] and targets moved by -y [O], nothing held out."""
        total = self.total - self.count * x
        moments = self.moments.plus_outer(-x, total, self.total)
        if self.cross is None or self.target_total is None:
            return GramStats(moments, total, self.count)
        target_total = self.target_total - self.count * y
        cross = self.cross - torch.outer(y, self.total) - torch.outer(target_total, x)
        energy = self.target_energy - (y @ (self.target_total + target_total)).item()
        return GramStats(moments, total, self.count, cross, energy, target_total)

    @property
    def mean(self) -> Tensor:
        """[H], the mean token."""
        return self.total / self.count

    @property
    def energy(self) -> Tensor:
        """[H], sum of squares of each channel: the Gram's diagonal."""
        return self.moments.diagonal

    def check_finite(self, name: str) -> None:
        """Raise FloatingPointError, naming the group, if an input or target was NaN or Inf."""
        # An entry that is not finite makes its own channel's sum of squares not finite.
        if not torch.isfinite(self.energy).all():
            bad = int((~torch.isfinite(self.energy)).sum())
            raise FloatingPointError(
                f"activations in {name} are NaN or Inf in {bad} of {self.energy.numel()} channels; "
                "float16 models overflow like this: load the model in bfloat16 or float32"
            )
        if not math.isfinite(self.target_energy):
            raise FloatingPointError(
                f"the dense model's output of {name} is NaN or Inf; float16 models overflow like "
                "this: load the model in bfloat16 or float32"
            )
