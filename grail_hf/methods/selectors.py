"""Which units to keep or to fold together: one pure function per method, and `SELECTORS`.

A selector maps a group and the statistics of its consumer's inputs to one score per unit, [units];
the units of highest score are kept. A selector that folds maps them and the width to a `Reduction`
that merges clusters of units. `choose` applies either kind. With W [O, H] the consumer's weight,
X [N, H] its inputs over N tokens and W_j, X_j the columns of channel j, the scores of channels are
summed over the channels that a unit owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from grail_hf.config import unknown_name, unwrapped, widest_float
from grail_hf.methods.clustering import k_means
from grail_hf.methods.elimination import diagonal_blocks, elimination_order_, gram_blocks, traces
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import add_, cholesky_inverse_, cholesky_solve_, damped_cholesky
from grail_hf.methods.reduction import Reduction


class RegionalGradient(NamedTuple):
    """Root mean square over calibration samples of a gradient by a consumer's weight.

    Attributes:
        rms: [O, H] fp32, sqrt(mean over n of (d ||f(X_n)|| / d W_ij)^2), where f is the one decoder
            layer that holds the consumer, and X_n are the hidden states of a sample before it.
        samples: the number of samples.
    """

    rms: Tensor
    samples: int


class Units(Protocol):
    """What a selector may read of a group."""

    @property
    def name(self) -> str:
        """For messages, for example `model.layers.3.mlp`."""

    @property
    def weight(self) -> Tensor:
        """[O, H], the consumer's weight."""

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """[units, features] for each producer: the weight rows and biases of each unit."""

    @property
    def columns(self) -> int:
        """Consumer columns that a unit owns; H = num_units * columns."""

    @property
    def partitions(self) -> int:
        """Equal consecutive runs of units; each run keeps the same number of units."""

    @property
    def seed(self) -> int:
        """For selectors that draw random numbers: differs between groups."""

    @property
    def regional_gradient(self) -> RegionalGradient:
        """Gradient by the consumer's weight, for a `Selector` with `needs_gradient`.

        Raises RuntimeError for any other selector.
        """


