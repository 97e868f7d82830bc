"""Allocation rules against a search over all widths."""

import dataclasses
import re
from contextlib import suppress
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grail_hf.config import ATTENTION, MLP, GrailConfig
from grail_hf.methods.allocation import ALLOCATIONS, allocate, error, flap, search
from grail_hf.methods.budget import Budget, Profile, Widths
from grail_hf.methods.widths import TOLERANCE, splits, with_representable_widest

few = settings(max_examples=25, deadline=None)

# What a plan makes of "auto", unless a test names a rule.
settled = partial(GrailConfig, allocation="uniform")


def uniform(budgets: dict[str, Budget], config: GrailConfig) -> dict[str, int]:
    """One width a kind: that of the only layer there is."""
    return {kind: widths[0] for kind, widths in allocate(budgets, config).items()}


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


@pytest.mark.parametrize("rule", [name for name, r in ALLOCATIONS.items() if not r.per_layer])
@given(budgets(), fractions)
@few
def test_one_width_a_kind_comes_as_close_as_promised_or_says_what_it_can(rule, budgets, wanted):
    reach = reachable(budgets)
    gap = min(abs(value - wanted) for value in reach)
    assume(abs(gap - TOLERANCE) > 1e-9)
    config = settled(sparsity=wanted, allocation=rule)
    if gap <= TOLERANCE:
        widths = uniform(budgets, config)
        assert abs(sparsity_of(budgets, widths) - wanted) <= TOLERANCE
        assert all(widths[kind] in possible(budget) for kind, budget in budgets.items())
        return
    with pytest.raises(ValueError, match=re.escape(f"sparsity={wanted:g}")) as error:
        allocate(budgets, config)
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
    config = settled(sparsity=wanted)
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


@pytest.mark.parametrize("rule", [name for name, r in ALLOCATIONS.items() if not r.per_layer])
@given(budgets(), fractions, st.data())
@few
def test_only_attention_widths_that_the_config_can_represent_are_taken(rule, budgets, wanted, data):
    every = possible(budgets[ATTENTION])
    representable = frozenset(data.draw(st.sets(st.sampled_from(every)))) | {every[-1]}
    limited = budgets | {
        ATTENTION: dataclasses.replace(budgets[ATTENTION], representable=representable)
    }
    config = settled(sparsity=wanted, allocation=rule)
    reach = [
        sparsity_of(budgets, {ATTENTION: heads, MLP: width})
        for heads in representable
        for width in possible(budgets[MLP])
    ]
    gap = min(abs(value - wanted) for value in reach)
    assume(abs(gap - TOLERANCE) > 1e-9)
    if gap > TOLERANCE:
        with pytest.raises(ValueError, match=re.escape(f"sparsity={wanted:g}")) as error:
            allocate(limited, config)
        offers = listed(str(error.value))
        assert all(min(abs(value - offer) for value in reach) <= 1e-4 for offer in offers)
        kept = f"the config can keep {', '.join(map(str, sorted(representable)))};"
        assert (kept in str(error.value)) == (len(representable) < len(every))
        return
    widths = uniform(limited, config)
    assert widths[ATTENTION] in representable
    assert abs(sparsity_of(budgets, widths) - wanted) <= TOLERANCE
    with suppress(ValueError):
        free = uniform(budgets, config)
        assert widths == free or free[ATTENTION] not in representable


@pytest.mark.parametrize(("share", "heads"), [(0.2, 7), (0.3, 7), (0.4, 4), (0.7, 2), (0.95, 1)])
def test_a_kind_s_own_sparsity_is_rounded_to_what_the_config_can_represent(share, heads):
    layer = {
        ATTENTION: Budget(8, 100, representable=frozenset({1, 2, 4, 7, 8})),
        MLP: Budget(100, 10),
    }
    config = settled(mlp_sparsity=0.5, attention_sparsity=share)
    assert uniform(layer, config) == {ATTENTION: heads, MLP: 50}


def test_of_two_equally_near_widths_attention_takes_the_wider():
    layer = {ATTENTION: Budget(4, 100), MLP: Budget(1000, 10)}
    assert uniform(layer, settled(sparsity=0.375))[ATTENTION] == 3


