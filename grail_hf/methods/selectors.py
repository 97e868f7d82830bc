"""Which units to keep or to fold: one pure function a method, and the table `SELECTORS`.

A selector maps a group and the statistics of its consumer's inputs to a score for each unit,
[units]; units of high score are kept. A `Folding` maps them and the width to a `Reduction` that
makes clusters of units one. `choose` does with either. With W [O, H] the consumer's weight,
X [N, H] its inputs over N tokens and W_j, X_j a channel's columns, a score of channels is summed
over the channels that a unit owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grail_hf.config import unknown_name, widest_float
from grail_hf.methods.clustering import k_means
from grail_hf.methods.elimination import diagonal_blocks, elimination_order_, gram_blocks, traces
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import add_, cholesky_inverse_, cholesky_solve_, damped_cholesky
from grail_hf.methods.reduction import Reduction


class RegionalGradient(NamedTuple):
    """Root mean square over calibration samples of the gradient by a consumer's weight.

    Attributes:
        rms: [O, H] fp32, sqrt(mean over n of (d ||f(X_n)|| / d W_ij)^2), with f the decoder layer
            that the consumer is in, alone, and X_n a sample's hidden states in front of it.
        samples: how many.
    """

    rms: Tensor
    samples: int


class Units(Protocol):
    """What a selector may ask of a group."""

    @property
    def name(self) -> str:
        """For messages, for example `model.layers.3.mlp`."""

    @property
    def weight(self) -> Tensor:
        """[O, H], the consumer's weight."""

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Of each producer, [units, features]: a unit's weight rows and biases."""

    @property
    def columns(self) -> int:
        """Consumer columns that a unit owns; H = num_units * columns."""

    @property
    def partitions(self) -> int:
        """Equal consecutive runs of units, each of which keeps equally many."""

    @property
    def seed(self) -> int:
        """For selectors that draw: differs between groups."""

    def regional_gradient(self) -> RegionalGradient:
        """By the consumer's weight, computed when asked for: a pass forward and one back."""


@dataclass(frozen=True)
class Folding:
    """A selector that folds units together instead of removing some.

    Attributes:
        clusters: (group, stats, width) -> `Reduction.fold` of labels [units]. There are `width`
            labels, as many in each partition, and none in two of them.
    """

    clusters: Callable[[Units, GramStats, int], Reduction]

    def __call__(self, group: Units, stats: GramStats, width: int) -> Reduction:
        return self.clusters(group, stats, width)


Scoring = Callable[[Units, GramStats], Tensor]
Selector = Scoring | Folding


