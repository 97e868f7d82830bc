"""Spherical k-means, for selectors that fold units together."""

from __future__ import annotations

import torch
from torch import Tensor

from grail_hf.methods.reduction import sum_clusters


def k_means(
    inner: Tensor,
    weights: Tensor,
    clusters: int,
    generator: torch.Generator,
    max_steps: int = 100,
) -> Tensor:
    """Lloyd's weighted k-means from the inner products of the points.

    A centre is the weighted mean of its points, so |p_i - centre|^2 is computed from means of inner
    products, and a step takes n^2 operations in any dimension. Initialised by k-means++ (Arthur &
    Vassilvitskii 2007). Ties go to the first cluster. An empty cluster takes the point of largest
    cost, so that the number of clusters is always as requested.

    Args:
        inner: [n, n], inner products of n points, fp64 if the device supports it.
        weights: [n], positive, in the same dtype.
        clusters: from 1 to n.
        generator: on the CPU, for the initialisation.
        max_steps: largest number of steps.

    Returns:
        [n] int64, the cluster of each point.
    """
    norms = inner.diagonal()
    centres = _spread_points(inner, weights, clusters, generator)
    labels = _nearest(norms[:, None] + norms[centres] - 2 * inner[:, centres], weights)
    for _ in range(max_steps):
        shares = weights / sum_clusters(weights, labels)[labels]
        to_centres = sum_clusters(shares[:, None] * inner, labels)  # [clusters, n]
        of_centres = sum_clusters(shares * to_centres.gather(0, labels[None])[0], labels)
        before = labels
        labels = _nearest(norms[:, None] + of_centres - 2 * to_centres.mT, weights)
        if torch.equal(labels, before):
            break
    return labels


def _spread_points(
    inner: Tensor, weights: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """[count] int64, distinct points, drawn in proportion to weight times squared distance."""
    norms = inner.diagonal()
    nearest = torch.full_like(norms, torch.inf)
    left = torch.ones(norms.numel(), dtype=torch.float64)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        chances = ((weights * nearest) if chosen else weights).cpu() * left
        # If only copies of chosen points are left, they are equally likely.
        point = torch.multinomial(chances if chances.any() else left, 1, generator=generator)
        left[point] = 0
        chosen.append(point)
        at = point.to(inner.device)
        distance = norms + norms[at] - 2 * inner[at].flatten()
        nearest = torch.minimum(nearest, distance.clamp_min(0))
    return torch.cat(chosen).to(inner.device)


def _nearest(distance: Tensor, weights: Tensor) -> Tensor:
    """[n, clusters] squared distances to [n] int64, the nearest cluster; no cluster is empty."""
    own, labels = weights * distance.min(dim=1).values, distance.argmin(dim=1)
    counts = labels.bincount(minlength=distance.shape[1])
    for empty in (counts == 0).nonzero().flatten():
        point = own.masked_fill(counts[labels] == 1, -torch.inf).argmax()
        counts[labels[point]] -= 1
        counts[empty] += 1
        labels[point] = empty
    return labels
