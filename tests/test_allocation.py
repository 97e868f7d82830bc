"""Allocation rules against a search over all pairs of widths."""

import dataclasses
import re
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grail_hf.allocation import (
    ALLOCATIONS,
    TOLERANCE,
    Budget,
    Profile,
    allocate,
    error,
    flap,
    search,
)
from grail_hf.architectures import ATTENTION, MLP
from grail_hf.config import GrailConfig

few = settings(max_examples=25, deadline=None)
fractions = st.floats(0, 0.99)


@st.composite
def budgets(draw, fine: bool = False) -> dict[str, Budget]:
    """Layers like those there are; with `fine`, of MLP steps so small that most can be reached."""
    heads = draw(st.integers(1, 16))
    partitions = draw(st.sampled_from([1, heads]))
    step = draw(st.sampled_from([1, 2] if fine else [1, 8, 64, 128]))
    return {
        ATTENTION: Budget(
            heads * draw(st.integers(1, 4)) if partitions == heads else heads,
            draw(st.integers(1, 500)),
            fixed_cost=draw(st.sampled_from([0, 1000])),
            step=partitions,
        ),
        MLP: Budget(draw(st.integers(64, 512)), draw(st.integers(10, 200)), step=step),
    }


def sparsity_of(budgets: dict[str, Budget], widths: dict[str, int]) -> float:
    before = sum(b.fixed_cost + b.num_units * b.unit_cost for b in budgets.values())
    after = sum(b.fixed_cost + widths[kind] * b.unit_cost for kind, b in budgets.items())
    return 1 - after / before


def possible(budget: Budget) -> list[int]:
    """Every width the step allows, and the full one."""
    return [w for w in range(1, budget.num_units + 1) if w % budget.step == 0] + (
        [budget.num_units] if budget.num_units % budget.step else []
    )


def reachable(budgets: dict[str, Budget]) -> list[float]:
    pairs = product(possible(budgets[ATTENTION]), possible(budgets[MLP]))
    return sorted(
        {sparsity_of(budgets, dict(zip((ATTENTION, MLP), p, strict=True))) for p in pairs}
    )


def listed(message: str) -> list[float]:
    """The sparsities that a refusal offers."""
    return [float(s) for s in re.findall(r"\d\.\d+", message.split("reachable nearby: ")[1])]


@pytest.mark.parametrize("rule", ALLOCATIONS)
@given(budgets(), fractions)
@few
def test_every_rule_comes_as_close_as_it_promises_or_says_what_it_can(rule, budgets, wanted):
    reach = reachable(budgets)
    gap = min(abs(value - wanted) for value in reach)
    assume(abs(gap - TOLERANCE) > 1e-9)
    config = GrailConfig(sparsity=wanted)
    if gap <= TOLERANCE:
        widths = ALLOCATIONS[rule](budgets, config)
        assert abs(sparsity_of(budgets, widths) - wanted) <= TOLERANCE
        assert all(widths[kind] in possible(budget) for kind, budget in budgets.items())
        return
    with pytest.raises(ValueError, match=re.escape(f"sparsity={wanted:g}")) as error:
        ALLOCATIONS[rule](budgets, config)
    offers = listed(str(error.value))
    for offer in offers:
        assert min(abs(value - offer) for value in reach) <= 1e-4
    # Those on either side of the one asked.
    below = [value for value in reach if value < wanted]
    above = [value for value in reach if value > wanted]
    for neighbour in below[-1:] + above[:1]:
        assert any(abs(offer - neighbour) <= 1e-4 for offer in offers)


@given(budgets(fine=True), fractions)
@few
def test_both_kinds_keep_about_the_same_fraction(budgets, wanted):
    """Attention comes as near to the fraction kept as the total allows."""
    config = GrailConfig(sparsity=wanted)
    mlp = possible(budgets[MLP])
    feasible = [
        heads
        for heads in possible(budgets[ATTENTION])
        if any(
            abs(sparsity_of(budgets, {ATTENTION: heads, MLP: width}) - wanted) <= TOLERANCE - 1e-9
            for width in mlp
        )
    ]
    assume(feasible)
    wish = (1 - wanted) * budgets[ATTENTION].num_units
    found = abs(uniform(budgets, config)[ATTENTION] - wish)
    assert found <= min(abs(heads - wish) for heads in feasible) + 1e-9


def test_of_two_equally_near_widths_attention_takes_the_wider():
    layer = {ATTENTION: Budget(4, 100), MLP: Budget(1000, 10)}
    assert uniform(layer, GrailConfig(sparsity=0.375))[ATTENTION] == 3


@given(budgets())
@few
def test_sparsity_zero_keeps_all(budgets):
    full = {kind: budget.num_units for kind, budget in budgets.items()}
    assert uniform(budgets, GrailConfig(sparsity=0)) == full
    assert uniform(budgets, GrailConfig(mlp_sparsity=0, attention_sparsity=0)) == full


