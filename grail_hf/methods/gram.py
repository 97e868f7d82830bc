"""`GramStats`: second moments of a consumer's inputs and targets over the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grail_hf.methods.linalg import (
    BLOCK,
    Symmetric,
    add_,
    columns,
    fp32_product,
    sum_of_products,
    terms_for,
)


@dataclass
class GramStats:
    """Sums over N tokens of the inputs x [H] of a consumer and of its target outputs y [O].

    Attributes:
        moments: X^T X = sum x x^T.
        total: [H], sum x.
        count: N.
        cross: [O, H], Y^T X = sum y x^T, in fp32 after `round_`; None if y is the consumer's own
            output W x, whose sums follow from the Gram matrix.
        target_energy: sum ||y||^2, if there is a cross moment.
        target_total: [O], sum y, if there is a cross moment.
        held_out: the same sums over the held-out part of the N tokens, which the choice of the
            damping evaluates.
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
        """Empty statistics of `channels` inputs and, if given, `outputs` targets.

        `dtype` is fp32, or fp64 for sums that do not depend on the order of the updates.
        """

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        stats = cls(Symmetric.zeros(channels, device, dtype), empty(channels))
        if outputs is not None:
            stats.cross, stats.target_total = empty(outputs, channels), empty(outputs)
        return stats

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of selection and solve, in which matrices are computed from the sums."""
        return self.moments.dtype

    @property
    def gram(self) -> Tensor:
        """[H, H], X^T X, a new tensor on each access."""
        return self.moments.dense()

    @property
    def sums(self) -> Iterator[Tensor]:
        """Every tensor that is a sum over tokens, to be summed over processes in place."""
        yield from (self.moments.flat, self.total)
        yield from (sums for sums in (self.cross, self.target_total) if sums is not None)
        if self.held_out is not None:
            yield from self.held_out.sums

    def update_(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the tokens x [n, H], with their targets y [n, O] if there is a cross moment.

        Products are computed in fp32 for any input dtype, and added in the dtype of the statistics.
        """
        self.moments.add_products_(x)
        self.total += x.sum(dim=0, dtype=self.total.dtype)
        self.count += x.shape[0]
        if self.cross is not None and y is not None:
            x, terms = terms_for(x, y)
            for term in terms:
                for rows, targets in zip(
                    torch.split(self.cross, BLOCK), torch.split(term, BLOCK, dim=1), strict=True
                ):
                    rows += fp32_product(targets.T, x)
            self.target_energy += y.float().square().sum().item()
        if self.target_total is not None and y is not None:
            self.target_total += y.sum(dim=0, dtype=self.target_total.dtype)

    def add_(self, other: GramStats) -> None:
        """Add the sums of other tokens, which have none held out."""
        for sums, more in zip(self.sums, other.sums, strict=False):
            sums += more
        self.count += other.count
        self.target_energy += other.target_energy

    def round_(self) -> GramStats:
        """Convert the matrices to fp32 in place, and return the statistics.

        They are sums of fp32 products, so the rounding adds no larger error, and sums that were
        accumulated in fp64 stay independent of their order. Half the memory is freed for the solve.
        """
        self.moments = self.moments.rounded()
        if self.cross is not None:
            self.cross = self.cross.float()
        if self.held_out is not None:
            self.held_out.round_()
        return self

    def moved(self, move: Callable[[Tensor], Tensor]) -> GramStats:
        """The same statistics, with the matrices placed by `move`."""
        return replace(
            self,
            moments=replace(self.moments, flat=move(self.moments.flat)),
            cross=None if self.cross is None else move(self.cross),
        )

    def restricted(self, kept: Tensor, weight: Tensor) -> GramStats:
        """The statistics of the kept inputs [K], always with a cross moment.

        Args:
            kept: [K] int64.
            weight: [O, H], the consumer's, whose output is the target if there is no cross moment.

        Returns:
            The statistics on the weight's device, from matrices on any device.
        """
        kept = kept.to(weight.device)
        own = self.targeted(weight)
        assert own.cross is not None
        return GramStats(
            self.moments.restricted(kept),
            self.total[kept],
            self.count,
            columns(own.cross, kept),
            own.target_energy,
            own.target_total,
            self.held_out and self.held_out.restricted(kept, weight),
        )

    def targeted(self, weight: Tensor) -> GramStats:
        """The statistics with a cross moment: of the weight's [O, H] output where there is none."""
        if self.cross is not None:
            return self
        cross = self.cross_of(weight)
        energy = sum_of_products(cross, weight)
        return replace(
            self, cross=cross, target_energy=energy, target_total=self.target_total_of(weight)
        )

    def computed_in(self, dtype: torch.dtype) -> GramStats:
        """The statistics for a selection and a solve in another precision; they have no targets."""
        return replace(self, moments=replace(self.moments, dtype=dtype), total=self.total.to(dtype))

    def fitted(self) -> GramStats:
        """The statistics of the tokens that are not held out; both need a cross moment."""
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
        """[O, H], Y^T X - W G, the residual of least squares; needs a cross moment."""
        assert self.cross is not None
        return add_(self.moments.times(weight).neg_(), self.cross)

    def cross_of(self, weight: Tensor) -> Tensor:
        """[O, H], Y^T X; without a cross moment the target is the weight's output, and this W G."""
        return self.moments.times(weight) if self.cross is None else self.cross.to(self.dtype)

    def target_total_of(self, weight: Tensor) -> Tensor:
        """[O], sum y; without a cross moment, W sum x."""
        return weight @ self.total if self.target_total is None else self.target_total

    def about(self, x: Tensor, y: Tensor) -> GramStats:
        """The sums over inputs shifted by -x [H] and targets by -y [O], without held-out tokens."""
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
        # One input that is not finite makes the sum of squares of its channel not finite.
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