@given(budgets())
@few
def test_sparsity_zero_keeps_all(budgets):
    full = {kind: budget.num_units for kind, budget in budgets.items()}
    assert uniform(budgets, settled(sparsity=0)) == full
    assert uniform(budgets, settled(mlp_sparsity=0, attention_sparsity=0)) == full


@given(budgets(), fractions, fractions)
@few
def test_a_kind_s_own_sparsity_gives_the_nearest_width(budgets, attention, mlp):
    config = settled(attention_sparsity=attention, mlp_sparsity=mlp)
    asked = {ATTENTION: attention, MLP: mlp}
    nearest = {
        kind: min(
            possible(budget), key=lambda width: abs(width - (1 - asked[kind]) * budget.num_units)
        )
        for kind, budget in budgets.items()
    }
    whole = [kind for kind in asked if asked[kind] and nearest[kind] == budgets[kind].num_units]
    if whole:
        with pytest.raises(
            ValueError, match=f"{whole[0]}_sparsity.*(rounded to|cannot be reached)"
        ):
            uniform(budgets, config)
    else:
        assert uniform(budgets, config) == nearest


@pytest.mark.parametrize(
    ("rule", "asked", "reached", "told"),
    [
        ("uniform", 0.25, 0.25, False),
        ("uniform", 0.38, 0.5, True),
        ("uniform", 0.3, 0.25, True),
        ("error", 0.372, 0.375, False),
        ("error", 0.3, 0.3125, True),
    ],
)
def test_a_kind_s_own_sparsity_says_what_it_is_rounded_to(rule, asked, reached, told, caplog):
    budgets = {ATTENTION: Budget(4, 100, layers=4), MLP: Budget(100, 10, layers=4)}
    config = settled(attention_sparsity=asked, mlp_sparsity=0.5, allocation=rule)
    assert 1 - sum(allocate(budgets, config)[ATTENTION]) / 16 == reached
    message = f"attention_sparsity={asked} is rounded to whole units: {reached} is reached"
    assert [record.getMessage() for record in caplog.records] == [message] * told


@pytest.mark.parametrize("total", [None, 0.3])
@pytest.mark.parametrize(
    ("rule", "ignored", "least"),
    [("uniform", [], 0.25), ("error", [], 0.0625), ("error", [1], 1 / 12)],
)
def test_a_kind_s_own_sparsity_that_removes_nothing_says_what_would(total, rule, ignored, least):
    budgets = {
        ATTENTION: Budget(4, 100, layers=4, ignored=frozenset(ignored)),
        MLP: Budget(100, 30, layers=4),
    }
    rest = {"sparsity": total} if total else {"mlp_sparsity": 0.3}
    config = settled(attention_sparsity=least / 3, allocation=rule, **rest)
    with pytest.raises(ValueError, match="rounded to nothing") as caught:
        allocate(budgets, config)
    (offer,) = re.findall(r"is attention_sparsity=([\d.]+)", str(caught.value))
    assert float(offer) == pytest.approx(least, rel=1e-3)
    widths = allocate(budgets, dataclasses.replace(config, attention_sparsity=float(offer)))
    assert sum(widths[ATTENTION]) == (12 if rule == "uniform" else 15)


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_units_that_cannot_be_removed_singly_are_refused(rule):
    budgets = {ATTENTION: Budget(1, 100, layers=2), MLP: Budget(100, 30, layers=2)}
    config = settled(attention_sparsity=0.5, mlp_sparsity=0.3, allocation=rule)
    with pytest.raises(ValueError, match="can have fewer than its 1 units"):
        allocate(budgets, config)


@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.parametrize("settings", [{"sparsity": 0}, {"sparsity": None, "mlp_sparsity": 0}])
def test_nothing_asked_is_nothing_removed_where_the_last_step_is_short(rule, settings):
    """From 83 units to 80 is less than half a step of 8."""
    budgets = {ATTENTION: Budget(4, 100, layers=2), MLP: Budget(83, 30, step=8, layers=2)}
    if settings["sparsity"] is None:
        settings = settings | {"attention_sparsity": 0.25}
    assert allocate(budgets, settled(allocation=rule, **settings))[MLP] == (83, 83)