@given(budgets(), fractions, fractions)
@few
def test_a_kind_s_own_sparsity_gives_the_nearest_width(budgets, attention, mlp):
    widths = uniform(budgets, GrailConfig(attention_sparsity=attention, mlp_sparsity=mlp))
    for kind, sparsity in ((ATTENTION, attention), (MLP, mlp)):
        wish = (1 - sparsity) * budgets[kind].num_units
        assert widths[kind] in possible(budgets[kind])
        nearest = min(abs(width - wish) for width in possible(budgets[kind]))
        assert abs(widths[kind] - wish) == nearest


@pytest.mark.parametrize("given_kind", [ATTENTION, MLP])
@given(budgets(fine=True), fractions, fractions)
@few
def test_the_other_kind_takes_what_is_left_to_remove(given_kind, budgets, own, wanted):
    config = GrailConfig(sparsity=wanted, **{f"{given_kind}_sparsity": own})
    other = ATTENTION if given_kind == MLP else MLP
    wish = (1 - own) * budgets[given_kind].num_units
    fixed = min(possible(budgets[given_kind]), key=lambda width: abs(width - wish))
    gaps = [
        abs(sparsity_of(budgets, {given_kind: fixed, other: width}) - wanted)
        for width in possible(budgets[other])
    ]
    assume(abs(min(gaps) - TOLERANCE) > 1e-9)
    if min(gaps) > TOLERANCE:
        with pytest.raises(ValueError, match="cannot be reached"):
            uniform(budgets, config)
    else:
        widths = uniform(budgets, config)
        assert widths[given_kind] == fixed
        assert abs(sparsity_of(budgets, widths) - wanted) <= TOLERANCE


@pytest.mark.parametrize("kind", [ATTENTION, MLP])
@given(budgets(fine=True), fractions)
@few
def test_an_ignored_kind_keeps_its_width_and_the_other_loses_more(kind, budgets, wanted):
    budgets[kind] = dataclasses.replace(budgets[kind], ignored=True)
    other = ATTENTION if kind == MLP else MLP
    full = budgets[kind].num_units
    gaps = [
        abs(sparsity_of(budgets, {kind: full, other: width}) - wanted)
        for width in possible(budgets[other])
    ]
    assume(abs(min(gaps) - TOLERANCE) > 1e-9)
    if min(gaps) > TOLERANCE:
        with pytest.raises(ValueError, match="cannot be reached"):
            uniform(budgets, GrailConfig(sparsity=wanted))
    else:
        widths = uniform(budgets, GrailConfig(sparsity=wanted))
        assert widths[kind] == full
        assert abs(sparsity_of(budgets, widths) - wanted) <= TOLERANCE


@given(budgets(fine=True), fractions, fractions)
@few
def test_more_sparsity_never_keeps_more(budgets, one, another):
    """Exactly so where one kind is free; with both, but for one step of the MLP's width."""
    less, more = sorted((one, another))
    step = (
        budgets[MLP].step
        * budgets[MLP].unit_cost
        / sum(b.cost(b.num_units) for b in budgets.values())
    )
    fixed = budgets | {ATTENTION: dataclasses.replace(budgets[ATTENTION], ignored=True)}
    for layers, slack in ((budgets, step), (fixed, 0.0)):
        try:
            widths = [uniform(layers, GrailConfig(sparsity=s)) for s in (less, more)]
        except ValueError:
            continue
        first, second = (sparsity_of(layers, found) for found in widths)
        assert first <= second + slack + 1e-9


@pytest.mark.parametrize(
    ("num_units", "step", "widths"),
    [
        (4, 1, [1, 2, 3, 4]),
        (10, 4, [4, 8, 10]),
        (8, 4, [4, 8]),
        (4, 4, [4]),
        (4, 64, [4]),
    ],
)
def test_widths_are_multiples_and_the_full_one(num_units, step, widths):
    assert Budget(num_units, 1, step=step).widths == widths
    assert Budget(num_units, 1, step=step, ignored=True).widths == [num_units]


def test_a_cost_is_linear_in_the_width():
    budget = Budget(8, 30, fixed_cost=7)
    assert [budget.cost(width) for width in (0, 1, 8)] == [7, 37, 247]
    assert {b - a for a, b in pairwise(budget.cost(width) for width in range(9))} == {30}


def test_an_ignored_kind_with_a_sparsity_of_its_own_is_refused():
    """The two contradict each other; neither may win in silence."""
    layer = {ATTENTION: Budget(8, 100, ignored=True), MLP: Budget(128, 30)}
    config = GrailConfig(attention_sparsity=0.5, mlp_sparsity=0.5, ignore="self_attn")
    with pytest.raises(ValueError, match="attention_sparsity"):
        uniform(layer, config)
