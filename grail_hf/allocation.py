"""How wide each group becomes: one function a rule, and the table `ALLOCATIONS`.

A rule says what each width of a group would lose; the widths of least total loss at the wanted
sparsity follow from that in the same way for all rules: `allocate`. Either every layer gets one
width a kind, which any stock config can say, or each layer its own.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

from torch import Tensor

from grail_hf.architectures import ATTENTION, EXPERTS, MLP
from grail_hf.config import GrailConfig, unknown_name

logger = logging.getLogger(__name__)

# Largest distance between the sparsity asked for and the one reached.
TOLERANCE = 0.005

# transformers multiplies experts' weights in one grouped product, which asks for rows of a multiple
# of 16 bytes: 8 channels in half precision, whatever precision the checkpoint is loaded in.
EXPERTS_STEP = 8

# What multiple_of="auto" tries, the largest first: what tensor cores and kernels like.
MLP_MULTIPLES = (128, 64, 32, 16, 8)

# Ways to split the budget that are measured, for each kind of attention unit.
MOST_SPLITS = 6

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


def flap(profile: Profile, budget: Budget) -> Curve:
    """The sum of the removed units' scores, standardised within the group, times their parameters.

    Least total loss then removes the units of lowest standardised score in the whole model (FLAP,
    arXiv 2312.11983, its "AL-AM"). FLAP's own scores are `selector="flap"`.
    """
    scores = profile.scores.double().sort().values
    deviation = scores.std(correction=0)
    standard = (scores - scores.mean()) / deviation if deviation > 0 else scores * 0
    removed = [0.0, *(budget.unit_cost * standard).cumsum(dim=0).tolist()]
    return {width: removed[budget.num_units - width] for width in budget.widths}


def error(profile: Profile, budget: Budget) -> Curve:
    """What repair leaves, relative to the energy of the residual stream, times the sensitivity.

    An error relative to the block's own output would spend width on blocks that hardly matter.
    Relative to the stream it tells the widths of one group from each other; what an error is worth
    in one layer beside another it does not tell, since a few tokens of massive activation may have
    most of the stream's energy. So the model's divergence is measured at one width of each group.
    """
    errors = profile.errors.tolist()
    return {width: profile.sensitivity * errors[width] for width in budget.widths}


def search(profile: Profile, budget: Budget) -> Curve:
    """The measured KL divergence; between the widths measured, as the error goes.

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
    """Piecewise linear through `points`, ascending; constant beyond them, zero without any."""
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
    """A rule.

    Attributes:
        loss: what each width of a group loses, from its profile; None where the rule needs none.
        per_layer: each layer gets a width of its own.
        divergences: whether the loss reads `Profile.divergences`, which takes longest to measure.
        sensitivities: whether the loss reads `Profile.sensitivity`.
        compares_scores: whether the loss reads `Profile.scores`, so that those of one group must
            mean something beside another's.
        splits: whether the widths are the best of `splits`, by the divergence of the whole model.
    """

    loss: Callable[[Profile, Budget], Curve] | None = None
    per_layer: bool = True
    divergences: bool = False
    sensitivities: bool = False
    compares_scores: bool = False
    splits: bool = False

    @property
    def measures(self) -> bool:
        """Whether the widths depend on what is measured of the dense model."""
        return self.loss is not None or self.splits


def find_allocation(name: str) -> Allocation:
    """The rule of a name. Raises ValueError with the nearest known one."""
    if name not in ALLOCATIONS:
        where = "ALLOCATIONS in grail_hf/allocation.py"
        raise unknown_name("allocation", name, ALLOCATIONS, where)
    return ALLOCATIONS[name]


def allocate(budgets: Budgets, config: GrailConfig, profiles: Profiles | None = None) -> Widths:
    """The widths of least total loss at the wanted sparsity.

    Without profiles, all layers are taken to lose alike: a forecast where the rule measures.

    Raises:
        ValueError: an unknown rule, infinite scores that it cannot compare, a kind's own sparsity
            that removes nothing, or no widths come within `TOLERANCE`; lists the sparsities next to
            the one asked.
    """
    rule = find_allocation(config.allocation)
    if rule.per_layer:
        curves = _alike(budgets)
        if profiles is not None and rule.loss is not None:
            if rule.compares_scores:
                _check_finite(profiles, config)
            curves = {
                (kind, layer): rule.loss(profile, budgets[kind])
                for (kind, layer), profile in profiles.items()
            }
        widths, said = _by_layer(budgets, config, curves), budgets[ATTENTION].said
        if said is not None and max(widths[ATTENTION]) not in said:
            curves = _with_said_widest(curves, widths[ATTENTION], said)
            widths = _by_layer(budgets, config, curves)
    else:
        widths = _in_all_layers(budgets, config)
    if profiles is None:  # once for a plan; what is measured moves units, and not their number
        _check_own_sparsities(budgets, widths, config)
    return widths