@pytest.mark.parametrize("given_kind", [ATTENTION, MLP])
@given(budgets(fine=True), fractions, fractions)
@few
def test_the_other_kind_takes_what_is_left_to_remove(given_kind, budgets, own, wanted):
    config = settled(sparsity=wanted, **{f"{given_kind}_sparsity": own})
    other = ATTENTION if given_kind == MLP else MLP
    wish = (1 - own) * budgets[given_kind].num_units
    fixed = min(possible(budgets[given_kind]), key=lambda width: abs(width - wish))
    assume(fixed < budgets[given_kind].num_units or own == 0)
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
    budgets[kind] = dataclasses.replace(budgets[kind], ignored=frozenset({0}))
    other = ATTENTION if kind == MLP else MLP
    full = budgets[kind].num_units
    gaps = [
        abs(sparsity_of(budgets, {kind: full, other: width}) - wanted)
        for width in possible(budgets[other])
    ]
    assume(abs(min(gaps) - TOLERANCE) > 1e-9)
    if min(gaps) > TOLERANCE:
        with pytest.raises(ValueError, match="cannot be reached"):
            uniform(budgets, settled(sparsity=wanted))
    else:
        widths = uniform(budgets, settled(sparsity=wanted))
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
    fixed = budgets | {ATTENTION: dataclasses.replace(budgets[ATTENTION], ignored=frozenset({0}))}
    for layers, slack in ((budgets, step), (fixed, 0.0)):
        try:
            widths = [uniform(layers, settled(sparsity=s)) for s in (less, more)]
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
    assert Budget(num_units, 1, step=step, ignored=frozenset({0})).widths == [num_units]


def test_a_cost_is_linear_in_the_width():
    budget = Budget(8, 30, fixed_cost=7)
    assert [budget.cost(width) for width in (0, 1, 8)] == [7, 37, 247]
    assert {b - a for a, b in pairwise(budget.cost(width) for width in range(9))} == {30}


def test_an_ignored_kind_with_a_sparsity_of_its_own_is_refused():
    """The two contradict each other; neither may win in silence."""
    layer = {ATTENTION: Budget(8, 100, ignored=frozenset({0})), MLP: Budget(128, 30)}
    config = settled(attention_sparsity=0.5, mlp_sparsity=0.5, ignore="self_attn")
    with pytest.raises(ValueError, match="attention_sparsity"):
        uniform(layer, config)


LAYERS = 4


