"""`Reduction` against lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_hf.methods.reduction import Reduction, expand_units

few = settings(max_examples=25, deadline=None)


@st.composite
def selections(draw) -> tuple[torch.Tensor, int, int]:
    """Scores with many ties and infinities, a width, and the number of partitions."""
    partitions, run = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    number = st.integers(-2, 2).map(float) | st.sampled_from([float("inf"), -float("inf"), -0.0])
    scores = draw(st.lists(number, min_size=partitions * run, max_size=partitions * run))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return torch.tensor(scores, dtype=dtype), partitions * draw(st.integers(0, run)), partitions


@given(selections())
@few
def test_keep_top_is_the_best_of_each_partition(selection):
    """Of equal scores the lower index."""
    scores, width, partitions = selection
    run = scores.numel() // partitions
    expected = []
    for start in range(0, scores.numel(), run):
        best = sorted(range(start, start + run), key=lambda unit: (-scores[unit].item(), unit))
        expected += sorted(best[: width // partitions])
    reduction = Reduction.keep_top(scores, width, partitions)
    assert reduction.kept.tolist() == expected
    assert reduction.kept.dtype == torch.int64
    assert reduction.num_units == scores.numel()


def test_integer_scores_rank_like_any():
    """The `obs` selector's are steps."""
    assert Reduction.keep_top(torch.tensor([3, 0, 2, 1]), 2).kept.tolist() == [0, 2]


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_score_that_is_nan_is_refused(partitions, dtype):
    for unit in range(4):
        scores = torch.ones(4, dtype=dtype)
        scores[unit] = float("nan")
        with pytest.raises(FloatingPointError, match="NaN"):
            Reduction.keep_top(scores, 2, partitions)


@given(st.sets(st.integers(0, 19)), st.integers(0, 10), st.integers(1, 5))
@few
def test_kept_and_removed_channels_partition_the_range(kept, more, per_unit):
    num_units = max(kept, default=0) + 1 + more
    reduction = Reduction(torch.tensor(sorted(kept), dtype=torch.int64), num_units)
    mine, others = reduction.kept_channels(per_unit), reduction.removed_channels(per_unit)
    assert sorted(mine.tolist() + others.tolist()) == list(range(num_units * per_unit))
    for channels in (mine, others):
        assert channels.tolist() == sorted(channels.tolist())
        assert channels.dtype == torch.int64
    assert {channel // per_unit for channel in mine.tolist()} == kept
    assert reduction.removed.tolist() == [unit for unit in range(num_units) if unit not in kept]


@given(st.lists(st.integers(0, 50)), st.integers(1, 5))
@few
def test_a_unit_s_channels_are_consecutive_and_units_keep_their_order(units, per_unit):
    expected = [unit * per_unit + i for unit in units for i in range(per_unit)]
    assert expand_units(torch.tensor(units, dtype=torch.int64), per_unit).tolist() == expected
