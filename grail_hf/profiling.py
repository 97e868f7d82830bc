"""What an allocation goes by: how much of each group of the dense model can be spared.

One pass over the dense model, layer by layer as in a compression: each group is scored and its
error at every width computed. For rules that ask for it, a few pruned and repaired variants of
each group are then put in its place, one at a time, on calibration windows that the repair has not
seen; their hidden states ride along through the remaining dense layers, so that every layer is
loaded once, and the divergence of their logits from the dense model's is measured at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grail_hf import processes
from grail_hf.allocation import Budget, Profile, Profiles, find_allocation
from grail_hf.compensation import error_curve, ridge
from grail_hf.gram import GramStats
from grail_hf.groups import Group
from grail_hf.offload import Homes, Place, input_device
from grail_hf.progress import Bar
from grail_hf.reduction import Reduction, best_first, expand_units
from grail_hf.refit import replaceable_weight
from grail_hf.selectors import Folding, Scoring, check_scores, gram
from grail_hf.stream import Block, as_returned, forwards_replaced, stream, takes_tuples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grail_hf.config import GrailConfig
    from grail_hf.planning import Plan

_DAMPING = 1e-4

# Divergences of variants are measured on few tokens, since they are the same ones for all.
HELD_OUT_TOKENS = 4096
LEAST_WINDOWS = 4  # to hold one out

# A channel's; with 32, the bundled model gets the same widths to within 3%.
PROFILED_TOKENS = 8

Batches = Sequence[dict[str, Tensor]]


@dataclass
class _Variant:
    """The dense model with one group reduced and repaired: its hidden states, [b, T, D] each."""

    slot: tuple[str, int, int]
    width: int
    hidden: list[Tensor]


def profile(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    batches: Batches,
    config: GrailConfig,
    homes: Homes,
    place: Place | None = None,
    progress: bool = True,
) -> list[Profiles]:
    """Measure every group that may lose units. The model is as it was afterwards.

    Args:
        model: the dense model.
        plans: forecasts, which give the groups and their budgets. They differ in nothing but what
            an attention unit is; all are measured on the same moments.
        batches: of `{input_ids [b, T], attention_mask [b, T] (optional)}`.
        config: the settings; the divergences are measured near the widths of its sparsity.
        homes: where the decoder layers lie, and where they work.
        place: where hidden states are kept; by default where the model takes its inputs.
        progress: show a bar on standard error.

    Returns:
        The profiles of each plan.
    """
    with homes.meter.phase("profile", whole=True):
        return _profile(model, plans, batches, config, homes, place, progress)


@torch.no_grad()
def _profile(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    batches: Batches,
    config: GrailConfig,
    homes: Homes,
    place: Place | None,
    progress: bool,
) -> list[Profiles]:
    first = plans[0]
    wanted = find_allocation(first.allocation).divergences
    parts, is_held = _in_turns(*(held_out(batches) if wanted else (enough(batches, plans), [])))
    # Folding has no scores: what it can spare is taken to be what greedy elimination can.
    score = gram if isinstance(first.select, Folding) else first.select
    profiles: dict[tuple[str, int, int], Profile] = {}  # by kind, units and layer
    variants: list[_Variant] = []
    finals: list[Tensor] = []
    layers = homes.layers
    blocks = stream(
        model,
        homes,
        first.specs,
        parts,
        place,
        seed=config.seed,
        progress=False,
        dtype=config.torch_dtype,
    )
    for block in Bar(
        blocks,
        total=len(layers),
        desc="Profiling",
        unit="layer",
        shown=progress,
        parts=len(layers),
    ):
        index = block.index
        fitted, watched = (
            replace(block, batches=[b for b in block.batches if is_held[b.number] == held])
            for held in (False, True)
        )
        for variant in variants:
            variant.hidden = watched.behind(variant.hidden)
        moments = fitted.collect_all()
        for position, group in enumerate(block.groups):
            stats, energy = moments.pop(0)
            if index in first.budgets[group.kind].ignored:
                continue
            for plan in plans:
                own = group.in_units_of(plan.specs[index][position])
                slot = (own.kind, own.num_units, index)
                if slot in profiles:
                    continue
                measure = partial(_measured, own, stats, energy, score, config.selector_name)
                profiles[slot] = fitted.once(own, measure)
                if wanted:
                    variants += [
                        _Variant(slot, width, _reduced(watched, own, stats, profiles[slot], width))
                        for width in widths_to_measure(plan.budgets[own.kind], plan.sparsity)
                    ]
            del stats
        if wanted and index + 1 == len(layers):
            finals = watched.behind([batch.hidden for batch in watched.batches])
    own_batches = [parts[batch.number] for batch in watched.batches]
    with homes.surroundings():
        divergences = _divergences(model, layers, own_batches, finals, variants)
    for variant, divergence in zip(variants, divergences, strict=True):
        known = profiles[variant.slot]
        measured = {**known.divergences, variant.width: divergence}
        profiles[variant.slot] = replace(known, divergences=measured)
    return [
        {
            (spec.kind, index): profiles[spec.kind, spec.num_units, index]
            for index, layer in enumerate(plan.specs)
            for spec in layer
            if (spec.kind, spec.num_units, index) in profiles
        }
        for plan in plans
    ]


def widths_to_measure(budget: Budget, sparsity: float) -> list[int]:
    """Three widths about the one of equal shares; the error curve tells what lies between."""
    kept = 1 - sparsity
    wishes = (fraction * budget.num_units for fraction in (kept / 2, kept, (1 + kept) / 2))
    nearest = {min(budget.widths, key=lambda width: abs(width - wish)) for wish in wishes}
    return sorted(nearest - {budget.num_units})


def enough(batches: Batches, plans: Sequence[Plan]) -> list[dict[str, Tensor]]:
    """Every n-th batch, so that each channel of the widest group has `PROFILED_TOKENS` tokens.

    There are at least as many batches as processes.
    """
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    stride = profile_stride(tokens, plans[0])
    return list(batches[:: max(1, min(stride, len(batches) // processes.count()))])


def profile_stride(tokens: int, plan: Plan) -> int:
    """Of so many tokens, one in how many is enough to measure errors on."""
    specs = (spec for layer in plan.specs for spec in layer if not spec.experts)
    channels = max(spec.num_units * spec.columns for spec in specs)
    return max(1, tokens // (PROFILED_TOKENS * max(channels, 1)))


def held_out(batches: Batches) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches to fit to, and batches to measure on: whole windows, from all over the calibration.

    Enough windows for `HELD_OUT_TOKENS` are held out, but at most one in `LEAST_WINDOWS`; where
    there are fewer than that, all serve for both.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    if sum(sizes) < LEAST_WINDOWS:
        return list(batches), list(batches)
    every = min(max(LEAST_WINDOWS, tokens // HELD_OUT_TOKENS), sum(sizes))
    chosen = torch.split(torch.arange(sum(sizes)) % every == every - 1, sizes)
    fit, held = (
        [
            {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()}
            for batch, rows in zip(batches, part, strict=True)
            if rows.any()
        ]
        for part in ([~rows for rows in chosen], chosen)
    )
    return fit, held


def _measured(group: Group, stats: GramStats, energy: float, score: Scoring, name: str) -> Profile:
    """The scores that the selector of this name gives, and the error at every width."""
    scores = check_scores(score(group, stats), group, name)
    weight = group.weight.to(stats.dtype)
    order = expand_units(best_first(scores, group.partitions), group.columns)
    errors = error_curve(weight, stats, order, _DAMPING, group.name)
    return Profile(scores.cpu(), errors[:: group.columns].cpu() / energy, {})


def _in_turns(
    fit: Sequence[dict[str, Tensor]], held: Sequence[dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[bool]]:
    """Batches to fit to and batches to measure on, mixed evenly, and which are of the second kind.

    So that processes that each take a run of them have as many of both.
    """
    places = [
        ((number + 0.5) / len(batches), is_held, batch)
        for is_held, batches in enumerate((fit, held))
        for number, batch in enumerate(batches)
    ]
    places.sort(key=lambda place: place[:2])
    return [batch for _, _, batch in places], [bool(is_held) for _, is_held, _ in places]


def _reduced(
    block: Block, group: Group, stats: GramStats, found: Profile, width: int
) -> list[Tensor]:
    """Behind the layer, [b, T, D] each, with the group cut to `width` units and repaired."""
    reduction = Reduction.keep_top(found.scores, width, group.partitions)
    kept = reduction.kept_channels(group.columns)
    weight = group.weight.to(stats.dtype)
    repaired = torch.zeros_like(weight)
    repaired[:, kept] = processes.once(
        lambda: ridge(weight, stats, kept, _DAMPING, group.name).weight, group.name
    )
    with replaceable_weight(group.projection(group.spec.consumer)) as put:
        put(repaired)
        return block.behind([batch.hidden for batch in block.batches])


def _divergences(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Batches,
    dense: Sequence[Tensor],
    variants: Sequence[_Variant],
) -> list[float]:
    """KL(dense || variant) of the next token, nats a token, for each variant.

    The model's own forward makes logits of the hidden states behind the last layer, so that its
    final norm, scaling and caps are what they are.
    """
    device = input_device(model)
    in_tuple = takes_tuples(model, layers)

    def log_probabilities(inputs: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        returned = as_returned(hidden.to(device), in_tuple)
        with forwards_replaced(layers, lambda *_, **__: returned):
            logits: Tensor = model(**inputs, use_cache=False).logits
        log_probabilities = logits.float().log_softmax(dim=-1)
        mask = inputs.get("attention_mask")
        return log_probabilities[mask.bool()] if mask is not None else log_probabilities

    sums, tokens = [0.0] * len(variants), 0
    for index, inputs in enumerate(batches):
        goal = log_probabilities(inputs, dense[index])
        tokens += goal[..., 0].numel()
        for number, variant in enumerate(variants):
            found = log_probabilities(inputs, variant.hidden[index])
            sums[number] += F.kl_div(found, goal, reduction="sum", log_target=True).item()
    *totals, count = processes.total([*sums, tokens], "the divergences")
    return [total / count for total in totals]
