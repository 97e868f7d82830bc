"""What an allocation goes by: how much of each group of the dense model can be spared.

One pass over the dense model, layer by layer as in a compression: each group is scored and its
error at every width computed. For rules that ask for it, pruned and repaired variants of the model
are measured on calibration windows that the repair has not seen. A variant has one group reduced,
or, to choose a split between attention and MLP, all of them. The variants' hidden states go along
through the layers, so that every layer is loaded once, and the divergence of their logits from the
dense model's is measured at the end.

The work grows with the square of the layers where single groups are cut: each variant passes the
layers from its own on. Of L layers with two groups, "search" sends 6 L variants through L / 2
layers each, 3 L dense passes of `HELD_OUT_TOKENS`. With 32 layers and 128 x 2048 calibration tokens
that is 1.5 dense passes of the calibration, and a sixth of it for "error", which has one variant a
group and half as many tokens. A split has at most six variants for each kind of attention unit, on
`FEW_HELD_OUT_TOKENS`, whatever the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grail_hf.calibration.block import Block
from grail_hf.calibration.refit import replaceable_weight
from grail_hf.calibration.stream import Stream
from grail_hf.config import ATTENTION, GrailConfig
from grail_hf.methods.allocation import Allocation, expected_loss, find_allocation
from grail_hf.methods.budget import Budget, Profile, Profiles, Widths
from grail_hf.methods.gram import GramStats
from grail_hf.methods.linalg import sound_cholesky_
from grail_hf.methods.reduction import Reduction, best_first, expand_units
from grail_hf.methods.ridge import error_curve, ridge
from grail_hf.methods.selectors import WITHOUT_FOLDING, check_scores
from grail_hf.methods.widths import splits
from grail_hf.models.capture import as_returned, forwards_replaced, takes_tuples
from grail_hf.models.groups import Group
from grail_hf.planning.plan import Plan, plan_compression
from grail_hf.runtime import processes
from grail_hf.runtime.devices import input_device
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel
_DAMPING = 1e-4
# Divergences of variants are measured on few tokens, since they are the same ones for all.
HELD_OUT_TOKENS = 4096
FEW_HELD_OUT_TOKENS = 2048  # where one figure a group, or one a split, is all that is asked
LEAST_WINDOWS = 4  # to hold one out
MOST_HELD_OUT = 8  # one window in so many
# A channel's; with 32, the bundled model gets the same widths to within 3%.
PROFILED_TOKENS = 8
FEW_PROFILED_TOKENS = 4  # where no error curve is read, and at most half of the calibration
Batches = Sequence[dict[str, Tensor]]
Slot = tuple[str, int, int]
"""Kind, units and layer of a group."""


@dataclass
class _Variant:
    """The dense model with some groups reduced and repaired: its hidden states, [b, T, D] each.

    Attributes:
        slot: the one group that is reduced; None where those of `plan` are.
        width: of that group.
        hidden: the states after the layers so far.
        plan: gives the widths of all groups.
    """

    slot: Slot | None
    width: int
    hidden: list[Tensor]
    plan: Plan | None = None


def measured_plan(
    stream: Stream, forecast: Plan, config: GrailConfig
) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan with the widths, and the attention unit, that its rule finds best.

    Args:
        stream: of the dense model; its targets do not count.
        forecast: the plan so far.
        config: the settings.

    Returns:
        The plan, and what was measured of each split between attention and MLP, as
        `CompressionReport.splits` has it.
    """

    def planned(unit: str, profiles: Profiles | None = None, widths: Widths | None = None) -> Plan:
        settings = replace(config, attention_unit=unit)
        return plan_compression(stream.model, settings, forecast.architecture, profiles, widths)

    plans = {unit: planned(unit) for unit in forecast.attention_units}
    candidates: list[Plan] = []
    if find_allocation(forecast.allocation).splits:
        for unit, plan in plans.items():
            for widths in splits(plan.budgets, config):
                whole = max(widths[ATTENTION]) == plan.budgets[ATTENTION].num_units
                if unit == forecast.attention_unit or not whole:  # the same in any unit
                    candidates.append(planned(unit, widths=widths))
    found, divergences = profile(stream, list(plans.values()), config, candidates)
    profiles = dict(zip(plans, found, strict=True))
    if not candidates:
        settled = [planned(unit, own) for unit, own in profiles.items()]

        def loss(plan: Plan) -> float:
            own = profiles[plan.attention_unit]
            return expected_loss(plan.budgets, plan.widths, plan.allocation, own)

        return min(settled, key=loss), []
    ways = [
        {
            "attention_unit": candidate.attention_unit,
            "widths": {kind: max(widths) for kind, widths in candidate.widths.items()},
            "divergence": divergence,
        }
        for candidate, divergence in zip(candidates, divergences, strict=True)
    ]
    best = candidates[min(range(len(candidates)), key=divergences.__getitem__)]
    unit = best.attention_unit
    return planned(unit, profiles[unit], best.widths), ways


