"""The widths of least total loss at a sparsity: one for all layers, or one for each layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product

from grail_hf.config import ATTENTION, EXPERTS, MLP, GrailConfig
from grail_hf.methods.budget import Budget, Budgets, Curve, Widths

# Largest distance between the requested sparsity and the one reached.
TOLERANCE = 0.005
# transformers multiplies experts' weights in one grouped product, which needs rows of a multiple of
# 16 bytes: 8 channels in half precision, in which any checkpoint may be loaded.
EXPERTS_STEP = 8
# Most splits of the budget to measure, for each kind of attention unit.
MOST_SPLITS = 6


def leading_kind(budgets: Budgets) -> str:
    """The kind with the most removable parameters, which other kinds of a mixture follow."""
    return max(budgets, key=lambda kind: budgets[kind].free_cost)


def one_width_a_kind(budgets: Budgets, config: GrailConfig) -> Widths:
    """One width per kind for all layers not ignored; both kinds keep about the same fraction.

    Attention units are coarse, so their number is rounded to the nearest, and the MLP width makes
    up for the difference.
    """
    every = _reaching(budgets, config)
    if config.sparsity is None:
        return next(iter(every.values()))
    units, kept = budgets[ATTENTION].num_units, 1 - config.sparsity
    # The least difference between the kept fractions; ties go to the wider attention.
    return every[min(every, key=lambda heads: (abs(heads / units - kept), -heads))]


def splits(budgets: Budgets, config: GrailConfig) -> list[Widths]:
    """At most `MOST_SPLITS` candidates for the split of the budget between attention and MLP.

    Each has one width per kind, from full attention down to half the fraction that the sparsity
    keeps. If there are too many, only multiples of 2, 4, 8, ... attention units are candidates,
    which suit tensor parallelism.
    """
    assert config.sparsity is not None
    units = budgets[ATTENTION].num_units
    every = _reaching(budgets, config)
    chosen = [heads for heads in every if heads >= units * (1 - config.sparsity) / 2]
    multiple = 1
    while len(chosen) > MOST_SPLITS:
        multiple *= 2
        chosen = [heads for heads in chosen if heads % multiple == 0 or heads == units]
    return [every[heads] for heads in chosen] or [one_width_a_kind(budgets, config)]


def _reaching(budgets: Budgets, config: GrailConfig) -> dict[int, Widths]:
    """Attention width -> widths with the MLP width that comes nearest to the sparsity.

    Only widths within `TOLERANCE` of the sparsity are included. Without a total sparsity, each kind
    has its own, which gives one entry. In a mixture of experts, the MLP width is that of the
    leading kind, and the other kinds keep the same fraction.
    """
    attention = budgets[ATTENTION]
    mlps = {kind: budget for kind, budget in budgets.items() if kind != ATTENTION}
    leader = mlps[leading_kind(mlps)]
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
    """The candidate widths: all, or the one nearest to the kind's own sparsity."""
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


def widths_by_layer(
    budgets: Budgets, config: GrailConfig, curves: Mapping[tuple[str, int], Curve]
) -> Widths:
    """A width for each group, so that the marginal loss per parameter is the same everywhere."""
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
            """Parameters that remain to be removed."""
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


def with_representable_widest(
    curves: Mapping[tuple[str, int], Curve], widths: Sequence[int], representable: frozenset[int]
) -> dict[tuple[str, int], Curve]:
    """The curves, restricted so that the config can represent the widest attention.

    The width of the widest layer is the config's own value; narrower layers have entries of their
    own. So the layer that is widest in `widths` keeps the representable widths above its own. The
    other layers keep all representable widths, and any that are narrower than those of the first.
    """
    first, least = widths.index(max(widths)), min(w for w in representable if w > max(widths))

    def stays(slot: tuple[str, int], width: int) -> bool:
        if slot == (ATTENTION, first):
            return width in representable and width >= least
        return slot[0] != ATTENTION or width in representable or width < least

    return {
        slot: {width: loss for width, loss in curve.items() if stays(slot, width)}
        for slot, curve in curves.items()
    }


def _spend(
    curves: Mapping[tuple[str, int], Curve], budgets: Budgets, parameters: float
) -> dict[tuple[str, int], int]:
    """Widths that remove about `parameters` at the least loss.

    The segments of the curves' lower convex hulls are taken in the order of their slopes, which is
    optimal at the end of each segment. A segment that is too long is taken as far as it fits, and
    finer segments after it remove the rest.
    """
    widths = {slot: max(curve) for slot, curve in curves.items()}
    if parameters <= 0:  # the rounding below would still take half of the finest step
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
    """Widths that remove `left` more parameters when every remaining step is too long.

    The step of least loss is taken anyway, and finer steps of other groups are undone in exchange:
    those first that gain most for their parameters.
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
    finest = min(budgets[kind].step * budgets[kind].unit_cost for kind, _ in curves)

    def undone(slot: tuple[str, int]) -> tuple[float, int, int] | None:
        """The gain by parameter of a group's last step, its parameters, and the width before it."""
        curve, now = curves[slot], widths[slot]
        wider = min((width for width in curve if width > now), default=now)
        parameters = (wider - now) * budgets[slot[0]].unit_cost
        if not 0 < parameters <= -left + finest / 2:
            return None
        return (curve[now] - curve[wider]) / parameters, parameters, wider

    others = [slot for slot in curves if slot != taken]
    while steps_back := [(found, slot) for slot in others if (found := undone(slot))]:
        (_, parameters, wider), slot = max(steps_back)
        widths[slot] = wider
        left += parameters
    return widths


def _hull(curve: Curve) -> list[tuple[int, int]]:
    """The lower convex hull of a curve as (wide, narrow) segments, from the full width down."""
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


def all_layers_alike(budgets: Budgets) -> dict[tuple[str, int], Curve]:
    """Curves for which every group keeps about the same fraction."""
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
    leader = leading_kind({kind: budget for kind, budget in budgets.items() if kind != ATTENTION})
    least = EXPERTS_STEP if leader == EXPERTS else 1
    if budgets[leader].free_cost and budgets[leader].step > least:
        remedies.append("a smaller multiple_of")
    if config.mlp_sparsity is not None or config.attention_sparsity is not None:
        remedies.append("drop mlp_sparsity or attention_sparsity")
    limits, attention = "", budgets[ATTENTION]
    if attention.uniform_widths != attention.widths:
        remedies += [attention.remedy] if attention.remedy else []
        limits = (
            f", where of {attention.num_units} attention units a layer the config can keep "
            f"{', '.join(map(str, attention.uniform_widths))}"
        )
    return (
        f"sparsity={wanted:g} cannot be reached within {100 * TOLERANCE:g} points with "
        f"multiple_of={config.multiple_of}, attention_unit={config.attention_unit!r} and "
        f"ignore={list(config.ignore)}{limits}; reachable nearby: "
        f"{', '.join(f'{value:.4f}' for value in below + above)}: {', or '.join(remedies)}"
    )