def expected_loss(budgets: Budgets, widths: Widths, rule: str, profiles: Profiles) -> float:
    """The sum over all groups of what they lose at `widths` by a rule that reads profiles."""
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
    """Warn where a kind's own sparsity is missed by far; raise ValueError where nothing goes."""
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
            raise ValueError(_nothing_goes(kind, asked, own[_leader(own)], config))
        if abs(removed / free - asked) > TOLERANCE:
            logger.warning(
                "%s_sparsity=%g is rounded to whole units: %.4g is reached",
                *(kind, asked, removed / free),
            )


def _nothing_goes(kind: str, asked: float, budget: Budget, config: GrailConfig) -> str:
    """Why a kind's own sparsity removes no unit of those of a budget."""
    units, per_layer = budget.num_units, find_allocation(config.allocation).per_layer
    widths = budget.widths if per_layer else budget.uniform_widths
    narrower = [width for width in widths if width < units]
    if not narrower:
        return (
            f"{kind}_sparsity={asked:g} cannot be had: with multiple_of={config.multiple_of} and "
            f"attention_unit={config.attention_unit!r}, no layer's {kind} can have fewer than its "
            f"{units} units; use {kind}_sparsity=0"
        )
    apart = budget.layers - len(budget.ignored) if per_layer else 1
    least = (units - max(narrower)) / (units * apart)
    return (
        f"{kind}_sparsity={asked:g} is rounded to nothing: the least that removes any of the "
        f"{units} units in a layer is {kind}_sparsity={least:.4g}; use that, or {kind}_sparsity=0"
    )


def _leader(budgets: Budgets) -> str:
    """Of several kinds, the one that most can be removed of; a mixture's others go by it."""
    return max(budgets, key=lambda kind: budgets[kind].free_cost)


def _in_all_layers(budgets: Budgets, config: GrailConfig) -> Widths:
    """One width per kind for all layers not ignored, so that both kinds keep about as much.

    Attention units are coarse, so their number is rounded to the nearest, and the MLP width takes
    up the difference.
    """
    every = _reaching(budgets, config)
    if config.sparsity is None:
        return next(iter(every.values()))
    units, kept = budgets[ATTENTION].num_units, 1 - config.sparsity
    # The least difference between the kinds' kept fractions; of equals, the wider attention.
    return every[min(every, key=lambda heads: (abs(heads / units - kept), -heads))]


def splits(budgets: Budgets, config: GrailConfig) -> list[Widths]:
    """At most `MOST_SPLITS` ways to split the budget between attention and MLP, to choose from.

    One width a kind, from whole attention to half of what the sparsity leaves of it. Where there
    are many, every second, fourth, ... number of attention units: powers of two, as tensor
    parallelism likes.
    """
    assert config.sparsity is not None
    units = budgets[ATTENTION].num_units
    every = _reaching(budgets, config)
    chosen = [heads for heads in every if heads >= units * (1 - config.sparsity) / 2]
    multiple = 1
    while len(chosen) > MOST_SPLITS:
        multiple *= 2
        chosen = [heads for heads in chosen if heads % multiple == 0 or heads == units]
    return [every[heads] for heads in chosen] or [_in_all_layers(budgets, config)]


def _reaching(budgets: Budgets, config: GrailConfig) -> dict[int, Widths]:
    """Attention width -> widths with the MLP width that comes nearest to the sparsity.

    Those that come within `TOLERANCE`; without a sparsity of the whole, the one that the kinds' own
    give. In a mixture, the MLP width is that of the blocks that hold most, and the others keep the
    same fraction.
    """
    attention = budgets[ATTENTION]
    mlps = {kind: budget for kind, budget in budgets.items() if kind != ATTENTION}
    leader = mlps[_leader(mlps)]
    total = sum(budget.cost(budget.num_units) for budget in budgets.values())
    attention_widths = _own_widths(ATTENTION, attention, config.attention_sparsity)
    mlp_widths = _own_widths(MLP, leader, config.mlp_sparsity)

    def of_mlps(width: int) -> dict[str, int]:
        return {
            kind: width if budget is leader else budget.nearest(width / leader.num_units)
            for kind, budget in mlps.items()
        }

    def widths(heads: int, width: int) -> Widths:
        chosen = {ATTENTION: heads} | of_mlps(width)
        return {kind: budgets[kind].in_all_layers(width) for kind, width in chosen.items()}

    if config.sparsity is None:
        return {attention_widths[0]: widths(attention_widths[0], mlp_widths[0])}

    wanted = config.sparsity
    attention_costs = {width: attention.cost(width) for width in attention_widths}
    mlp_costs = {
        width: sum(mlps[kind].cost(own) for kind, own in of_mlps(width).items())
        for width in mlp_widths
    }

    def reached(heads: int, width: int) -> float:
        return 1 - (attention_costs[heads] + mlp_costs[width]) / total

    nearest = {
        heads: min(mlp_widths, key=lambda width: abs(reached(heads, width) - wanted))
        for heads in attention_widths
    }
    near = {
        heads: widths(heads, width)
        for heads, width in nearest.items()
        if abs(reached(heads, width) - wanted) <= TOLERANCE
    }
    if not near:
        every = {reached(*pair) for pair in product(attention_widths, mlp_widths)}
        raise ValueError(_unreachable(wanted, every, budgets, config))
    return near