@torch.no_grad()
def profile(
    stream: Stream, plans: Sequence[Plan], config: GrailConfig, candidates: Sequence[Plan] = ()
) -> tuple[list[Profiles], list[float]]:
    """Measure every group that may lose units. The model is as it was afterwards.

    Args:
        stream: of the dense model; its targets do not count.
        plans: forecasts, which give the groups and their budgets. They differ in nothing but what
            an attention unit is; all are measured on the same moments.
        config: the settings; the divergences of single groups are measured near the widths of its
            sparsity.
        candidates: plans with widths, for the model's divergence with all of them in place.

    Returns:
        The profiles of each plan, and the divergence of each candidate: KL(dense || candidate) of
        the next token, nats a token.
    """
    with stream.placement.meter.phase("profile", whole=True):
        profiling = _Profiling(stream, plans, config, candidates)
        profiling.measure()
    rule = find_allocation(plans[0].allocation)
    if rule.sensitivities:
        _set_sensitivities(profiling.profiles)
    found: list[Profiles] = [
        {
            (spec.kind, index): profiling.profiles[spec.kind, spec.num_units, index]
            for index, layer in enumerate(plan.specs)
            for spec in layer
            if (spec.kind, spec.num_units, index) in profiling.profiles
        }
        for plan in plans
    ]
    return found, profiling.divergences