@dataclass(frozen=True)
class Selector:
    """A function that scores or folds the units of a group, and what it needs.

    Attributes:
        function: (group, stats) -> scores [units], any real dtype; the highest are kept. With
            `folds`, (group, stats, width) -> `Reduction.fold` of labels [units] with `width`
            clusters, as many in each partition and none in two of them.
        ranks_only: the scores order the units of one group, and cannot be compared with those of
            another group.
        needs_gradient: the function reads `group.regional_gradient`, which costs a forward and a
            backward pass of the decoder layer.
        inverts_gram: the function inverts the Gram matrix, which cost estimates count.
        stops: the function takes `width` too, and orders only the units beyond that many.
        folds: the function folds units together instead of scoring them.
    """

    function: Callable[..., Any]
    ranks_only: bool = False
    needs_gradient: bool = False
    inverts_gram: bool = False
    stops: bool = False
    folds: bool = False

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function."""
        return self.function(*arguments, **keywords)


def random(group: Units, stats: GramStats) -> Tensor:
    """Uniform draws from the group's seed: the baseline for every other selector."""
    generator = torch.Generator().manual_seed(group.seed)
    return torch.rand(stats.energy.numel() // group.columns, generator=generator)


def magnitude(group: Units, stats: GramStats) -> Tensor:
    """||W_u||, the Frobenius norm of the unit's consumer columns. Uses no activations."""
    return _by_unit(group.weight.to(stats.dtype).square().sum(dim=0), group).sqrt()


def wanda(group: Units, stats: GramStats) -> Tensor:
    """sum_j mean_i |W_ij| ||X_j|| over the unit's columns j.

    Wanda (arXiv 2306.11695, equation 1) summed to channels as GRAIL does (arXiv 2602.23795).
    """
    salience = group.weight.to(stats.dtype).abs().mean(dim=0) * stats.energy.sqrt()
    return _by_unit(salience, group)


def wanda_plus_plus(group: Units, stats: GramStats, alpha: float = 100.0) -> Tensor:
    """sum_j mean_i (alpha G_ij + ||X_j|| / sqrt(n)) |W_ij| over the unit's columns j, n samples.

    Wanda++'s regional gradient score (arXiv 2503.04992), summed to channels as `wanda` is. G is the
    root mean square over samples of the gradient of the norm of one decoder layer's output with
    respect to the weight, within that layer alone. This is the only selector that uses automatic
    differentiation. G is an average over samples, so ||X_j|| is averaged too: as in Wanda's code,
    sums over all tokens are divided by n, and the meaning of alpha = 100 does not depend on the
    number of samples. Only the score of Wanda++ is implemented; its second half, which trains each
    layer's weights towards the dense output, is not.
    """
    gradient = group.regional_gradient
    weight = group.weight.to(stats.dtype)
    norms = (stats.energy / gradient.samples).sqrt()
    salience = ((alpha * gradient.rms.to(weight) + norms) * weight.abs()).mean(dim=0)
    return _by_unit(salience, group)


def flap(group: Units, stats: GramStats) -> Tensor:
    """sum_j var(X_j) ||W_j||^2 over the unit's columns j.

    FLAP's WIFV, weighted input feature variance (arXiv 2312.11983): what a channel contributes
    beyond its mean, which a bias could replace. Scores are not standardised across groups: that is
    left to the allocation, and would not change the order within a group.
    """
    energy = group.weight.to(stats.dtype).square().sum(dim=0)
    return _by_unit(_variance(stats) * energy, group)


def flap_wifn(group: Units, stats: GramStats) -> Tensor:
    """sum_j mean_i |W_ij| ||X_j|| / sqrt(N) over the unit's columns j.

    FLAP's WIFN, weighted input feature norm (arXiv 2312.11983 and its code). Within a group it
    orders the units as `wanda` does; only the scale differs.
    """
    return wanda(group, stats) / math.sqrt(max(stats.count, 1))


def flap_ifv(group: Units, stats: GramStats) -> Tensor:
    """sum_j var(X_j) over the unit's columns j. Uses no weights.

    FLAP's IFV, input feature variance (arXiv 2312.11983).
    """
    return _by_unit(_variance(stats), group)


def slimgpt(group: Units, stats: GramStats, damping: float = 0.01) -> Tensor:
    """tr(W_u (P_uu)^-1 W_u^T) with P = (G + damping * mean(diag G) * I)^-1.

    SlimGPT's score (arXiv 2412.18110): the error that removing unit u alone adds when all other
    units are refitted. For a unit of one column j this is ||W_j||^2 / P_jj; an attention head is
    scored as one block, not as the sum of its channels. The scores are computed once: units that
    can replace each other all score low, which `obs` avoids by eliminating one unit at a time.
    """
    factor, _ = damped_cholesky(stats.moments.dense, damping, group.name)
    blocks = diagonal_blocks(cholesky_inverse_(factor), group.columns)
    return traces(blocks, gram_blocks(group.weight.to(stats.dtype), group.columns))


def obs(group: Units, stats: GramStats, damping: float = 1e-4, width: int = 0) -> Tensor:
    """The step at which greedy elimination on the Gram matrix removes the unit.

    Elimination stops at `width` units, which share the highest score.

    Optimal brain surgeon (Hassibi & Stork 1993) on whole units. Removing unit u from those left,
    and repairing the others by least squares, adds the error

        tr(W_u (P_uu)^-1 W_u^T),   P = (G + damping * mean(diag G) * I)^-1 over the units left.

    The unit of least error is removed, W and P are updated exactly, and so on, starting from the
    weight that fits the target best. Unlike scores that are computed once, this accounts for units
    that can replace each other, of which one has to stay. Partitions lose units in turns.
    """
    missing = None if stats.cross is None else stats.missing_of(group.weight.to(stats.dtype))
    factor, _ = damped_cholesky(stats.moments.dense, damping, group.name)
    if missing is None:
        weight = group.weight.to(stats.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        weight = add_(cholesky_solve_(missing, factor), group.weight)
    inverse = cholesky_inverse_(factor)
    order = elimination_order_(weight, inverse, group.columns, group.partitions, width=width)
    scores = order.new_full((order.numel() + width,), order.numel())
    scores[order] = torch.arange(order.numel(), device=order.device)
    return scores


def fold(group: Units, stats: GramStats, width: int) -> Reduction:
    """Weighted k-means on the units' producer rows.

    Model folding (arXiv 2502.10216): units with similar producers become one unit, whose producers
    are their mean. Unlike in the paper, units are weighted by the energy of what they contribute,
    sum_j ||W_j||^2 ||X_j||^2 over their columns, in the clustering and in the mean, because that is
    the cost of moving their producers.

    The point of a unit is the concatenation of the rows and biases of all its producers (gate and
    up of a channel; q, k and v of a KV group), so that similar units are similar in all of them.
    Each producer is divided by the root of its total variance over the units, so that neither its
    scale nor its number of rows matters. Clusters stay within partitions.
    """
    parts = []
    for rows in group.producers:
        rows = rows.to(widest_float(rows.device))
        centred = rows - rows.mean(dim=0)
        parts.append(centred / centred.norm().clamp_min(torch.finfo(centred.dtype).tiny))
    points = torch.cat(parts, dim=1)
    inner = points @ points.mT
    norms = group.weight.to(stats.dtype).square().sum(dim=0)
    weights = _by_unit(norms * stats.energy, group).to(inner)
    weights = (weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(group.seed)
    per_run = width // group.partitions
    runs = diagonal_blocks(inner, inner.shape[0] // group.partitions)
    labels = [
        k_means(run, own, per_run, generator) + n * per_run
        for n, (run, own) in enumerate(
            zip(runs, weights.reshape(group.partitions, -1), strict=True)
        )
    ]
    return Reduction.fold(torch.cat(labels), weights)


def _variance(stats: GramStats) -> Tensor:
    """[H], the variance of the inputs over the tokens, clamped at 0 against rounding."""
    centred = stats.energy - stats.total.square() / max(stats.count, 1)
    return centred.clamp(min=0) / max(stats.count - 1, 1)


def _by_unit(channel_scores: Tensor, group: Units) -> Tensor:
    """[H] to [units] by summing a unit's channels."""
    return channel_scores.reshape(-1, group.columns).sum(dim=1)


def find_selector(selector: str | Callable[..., Any]) -> Selector:
    """The `Selector` of a name in `SELECTORS` or `ALIASES`, or of a function.

    A `Selector` is returned as it is. A function (group, stats) -> scores becomes one; a function
    from the table, with or without arguments bound by `functools.partial`, keeps its attributes.
    Raises ValueError for an unknown name, with the nearest known one.
    """
    if isinstance(selector, Selector):
        return selector
    if not isinstance(selector, str):
        function = unwrapped(selector)
        known = (one for one in SELECTORS.values() if one.function is function)
        return replace(next(known, Selector(selector)), function=selector)
    name = ALIASES.get(selector, selector)
    if name not in SELECTORS:
        where = "SELECTORS in grail_hf/methods/selectors.py, or passed as a function"
        raise unknown_name("selector", name, SELECTORS, where)
    return SELECTORS[name]


def check_scores(scores: object, group: Units, name: str) -> Tensor:
    """Return the scores that the selector `name` gave for `group`, if they are valid.

    Raises ValueError for anything but a real tensor [units] without NaN; infinities are allowed.
    """
    units = group.weight.shape[1] // group.columns
    if not isinstance(scores, Tensor):
        got = f"a {type(scores).__name__}"
    elif scores.shape != (units,):
        got = f"shape {list(scores.shape)}"
    elif scores.is_complex():
        got = f"dtype {scores.dtype}"
    elif scores.isnan().any():
        got = f"NaN for {int(scores.isnan().sum())} units"
    else:
        return scores.detach().to(group.weight.device)
    raise ValueError(
        f"selector {name!r} returned {got} for {group.name}: it must return a real tensor of "
        f"shape [{units}], one score per unit, of which the highest are kept"
    )


def choose(select: Selector, group: Units, stats: GramStats, width: int, name: str) -> Reduction:
    """Keep or fold units of `group` so that `width` are left.

    Raises ValueError, naming the selector as `name`, if it returns anything invalid.
    """
    units = group.weight.shape[1] // group.columns
    if width == units:
        return Reduction(torch.arange(units, device=group.weight.device), units)
    if select.folds:
        return check_clusters(select(group, stats, width), group, width, name)
    found = select(group, stats, width=width) if select.stops else select(group, stats)
    scores = check_scores(found, group, name)
    return Reduction.keep_top(scores, width, group.partitions)


def check_clusters(reduction: object, group: Units, width: int, name: str) -> Reduction:
    """Return what the selector `name` gave, if it folds the units to `width` clusters.

    Raises ValueError for anything but a `Reduction` that folds, with as many clusters in each
    partition and none in two of them.
    """
    units = group.weight.shape[1] // group.columns
    if not isinstance(reduction, Reduction) or reduction.labels is None:
        got = f"a {type(reduction).__name__} that folds nothing"
    elif reduction.num_units != units:
        got = f"{reduction.num_units} labels"
    else:
        runs = [len(torch.unique(run)) for run in reduction.labels.reshape(group.partitions, -1)]
        if set(runs) == {width // group.partitions} and reduction.kept.numel() == width:
            return reduction
        got = f"{reduction.kept.numel()} clusters ({runs} in the partitions)"
    raise ValueError(
        f"selector {name!r} returned {got} for {group.name}: it must return Reduction.fold of "
        f"{units} labels with {width} clusters, as many in each of {group.partitions} partitions "
        "and none in two of them"
    )


SELECTORS: dict[str, Selector] = {
    "random": Selector(random, ranks_only=True),
    "magnitude": Selector(magnitude),
    "wanda": Selector(wanda),
    "wanda++": Selector(wanda_plus_plus, needs_gradient=True),
    "flap": Selector(flap),
    "flap-wifn": Selector(flap_wifn),
    "flap-ifv": Selector(flap_ifv),
    "slimgpt": Selector(slimgpt, inverts_gram=True),
    "obs": Selector(obs, ranks_only=True, inverts_gram=True, stops=True),
    "fold": Selector(fold, folds=True),
}
# What chooses instead where no token was seen, and scores for one that folds and has no scores.
WITHOUT_TOKENS = SELECTORS["magnitude"]
WITHOUT_FOLDING = SELECTORS["obs"]
# Earlier names, which saved configs still hold.
ALIASES = {"gram": "obs"}