def _own_widths(kind: str, budget: Budget, sparsity: float | None) -> list[int]:
    """The widths to choose from: all, or the one nearest to the kind's own sparsity."""
    if sparsity is None:
        return budget.uniform_widths
    _check_not_ignored(kind, budget, sparsity)
    return [budget.nearest(1 - sparsity)]


def _check_not_ignored(kind: str, budget: Budget, sparsity: float) -> None:
    if len(budget.ignored) == budget.layers and sparsity > 0:
        raise ValueError(
            f"{kind}_sparsity={sparsity:g} and ignore contradict each other, since ignore keeps "
            f"the {kind} whole: drop one"
        )


def _by_layer(
    budgets: Budgets, config: GrailConfig, curves: Mapping[tuple[str, int], Curve]
) -> Widths:
    """A width for each group: the marginal loss of a removed parameter is the same everywhere."""
    total = sum(budget.cost(budget.num_units) for budget in budgets.values())
    widths = {
        kind: list(budget.in_all_layers(budget.num_units)) for kind, budget in budgets.items()
    }
    own = {ATTENTION: config.attention_sparsity, MLP: config.mlp_sparsity}
    together = {kind for kind, sparsity in own.items() if sparsity is None}

    def shrink(kinds: Iterable[str], parameters: float) -> None:
        chosen = {slot: curve for slot, curve in curves.items() if slot[0] in kinds}
        for (kind, layer), width in _spend(chosen, budgets, parameters).items():
            widths[kind][layer] = width

    for kind, sparsity in own.items():
        if sparsity is not None:
            budget = budgets[kind]
            _check_not_ignored(kind, budget, sparsity)
            free = budget.layers - len(budget.ignored)
            shrink({kind}, sparsity * free * budget.num_units * budget.unit_cost)
    if config.sparsity is not None:
        wanted = (1 - config.sparsity) * total

        def missing() -> float:
            """Parameters still to be removed."""
            return sum(budgets[kind].cost_of(widths[kind]) for kind in budgets) - wanted

        shrink(together, missing())
        if missing() > TOLERANCE * total:
            open_ = {slot: curve for slot, curve in curves.items() if slot[0] in together}
            now = {(kind, layer): widths[kind][layer] for kind, layer in open_}
            for (kind, layer), width in _exchanged(open_, budgets, now, missing()).items():
                widths[kind][layer] = width
        reached = config.sparsity - missing() / total
        if abs(reached - config.sparsity) > TOLERANCE:
            raise ValueError(_unreachable(config.sparsity, {reached}, budgets, config))
    return {kind: tuple(values) for kind, values in widths.items()}


def _with_said_widest(
    curves: Mapping[tuple[str, int], Curve], widths: Sequence[int], said: frozenset[int]
) -> dict[tuple[str, int], Curve]:
    """The curves without attention widths whose widest might be one that the config cannot say.

    Only the widest layer's is the config's own value; the other layers have entries of theirs. So
    the layer that is widest in `widths` gets the next width that can be said, or a wider one, and
    the others one that can be said, or any that is narrower than that.
    """
    first, least = widths.index(max(widths)), min(w for w in said if w > max(widths))

    def stays(slot: tuple[str, int], width: int) -> bool:
        if slot == (ATTENTION, first):
            return width in said and width >= least
        return slot[0] != ATTENTION or width in said or width < least

    return {
        slot: {width: loss for width, loss in curve.items() if stays(slot, width)}
        for slot, curve in curves.items()
    }