class _Profiling:
    """A profile under way.

    Attributes:
        profiles: of each group in each kind of units.
        divergences: of each candidate, when all layers are measured.
    """

    def __init__(
        self, stream: Stream, plans: Sequence[Plan], config: GrailConfig, candidates: Sequence[Plan]
    ) -> None:
        self.plans, self.config, self.candidates = plans, config, candidates
        self.rule = find_allocation(plans[0].allocation)
        # Folding has no scores: what it can spare is taken to be what greedy elimination can.
        self.select = WITHOUT_FOLDING if plans[0].select.folds else plans[0].select
        fit = list(stream.batches)
        held: list[dict[str, Tensor]] = []
        if self.rule.divergences or self.rule.sensitivities or candidates:
            fit, held = held_out(fit, wanted_tokens(self.rule))
        fit = fit if self.rule.divergences else enough(fit, plans)
        self.batches, self.is_held = _in_turns(fit, held)
        self.shown = stream.progress
        self.stream = replace(
            stream, specs=plans[0].specs, batches=self.batches, target="self", progress=False
        )
        self.profiles: dict[Slot, Profile] = {}
        self.divergences: list[float] = []
        self.variants: list[_Variant] = []

    def measure(self) -> None:
        layers = self.stream.placement.layers
        finals: list[Tensor] = []
        for block in Bar(
            self.stream.blocks(),
            total=len(layers),
            desc="Profiling",
            unit="layer",
            shown=self.shown,
            parts=len(layers),
        ):
            fitted, watched = (
                replace(block, batches=[b for b in block.batches if self.is_held[b.number] == held])
                for held in (False, True)
            )
            self._measure_layer(fitted, watched)
            if self.variants and block.index + 1 == len(layers):
                finals = watched.after([batch.hidden for batch in watched.batches])
        own = [self.batches[batch.number] for batch in watched.batches]
        with self.stream.placement.rest_of_model():
            found = _divergences(self.stream.model, layers, own, finals, self.variants)
        for variant, divergence in zip(self.variants, found, strict=True):
            if variant.slot:
                known = self.profiles[variant.slot]
                measured = {**known.divergences, variant.width: divergence}
                self.profiles[variant.slot] = replace(known, divergences=measured)
        self.divergences = found[: len(self.candidates)]

    def _measure_layer(self, fitted: Block, watched: Block) -> None:
        """Measure the layer's groups, and bring the variants of the model past the layer."""
        before = [batch.hidden for batch in watched.batches]
        if not fitted.index:
            self.variants = [_Variant(None, 0, before, plan) for plan in self.candidates]
        for variant in self.variants:
            if variant.slot:
                variant.hidden = watched.after(variant.hidden)
        moments = fitted.collect_all()
        repaired: dict[tuple[Slot, int], Tensor] = {}
        for position, group in enumerate(fitted.groups):
            stats, energy = moments.pop(0)
            if fitted.index not in self.plans[0].budgets[group.kind].ignored:
                if self.select.needs_gradient:
                    group.gradient = fitted.regional_gradient(group)
                for plan in self.plans:
                    own = group.in_units_of(plan.specs[fitted.index][position])
                    slot = (own.kind, own.num_units, fitted.index)
                    tried = _widths_of(slot, self.candidates)
                    if slot in self.profiles or not (tried or self.rule.loss):
                        continue
                    alone = self._single_widths(plan, own.kind)
                    weights = self._repairs(slot, own, stats, energy, [*tried, *alone])
                    repaired |= {(slot, width): weights[width] for width in tried}
                    for width in alone:
                        with _in_place([(own, weights[width])]):
                            hidden = watched.after(before)
                        self.variants.append(_Variant(slot, width, hidden))
            group.gradient = None
            del stats
        for variant in self.variants:
            if variant.plan:
                with _in_place(_of_candidate(variant.plan, fitted, repaired)):
                    variant.hidden = watched.after(variant.hidden)

    def _single_widths(self, plan: Plan, kind: str) -> list[int]:
        """Widths at which the model's divergence is measured with one group cut alone."""
        if plan is self.plans[0] or self.rule.divergences:
            return single_widths(self.rule, plan.budgets[kind], plan.sparsity)
        return []

    def _repairs(
        self, slot: Slot, group: Group, stats: GramStats, energy: float, widths: Sequence[int]
    ) -> dict[int, Tensor]:
        """Measure a group's profile; width -> its consumer [O, H], reduced and repaired."""
        stats = stats if self.rule.loss else _in_fp32_if_sound(stats)
        found = self.profiles[slot] = self._measured(group, stats, energy, widths)
        stats = stats.targeted(group.weight.to(stats.dtype))  # once for all widths
        return {width: _repaired(group, stats, found, width) for width in widths}

    def _measured(
        self, group: Group, stats: GramStats, energy: float, widths: Sequence[int]
    ) -> Profile:
        """The scores that the selector gives; and the error at every width, for a rule's loss.

        Without a loss, the units of the least of `widths` need not be told apart.
        """
        select, name = self.select, self.config.selector_name
        least = {} if self.rule.loss or not select.stops else {"width": min(widths)}

        def measure() -> Profile:
            scores = check_scores(select(group, stats, **least), group, name)
            if not self.rule.loss:
                return Profile(scores.cpu(), scores.new_zeros(0), {})
            weight = group.weight.to(stats.dtype)
            order = expand_units(best_first(scores, group.partitions), group.columns)
            errors = error_curve(weight, stats, order, _DAMPING, group.name)
            return Profile(scores.cpu(), errors[:: group.columns].cpu() / energy, {})

        return processes.once(measure, group.name)


def _of_candidate(
    plan: Plan, block: Block, repaired: Mapping[tuple[Slot, int], Tensor]
) -> list[tuple[Group, Tensor]]:
    """The layer's groups that a candidate cuts, with their repaired consumers."""
    index = block.index
    keys = [
        (group, ((spec.kind, spec.num_units, index), plan.widths[spec.kind][index]))
        for group, spec in zip(block.groups, plan.specs[index], strict=True)
    ]
    return [(group, repaired[key]) for group, key in keys if key in repaired]


def _widths_of(slot: Slot, candidates: Sequence[Plan]) -> list[int]:
    """The widths, but the full one, that candidates give a group in these units."""
    kind, units, index = slot
    return sorted(
        {
            plan.widths[kind][index]
            for plan in candidates
            if any(s.kind == kind and s.num_units == units for s in plan.specs[index])
        }
        - {units}
    )


def _set_sensitivities(profiles: dict[Slot, Profile]) -> None:
    """What was measured of a group in one kind of unit counts in the other: errors are errors."""
    measured = {
        (kind, index): divergence / float(profile.errors[width])
        for (kind, _, index), profile in profiles.items()
        for width, divergence in profile.divergences.items()
        if divergence > 0 and profile.errors[width] > 1e-6
    }
    usual = median(measured.values()) if measured else 1.0  # of a group that loses nothing there
    for (kind, units, index), profile in profiles.items():
        sensitivity = measured.get((kind, index), usual)
        profiles[kind, units, index] = replace(profile, sensitivity=sensitivity)


