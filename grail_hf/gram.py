"""`GramStats`: second moments of a consumer's inputs and targets over the calibration tokens."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_DAMPING_STEP = 10.0
_LARGEST_DAMPING = 1.0


@dataclass
class GramStats:
    """Sums over N tokens of a consumer's inputs x [H] and of what it should put out, y [O].

    Attributes:
        gram: [H, H], X^T X = sum x x^T.
        total: [H], sum x.
        count: N.
        cross: [O, H], Y^T X = sum y x^T; None where y is the consumer's own output W x, whose
            sums follow from the Gram.
        target_total: [O], sum y, where there is a cross moment.
        target_energy: sum ||y||^2, likewise.
        held_out: the same sums over those of the N tokens on which a damping is judged.
    """

    gram: Tensor
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

        stats = cls(empty(channels, channels), empty(channels))
        if outputs is not None:
            stats.cross, stats.target_total = empty(outputs, channels), empty(outputs)
        return stats

    def update_(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the tokens x [n, H], with their targets y [n, O] where there is a cross moment.

        Products are in fp32 whatever the dtypes, and added in the dtype of the statistics.
        """
        # Half-precision inputs have exact fp32 products, so on CUDA the tensor cores' half
        # inputs with fp32 accumulation lose nothing and are many times as fast as fp32 inputs.
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            self.gram += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            self.gram += x.float().T @ x.float()
        self.total += x.sum(dim=0, dtype=self.total.dtype)
        self.count += x.shape[0]
        if self.cross is not None and y is not None:
            self.cross += y.float().T @ x.float()
            self.target_energy += y.float().square().sum().item()
        if self.target_total is not None and y is not None:
            self.target_total += y.sum(dim=0, dtype=self.target_total.dtype)

    def merge_(self, other: GramStats) -> None:
        """Add the tokens that `other` has seen."""
        self.gram += other.gram
        self.total += other.total
        self.count += other.count
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
            self.target_energy += other.target_energy
        if self.target_total is not None and other.target_total is not None:
            self.target_total += other.target_total
        if self.held_out is not None and other.held_out is not None:
            self.held_out.merge_(other.held_out)

    def cross_of(self, weight: Tensor) -> Tensor:
        """[O, H], Y^T X; for the weight's own output it is W G."""
        return weight @ self.gram if self.cross is None else self.cross

    def target_total_of(self, weight: Tensor) -> Tensor:
        """[O], sum y; for the weight's own output it is W sum x."""
        return weight @ self.total if self.target_total is None else self.target_total

    def about(self, x: Tensor, y: Tensor) -> GramStats:
        """The sums over inputs moved by -x [H] and targets moved by -y [O], nothing held out."""
        total = self.total - self.count * x
        gram = self.gram - torch.outer(self.total, x) - torch.outer(x, total)
        if self.cross is None or self.target_total is None:
            return GramStats(gram, total, self.count)
        target_total = self.target_total - self.count * y
        cross = self.cross - torch.outer(y, self.total) - torch.outer(target_total, x)
        energy = self.target_energy - (y @ (self.target_total + target_total)).item()
        return GramStats(gram, total, self.count, cross, energy, target_total)

    @property
    def mean(self) -> Tensor:
        """[H], the mean token."""
        return self.total / self.count

    @property
    def energy(self) -> Tensor:
        """[H], sum of squares of each channel: the Gram's diagonal."""
        return self.gram.diagonal()

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


def damped_cholesky(gram: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The lower Cholesky factor of G + d mean(diag G) I, and the d that it took.

    Starts from d = `damping`; where that leaves the matrix singular (fewer tokens than channels,
    say), d grows tenfold until it does not, with a warning that names the group. Channels that
    are all dead get the identity.

    Args:
        gram: [H, H], fp32 or fp64, positive semi-definite up to rounding.
        damping: relative to the mean diagonal, >= 0.
        name: of the group, for messages.

    Raises:
        FloatingPointError: d = 1 does not suffice, so this is no Gram matrix.
    """
    scale = gram.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    used = damping if gram.any() else 1.0
    while (factor := sound_cholesky(gram, used * scale)) is None:
        if used >= _LARGEST_DAMPING:
            raise FloatingPointError(
                f"the Gram of {name} cannot be factorised even with damping {used:g}"
            )
        used = min(max(used * _DAMPING_STEP, torch.finfo(gram.dtype).eps), _LARGEST_DAMPING)
    if used > damping and gram.any():
        logger.warning(
            "%s: the Gram is singular with damping %g; solved with damping %g", name, damping, used
        )
    return factor, used


def sound_cholesky(gram: Tensor, shift: Tensor) -> Tensor | None:
    """The lower Cholesky factor of G + shift I, or None where rounding would spoil its solves.

    Args:
        gram: [H, H], fp32 or fp64.
        shift: [], in the Gram's dtype.
    """
    system = gram.clone()
    system.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(system)
    # A pivot at the level of rounding, against its own channel, passes the factorisation but not
    # the solve.
    pivots = factor.diagonal().square() / system.diagonal()
    sound = not info.any() and pivots.min() > 8 * torch.finfo(gram.dtype).eps * len(gram) ** 0.5
    return factor if sound else None
