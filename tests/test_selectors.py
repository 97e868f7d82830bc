"""Selectors against loops, and greedy elimination against refitting every candidate."""

import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from grail_hf.methods import elimination
from grail_hf.methods.elimination import PANEL, elimination_order_
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import Symmetric, cholesky_inverse_, damped_cholesky
from grail_hf.methods.selectors import (
    ALIASES,
    SELECTORS,
    RegionalGradient,
    Selector,
    check_scores,
    choose,
    find_selector,
    wanda_plus_plus,
)

DAMPING = 1e-4  # The `obs` selector's default.


@dataclass
class Units:
    """What a selector may read of a group, and the tokens that make its statistics."""

    weight: Tensor
    x: Tensor
    columns: int = 1
    partitions: int = 1
    seed: int = 0
    name: str = "layers.3.mlp"
    producers: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self):
        self.producers = (self.weight.T.reshape(-1, self.columns * self.weight.shape[0]),)

    @property
    def regional_gradient(self) -> RegionalGradient:
        generator = torch.Generator().manual_seed(9)
        return RegionalGradient(torch.rand(self.weight.shape, generator=generator), 3)

    def stats(self, dtype: torch.dtype = torch.float64) -> GramStats:
        x = self.x.to(dtype)
        return GramStats(Symmetric.of(x.T @ x), x.sum(0), x.shape[0])


