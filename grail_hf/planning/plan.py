"""What a compression will do, from shapes alone: widths, parameters, config.

Everything that can be refused is refused here, before a weight or a calibration token is read.
A plan can be made of a model on the meta device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from grail_hf.calibration.refit import refit_batches, refit_stride
from grail_hf.config import ATTENTION, ATTENTION_UNITS, AUTO, EXPERTS, GrailConfig
from grail_hf.methods.allocation import MLP_MULTIPLES, allocate, expected_loss, find_allocation
from grail_hf.methods.budget import Budget, Profiles, Widths
from grail_hf.methods.selectors import Selector, find_selector
from grail_hf.methods.widths import EXPERTS_STEP, TOLERANCE, one_width_a_kind
from grail_hf.models.architectures import find_architecture
from grail_hf.models.configs import compressed_config, said_widths, switch_on_biases_
from grail_hf.models.decoder import (
    check_apart,
    check_model,
    context_length,
    decoder_layers,
    is_stock_causal_lm,
)
from grail_hf.models.experts import ExpertsGroup, group_in
from grail_hf.models.groups import Group
from grail_hf.models.quantization import without_quantization
from grail_hf.models.schema import Architecture, GroupSpec, Rehome
from grail_hf.planning.checks import (
    check_comparable,
    check_equal,
    check_experts,
    check_offered,
    check_one_width,
    check_tied,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# With 2 tokens a channel and little ridge, repair did worse than plain pruning on held-out text of
# the bundled model; with 8 it did much better.
TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        architecture: the model type's entry.
        specs: of each decoder layer, its groups.
        select: scores the units of a group.
        budgets: what the units of each kind cost.
        widths: kind -> units kept, one number a layer, 0 where a layer has no units; a forecast
            until the allocation's profiles are measured.
        mended: (layer, kind) of the groups that keep all units and are repaired all the same,
            because of what the groups in front of them lost.
        config: of the compressed model.
        biased: kinds of group whose consumer's bias is fitted.
        newly_biased: kinds whose projections have biases in `config`, and did not have them.
        projection_parameters: of all decoder blocks' projections, before and after.
        total_parameters: of the whole model, tied ones once, before and after.
        experts_at_once: experts of a layer whose Grams are held at a time.
        allocation: the rule that gives the widths.
        attention_unit: what the attention's units are.
        attention_units: what they may be, where the allocation is to choose; else this one alone.
        errors: what these widths lose by the `error` rule, and what one width a kind would; None
            where the rule is another, or has not measured.
    """

    architecture: Architecture
    specs: tuple[tuple[GroupSpec, ...], ...]
    select: Selector
    budgets: dict[str, Budget]
    widths: Widths
    mended: frozenset[tuple[int, str]]
    config: PreTrainedConfig
    biased: frozenset[str]
    newly_biased: frozenset[str]
    projection_parameters: tuple[int, int]
    total_parameters: tuple[int, int]
    experts_at_once: int
    allocation: str
    attention_unit: str
    attention_units: tuple[str, ...]
    errors: tuple[float, float] | None

    @property
    def measures(self) -> bool:
        """Whether the widths depend on what is measured of the dense model."""
        return bool(self.reduced) and find_allocation(self.allocation).measures

    @property
    def units(self) -> dict[str, int]:
        """kind -> units in a layer, before."""
        return {
            kind: max(spec.num_units for layer in self.specs for spec in layer if spec.kind == kind)
            for kind in self.widths
        }

    @property
    def reduced(self) -> tuple[tuple[int, GroupSpec], ...]:
        """(layer, group) of the groups that lose units."""
        return tuple(
            (index, spec) for index, spec in self.repaired if (index, spec.kind) not in self.mended
        )

    @property
    def repaired(self) -> tuple[tuple[int, GroupSpec], ...]:
        """(layer, group) of the groups that lose units or are mended."""
        return tuple(
            (index, spec)
            for index, layer in enumerate(self.specs)
            for spec in layer
            if self.widths[spec.kind][index] < spec.num_units or (index, spec.kind) in self.mended
        )

    def changes(self, layer: int, kind: str) -> bool:
        """Whether a layer's group loses units, or is mended."""
        return any((index, spec.kind) == (layer, kind) for index, spec in self.repaired)

    def runs(self, spec: GroupSpec) -> int:
        """Passes that a group's Grams take: of a mixture, as many as hold all experts in turns."""
        return -(-spec.experts // self.experts_at_once) if spec.experts else 1

    @property
    def sparsity(self) -> float:
        """Fraction of the projection parameters removed."""
        before, after = self.projection_parameters
        return 1 - after / before


def plan_compression(
    model: PreTrainedModel,
    config: GrailConfig,
    architecture: Architecture | None = None,
    profiles: Profiles | None = None,
    widths: Widths | None = None,
) -> Plan:
    """Check the model against the config and settle the widths.

    Args:
        model: the dense model; on the meta device it will do.
        config: the settings.
        architecture: the model type's entry; None for the table's.
        profiles: what the allocation goes by (`profiling.profile`), if it has been measured.
        widths: those of a plan made earlier from the same.

    Raises:
        TypeError: not a transformers model.
        ValueError: a selector, allocation or architecture that is not known, a model that cannot
            be compressed (encoder-decoder, quantised, sharded over processes, with adapters, with
            layers that share parameters), a sparsity that cannot be reached, an `ignore` entry that
            matches nothing, widths that no config can say.
    """
    select = find_selector(config.selector)
    check_model(model)
    architecture = architecture or find_architecture(model.config.model_type)
    if architecture.model_type != model.config.model_type:
        raise ValueError(
            f"architecture is an entry for {architecture.model_type!r} and the model is a "
            f"{model.config.model_type!r}: give that type's, or None for the table's"
        )
    layers = decoder_layers(model, architecture)
    check_apart(layers)
    attention_units = _attention_units(architecture, model.config, layers, config)
    # From here on, "auto" is what it stands for.
    config = replace(config, attention_unit=attention_units[0])
    specs = tuple(
        architecture.groups(model.config, layer, config.attention_unit) for layer in layers
    )
    names = {id(module): name for name, module in model.named_modules()}
    groups = [
        [group_in(layer, spec, names[id(layer)]) for spec in of_layer]
        for layer, of_layer in zip(layers, specs, strict=True)
    ]
    check_offered(groups, model.config.model_type, config)
    ignored = _ignored_groups(groups, config)
    movable = architecture.rehome if is_stock_causal_lm(model) else None
    budgets = _budgets(groups, ignored, config)
    budgets[ATTENTION] = _sayable(budgets[ATTENTION], specs, model.config, movable, config.rehome)
    if config.allocation == AUTO:
        config = replace(config, allocation=_measurable(budgets, config))
    if architecture.per_layer is not None:
        check_one_width(config, architecture.model_type, architecture.per_layer.reason)
    check_experts(specs, select, config)
    check_comparable(select, config)
    widths = widths or allocate(budgets, config, profiles)
    errors = profiles and _errors(budgets, widths, config, profiles)
    check_tied(groups, widths)
    if architecture.per_layer is not None:
        check_equal(widths, architecture.model_type, architecture.per_layer.reason)
    before = sum(budget.cost(budget.num_units) for budget in budgets.values())
    after = sum(budget.cost_of(widths[kind]) for kind, budget in budgets.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    new_config = compressed_config(
        without_quantization(model.config),
        specs,
        widths,
        movable if config.rehome else None,
    )
    biased, newly_biased = set(), set()
    if config.bias:
        newly_biased = switch_on_biases_(new_config, model.config, specs, widths)
        biased = newly_biased | {
            group.kind
            for layer in groups
            for group in layer
            if group.num_units and group.bias is not None
        }
    after += sum(
        group.missing_biases(widths[group.kind][index])
        for index, layer in enumerate(groups)
        for group in layer
        if group.kind in newly_biased
    )
    norms = sum(
        group.norm_cost * (group.num_units - widths[group.kind][index])
        for index, layer in enumerate(groups)
        for group in layer
    )
    return Plan(
        architecture,
        specs,
        select,
        budgets,
        widths,
        _mended(specs, widths, ignored, config),
        new_config,
        frozenset(biased),
        frozenset(newly_biased),
        (before, after),
        (total, total - before + after - norms),
        min(
            (
                group.at_once(config.solve_torch_dtype.itemsize * (1 + config.holds_out))
                for layer in groups
                for group in layer
                if isinstance(group, ExpertsGroup)
            ),
            default=0,
        ),
        config.allocation,
        config.attention_unit,
        attention_units,
        errors or None,
    )


def _attention_units(
    architecture: Architecture, model_config: Any, layers: nn.ModuleList, config: GrailConfig
) -> tuple[str, ...]:
    """What may count as an attention unit: of "auto", whatever gives a choice of widths."""
    if config.attention_unit != AUTO:
        return (config.attention_unit,)
    choices: dict[str, list[GroupSpec]] = {}
    for unit in ATTENTION_UNITS:
        every = (architecture.groups(model_config, layer, unit) for layer in layers)
        attention = [spec for of_layer in every for spec in of_layer if spec.kind == ATTENTION]
        # Where queries are not grouped, both units are the same.
        if attention not in choices.values() and any(
            spec.offered and spec.partitions < spec.num_units for spec in attention
        ):
            choices[unit] = attention
    return tuple(choices) or ATTENTION_UNITS[:1]


def _measurable(budgets: Mapping[str, Budget], config: GrailConfig) -> str:
    """The rule that "auto" stands for: one that measures where there is a split to choose."""
    free = [budget for budget in budgets.values() if len(budget.uniform_widths) > 1]
    fixed = config.mlp_sparsity is not None or config.attention_sparsity is not None
    a_choice = config.sparsity and not fixed and len(free) > 1
    return "uniform-split" if a_choice and EXPERTS not in budgets else "uniform"


def _errors(
    budgets: Mapping[str, Budget],
    widths: Widths,
    config: GrailConfig,
    profiles: Profiles,
) -> tuple[float, float] | None:
    """The expected losses of `widths` and of one width per kind, if the rule compares layers."""
    if not find_allocation(config.allocation).sensitivities:
        return None  # errors of different layers do not compare
    try:
        others = one_width_a_kind(budgets, config)
    except ValueError:  # it may not reach the sparsity
        return None
    rule = config.allocation
    own, another = (expected_loss(budgets, each, rule, profiles) for each in (widths, others))
    return own, another


def _mended(
    specs: Sequence[Sequence[GroupSpec]],
    widths: Widths,
    ignored: set[tuple[int, str]],
    config: GrailConfig,
) -> frozenset[tuple[int, str]]:
    """(layer, kind) of the groups that lose nothing, and can make up for what others lost."""
    mended: set[tuple[int, str]] = set()
    lost = False
    for index, layer in enumerate(specs):
        for spec in layer:
            slot = (index, spec.kind)
            if widths[spec.kind][index] < spec.num_units:
                lost = True
            elif lost and spec.num_units and not spec.experts and slot not in ignored:
                mended.add(slot)
    return frozenset(mended) if config.targeted else frozenset()


def _budgets(
    groups: Sequence[Sequence[Group]], ignored: set[tuple[int, str]], config: GrailConfig
) -> dict[str, Budget]:
    """Of each kind of group that there is, the attention's first."""
    kinds = dict.fromkeys([ATTENTION, *(group.kind for layer in groups for group in layer)])
    budgets: dict[str, Budget] = {}
    total = sum(group.num_parameters for layer in groups for group in layer)
    for kind in kinds:
        of_kind = [next((g for g in layer if g.kind == kind), None) for layer in groups]
        budgets[kind] = _budget(of_kind, {i for i, own in ignored if own == kind}, total, config)
    for group in (group for layer in groups for group in layer if group.spec.tied_to):
        leader = budgets[str(group.spec.tied_to)]
        step = leader.step * group.num_units // leader.num_units
        budgets[group.kind] = replace(budgets[group.kind], step=step)
    return budgets


def _budget(
    groups: Sequence[Group | None], ignored: set[int], total: int, config: GrailConfig
) -> Budget:
    """Of one kind's groups, at most one a layer; those in layers `ignored` keep their width.

    So do those that are not offered. `total` is the number of all blocks' projection parameters.
    Raises ValueError where the layers' units are not alike.
    """
    present = [group for group in groups if group is not None]
    counted = [group for group in present if group.num_units]
    sizes = {(group.num_units, group.unit_cost) for group in counted}
    if len(sizes) > 1:
        raise ValueError(
            f"the layers of {counted[0].name} and others differ in units or in their size, "
            f"{sorted(sizes)} (units, parameters of one): compress the dense model instead"
        )
    ((num_units, unit_cost),) = sizes or {(1, 0)}
    first = counted[0] if counted else present[0]
    kept = {i for i, group in enumerate(groups) if group is None or not group.spec.offered}
    free = len(groups) - len(ignored | kept)
    own = config.attention_sparsity if first.kind == ATTENTION else config.mlp_sparsity
    whole = total if own is None else free * num_units * unit_cost
    return Budget(
        num_units,
        unit_cost,
        fixed_cost=first.num_parameters - num_units * unit_cost,
        step=_step(first, config, whole / max(free * unit_cost, 1)),
        layers=len(groups),
        ignored=frozenset(ignored | kept),
        absent=frozenset(i for i, g in enumerate(groups) if g is None or not g.num_units),
        whole_cost=sum(group.num_parameters for group in present if not group.num_units),
    )


def _sayable(
    budget: Budget,
    specs: Sequence[Sequence[GroupSpec]],
    model_config: PreTrainedConfig,
    movable: Rehome | None,
    may_move: bool,
) -> Budget:
    """The attention's budget with the widths that the result's config can say.

    These are any where the model can become one of another type, and where a layer keeps all its
    units: the widest layer's width is the config's own, and the others have entries of theirs.
    """
    moves = movable is not None and not movable.obstacles(model_config)
    if (moves and may_move) or budget.ignored > budget.absent:
        return budget
    return replace(
        budget,
        representable=said_widths(model_config, specs),
        remedy="rehome=True" if moves else "",
    )


def _step(group: Group, config: GrailConfig, units: float) -> int:
    """Widths of such groups are multiples of this.

    "auto" rounds to what kernels like where a step in all layers moves the sparsity by so little
    that any one can still be reached: by `TOLERANCE` in either direction.

    Args:
        group: one of them.
        config: the settings.
        units: that a layer would have if they held all the parameters the sparsity is counted in.
    """
    if group.kind == ATTENTION:
        return group.partitions
    least = EXPERTS_STEP if group.spec.experts else 1
    if not isinstance(config.multiple_of, str):
        return math.lcm(config.multiple_of, least)
    fitting = (
        multiple
        for multiple in MLP_MULTIPLES
        if group.num_units % multiple == 0 and multiple <= 2 * TOLERANCE * units
    )
    return next(fitting, MLP_MULTIPLES[-1])


def group_batches(plan: Plan, config: GrailConfig, number: int, first: int = 0) -> int:
    """Batches that are run for groups, from layer `first` on, with `number` of calibration."""
    folding = 0
    if plan.select.folds:
        folding = 1 if config.targeted else 2
    total = 0
    for index, spec in plan.repaired:
        if index < first:
            continue
        refits = config.refit_steps > 0 and spec.linear is not None
        folds = folding * ((index, spec.kind) not in plan.mended)
        each = number * (plan.runs(spec) + folds + refits)
        if refits:
            each += refit_batches(
                config.refit_steps, len(range(0, number, refit_stride(config.refit_steps)))
            )
        total += each
    return total


def refits(plan: Plan, config: GrailConfig) -> dict[str, tuple[int, int]]:
    """Of each kind, the groups that will be refitted, of how many that are repaired.

    The others are linear in no producer, or a mixture's experts. Empty without a refit.
    """
    found: dict[str, tuple[int, int]] = {}
    for _, spec in plan.repaired if config.refit_steps else ():
        refitted, repaired = found.get(spec.kind, (0, 0))
        found[spec.kind] = refitted + (spec.linear is not None), repaired + 1
    return found


def warn_of_few_tokens(tokens: int, plan: Plan, config: GrailConfig) -> None:
    """Warn where a consumer has so many channels that the solve would fit the tokens' noise."""
    channels = max(plan.widths[spec.kind][i] * spec.columns for i, spec in plan.reduced)
    few = tokens < TOKENS_PER_CHANNEL * channels
    if few and not isinstance(config.ridge, str) and config.ridge < 0.1:
        logger.warning(
            "%d calibration tokens for %d channels are fewer than %d a channel: the repair may do "
            "harm on other text; use more num_samples, or ridge='auto'",
            *(tokens, channels, TOKENS_PER_CHANNEL),
        )


def window_length(model: PreTrainedModel, config: GrailConfig) -> int:
    """Tokens in a window: as the config says, within the model's limit."""
    return min(config.seq_length, context_length(model) or config.seq_length)


def _ignored_groups(groups: Sequence[Sequence[Group]], config: GrailConfig) -> set[tuple[int, str]]:
    """(layer, kind) of the groups that keep their width. ValueError if an entry matches nothing."""
    ignored: set[tuple[int, str]] = set()
    for entry in config.ignore:
        found = {
            (index, group.kind)
            for index, layer in enumerate(groups)
            for group in layer
            if _matches(entry, index, group.name, len(groups))
        }
        if not found:
            raise ValueError(
                f"ignore={entry!r} matches nothing: there are layers 0 to {len(groups) - 1}, and "
                f"names like {', '.join(group.name for group in groups[0])}"
            )
        ignored |= found
    return ignored


def _matches(entry: int | str, index: int, name: str, num_layers: int) -> bool:
    if isinstance(entry, int):
        return index == (entry if entry >= 0 else num_layers + entry)
    return fnmatchcase(f".{name}.", f"*.{entry}.*")
