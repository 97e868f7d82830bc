"""How wide each group becomes: one loss function per rule, and the table `ALLOCATIONS`.

A rule gives the loss of each width of a group; `allocate` finds the widths of least total loss at
the wanted sparsity in the same way for all rules. Either all layers get one width per kind, which
stock configs represent, or each layer gets its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from grail_hf.config import ATTENTION, MLP, GrailConfig, unknown_name
from grail_hf.methods.budget import Budget, Budgets, Curve, Profile, Profiles, Widths
from grail_hf.methods.widths import (
    TOLERANCE,
    all_layers_alike,
    leading_kind,
    one_width_a_kind,
    widths_by_layer,
    with_representable_widest,
)

logger = logging.getLogger(__name__)

# The candidates of multiple_of="auto", largest first: sizes that suit tensor cores and kernels.
MLP_MULTIPLES = (128, 64, 32, 16, 8)


def flap(profile: Profile, budget: Budget) -> Curve:
    """The sum of the removed units' scores, standardised within the group, times their parameters.

    Least total loss then removes the units of lowest standardised score in the whole model, which
    is "AL-AM" of FLAP (arXiv 2312.11983). FLAP's own scores are `selector="flap"`.
    """
    scores = profile.scores.double().sort().values
    deviation = scores.std(correction=0)
    standard = (scores - scores.mean()) / deviation if deviation > 0 else scores * 0
    removed = [0.0, *(budget.unit_cost * standard).cumsum(dim=0).tolist()]
    return {width: removed[budget.num_units - width] for width in budget.widths}


def error(profile: Profile, budget: Budget) -> Curve:
    """The error after repair, relative to the energy of the residual stream, times sensitivity.

    An error relative to the block's own output would spend width on blocks that hardly matter.
    Relative to the stream, errors compare the widths of one group. They do not compare layers,
    because a few tokens with massive activations can hold most of the stream's energy. Therefore
    the divergence of the model is measured at one width of each group.
    """
    errors = profile.errors.tolist()
    return {width: profile.sensitivity * errors[width] for width in budget.widths}


def search(profile: Profile, budget: Budget) -> Curve:
    """The measured KL divergence, interpolated between the measured widths by the error.

    The logarithm of divergence / error is interpolated linearly in the width.
    """
    errors = profile.errors.tolist()
    points = [
        (width, math.log(divergence / errors[width]))
        for width, divergence in sorted(profile.divergences.items())
        if divergence > 0 and errors[width] > 0
    ]
    return {
        width: errors[width] * math.exp(_interpolated(points, width)) for width in budget.widths
    }


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ascending `points`, constant beyond them; 0 if there are none."""
    if not points:
        return 0.0
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]


@dataclass(frozen=True)
class Allocation:
    """A rule that gives each group its width.

    Attributes:
        loss: the loss of each width of a group, from its profile; None if the rule needs none.
        per_layer: whether each layer gets a width of its own.
        divergences: whether the loss reads `Profile.divergences`, which take longest to measure.
        sensitivities: whether the loss reads `Profile.sensitivity`.
        compares_scores: whether the loss reads `Profile.scores`, so that the scores of different
            groups have to be comparable.
        splits: whether the widths are the best of `splits`, by the divergence of the whole model.
        auto: "auto" is this rule where there is a split between attention and MLP to choose
            (True), or where there is none (False); None if it never is.
    """

    loss: Callable[[Profile, Budget], Curve] | None = None
    per_layer: bool = True
    divergences: bool = False
    sensitivities: bool = False
    compares_scores: bool = False
    splits: bool = False
    auto: bool | None = None

    @property
    def measures(self) -> bool:
        """Whether the widths depend on measurements of the dense model."""
        return self.loss is not None or self.splits


def find_allocation(name: str) -> Allocation:
    """The rule of a name. Raises ValueError for an unknown name, with the nearest known one."""
    if name not in ALLOCATIONS:
        where = "ALLOCATIONS in grail_hf/methods/allocation.py"
        raise unknown_name("allocation", name, ALLOCATIONS, where)
    return ALLOCATIONS[name]


def automatic_allocation(a_choice: bool) -> str:
    """The name of the rule that "auto" is, by whether there is a split to choose."""
    return next(name for name, rule in ALLOCATIONS.items() if rule.auto is a_choice)


