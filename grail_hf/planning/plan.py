"""Plan a compression from shapes alone: widths, parameters, config.

Bad input is refused here, before a weight or a calibration token is read. A plan can be made of a
model on the meta device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from grail_hf.calibration.refit import refit_batches, refit_stride
from grail_hf.config import ATTENTION, ATTENTION_UNITS, AUTO, GrailConfig
from grail_hf.methods.allocation import allocate, expected_loss, find_allocation
from grail_hf.methods.budget import Budget, Budgets, Profiles, Widths
from grail_hf.methods.selectors import Selector, find_selector
from grail_hf.methods.widths import one_width_a_kind
from grail_hf.models.architectures import find_architecture
from grail_hf.models.compatibility import Rehome
from grail_hf.models.configs import compressed_config, switch_on_biases_
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
from grail_hf.models.schema import Architecture, GroupSpec
from grail_hf.planning.budgets import budgets_of, resolved_allocation, with_representable_widths
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

# With 2 tokens per channel and little ridge, repair was worse than plain pruning on held-out text
# for the bundled model; with 8 it was much better.
TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class Plan:
    """What a compression will do to a model.

    Attributes:
        architecture: the model type's entry.
        specs: the groups of each decoder layer.
        select: scores the units of a group.
        budgets: kind -> what its units cost.
        widths: kind -> units kept, one number per layer, 0 where a layer has no such units; a
            forecast until the allocation has measured its profiles.
        mended: (layer, kind) of the groups that keep all units and are repaired nevertheless, for
            what groups before them lost.
        config: of the compressed model.
        biased: kinds of group whose consumer's bias is fitted.
        newly_biased: kinds whose projections have biases in `config`, and did not have them.
        projection_parameters: of all decoder blocks, before and after.
        total_parameters: of the whole model, tied ones once, before and after.
        experts_at_once: experts of a layer whose Grams are held at a time.
        allocation: name of the rule that gives the widths.
        attention_unit: the attention unit.
        attention_units: those that the allocation may choose from; else this one alone.
        errors: what these widths lose by the `error` rule, and what one width per kind would lose;
            None where the rule is another, or has not measured yet.
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
        """Whether the widths depend on measurements of the dense model."""
        return bool(self.reduced) and find_allocation(self.allocation).measures

    @property
    def units(self) -> dict[str, int]:
        """kind -> units per layer, before."""
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
        """Passes that a group's Grams take, of which each holds those of `experts_at_once`."""
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
    """Check the model against the config and determine the widths.

    Args:
        model: the dense model; it may be on the meta device.
        config: the settings.
        architecture: the model type's entry; None for the table's.
        profiles: the measurements that the allocation uses (`profiling.profile`), once they exist.
        widths: those of an earlier plan of the same model and settings, kept as they are.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown selector, allocation or architecture; a model that cannot be
            compressed (encoder-decoder, quantised, sharded over processes, with adapters, with
            layers that share parameters); a sparsity that cannot be reached; an `ignore` entry that
            matches nothing; widths that no config can represent.
    """
    select = find_selector(config.selector)
    check_model(model)
    dense = _resolved(model, config, architecture)
    check_offered(dense.groups, model.config.model_type, config)
    ignored = _ignored_groups(dense.groups, config)
    budgets = budgets_of(dense.groups, ignored, dense.config)
    budgets[ATTENTION] = with_representable_widths(
        budgets[ATTENTION], dense.specs, model.config, dense.convertible_to, config.rehome
    )
    config = dense.config
    if config.allocation == AUTO:
        config = replace(config, allocation=resolved_allocation(budgets, config))
    _check_allocation(dense, select, config)
    widths = widths or allocate(budgets, config, profiles)
    _check_widths(dense, widths)
    new_config, biased, newly_biased = _new_config(dense, widths)
    projections, total = _parameters(dense, budgets, widths, newly_biased)
    return Plan(
        architecture=dense.architecture,
        specs=dense.specs,
        select=select,
        budgets=budgets,
        widths=widths,
        mended=_mended(dense.specs, widths, ignored, config),
        config=new_config,
        biased=frozenset(biased),
        newly_biased=frozenset(newly_biased),
        projection_parameters=projections,
        total_parameters=total,
        experts_at_once=_experts_at_once(dense),
        allocation=config.allocation,
        attention_unit=config.attention_unit,
        attention_units=dense.attention_units,
        errors=_errors(budgets, widths, config, profiles) if profiles else None,
    )


