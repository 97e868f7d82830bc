"""`Budget`: what the units of one kind cost. `Profile`: what was measured of one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Widths = dict[str, tuple[int, ...]]
"""Kind -> units kept in each layer."""
Curve = Mapping[int, float]
"""Width -> loss, for every possible width."""


@dataclass(frozen=True)
class Budget:
    """What one kind of group costs, and the widths that it can have.

    Attributes:
        num_units: units per layer before the reduction.
        unit_cost: projection parameters per unit.
        fixed_cost: projection parameters per layer with units that do not depend on the width.
        step: widths are multiples of this.
        layers: number of decoder layers.
        ignored: layers that keep their width.
        absent: those of the ignored layers that have no such units; their width is 0.
        whole_cost: projection parameters of the absent layers' blocks together.
        representable: widths that the config can represent as one width for all layers, the full
            one included; None if it can represent any.
        remedy: setting that makes more widths representable; empty if there is none.
    """

    num_units: int
    unit_cost: int
    fixed_cost: int = 0
    step: int = 1
    layers: int = 1
    ignored: frozenset[int] = frozenset()
    absent: frozenset[int] = frozenset()
    whole_cost: int = 0
    representable: frozenset[int] | None = None
    remedy: str = ""

    def cost(self, width: int) -> int:
        """Projection parameters in all layers if those not ignored have `width` units."""
        return self.cost_of(self.in_all_layers(width))

    def cost_of(self, widths: Sequence[int]) -> int:
        """Projection parameters in all layers, given the width of each."""
        fixed = (self.layers - len(self.absent)) * self.fixed_cost
        return self.whole_cost + fixed + sum(widths) * self.unit_cost

    def in_all_layers(self, width: int) -> tuple[int, ...]:
        """The width of each layer if those not ignored have `width` units."""
        kept = {layer: self.num_units for layer in self.ignored} | dict.fromkeys(self.absent, 0)
        return tuple(kept.get(layer, width) for layer in range(self.layers))

    @property
    def free_cost(self) -> int:
        """Projection parameters of the units in the layers that are not ignored."""
        return (self.layers - len(self.ignored)) * self.num_units * self.unit_cost

    def nearest(self, fraction: float) -> int:
        """The uniform width nearest to this fraction of the units."""
        return min(self.uniform_widths, key=lambda width: abs(width - fraction * self.num_units))

    @property
    def widths(self) -> list[int]:
        """The possible widths, ascending. The full width need not be a multiple of `step`."""
        if len(self.ignored) == self.layers:
            return [self.num_units]
        return [*range(self.step, self.num_units, self.step), self.num_units]

    @property
    def uniform_widths(self) -> list[int]:
        """The widths that all layers can have together, ascending."""
        if self.representable is None:
            return self.widths
        return [width for width in self.widths if width in self.representable]


Budgets = Mapping[str, Budget]


@dataclass(frozen=True)
class Profile:
    """What was measured of one group of the dense model.

    Attributes:
        scores: [units], the scores of the selector.
        errors: [units + 1], entry k is the squared error of the repaired consumer with k units,
            relative to the energy of the residual stream after the block; empty where the
            allocation reads none.
        divergences: width -> KL divergence from the dense model, in nats per token, of the model
            in which only this group is reduced and repaired; a few widths, if the allocation reads
            them.
        sensitivity: divergence in nats per token for an error of 1, from one such measurement; 1
            unless the allocation reads it.
    """

    scores: Tensor
    errors: Tensor
    divergences: Mapping[int, float] = field(default_factory=dict)
    sensitivity: float = 1.0


Profiles = Mapping[tuple[str, int], Profile]
"""(kind, layer) -> profile, for every group that can lose units."""