def _spend(
    curves: Mapping[tuple[str, int], Curve], budgets: Budgets, parameters: float
) -> dict[tuple[str, int], int]:
    """Widths that remove about `parameters` at the least loss.

    The segments of the curves' lower convex hulls are taken in the order of their slopes, which is
    optimal wherever they end. A segment that is too long is taken as far as it fits, and finer
    ones that follow take what is left.
    """
    widths = {slot: max(curve) for slot, curve in curves.items()}
    if parameters <= 0:  # a step of less than half the finest would go all the same
        return widths
    segments = [
        (slot, wide, narrow) for slot, curve in curves.items() for wide, narrow in _hull(curve)
    ]

    def slope(segment: tuple[tuple[str, int], int, int]) -> float:
        slot, wide, narrow = segment
        loss = curves[slot][narrow] - curves[slot][wide]
        return loss / ((wide - narrow) * budgets[slot[0]].unit_cost)

    left = parameters
    finest = min((budgets[kind].step * budgets[kind].unit_cost for kind, _ in curves), default=0)
    ascending = {slot: sorted(curve) for slot, curve in curves.items()}
    for slot, wide, narrow in sorted(segments, key=slope):
        if widths[slot] != wide:
            continue
        unit_cost = budgets[slot[0]].unit_cost
        fits = wide - (left + finest / 2) / unit_cost
        least = min(max(narrow, fits), wide)
        widths[slot] = ascending[slot][bisect_left(ascending[slot], least)]
        left -= (wide - widths[slot]) * unit_cost
    return widths


def _exchanged(
    curves: Mapping[tuple[str, int], Curve],
    budgets: Budgets,
    widths: Mapping[tuple[str, int], int],
    left: float,
) -> dict[tuple[str, int], int]:
    """Widths that remove `left` parameters more, where all steps that are left are too long.

    The step that costs least is taken all the same, and finer ones are taken back for it.
    """
    widths = dict(widths)
    steps = [
        (slot, max(width for width in curve if width < widths[slot]))
        for slot, curve in curves.items()
        if widths[slot] > min(curve)
    ]
    if not steps:
        return widths
    taken, width = min(
        steps, key=lambda step: curves[step[0]][step[1]] - curves[step[0]][widths[step[0]]]
    )
    left -= (widths[taken] - width) * budgets[taken[0]].unit_cost
    widths[taken] = width
    for slot in sorted(
        curves.keys() - {taken}, key=lambda slot: (budgets[slot[0]].unit_cost, slot)
    ):
        cost, now = budgets[slot[0]].unit_cost, widths[slot]
        back = [width for width in curves[slot] if width >= now]
        widths[slot] = min(back, key=lambda width: abs(left + (width - now) * cost))
        left += (widths[slot] - now) * cost
    return widths


def _hull(curve: Curve) -> list[tuple[int, int]]:
    """The lower convex hull of a curve: (wide, narrow) segments, from the full width down."""
    hull: list[int] = []
    for width in sorted(curve, reverse=True):
        while len(hull) > 1:
            before, last = hull[-2:]
            # Is `last` on or above the line from `before` to `width`?
            rise = (curve[width] - curve[before]) * (before - last)
            if (curve[last] - curve[before]) * (before - width) < rise:
                break
            hull.pop()
        hull.append(width)
    return list(pairwise(hull))


def _alike(budgets: Budgets) -> dict[tuple[str, int], Curve]:
    """Curves by which every group keeps about the same fraction."""
    return {
        (kind, layer): {
            width: budget.unit_cost * (budget.num_units - width) ** 2 / budget.num_units
            for width in budget.widths
        }
        for kind, budget in budgets.items()
        for layer in range(budget.layers)
        if layer not in budget.ignored
    }


def _unreachable(
    wanted: float, reachable: set[float], budgets: Budgets, config: GrailConfig
) -> str:
    below = sorted(value for value in reachable if value < wanted)[-3:]
    above = sorted(value for value in reachable if value > wanted)[:3]
    remedies = ["choose one of these"]
    leader = _leader({kind: budget for kind, budget in budgets.items() if kind != ATTENTION})
    least = EXPERTS_STEP if leader == EXPERTS else 1
    if budgets[leader].free_cost and budgets[leader].step > least:
        remedies.append("a smaller multiple_of")
    if config.mlp_sparsity is not None or config.attention_sparsity is not None:
        remedies.append("drop mlp_sparsity or attention_sparsity")
    said, attention = "", budgets[ATTENTION]
    if attention.uniform_widths != attention.widths:
        remedies += [attention.remedy] if attention.remedy else []
        said = (
            f", where of {attention.num_units} attention units a layer the config can keep "
            f"{', '.join(map(str, attention.uniform_widths))}"
        )
    return (
        f"sparsity={wanted:g} cannot be reached within {100 * TOLERANCE:g} points with "
        f"multiple_of={config.multiple_of}, attention_unit={config.attention_unit!r} and "
        f"ignore={list(config.ignore)}{said}; reachable nearby: "
        f"{', '.join(f'{value:.4f}' for value in below + above)}: {', or '.join(remedies)}"
    )


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(per_layer=False),
    "uniform-split": Allocation(per_layer=False, splits=True),
    "flap": Allocation(flap, compares_scores=True),
    "error": Allocation(error, sensitivities=True),
    "search": Allocation(search, divergences=True),
}