@dataclass(frozen=True)
class _Dense:
    """The dense model, and the settings with its attention unit.

    Attributes:
        model: the model.
        config: the settings, whose attention unit is no longer "auto".
        architecture: the model type's entry.
        attention_units: those that the allocation may choose from.
        specs: the groups of each decoder layer.
        groups: the same, live.
        convertible_to: the model type that the model can be converted to, if any.
    """

    model: PreTrainedModel
    config: GrailConfig
    architecture: Architecture
    attention_units: tuple[str, ...]
    specs: tuple[tuple[GroupSpec, ...], ...]
    groups: tuple[tuple[Group, ...], ...]
    convertible_to: Rehome | None


def _resolved(
    model: PreTrainedModel, config: GrailConfig, architecture: Architecture | None
) -> _Dense:
    """Find the model's groups by its architecture and the attention unit."""
    architecture = architecture or find_architecture(model.config.model_type)
    if architecture.model_type != model.config.model_type:
        raise ValueError(
            f"architecture is an entry for {architecture.model_type!r} and the model is a "
            f"{model.config.model_type!r}: pass that type's entry, or None for the table's"
        )
    layers = decoder_layers(model, architecture)
    check_apart(layers)
    attention_units = _attention_units(architecture, model.config, layers, config)
    unit = attention_units[0]
    specs = tuple(architecture.groups(model.config, layer, unit) for layer in layers)
    names = {id(module): name for name, module in model.named_modules()}
    groups = tuple(
        tuple(group_in(layer, spec, names[id(layer)]) for spec in of_layer)
        for layer, of_layer in zip(layers, specs, strict=True)
    )
    return _Dense(
        model,
        replace(config, attention_unit=unit),
        architecture,
        attention_units,
        specs,
        groups,
        architecture.rehome if is_stock_causal_lm(model) else None,
    )


def _check_allocation(dense: _Dense, select: Selector, config: GrailConfig) -> None:
    """Raise ValueError where the model or the selector does not support the allocation."""
    alike = dense.architecture.per_layer
    if alike is not None:
        check_one_width(config, dense.architecture.model_type, alike.reason)
    check_experts(dense.specs, select, config)
    check_comparable(select, config)


def _check_widths(dense: _Dense, widths: Widths) -> None:
    """Raise ValueError where the model type does not support the widths."""
    check_tied(dense.groups, widths)
    alike = dense.architecture.per_layer
    if alike is not None:
        check_equal(widths, dense.architecture.model_type, alike.reason)


def _attention_units(
    architecture: Architecture,
    model_config: PreTrainedConfig,
    layers: nn.ModuleList,
    config: GrailConfig,
) -> tuple[str, ...]:
    """The possible attention units; for "auto", those that give a choice of widths."""
    if config.attention_unit != AUTO:
        return (config.attention_unit,)
    choices: dict[str, list[GroupSpec]] = {}
    for unit in ATTENTION_UNITS:
        every = (architecture.groups(model_config, layer, unit) for layer in layers)
        attention = [spec for of_layer in every for spec in of_layer if spec.kind == ATTENTION]
        # Without grouped queries both units are the same.
        if attention not in choices.values() and any(
            spec.offered and spec.partitions < spec.num_units for spec in attention
        ):
            choices[unit] = attention
    return tuple(choices) or ATTENTION_UNITS[:1]