def allocate(budgets: Budgets, config: GrailConfig, profiles: Profiles | None = None) -> Widths:
    """The widths of least total loss at the wanted sparsity.

    Without profiles, the same loss curve is assumed for all layers: if the rule measures, this is
    a forecast.

    Raises:
        ValueError: the rule is unknown, scores that it compares are infinite, the sparsity of one
            kind removes nothing, or no widths come within `TOLERANCE` of the sparsity; the message
            lists the nearest sparsities that can be reached.
    """
    rule = find_allocation(config.allocation)
    if rule.per_layer:
        curves = all_layers_alike(budgets)
        if profiles is not None and rule.loss is not None:
            if rule.compares_scores:
                _check_finite(profiles, config)
            curves = {
                (kind, layer): rule.loss(profile, budgets[kind])
                for (kind, layer), profile in profiles.items()
            }
        widths = widths_by_layer(budgets, config, curves)
        representable = budgets[ATTENTION].representable
        if representable is not None and max(widths[ATTENTION]) not in representable:
            curves = with_representable_widest(curves, widths[ATTENTION], representable)
            widths = widths_by_layer(budgets, config, curves)
    else:
        widths = one_width_a_kind(budgets, config)
    if profiles is None:  # once per plan: measurements only move units between layers
        _check_own_sparsities(budgets, widths, config)
    return widths


def expected_loss(budgets: Budgets, widths: Widths, rule: str, profiles: Profiles) -> float:
    """The total loss of all groups at `widths`, by a rule that reads profiles."""
    loss = find_allocation(rule).loss
    assert loss is not None
    return sum(
        loss(profile, budgets[kind])[widths[kind][layer]]
        for (kind, layer), profile in profiles.items()
    )


def _check_finite(profiles: Profiles, config: GrailConfig) -> None:
    for (kind, layer), profile in profiles.items():
        infinite = int((~profile.scores.isfinite()).sum())
        if infinite:
            raise ValueError(
                f"selector {config.selector_name!r} gives {infinite} infinite scores to the {kind} "
                f"of layer {layer}, which allocation={config.allocation!r} cannot standardise: "
                "return finite scores, or use allocation='error'"
            )


def _check_own_sparsities(budgets: Budgets, widths: Widths, config: GrailConfig) -> None:
    """Warn if a kind misses its own sparsity by far; raise ValueError if it loses no units."""
    for kind, asked in ((ATTENTION, config.attention_sparsity), (MLP, config.mlp_sparsity)):
        if not asked:
            continue
        own = {
            name: budget
            for name, budget in budgets.items()
            if (name == ATTENTION) == (kind == ATTENTION)
        }
        free = sum(budget.free_cost for budget in own.values())
        full = sum(budget.cost(budget.num_units) for budget in own.values())
        removed = full - sum(budget.cost_of(widths[name]) for name, budget in own.items())
        if not removed:
            raise ValueError(_nothing_goes(kind, asked, own[leading_kind(own)], config))
        if abs(removed / free - asked) > TOLERANCE:
            logger.warning(
                "%s_sparsity=%g is rounded to whole units: %.4g is reached",
                *(kind, asked, removed / free),
            )


def _nothing_goes(kind: str, asked: float, budget: Budget, config: GrailConfig) -> str:
    """Why a kind's own sparsity removes none of the units of a budget."""
    units, per_layer = budget.num_units, find_allocation(config.allocation).per_layer
    widths = budget.widths if per_layer else budget.uniform_widths
    narrower = [width for width in widths if width < units]
    if not narrower:
        return (
            f"{kind}_sparsity={asked:g} cannot be reached: with multiple_of={config.multiple_of} "
            f"and attention_unit={config.attention_unit!r}, no layer's {kind} can have fewer than "
            f"its {units} units; use {kind}_sparsity=0"
        )
    apart = budget.layers - len(budget.ignored) if per_layer else 1
    least = (units - max(narrower)) / (units * apart)
    return (
        f"{kind}_sparsity={asked:g} is rounded to nothing: the least that removes any of the "
        f"{units} units in a layer is {kind}_sparsity={least:.4g}; use that, or {kind}_sparsity=0"
    )


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(per_layer=False, auto=False),
    "uniform-split": Allocation(per_layer=False, splits=True, auto=True),
    "flap": Allocation(flap, compares_scores=True),
    "error": Allocation(error, sensitivities=True),
    "search": Allocation(search, divergences=True),
}
