"""How wide each kind of group becomes: one function a rule, sparsity -> widths, and `ALLOCATIONS`.

A `Budget` says what a kind's units cost; a rule turns the budgets of all kinds and the config into
the number of units that each kind keeps in a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

from grail_hf.architectures import ATTENTION, MLP
from grail_hf.config import GrailConfig

# Largest distance between the sparsity asked for and the one reached.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Budget:
    """What one kind of group costs.

    Attributes:
        num_units: units in a layer before.
        unit_cost: projection parameters that one unit holds.
        fixed_cost: projection parameters of a layer that stay whatever the width.
        step: widths are multiples of this.
        layers: decoder layers.
        ignored: of these, how many keep their width.
        whole_cost: projection parameters of further layers, whose block has no units.
    """

    num_units: int
    unit_cost: int
    fixed_cost: int = 0
    step: int = 1
    layers: int = 1
    ignored: int = 0
    whole_cost: int = 0

    def cost(self, width: int) -> int:
        """Projection parameters in all layers, of which those not ignored have `width` units."""
        units = width * (self.layers - self.ignored) + self.num_units * self.ignored
        return self.whole_cost + self.layers * self.fixed_cost + units * self.unit_cost

    @property
    def widths(self) -> list[int]:
        """The widths there can be, ascending. The full width needs to be no multiple."""
        if self.ignored == self.layers:
            return [self.num_units]
        return [*range(self.step, self.num_units, self.step), self.num_units]


Allocation = Callable[[Mapping[str, Budget], GrailConfig], dict[str, int]]


def uniform(budgets: Mapping[str, Budget], config: GrailConfig) -> dict[str, int]:
    """One width per kind for all layers not ignored, both kinds at about the same kept fraction.

    Attention units are coarse: their number is rounded to the nearest, and the MLP width takes up
    the difference. Where even so the total misses by more than `TOLERANCE` (a large
    `multiple_of`), the next nearest numbers of attention units are tried.

    Raises:
        ValueError: no pair of widths comes close enough; lists the sparsities next to the asked.
    """
    attention, mlp = budgets[ATTENTION], budgets[MLP]
    total = sum(budget.cost(budget.num_units) for budget in budgets.values())

    def reached(pair: tuple[int, int]) -> float:
        return 1 - (attention.cost(pair[0]) + mlp.cost(pair[1])) / total

    attention_widths = _widths(ATTENTION, attention, config.attention_sparsity)
    mlp_widths = _widths(MLP, mlp, config.mlp_sparsity)
    if config.sparsity is None:
        return {ATTENTION: attention_widths[0], MLP: mlp_widths[0]}

    wanted = config.sparsity

    def best_mlp(heads: int) -> int:
        return min(mlp_widths, key=lambda width: abs(reached((heads, width)) - wanted))

    pairs = [(heads, best_mlp(heads)) for heads in attention_widths]
    near = [pair for pair in pairs if abs(reached(pair) - wanted) <= TOLERANCE]
    if not near:
        every = {reached(pair) for pair in product(attention_widths, mlp_widths)}
        raise ValueError(_unreachable(wanted, every, config))
    # The least difference between the kinds' kept fractions; of equals, the wider attention.
    heads, width = min(
        near,
        key=lambda pair: (abs(pair[0] / attention.num_units - (1 - wanted)), -pair[0]),
    )
    return {ATTENTION: heads, MLP: width}


def _widths(kind: str, budget: Budget, sparsity: float | None) -> list[int]:
    """The widths to choose from: all, or the one nearest to the kind's own sparsity."""
    if sparsity is None:
        return budget.widths
    if budget.ignored == budget.layers and sparsity > 0:
        raise ValueError(
            f"{kind}_sparsity={sparsity:g} and ignore contradict each other, since ignore keeps "
            f"the {kind} whole: drop one"
        )
    return [min(budget.widths, key=lambda width: abs(width - (1 - sparsity) * budget.num_units))]


def _unreachable(wanted: float, reachable: set[float], config: GrailConfig) -> str:
    below = sorted(value for value in reachable if value < wanted)[-3:]
    above = sorted(value for value in reachable if value > wanted)[:3]
    remedies = ["choose one of these"]
    if config.multiple_of > 1:
        remedies.append("a smaller multiple_of")
    if config.mlp_sparsity is not None or config.attention_sparsity is not None:
        remedies.append("drop mlp_sparsity or attention_sparsity")
    return (
        f"sparsity={wanted:g} cannot be reached within {100 * TOLERANCE:g} points with "
        f"multiple_of={config.multiple_of}, attention_unit={config.attention_unit!r} and "
        f"ignore={list(config.ignore)}; reachable nearby: "
        f"{', '.join(f'{value:.4f}' for value in below + above)}: {', or '.join(remedies)}"
    )


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform}
