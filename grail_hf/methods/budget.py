"""What the units of a kind cost, and what was measured of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Widths = dict[str, tuple[int, ...]]
"""Kind -> units kept, one number a layer."""
Curve = Mapping[int, float]
"""Width -> loss, for every width there can be."""


@dataclass(frozen=True)
class Budget:
    """What one kind of group costs.

    Attributes:
        num_units: units in a layer before.
        unit_cost: projection parameters that one unit holds.
        fixed_cost: projection parameters of a layer with units that stay whatever the width.
        step: widths are multiples of this.
        layers: decoder layers.
        ignored: of these, the ones that keep their width.
        absent: of the ignored, the ones that have no such units; their width is 0.
        whole_cost: projection parameters of the absent layers' blocks together.
        said: widths that the config can say of all layers alike, with the full one; None: any.
        remedy: setting with which it could say more; empty where there is none.
    """

    num_units: int
    unit_cost: int
    fixed_cost: int = 0
    step: int = 1
    layers: int = 1
    ignored: frozenset[int] = frozenset()
    absent: frozenset[int] = frozenset()
    whole_cost: int = 0
    said: frozenset[int] | None = None
    remedy: str = ""

    def cost(self, width: int) -> int:
        """Projection parameters in all layers, of which those not ignored have `width` units."""
        return self.cost_of(self.in_all_layers(width))

    def cost_of(self, widths: Sequence[int]) -> int:
        """Projection parameters in all layers, with a width for each."""
        fixed = (self.layers - len(self.absent)) * self.fixed_cost
        return self.whole_cost + fixed + sum(widths) * self.unit_cost

    def in_all_layers(self, width: int) -> tuple[int, ...]:
        """`width` in every layer that is not ignored."""
        kept = {layer: self.num_units for layer in self.ignored} | dict.fromkeys(self.absent, 0)
        return tuple(kept.get(layer, width) for layer in range(self.layers))

    @property
    def free_cost(self) -> int:
        """Projection parameters that the units hold in the layers that are not ignored."""
        return (self.layers - len(self.ignored)) * self.num_units * self.unit_cost

    def nearest(self, fraction: float) -> int:
        """The uniform width that is nearest to this fraction of the units."""
        return min(self.uniform_widths, key=lambda width: abs(width - fraction * self.num_units))

    @property
    def widths(self) -> list[int]:
        """The widths there can be, ascending. The full width needs to be no multiple."""
        if len(self.ignored) == self.layers:
            return [self.num_units]
        return [*range(self.step, self.num_units, self.step), self.num_units]

    @property
    def uniform_widths(self) -> list[int]:
        """The widths that all layers can have alike, ascending."""
        return [width for width in self.widths if self.said is None or width in self.said]


Budgets = Mapping[str, Budget]


@dataclass(frozen=True)
class Profile:
    """What was measured of one group of the dense model.

    Attributes:
        scores: [units], the selector's.
        errors: [units + 1], the squared error of the repaired consumer with so many units kept,
            relative to the energy of the residual stream behind the block.
        divergences: width -> KL divergence from the dense model, nats a token, of the model in
            which this group alone is reduced and repaired; measured for a few widths, where the
            rule asks for it.
        sensitivity: divergence in nats a token for an error of 1, from one such measurement; 1
            where the rule does not ask for it.
    """

    scores: Tensor
    errors: Tensor
    divergences: Mapping[int, float] = field(default_factory=dict)
    sensitivity: float = 1.0


Profiles = Mapping[tuple[str, int], Profile]
"""(kind, layer) -> profile, for every group that may lose units."""