def random(group: Units, stats: GramStats) -> Tensor:
    """Uniform draws from the group's seed: the baseline that any selector must beat."""
    generator = torch.Generator().manual_seed(group.seed)
    return torch.rand(stats.energy.numel() // group.columns, generator=generator)


def magnitude(group: Units, stats: GramStats) -> Tensor:
    """||W_u||, the Frobenius norm of the unit's consumer columns. Reads no activations."""
    return _by_unit(group.weight.to(stats.dtype).square().sum(dim=0), group).sqrt()


def wanda(group: Units, stats: GramStats) -> Tensor:
    """sum_j mean_i |W_ij| ||X_j|| over the unit's columns j.

    Wanda (arXiv 2306.11695, equation 1) summed to channels as GRAIL does (arXiv 2602.23795).
    """
    salience = group.weight.to(stats.dtype).abs().mean(dim=0) * stats.energy.sqrt()
    return _by_unit(salience, group)


def wanda_plus_plus(group: Units, stats: GramStats, alpha: float = 100.0) -> Tensor:
    """sum_j mean_i (alpha G_ij + ||X_j|| / sqrt(n)) |W_ij| over the unit's columns j, n samples.

    Wanda++'s regional gradient score (arXiv 2503.04992), summed to channels as `wanda` is: G is the
    root mean square over samples of the gradient of the norm of one decoder layer's output, taken
    inside that layer alone. This is the one selector that uses automatic differentiation. G is
    of a sample, so ||X_j|| is too: sums over all tokens are divided by n, as in Wanda's code, and
    what alpha = 100 means does not depend on how many samples there are. Of Wanda++ this is the
    score; its other half, steps of an optimiser that trains each layer's weights towards the dense
    output, is not done here.
    """
    gradient = group.regional_gradient()
    weight = group.weight.to(stats.dtype)
    norms = (stats.energy / gradient.samples).sqrt()
    salience = ((alpha * gradient.rms.to(weight) + norms) * weight.abs()).mean(dim=0)
    return _by_unit(salience, group)


def flap(group: Units, stats: GramStats) -> Tensor:
    """sum_j var(X_j) ||W_j||^2 over the unit's columns j.

    FLAP's WIFV, weighted input feature variance (arXiv 2312.11983): what a channel
    puts out beyond its mean, which a bias could make up for. Nothing is standardised between
    groups: that would be a matter of the allocation, and cannot change the order within a group.
    """
    energy = group.weight.to(stats.dtype).square().sum(dim=0)
    return _by_unit(_variance(stats) * energy, group)


def flap_wifn(group: Units, stats: GramStats) -> Tensor:
    """sum_j mean_i |W_ij| ||X_j|| / sqrt(N) over the unit's columns j.

    FLAP's WIFN, weighted input feature norm (arXiv 2312.11983, and its code). Within a group it
    orders the units as `wanda` does: only the scale differs.
    """
    return wanda(group, stats) / math.sqrt(max(stats.count, 1))


def flap_ifv(group: Units, stats: GramStats) -> Tensor:
    """sum_j var(X_j) over the unit's columns j. Reads no weights.

    FLAP's IFV, input feature variance (arXiv 2312.11983).
    """
    return _by_unit(_variance(stats), group)


def slimgpt(group: Units, stats: GramStats, damping: float = 0.01) -> Tensor:
    """tr(W_u (P_uu)^-1 W_u^T) with P = (G + damping * mean(diag G) * I)^-1.

    The error that removing unit u alone adds when all other units are refitted: SlimGPT's (arXiv
    2412.18110). Where a unit owns one column j, this is ||W_j||^2 / P_jj; an attention head is
    scored as one block, not as a sum of its channels. One shot: units that can stand in for each
    other all score low, which `gram` mends by eliminating one at a time.
    """
    factor, _ = damped_cholesky(stats.moments.dense, damping, group.name)
    blocks = diagonal_blocks(cholesky_inverse_(factor), group.columns)
    return traces(blocks, gram_blocks(group.weight.to(stats.dtype), group.columns))


def gram(group: Units, stats: GramStats, damping: float = 1e-4) -> Tensor:
    """The step at which greedy elimination on the Gram removes the unit.

    Removing unit u from those left, and repairing the rest by least squares, adds the error

        tr(W_u (P_uu)^-1 W_u^T),   P = (G + damping * mean(diag G) * I)^-1 over the units left,

    (optimal brain surgeon; Hassibi & Stork 1993). The cheapest unit goes, W and P are updated
    exactly, and so on, from the weight that fits the target best. Unlike one-shot scores this
    sees that two like units can stand in for each other, but not both go. Within partitions the
    units go in turns.
    """
    missing = None if stats.cross is None else stats.missing_of(group.weight.to(stats.dtype))
    factor, _ = damped_cholesky(stats.moments.dense, damping, group.name)
    if missing is None:
        weight = group.weight.to(stats.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        weight = add_(cholesky_solve_(missing, factor), group.weight)
    inverse = cholesky_inverse_(factor)
    order = elimination_order_(weight, inverse, group.columns, group.partitions)
    scores = torch.empty_like(order)
    scores[order] = torch.arange(order.numel(), device=order.device)
    return scores


@Folding
def fold(group: Units, stats: GramStats, width: int) -> Reduction:
    """Weighted k-means on the units' producer rows.

    Model folding (arXiv 2502.10216): units whose producers are alike become one, whose producers
    are their mean. Unlike there, a unit weighs what it puts out, sum_j ||W_j||^2 ||X_j||^2 over its
    columns, in the clustering and in the mean: to move its producers costs as much, and one that
    nothing reads moves none.

    A unit is the point of all its producers' rows and biases together (a channel's gate and up; a
    KV group's q, k and v), since it is like another only if it is in all of them. Each producer is
    divided by the root of its total variance over the units, so that none decides by its scale or
    by how many rows it has. Clusters stay within partitions.
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
    """[H], the inputs' variance over the tokens; not negative, whatever the rounding."""
    centred = stats.energy - stats.total.square() / max(stats.count, 1)
    return centred.clamp(min=0) / max(stats.count - 1, 1)


def _by_unit(channel_scores: Tensor, group: Units) -> Tensor:
    """[H] to [units] by summing a unit's channels."""
    return channel_scores.reshape(-1, group.columns).sum(dim=1)


SELECTORS: dict[str, Selector] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "wanda++": wanda_plus_plus,
    "flap": flap,
    "flap-wifn": flap_wifn,
    "flap-ifv": flap_ifv,
    "slimgpt": slimgpt,
    "gram": gram,
    "fold": fold,
}
# Their scores say which of a group's units go first, and nothing of two groups.
RANKS = (random, gram)


def find_selector(selector: str | Selector) -> Selector:
    """The selector of a name; a function or a `Folding` is returned as it is.

    Raises ValueError with the nearest known name.
    """
    if not isinstance(selector, str):
        return selector
    if selector not in SELECTORS:
        where = "SELECTORS in grail_hf/methods/selectors.py, or passed as a function"
        raise unknown_name("selector", selector, SELECTORS, where)
    return SELECTORS[selector]


def check_scores(scores: object, group: Units, name: str) -> Tensor:
    """Return what the selector `name` gave for `group` if it is a score for each unit.

    Raises ValueError for anything but a real tensor [units] without NaN; infinities count.
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
        f"shape [{units}], a score for each unit, of which the highest are kept"
    )


def choose(select: Selector, group: Units, stats: GramStats, width: int, name: str) -> Reduction:
    """The units of `group` to keep or to fold so that `width` are left.

    Raises ValueError, by the selector's `name`, where it does not give what it must.
    """
    units = group.weight.shape[1] // group.columns
    if width == units:
        return Reduction(torch.arange(units, device=group.weight.device), units)
    if isinstance(select, Folding):
        return check_clusters(select(group, stats, width), group, width, name)
    scores = check_scores(select(group, stats), group, name)
    return Reduction.keep_top(scores, width, group.partitions)


def check_clusters(reduction: object, group: Units, width: int, name: str) -> Reduction:
    """Return what the folding selector `name` gave if it makes `width` clusters of the units.

    Raises ValueError for anything but a `Reduction` that folds, with as many clusters in each
    partition, and none in two of them.
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


def needs_gradient(s: Selector) -> bool:
    from grail_hf.config import unwrapped

    return unwrapped(s) is wanda_plus_plus


def folds(s: Selector) -> bool:
    return isinstance(s, Folding)