def single_widths(rule: Allocation, budget: Budget, sparsity: float) -> list[int]:
    """Widths of a group at which a rule has the model's divergence measured."""
    number = 3 if rule.divergences else 1 if rule.sensitivities else 0
    return widths_to_measure(budget, sparsity, number) if number else []


def widths_to_measure(budget: Budget, sparsity: float, number: int = 3) -> list[int]:
    """Widths about the one of equal shares; the error curve tells what lies between."""
    kept = 1 - sparsity
    fractions = (kept / 2, kept, (1 + kept) / 2) if number > 1 else (kept,)
    narrower = [width for width in budget.widths if width < budget.num_units]
    return sorted(
        {
            min(narrower, key=lambda width: abs(width - fraction * budget.num_units))
            for fraction in fractions
            if narrower
        }
    )


def enough(batches: Batches, plans: Sequence[Plan]) -> list[dict[str, Tensor]]:
    """Every n-th batch, so that each channel of the widest group has enough tokens.

    At least as many batches as processes.
    """
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    stride = profile_stride(tokens, plans[0])
    return list(batches[:: max(1, min(stride, len(batches) // processes.count()))])


def profile_stride(tokens: int, plan: Plan) -> int:
    """Of so many tokens, one in how many is enough to measure errors on."""
    specs = (spec for layer in plan.specs for spec in layer if not spec.experts)
    channels = max(spec.num_units * spec.columns for spec in specs)
    if find_allocation(plan.allocation).loss:
        return max(1, tokens // (PROFILED_TOKENS * max(channels, 1)))
    return max(2, tokens // (FEW_PROFILED_TOKENS * max(channels, 1)))


def held_out(
    batches: Batches, wanted: int = HELD_OUT_TOKENS
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches to fit to, and batches to measure on: whole windows, from all over the calibration.

    Enough windows for `wanted` tokens are held out, but at most one in `MOST_HELD_OUT`, and at
    least one. Where there are fewer than `LEAST_WINDOWS`, all serve for both.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    number = held_out_windows(sum(sizes), tokens, wanted)
    if number == sum(sizes):
        return list(batches), list(batches)
    every = sum(sizes) // number
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


def held_out_windows(windows: int, tokens: int, wanted: int) -> int:
    """How many of the calibration's windows are held out for `wanted` of its tokens."""
    if windows < LEAST_WINDOWS:
        return windows
    return windows // min(max(MOST_HELD_OUT, tokens // wanted), windows)


def wanted_tokens(rule: Allocation) -> int:
    """Tokens that are held out for a rule's divergences."""
    return HELD_OUT_TOKENS if rule.divergences else FEW_HELD_OUT_TOKENS


def _in_fp32_if_sound(stats: GramStats) -> GramStats:
    """The statistics for computing in fp32, at half the time of fp64, which a split does not need.

    Where rounding would dominate the solves, with channels of very different magnitudes, they stay
    as they are.
    """
    narrow = stats.computed_in(torch.float32)
    sound = sound_cholesky_(narrow.moments.dense(), _DAMPING * narrow.energy.mean())
    return stats if sound is None else narrow


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


def _repaired(group: Group, stats: GramStats, found: Profile, width: int) -> Tensor:
    """[O, H], the consumer without the channels of all but `width` units, and repaired."""
    reduction = Reduction.keep_top(found.scores, width, group.partitions)
    kept = reduction.kept_channels(group.columns)
    weight = group.weight.to(stats.dtype)
    repaired = torch.zeros_like(weight)
    repaired[:, kept] = processes.once(
        lambda: ridge(weight, stats, kept, _DAMPING, group.name).weight, group.name
    )
    return repaired.to(group.weight.dtype)


@contextmanager
def _in_place(weights: Sequence[tuple[Group, Tensor]]) -> Iterator[None]:
    """The groups' consumers have these weights [O, H] inside the context."""
    with ExitStack() as stack:
        for group, weight in weights:
            projection = group.projection(group.spec.consumer)
            stack.enter_context(replaceable_weight(projection))(weight)
        yield


def _divergences(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Batches,
    dense: Sequence[Tensor],
    variants: Sequence[_Variant],
) -> list[float]:
    """KL(dense || variant) of the next token, nats a token, for each variant.

    The model's own forward makes logits of the hidden states after the last layer, so that its
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