@st.composite
def profiled(draw) -> tuple[dict[str, Budget], dict[tuple[str, int], Profile]]:
    """Layers with a fine MLP, of which some may be ignored, and a profile for each other group."""
    budgets = {
        kind: Budget(
            draw(st.integers(2, 8)) if kind == ATTENTION else 64,
            draw(st.integers(1, 400)) if kind == ATTENTION else draw(st.integers(10, 50)),
            layers=LAYERS,
            ignored=frozenset(draw(st.sets(st.integers(0, LAYERS - 1), max_size=1))),
        )
        for kind in (ATTENTION, MLP)
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def profile(units: int) -> Profile:
        size = 10 ** float(4 * torch.rand(1, generator=generator) - 4)
        scores = torch.rand(units, generator=generator, dtype=torch.float64) ** 4 * size
        errors = torch.cat([scores.sort().values.cumsum(0).flip(0), torch.zeros(1)]).double()
        measured = {
            width: float(errors[width] * (1 + torch.rand(1, generator=generator)))
            for width in {units // 2, units // 4} - {0}
        }
        return Profile(scores, errors, measured)

    profiles = {
        (kind, layer): profile(budget.num_units)
        for kind, budget in budgets.items()
        for layer in range(LAYERS)
        if layer not in budget.ignored
    }
    return budgets, profiles


def sparsity_by_layer(budgets: dict[str, Budget], widths: Widths) -> float:
    before = sum(b.cost_of([b.num_units] * b.layers) for b in budgets.values())
    return 1 - sum(b.cost_of(widths[kind]) for kind, b in budgets.items()) / before


PER_LAYER = [name for name, rule in ALLOCATIONS.items() if rule.per_layer]


@pytest.mark.parametrize("rule", PER_LAYER)
@given(profiled(), st.floats(0, 0.9))
@few
def test_layers_of_their_own_widths_reach_the_sparsity(rule, case, wanted):
    budgets, profiles = case
    low = sparsity_by_layer(
        budgets, {kind: b.in_all_layers(b.widths[0]) for kind, b in budgets.items()}
    )
    assume(wanted < low - TOLERANCE)
    config = settled(sparsity=wanted, allocation=rule)
    for measured in (profiles, None):
        widths = allocate(budgets, config, measured)
        assert abs(sparsity_by_layer(budgets, widths) - wanted) <= TOLERANCE
        for kind, budget in budgets.items():
            assert set(widths[kind]) <= set(budget.widths)
            assert all(widths[kind][layer] == budget.num_units for layer in budget.ignored)


@pytest.mark.parametrize("rule", PER_LAYER)
@given(profiled(), st.floats(0, 0.8), st.data())
@few
def test_the_widest_layer_s_attention_is_one_that_the_config_can_represent(
    rule, case, wanted, data
):
    """The layers below it are as free as ever, and all of them where it was one already."""
    budgets, profiles = case
    attention = dataclasses.replace(budgets[ATTENTION], ignored=frozenset())
    representable = frozenset(data.draw(st.sets(st.sampled_from(attention.widths)))) | {
        attention.num_units
    }
    budgets[ATTENTION] = attention
    limited = budgets | {ATTENTION: dataclasses.replace(attention, representable=representable)}
    some = next(profile for (kind, _), profile in profiles.items() if kind == ATTENTION)
    profiles = {(ATTENTION, layer): some for layer in range(LAYERS)} | profiles
    config = settled(sparsity=wanted, allocation=rule)
    for measured in (profiles, None):
        try:
            free, widths = allocate(budgets, config, measured), allocate(limited, config, measured)
        except ValueError:
            assume(False)
        assert max(widths[ATTENTION]) in representable
        assert abs(sparsity_by_layer(budgets, widths) - wanted) <= TOLERANCE
        assert widths == free or max(free[ATTENTION]) not in representable


@pytest.mark.parametrize("representable", [{5}, {1, 5}, {2, 5}, {1, 2, 5}, {2, 4, 5}])
def test_whatever_is_left_to_choose_from_has_a_representable_widest(representable):
    """All choices from the curves, after all widths that are not representable."""
    curve = dict.fromkeys(range(1, 6), 0.0)
    curves = {(kind, layer): curve for kind in (ATTENTION, MLP) for layer in range(3)}
    for widths in product(curve, repeat=3):
        if max(widths) in representable:
            continue
        left = with_representable_widest(curves, widths, frozenset(representable))
        choices = [left[ATTENTION, layer] for layer in range(3)]
        assert {max(choice) for choice in product(*choices)} <= representable
        assert all(5 in choice for choice in choices)
        assert any(
            max(choice) == min(w for w in representable if w > max(widths))
            for choice in product(*choices)
        )
        assert all(left[MLP, layer] == curve for layer in range(3))


@pytest.mark.parametrize("rule", ["error", "search"])
@given(profiled(), st.floats(0.1, 0.8))
@few
def test_no_move_of_units_between_two_groups_loses_less(rule, case, wanted):
    """Local optimality of the whole: as many parameters moved from one group to another gain
    nothing, where the curves are convex (those of `profiled` errors are)."""
    budgets, profiles = case
    config = settled(sparsity=wanted, allocation=rule)
    profiles = {slot: dataclasses.replace(p, divergences={}) for slot, p in profiles.items()}
    try:
        widths = allocate(budgets, config, profiles)
    except ValueError:
        assume(False)
    loss = ALLOCATIONS[rule].loss
    curves = {slot: loss(p, budgets[slot[0]]) for slot, p in profiles.items() if slot[0] == MLP}
    for one, other in product(curves, repeat=2):
        narrow, wide = widths[MLP][one[1]], widths[MLP][other[1]]
        if one != other and narrow > 1 and wide < budgets[MLP].num_units:
            gain = curves[other][wide] - curves[other][wide + 1]
            price = curves[one][narrow - 1] - curves[one][narrow]
            assert gain <= price * (1 + 1e-9)


def test_layers_take_the_exhaustively_best_widths_where_all_steps_fit():
    """Four layers of 6 alike-priced units, half to go: against all combinations of widths."""
    torch.manual_seed(0)
    budgets = {
        ATTENTION: Budget(1, 10, layers=4, ignored=frozenset(range(4))),
        MLP: Budget(6, 10, layers=4),
    }
    total = sum(b.cost(b.num_units) for b in budgets.values())
    for _ in range(5):
        scores = torch.rand(4, 6, dtype=torch.float64) ** 3
        profiles = {
            (MLP, layer): Profile(s, torch.cat([s.sort().values.cumsum(0).flip(0), torch.zeros(1)]))
            for layer, s in enumerate(scores)
        }
        config = settled(sparsity=120 / total, allocation="error")
        widths = allocate(budgets, config, profiles)[MLP]
        curves = [error(profiles[MLP, layer], budgets[MLP]) for layer in range(4)]
        best = min(
            sum(curve[w] for curve, w in zip(curves, choice, strict=True))
            for choice in product(range(1, 7), repeat=4)
            if sum(choice) == 12
        )
        found = sum(curve[w] for curve, w in zip(curves, widths, strict=True))
        assert found == pytest.approx(best, rel=1e-12)


def test_flap_removes_the_lowest_standardised_scores_of_the_whole_model():
    torch.manual_seed(1)
    scores = torch.randn(3, 32, dtype=torch.float64).exp() * torch.tensor([[1.0], [100.0], [1e-3]])
    budgets = {
        ATTENTION: Budget(1, 1, layers=3, ignored=frozenset(range(3))),
        MLP: Budget(32, 1, layers=3),
    }
    profiles = {(MLP, i): Profile(s, torch.zeros(33)) for i, s in enumerate(scores)}
    config = settled(sparsity=40 / 99, allocation="flap")
    widths = allocate(budgets, config, profiles)[MLP]
    standard = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    kept = standard >= standard.flatten().sort().values[40]
    assert widths == tuple(kept.sum(1).tolist())


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_scores_cannot_be_standardised(value):
    budgets = {
        ATTENTION: Budget(1, 1, layers=2, ignored=frozenset(range(2))),
        MLP: Budget(8, 1, layers=2),
    }
    scores = torch.arange(8.0)
    profiles = {(MLP, 0): Profile(scores, torch.zeros(9))}
    profiles[MLP, 1] = Profile(torch.where(scores < 2, value, scores), torch.zeros(9))
    config = settled(sparsity=0.3, allocation="flap", selector="mine")
    with pytest.raises(ValueError, match=r"'mine' gives 2 infinite scores to the mlp of layer 1"):
        allocate(budgets, config, profiles)


def test_equal_scores_have_no_loss_under_flap():
    budget = Budget(8, 3)
    assert set(flap(Profile(torch.ones(8), torch.zeros(9)), budget).values()) == {0.0}


def test_search_agrees_with_what_was_measured_and_follows_the_error_between():
    budget = Budget(8, 1)
    errors = torch.tensor([64.0, 49, 36, 25, 16, 9, 4, 1, 0], dtype=torch.float64)
    measured = {2: 72.0, 4: 8.0}
    curve = search(Profile(torch.ones(8), errors, measured), budget)
    assert curve[2] == pytest.approx(72) and curve[4] == pytest.approx(8) and curve[8] == 0
    assert curve[3] == pytest.approx(25 * (2 * 0.5) ** 0.5)  # halfway between the factors 2 and 1/2
    assert curve[1] == pytest.approx(98) and curve[6] == pytest.approx(2)
    proportional = search(Profile(torch.ones(8), errors), budget)
    assert proportional == pytest.approx(error(Profile(torch.ones(8), errors), budget))


@pytest.mark.parametrize("rule", PER_LAYER)
def test_kinds_with_sparsities_of_their_own_are_shared_out_among_their_layers(rule):
    budgets = {ATTENTION: Budget(4, 100, layers=6), MLP: Budget(128, 10, layers=6)}
    generator = torch.Generator().manual_seed(3)
    profiles = {
        (kind, layer): Profile(
            torch.rand(b.num_units, generator=generator),
            torch.rand(b.num_units + 1, generator=generator).sort(descending=True).values,
        )
        for kind, b in budgets.items()
        for layer in range(6)
    }
    for measured in (profiles, None):
        widths = allocate(
            budgets,
            settled(attention_sparsity=0.25, mlp_sparsity=0.5, allocation=rule),
            measured,
        )
        assert sum(widths[ATTENTION]) == 18 and sum(widths[MLP]) == 6 * 64
        config = settled(sparsity=0.5, attention_sparsity=0.25, allocation=rule)
        widths = allocate(budgets, config, measured)
        assert sum(widths[ATTENTION]) == 18
        assert abs(sparsity_by_layer(budgets, widths) - 0.5) <= TOLERANCE


def test_an_unknown_rule_is_refused_with_the_nearest():
    budgets = {ATTENTION: Budget(4, 100), MLP: Budget(128, 10)}
    with pytest.raises(ValueError, match="did you mean 'search'"):
        allocate(budgets, settled(sparsity=0.5, allocation="serch"))


def test_layers_without_units_cost_what_they_cost_and_have_no_width():
    budget = Budget(
        8,
        30,
        fixed_cost=7,
        layers=4,
        ignored=frozenset({0, 2}),
        absent=frozenset({2}),
        whole_cost=11,
    )
    assert budget.in_all_layers(5) == (8, 5, 0, 5)
    assert budget.cost(5) == 11 + 3 * 7 + (8 + 5 + 5) * 30
    none = Budget(1, 0, layers=2, ignored=frozenset({0, 1}), absent=frozenset({0, 1}), whole_cost=9)
    assert (none.widths, none.in_all_layers(1), none.cost(1)) == ([1], (0, 0), 9)
    for rule in ("uniform", "error"):
        budgets = {ATTENTION: none, MLP: Budget(100, 10, layers=2)}
        widths = allocate(budgets, settled(sparsity=0.3, multiple_of=1, allocation=rule))
        assert widths[ATTENTION] == (0, 0)
        assert sum(widths[MLP]) == pytest.approx(140, abs=3)


def test_a_step_that_is_too_long_is_taken_where_finer_ones_can_be_given_back():
    """All MLP units would go before the last heads, whose step is longer than what is left."""
    budgets = {
        ATTENTION: Budget(4, 49, fixed_cost=0, step=1, layers=4),
        MLP: Budget(64, 10, fixed_cost=0, step=1, layers=4, ignored=frozenset({0})),
    }
    curves = {
        (kind, layer): Profile(
            torch.arange(float(budget.num_units)),
            torch.linspace(scale, 0, budget.num_units + 1, dtype=torch.float64) ** 2,
            {},
        )
        for kind, budget, scale in ((ATTENTION, budgets[ATTENTION], 1e3), (MLP, budgets[MLP], 1.0))
        for layer in range(4)
        if layer not in budget.ignored
    }
    for wanted in torch.linspace(0.5, 0.72, 45).tolist():
        widths = allocate(budgets, settled(sparsity=wanted, allocation="error"), curves)
        assert abs(sparsity_by_layer(budgets, widths) - wanted) <= TOLERANCE


class CountedCurve(dict):
    """A curve that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        type(self).passes += 1
        return super().__iter__()


def test_a_curve_is_not_gone_through_once_a_segment(monkeypatch):
    """Every width of a strictly convex curve is a segment of its own."""
    budgets = {
        ATTENTION: Budget(1, 10, layers=2, ignored=frozenset(range(2))),
        MLP: Budget(500, 10, layers=2),
    }
    errors = torch.linspace(1, 0, 501, dtype=torch.float64) ** 2
    rule = dataclasses.replace(ALLOCATIONS["error"], loss=lambda p, b: CountedCurve(error(p, b)))
    monkeypatch.setitem(ALLOCATIONS, "error", rule)
    profiles = {(MLP, layer): Profile(torch.arange(500.0), errors) for layer in range(2)}
    widths = allocate(budgets, settled(sparsity=0.5, allocation="error"), profiles)
    assert sum(widths[MLP]) == pytest.approx(499, abs=2)
    assert CountedCurve.passes < 20


@pytest.mark.parametrize(
    ("units", "sparsity", "heads"),
    [
        (3, 0.3, [2, 3]),
        (8, 0.3, [3, 4, 5, 6, 7, 8]),
        (32, 0.3, [12, 16, 20, 24, 28, 32]),
        (40, 0.3, [16, 24, 32, 40]),
        (9, 0.5, [4, 6, 8, 9]),
    ],
)
def test_few_splits_are_tried_from_whole_attention_down(units, sparsity, heads):
    budgets = {ATTENTION: Budget(units, 1000 // units), MLP: Budget(3000, 1)}
    config = settled(sparsity=sparsity, allocation="uniform-split")
    found = splits(budgets, config)
    assert [widths[ATTENTION][0] for widths in found] == heads
    for widths in found:
        assert abs(sparsity_by_layer(budgets, widths) - sparsity) <= TOLERANCE