def _new_config(dense: _Dense, widths: Widths) -> tuple[PreTrainedConfig, set[str], set[str]]:
    """The compressed model's config, and the kinds of group with a fitted and with a new bias."""
    config, model = dense.config, dense.model
    rehome = dense.convertible_to if config.rehome else None
    new_config = compressed_config(without_quantization(model.config), dense.specs, widths, rehome)
    if not config.bias:
        return new_config, set(), set()
    newly_biased = switch_on_biases_(new_config, model.config, dense.specs, widths)
    biased = {
        group.kind
        for layer in dense.groups
        for group in layer
        if group.num_units and group.bias is not None
    }
    return new_config, newly_biased | biased, newly_biased


def _parameters(
    dense: _Dense, budgets: Budgets, widths: Widths, newly_biased: set[str]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters before and after: of all blocks' projections, and of the whole model."""
    groups = [(index, group) for index, layer in enumerate(dense.groups) for group in layer]
    before = sum(budget.cost(budget.num_units) for budget in budgets.values())
    after = sum(budget.cost_of(widths[kind]) for kind, budget in budgets.items())
    after += sum(
        group.missing_biases(widths[group.kind][index])
        for index, group in groups
        if group.kind in newly_biased
    )
    norms = sum(
        group.norm_cost * (group.num_units - widths[group.kind][index]) for index, group in groups
    )
    total = sum(parameter.numel() for parameter in dense.model.parameters())
    return (before, after), (total, total - before + after - norms)


def _experts_at_once(dense: _Dense) -> int:
    """Experts whose Grams are held at a time; 0 without a mixture of experts."""
    item = dense.config.solve_torch_dtype.itemsize * (1 + dense.config.holds_out)
    experts = (g for layer in dense.groups for g in layer if isinstance(g, ExpertsGroup))
    return min((group.at_once(item) for group in experts), default=0)


def _errors(
    budgets: Budgets, widths: Widths, config: GrailConfig, profiles: Profiles
) -> tuple[float, float] | None:
    """The expected losses of `widths` and of one width per kind, if the rule compares layers."""
    if not find_allocation(config.allocation).sensitivities:
        return None  # errors of different layers are not comparable
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
    """(layer, kind) of the groups that lose nothing, and can compensate for earlier losses."""
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


def group_batches(plan: Plan, config: GrailConfig, number: int, first: int = 0) -> int:
    """Batches that are run for the groups from layer `first` on, with `number` in one pass."""
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
    """kind -> (groups that will be refitted, groups that are repaired); empty without a refit.

    A refit needs a block that is linear in a producer, and leaves out a mixture's experts.
    """
    found: dict[str, tuple[int, int]] = {}
    for _, spec in plan.repaired if config.refit_steps else ():
        refitted, repaired = found.get(spec.kind, (0, 0))
        found[spec.kind] = refitted + (spec.linear is not None), repaired + 1
    return found


def warn_of_few_tokens(tokens: int, plan: Plan, config: GrailConfig) -> None:
    """Warn where a consumer has so many channels that the solve would fit noise in the tokens."""
    channels = max(plan.widths[spec.kind][i] * spec.columns for i, spec in plan.reduced)
    few = tokens < TOKENS_PER_CHANNEL * channels
    if few and not isinstance(config.ridge, str) and config.ridge < 0.1:
        logger.warning(
            "%d calibration tokens for %d channels are fewer than %d per channel: the repair may "
            "do harm on other text; use more num_samples, or ridge='auto'",
            *(tokens, channels, TOKENS_PER_CHANNEL),
        )


def window_length(model: PreTrainedModel, config: GrailConfig) -> int:
    """Tokens per window: `seq_length`, within the model's limit."""
    return min(config.seq_length, context_length(model) or config.seq_length)


def _ignored_groups(groups: Sequence[Sequence[Group]], config: GrailConfig) -> set[tuple[int, str]]:
    """(layer, kind) of the groups that `ignore` matches.

    Raises ValueError where an entry matches nothing.
    """
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