def problem(units: int, columns: int = 1, partitions: int = 1, seed: int = 0, outputs=5) -> Units:
    """Random weights, and correlated tokens of unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    channels = units * columns

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(3 * channels, channels) @ (torch.eye(channels) + 0.5 * normal(channels, channels))
    x *= normal(channels).exp()
    return Units(normal(outputs, channels), x, columns, partitions, seed)


def damped_gram(group: Units, damping: float = DAMPING) -> Tensor:
    gram = group.x.T @ group.x
    return gram + damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)


def error_of(group: Units, gram: Tensor, units) -> float:
    """Squared error of the outputs when only `units` are left and fitted best."""
    own = torch.arange(gram.shape[0]).reshape(-1, group.columns)[list(units)].flatten()
    cross = gram[:, own]
    left_over = gram - cross @ torch.linalg.solve(gram[own][:, own], cross.T)
    return torch.trace(group.weight @ left_over @ group.weight.T).item()


def greedy_by_refitting(group: Units) -> list[int]:
    """Remove, again and again, the unit without which the best fit of all others is best."""
    gram = damped_gram(group)
    units = gram.shape[0] // group.columns
    left, lost, order = set(range(units)), [0] * group.partitions, []
    run = [unit * group.partitions // units for unit in range(units)]
    while left:
        turn = [unit for unit in left if lost[run[unit]] == min(lost)]
        order.append(min(turn, key=lambda unit: error_of(group, gram, left - {unit})))
        left.remove(order[-1])
        lost[run[order[-1]]] += 1
    return order


@pytest.mark.parametrize("columns", [1, 4])
def test_magnitude_is_the_norm_of_a_unit_s_columns(columns):
    group = problem(6, columns)
    for unit, score in enumerate(SELECTORS["magnitude"](group, group.stats())):
        own = range(unit * columns, (unit + 1) * columns)
        squares = sum(group.weight[i, j].item() ** 2 for j in own for i in range(5))
        assert score.item() == pytest.approx(squares**0.5)


@pytest.mark.parametrize("columns", [1, 4])
def test_wanda_is_the_mean_weight_times_the_input_norm(columns):
    group = problem(6, columns)
    for unit, score in enumerate(SELECTORS["wanda"](group, group.stats())):
        own = range(unit * columns, (unit + 1) * columns)
        expected = sum(
            abs(group.weight[i, j].item()) / 5 * group.x[:, j].norm().item()
            for j in own
            for i in range(5)
        )
        assert score.item() == pytest.approx(expected)


@pytest.mark.parametrize("columns", [1, 4])
def test_wanda_plus_plus_adds_the_gradient_to_the_input_norm_of_a_sample(columns):
    group = problem(6, columns)
    gradient, samples = group.regional_gradient
    for unit, score in enumerate(SELECTORS["wanda++"](group, group.stats())):
        own = range(unit * columns, (unit + 1) * columns)
        expected = sum(
            abs(group.weight[i, j].item())
            * (100 * gradient[i, j].item() + group.x[:, j].norm().item() / samples**0.5)
            for j in own
            for i in range(5)
        )
        assert score.item() == pytest.approx(expected / 5)


either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("columns", [1, 4])
@either_dtype
@pytest.mark.parametrize(
    ("name", "channel_score"),
    [
        ("flap", lambda x, w: statistics.variance(x) * sum(v**2 for v in w)),
        ("flap-ifv", lambda x, w: statistics.variance(x)),
        (
            "flap-wifn",
            lambda x, w: statistics.fmean(map(abs, w)) * statistics.fmean(v**2 for v in x) ** 0.5,
        ),
    ],
)
def test_flap_s_scores_are_sums_over_a_unit_s_channels(name, channel_score, dtype, columns):
    """Inputs with a mean, which the variances must not see."""
    group = problem(6, columns)
    group.x += 2
    scores = SELECTORS[name](group, group.stats(dtype))
    assert scores.dtype == dtype
    for unit, score in enumerate(scores):
        own = range(unit * columns, (unit + 1) * columns)
        expected = sum(
            channel_score(group.x[:, j].tolist(), group.weight[:, j].tolist()) for j in own
        )
        assert score.item() == pytest.approx(expected, rel=1e-4 if dtype.itemsize == 4 else 1e-9)


def test_flap_does_not_keep_what_a_bias_could_put_out():
    """The unit of largest output is constant: `wanda` keeps it, `flap` lets it go first."""
    group = problem(6)
    group.x[:, 2] = 100
    assert SELECTORS["wanda"](group, group.stats()).argmax() == 2
    assert SELECTORS["flap"](group, group.stats()).argmin() == 2


@pytest.mark.parametrize("name", ["flap", "flap-ifv"])
def test_a_variance_below_rounding_is_not_negative(name):
    group = problem(50)
    group.x = 1000 + 1e-4 * group.x
    scores = SELECTORS[name](group, group.stats(torch.float32))
    assert (scores >= 0).all()


@pytest.mark.parametrize("columns", [1, 4])
@either_dtype
def test_slimgpt_is_the_error_of_refitting_all_but_the_unit(dtype, columns):
    """A head as one block: not the sum of what its channels cost one by one."""
    group = problem(6, columns)
    gram = damped_gram(group, 0.01)
    scores = SELECTORS["slimgpt"](group, group.stats(dtype))
    assert scores.dtype == dtype
    for unit, score in enumerate(scores):
        expected = error_of(group, gram, set(range(6)) - {unit})
        assert score.item() == pytest.approx(expected, rel=1e-3 if dtype.itemsize == 4 else 1e-9)


def test_slimgpt_is_the_squared_weight_over_the_inverse_s_diagonal():
    """The form that the paper prints, for units of one column."""
    group = problem(7)
    inverse = torch.linalg.inv(damped_gram(group, 0.01))
    for unit, score in enumerate(SELECTORS["slimgpt"](group, group.stats())):
        squares = sum(value.item() ** 2 for value in group.weight[:, unit])
        assert score.item() == pytest.approx(squares / inverse[unit, unit].item())


def test_random_depends_on_the_seed_alone():
    draw = SELECTORS["random"]
    first = problem(50, seed=1)
    other = problem(50, seed=2)
    expected = draw(first, first.stats())
    assert not torch.equal(draw(other, other.stats()), expected)
    other.seed = 1
    torch.rand(1)
    assert torch.equal(draw(other, other.stats()), expected)
    assert 0 <= expected.min() < expected.max() < 1


@pytest.mark.parametrize("name", SELECTORS)
@either_dtype
@pytest.mark.parametrize(("columns", "partitions"), [(1, 1), (4, 1), (4, 3)])
def test_every_selector_chooses_for_every_unit(name, dtype, columns, partitions):
    """With a half-precision weight, more channels than tokens and dead channels too."""
    group = problem(6, columns, partitions)
    group.weight = group.weight.bfloat16()
    before = group.weight.clone()
    group.x = group.x[:5]
    group.x[:, :columns] = 0
    stats = group.stats(dtype)
    gram = stats.gram.clone()
    select = find_selector(name)
    reduction = choose(select, group, stats, 3, name)
    assert len(set(reduction.kept.tolist())) == 3
    if not select.folds:
        scores = select(group, stats)
        assert scores.shape == (6,)
        assert torch.isfinite(scores).all()
        assert len(set(scores.tolist())) > 1
    assert torch.equal(stats.gram, gram)
    assert torch.equal(group.weight, before)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_takes_channels_that_are_all_dead(name):
    group = problem(6, 2)
    group.x.zero_()
    assert choose(find_selector(name), group, group.stats(), 3, name).kept.shape == (3,)


def elimination_order(group: Units, panel: int, dtype: torch.dtype = torch.float64) -> Tensor:
    factor, _ = damped_cholesky(group.stats().moments.dense, DAMPING, group.name)
    weight, inverse = group.weight.to(dtype, copy=True), cholesky_inverse_(factor).to(dtype)
    return elimination_order_(weight, inverse, group.columns, group.partitions, panel)


@pytest.mark.parametrize("panel", [1, 4, 5, PANEL])
@pytest.mark.parametrize(
    ("units", "columns", "partitions"),
    [(14, 1, 1), (13, 1, 1), (6, 3, 1), (12, 1, 3), (8, 2, 2), (8, 2, 8), (1, 4, 1), (3, 1, 3)],
)
def test_obs_is_greedy_elimination(units, columns, partitions, panel):
    """The step at which a unit is removed, across full panels, partial ones, and of one unit."""
    for seed in range(2):
        group = problem(units, columns, partitions, seed)
        order = greedy_by_refitting(group)
        assert elimination_order(group, panel).tolist() == order
        scores = SELECTORS["obs"](group, group.stats())
        assert scores.argsort().tolist() == order
        assert sorted(scores.tolist()) == list(range(units))


def test_obs_is_greedy_elimination_over_several_panels():
    """Against panels of one unit, which is optimal brain surgeon step by step."""
    group = problem(2 * PANEL + 20)
    scores = SELECTORS["obs"](group, group.stats())
    assert torch.equal(scores.argsort(), elimination_order(group, panel=1))


@either_dtype
@pytest.mark.parametrize(("columns", "partitions"), [(1, 1), (1, 4), (2, 1), (3, 2)])
def test_a_panel_ends_where_a_unit_that_was_no_candidate_is_cheapest(
    columns, partitions, dtype, monkeypatch
):
    """Too few candidates make more panels, and the same order."""
    group = problem(60, columns, partitions)
    expected = elimination_order(group, panel=1)
    panels = []
    for candidates in (1, 60):
        monkeypatch.setattr(elimination, "CANDIDATES", candidates)
        with patch.object(elimination, "_greedy", wraps=elimination._greedy) as greedy:
            assert torch.equal(elimination_order(group, 20 * columns, dtype), expected)
        panels.append(greedy.call_count)
    assert panels[0] > panels[1] == 3


@pytest.mark.parametrize(("columns", "partitions"), [(1, 1), (1, 4), (3, 2)])
def test_to_choose_a_width_elimination_stops_there(columns, partitions):
    group = problem(24, columns, partitions)
    order = SELECTORS["obs"](group, group.stats()).argsort()
    for width in (4, 8, 20):
        kept = choose(SELECTORS["obs"], group, group.stats(), width, "obs").kept
        assert kept.tolist() == sorted(order[24 - width :].tolist())
        scores = SELECTORS["obs"](group, group.stats(), width=width)
        assert torch.equal(scores[order[: 24 - width]], torch.arange(24 - width))
        assert (scores[kept] == 24 - width).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("units", "columns"), [(8, 1), (12, 1), (6, 2)])
def test_greedy_is_close_to_the_best_subset(units, columns, seed):
    """At every width, within twice the error of the best of all subsets."""
    group = problem(units, columns, seed=seed)
    gram = damped_gram(group)
    order = SELECTORS["obs"](group, group.stats()).argsort().tolist()
    for width in range(1, units):
        found = error_of(group, gram, order[units - width :])
        best = min(error_of(group, gram, kept) for kept in combinations(range(units), width))
        assert best * (1 - 1e-9) <= found <= 2 * best


@pytest.mark.parametrize("columns", [1, 2])
def test_greedy_is_optimal_where_channels_know_nothing_of_each_other(columns):
    """A diagonal Gram: the cost of a unit does not depend on the units that are left."""
    group = problem(7, columns)
    group.x = torch.linalg.qr(group.x).Q * torch.arange(1, 7 * columns + 1)
    gram = damped_gram(group)
    order = SELECTORS["obs"](group, group.stats()).argsort().tolist()
    assert order == sorted(range(7), key=lambda unit: error_of(group, gram, set(range(7)) - {unit}))
    for width in range(1, 7):
        best = min(combinations(range(7), width), key=lambda kept: error_of(group, gram, kept))
        assert set(order[7 - width :]) == set(best)


def test_of_two_like_channels_one_stays():
    """What no one-shot score sees: each of a pair can go, but not both."""
    group = problem(5)
    group.x = group.x[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    group.weight = problem(10).weight
    kept = SELECTORS["obs"](group, group.stats()).argsort().tolist()[5:]
    assert sorted(unit % 5 for unit in kept) == list(range(5))


def test_units_that_cost_the_same_end_no_panel():
    """All of them at every step, up to rounding: outputs that are the inputs, all alike."""
    inverse = torch.linalg.inv(torch.eye(60).double() + 1)
    with patch.object(elimination, "_greedy", wraps=elimination._greedy) as greedy:
        elimination_order_(torch.eye(60).double(), inverse, 1, panel=20)
    assert greedy.call_count == 3


@pytest.mark.parametrize("width", [0, 3 * PANEL + 99])
@pytest.mark.parametrize(("spoilt", "value"), [("P", math.nan), ("P", -1.0), ("W", math.nan)])
def test_elimination_that_lost_its_precision_is_refused(spoilt, value, width):
    """Though the unit is far from the cheapest, and others could be removed."""
    group = problem(3 * PANEL + 100)
    inverse = torch.linalg.inv(damped_gram(group)).contiguous()
    group.weight[:, 2] *= 1e6
    {"P": inverse, "W": group.weight}[spoilt][2, 2] = value
    with pytest.raises(FloatingPointError, match="damping"):
        elimination_order_(group.weight, inverse, 1, width=width)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_is_found_by_its_name(name):
    assert find_selector(name) is SELECTORS[name]


@pytest.mark.parametrize("name", ALIASES)
def test_an_earlier_name_still_finds_its_selector(name):
    assert name not in SELECTORS
    assert find_selector(name) is SELECTORS[ALIASES[name]]


def test_an_unknown_selector_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ValueError, match="'wnada' is not known; did you mean 'wanda'\\?") as error:
        find_selector("wnada")
    assert ", ".join(SELECTORS) in str(error.value)
    assert "grail_hf/methods/selectors.py" in str(error.value)


def test_a_selector_like_no_other_is_refused_in_whole_sentences():
    with pytest.raises(ValueError, match=r"'zzz' is not known\. Known: "):
        find_selector("zzz")


# A user's own function


def test_a_function_becomes_a_selector_that_needs_nothing():
    def mine(group, stats):
        return stats.energy

    assert find_selector(mine) == Selector(mine)


def test_a_selector_is_its_own():
    mine = Selector(lambda group, stats, width: None, folds=True)
    assert find_selector(mine) is mine


@pytest.mark.parametrize("known", SELECTORS.values(), ids=SELECTORS)
def test_a_function_of_the_table_needs_what_it_does_there(known):
    assert find_selector(known.function) == known


def test_other_arguments_change_nothing_of_what_a_function_of_the_table_needs():
    select = partial(wanda_plus_plus, alpha=10)
    assert find_selector(select) == Selector(select, needs_gradient=True)


def test_the_name_of_a_function_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"my\.module:mine.*passed as a function"):
        find_selector("my.module:mine")


@pytest.mark.parametrize(
    "scores", [torch.arange(3), torch.tensor([1.0, float("inf"), -float("inf")]), torch.ones(3) > 0]
)
def test_scores_may_be_of_any_real_dtype_and_infinite(scores):
    assert torch.equal(check_scores(scores, problem(3, 2), "mine"), scores)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.ones(6), "shape [6]"),
        (torch.ones(3, 1), "shape [3, 1]"),
        (torch.ones(()), "shape []"),
        ([1.0, 2.0, 3.0], "a list"),
        (None, "a NoneType"),
        (torch.tensor([1.0, float("nan"), 2.0]), "NaN for 1 units"),
        (torch.ones(3, dtype=torch.complex64), "dtype torch.complex64"),
    ],
)
def test_scores_that_are_not_one_real_number_a_unit_are_refused(scores, words):
    with pytest.raises(ValueError) as error:
        check_scores(scores, problem(3, 2), "my.module:mine")
    for part in (words, "'my.module:mine'", "layers.3.mlp", "shape [3]"):
        assert part in str(error.value)
