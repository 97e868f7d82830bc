"""What a compression will do, from shapes alone: widths, parameters, config, memory, arithmetic.

Everything that can be refused is refused here, before a weight or a calibration token is read.
A plan can be made of a model on the meta device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grail_hf import processes
from grail_hf.allocation import Budget, Profiles, Widths, allocate, find_allocation
from grail_hf.architectures import (
    ATTENTION,
    MLP,
    Architecture,
    GroupSpec,
    find_architecture,
)
from grail_hf.calibration import context_length
from grail_hf.compensation import DAMPINGS
from grail_hf.config import AUTO, GrailConfig
from grail_hf.experts import group_in
from grail_hf.gram import BLOCK
from grail_hf.groups import Group
from grail_hf.offload import input_device, is_dispatched, weights_of
from grail_hf.refit import refit_batches, refit_stride
from grail_hf.saving import compressed_config, is_stock_causal_lm, switch_on_biases_
from grail_hf.selectors import Folding, Selector, find_selector, wanda_plus_plus

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

# transformers multiplies experts' weights in one grouped product, which asks for rows of a multiple
# of 16 bytes: 8 channels in half precision, whatever precision the checkpoint is loaded in.
EXPERTS_STEP = 8

# Divergences of an allocation's variants are measured on few tokens, since they are the same ones.
HELD_OUT_TOKENS = 4096
LEAST_WINDOWS = 4  # to hold one out

_PHASES = ("profile", "embed", "forward", "gram", "select", "solve", "refit")
_PANEL = 128  # of greedy elimination
# On a CPU: what matrix products pack their arguments into, and what the C library has not given
# back yet.
_SCRATCH = 2**25


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
            be compressed (encoder-decoder, quantised), a sparsity that cannot be reached, an
            `ignore` entry that matches nothing, widths that no config can say.
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
    budgets = _budgets(groups, ignored, config)
    if architecture.per_layer is not None:
        check_one_width(config, architecture.model_type, architecture.per_layer.reason)
    check_experts(specs, select, config)
    widths = widths or allocate(budgets, config, profiles)
    _check_tied(groups, widths)
    if architecture.per_layer is not None:
        _check_equal(widths, architecture.model_type, architecture.per_layer.reason)
    before = sum(budget.cost(budget.num_units) for budget in budgets.values())
    after = sum(budget.cost_of(widths[kind]) for kind, budget in budgets.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    new_config = compressed_config(
        model.config,
        specs,
        widths,
        architecture.rehome if config.rehome and is_stock_causal_lm(model) else None,
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
    )


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


def check_offered(groups: Sequence[Sequence[Group]], model_type: str, config: GrailConfig) -> None:
    """Raise ValueError where what is asked for is what this model type does not offer."""
    refused = {}
    for kind in (ATTENTION, MLP):
        of_kind = [
            group.spec
            for layer in groups
            for group in layer
            if (group.kind == ATTENTION) == (kind == ATTENTION)
        ]
        if not any(spec.offered for spec in of_kind):
            refused[kind] = "; ".join(dict.fromkeys(spec.refusal or "" for spec in of_kind))
    for kind, reason in refused.items():
        asked = getattr(config, f"{kind}_sparsity")
        if asked:
            raise ValueError(
                f"{kind}_sparsity={asked:g} cannot be had: a stock {model_type} keeps its {kind} "
                f"whole, because {reason}; use {kind}_sparsity=0, or sparsity alone"
            )
    if config.sparsity and len(refused) == 2:
        raise ValueError(
            f"sparsity={config.sparsity:g} cannot be had: a stock {model_type} can become narrower "
            "nowhere; "
            + "; ".join(f"its {kind} stays whole because {why}" for kind, why in refused.items())
            + "; choose a model of another type"
        )


def check_experts(
    specs: Sequence[Sequence[GroupSpec]], select: Selector, config: GrailConfig
) -> None:
    """Raise ValueError for settings that are not offered for a mixture of experts."""
    if not any(spec.experts for layer in specs for spec in layer):
        return
    if find_allocation(config.allocation).loss is not None:
        raise ValueError(
            f"allocation={config.allocation!r} measures what each width of a block loses, which is "
            "not known for experts, since each has tokens of its own: use allocation='uniform'"
        )
    if config.mlp_sparsity == 0:
        return
    if isinstance(select, Folding):
        raise ValueError(
            f"selector={config.selector_name!r} folds units together, which is not offered for "
            "experts: choose a selector that removes them, or mlp_sparsity=0"
        )
    if select is wanda_plus_plus:
        raise ValueError(
            f"selector={config.selector_name!r} needs a gradient, which is not computed for "
            "experts: choose another selector, for example 'wanda', or mlp_sparsity=0"
        )


def _budgets(
    groups: Sequence[Sequence[Group]], ignored: set[tuple[int, str]], config: GrailConfig
) -> dict[str, Budget]:
    """Of each kind of group that there is, the attention's first."""
    kinds = dict.fromkeys([ATTENTION, *(group.kind for layer in groups for group in layer)])
    budgets: dict[str, Budget] = {}
    for kind in kinds:
        of_kind = [next((g for g in layer if g.kind == kind), None) for layer in groups]
        budgets[kind] = _budget(of_kind, {i for i, own in ignored if own == kind}, config)
    for group in (group for layer in groups for group in layer if group.spec.tied_to):
        leader = budgets[str(group.spec.tied_to)]
        step = leader.step * group.num_units // leader.num_units
        budgets[group.kind] = replace(budgets[group.kind], step=step)
    return budgets


def _budget(groups: Sequence[Group | None], ignored: set[int], config: GrailConfig) -> Budget:
    """Of one kind's groups, at most one a layer; those in layers `ignored` keep their width.

    So do those that are not offered. Raises ValueError where the layers' units are not alike.
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
    return Budget(
        num_units,
        unit_cost,
        fixed_cost=first.num_parameters - num_units * unit_cost,
        step=_step(first, config),
        layers=len(groups),
        ignored=frozenset(ignored | kept),
        absent=frozenset(i for i, g in enumerate(groups) if g is None or not g.num_units),
        whole_cost=sum(group.num_parameters for group in present if not group.num_units),
    )


def _step(group: Group, config: GrailConfig) -> int:
    """Widths of such groups are multiples of this."""
    if group.kind == ATTENTION:
        return group.partitions
    return math.lcm(config.multiple_of, EXPERTS_STEP if group.spec.experts else 1)


def _check_tied(groups: Sequence[Sequence[Group]], widths: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where two blocks of a layer would need two values of one config key."""
    for index, layer in enumerate(groups):
        units = {group.kind: group.num_units for group in layer}
        for group in layer:
            tied = group.spec.tied_to
            if tied and widths[group.kind][index] * units[tied] != (
                widths[tied][index] * units[group.kind]
            ):
                raise ValueError(
                    f"{group.name} and the layer's {tied} have one width in the config, so both "
                    "keep the same fraction: put both in ignore, or neither"
                )


def check_one_width(config: GrailConfig, model_type: str, reason: str) -> None:
    """Raise ValueError where the allocation gives each layer a width of its own."""
    if find_allocation(config.allocation).per_layer:
        raise ValueError(
            f"allocation={config.allocation!r} gives layers widths that differ, which a "
            f"{model_type} cannot say because {reason}: use allocation='uniform'"
        )


def _check_equal(widths: Mapping[str, Sequence[int]], model_type: str, reason: str) -> None:
    for kind, numbers in widths.items():
        different = sorted(set(numbers) - {0})
        if len(different) > 1:
            raise ValueError(
                f"the layers' {kind} widths {different} differ, which a {model_type} "
                f"cannot say because {reason}: give every layer the same width (no single layers "
                "in ignore)"
            )


def decoder_layers(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The model's decoder layers."""
    layers = model.base_model.get_submodule(architecture.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{architecture.layers} is a {type(layers).__name__}, not a ModuleList")
    return layers


def check_model(model: object) -> None:
    """Raise TypeError or ValueError for a model that no setting could compress."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a {type(model).__name__} is not a transformers model; load one with "
            "AutoModelForCausalLM.from_pretrained (and merge_and_unload() PEFT adapters first)"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{model.config.model_type!r} is an encoder-decoder; grail_hf compresses decoder-only "
            "models"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(
        model.config, "quantization_config", None
    ):
        raise ValueError(
            "the model is quantised: compress the full-precision model, then quantise the result"
        )


def check_weights(model: PreTrainedModel) -> None:
    """Raise FloatingPointError naming the first parameter that holds NaN or Inf.

    Raises ValueError where a parameter has no values (it is on the meta device, and no hook of
    accelerate's knows them).
    """
    for name, parameter in weights_of(model):
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model with its weights")
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} holds NaN or Inf; the model has not been changed")


def group_batches(plan: Plan, config: GrailConfig, number: int, first: int = 0) -> int:
    """Batches that are run for groups, from layer `first` on, with `number` of calibration."""
    folding = 0
    if isinstance(plan.select, Folding):
        folding = 1 if config.targeted else 2
    total = 0
    for index, spec in plan.repaired:
        if index < first:
            continue
        refits = config.refit_steps > 0 and spec.linear is not None
        each = number * (1 + folding * ((index, spec.kind) not in plan.mended) + refits)
        if refits:
            each += refit_batches(
                config.refit_steps, len(range(0, number, refit_stride(config.refit_steps)))
            )
        total += each
    return total


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


def choose_device(model: PreTrainedModel, wanted: str | None) -> torch.device:
    """Where layers run: as wanted, else the model's accelerator, else the machine's, else CPU.

    A model that accelerate has dispatched runs where it takes its inputs, a CPU too. Of several
    processes, each has an accelerator of its own.

    Raises ValueError where this machine does not have the wanted device, or it is another
    process's.
    """
    if wanted is not None:
        device = torch.device(wanted)
        try:
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={wanted!r} cannot be used here: {error}") from error
    elif (own := input_device(model)).type not in ("cpu", "meta") or is_dispatched(model):
        device = own
    else:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return processes.own_device(device)


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


@dataclass(frozen=True)
class Cost:
    """What a phase takes.

    Attributes:
        accelerator_bytes: peak where layers run.
        host_bytes: peak of anonymous memory of the host, above what the process held at the start.
        operations: floating-point operations.
    """

    accelerator_bytes: int = 0
    host_bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Estimate:
    """What compressing will take, from shapes alone.

    Attributes:
        tokens: of calibration.
        phases: phase -> its cost, in the order of the work: "profile" (where an allocation is
            measured), "embed", "forward", "gram", "select", "solve", "refit", "write" (from disk
            to disk).
        weights_bytes: of the dense model, where it is in host memory as a whole; else 0.
        hidden_bytes: of the hidden states, in host memory or wherever they are kept; the phases'
            host memory has them in it where that is host memory.
        disk_bytes: of the new checkpoint and, from disk to disk, two generations of hidden states.
        one_memory: layers run on the CPU: the accelerator's bytes are among the host's.
    """

    tokens: int
    phases: dict[str, Cost]
    weights_bytes: int
    hidden_bytes: int
    disk_bytes: int
    one_memory: bool

    @property
    def accelerator_bytes(self) -> int:
        """Peak of all phases."""
        return max(cost.accelerator_bytes for cost in self.phases.values())

    @property
    def host_bytes(self) -> int:
        """Peak of all phases, with the dense weights."""
        return self.weights_bytes + max(cost.host_bytes for cost in self.phases.values())

    @property
    def operations(self) -> dict[str, int]:
        """By phase, of those that take any."""
        return {name: cost.operations for name, cost in self.phases.items() if cost.operations}

    def phases_to_dict(self) -> dict[str, dict[str, int]]:
        """phase -> its cost, as JSON."""
        return {name: asdict(cost) for name, cost in self.phases.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        totals = {
            "accelerator_bytes": self.accelerator_bytes,
            "host_bytes": self.host_bytes,
            "operations": self.operations,
        }
        return asdict(self) | totals


def estimate(
    model: PreTrainedModel,
    plan: Plan,
    config: GrailConfig,
    device: torch.device | None = None,
    *,
    disk_to_disk: bool = False,
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> Estimate:
    """Memory, disk and arithmetic of a compression; works on the meta device.

    With N tokens and H inputs, K of them kept, to O outputs, a group costs 2 N per projection
    parameter for the pass up to its consumer, N H^2 for half a Gram and 2 N O H for the moments
    with a target of the dense model (and a dense pass for it), and a quarter of the moments more
    for the tokens held out; for a refit, all this once more at the new width, and 6 N per parameter
    for a step (half as much for one or two steps). A solve is K^3/3 + 2 O K^2, the choice of the
    ridge that and O K^2 more for each damping tried, a selection at most 5/3 H^3 + 2 O H^2 (greedy
    elimination: factor, inverse and update), and the two errors in the report 2 O H^2. A fold takes
    a pass more, or two. Each of a mixture's experts has a Gram and a solve, and its share of the
    tokens. Causal attention adds 2 N T per query channel and pass.

    Memory, with s bytes a number in the solve: the moments are half a square and O H numbers in
    fp32, and as much for the tokens held out. Greedy elimination has a square and O H numbers of s
    bytes beside them; the choice of the ridge works at K channels, with the moments in fp32, those
    of the fit and a square, and three times O K numbers; a refit has K^2 and four times K D.

    Args:
        model: the dense one.
        plan: of it.
        config: the settings.
        device: where layers will run; by default where this machine would have them run.
        disk_to_disk: by `compress_checkpoint`: no model is in memory, and layers are mapped.
        batches: the calibration's, where they are known; else as many as the config asks for.
    """
    layers = decoder_layers(model, plan.architecture)
    length, tokens = window_length(model, config), config.num_samples * window_length(model, config)
    batch = min(config.batch_size, config.num_samples) * length
    if batches:
        shapes = [tuple(one["input_ids"].shape) for one in batches]
        length = max(shape[1] for shape in shapes)
        tokens, batch = (f(a * b for a, b in shapes) for f in (sum, max))
    device = device or choose_device(model, config.device)
    one_memory = device.type == "cpu"
    item, solve_item = model.dtype.itemsize, config.torch_dtype.itemsize
    targeted, hold_out = config.targeted, config.holds_out
    dampings = len(DAMPINGS) if hold_out else 0
    folds = (1 if targeted else 2) * isinstance(plan.select, Folding)
    eliminates = config.selector in ("gram", "slimgpt")
    profiled = find_allocation(config.allocation)
    repaired = {(index, spec.kind) for index, spec in plan.repaired}
    operations = dict.fromkeys((*_PHASES, "write"), 0)
    peaks = dict.fromkeys((*_PHASES, "write"), 0)
    inputs_of_refit = 0
    width_of_stream = model.config.get_text_config().hidden_size

    def at_peak(phase: str, size: float) -> None:
        peaks[phase] = max(peaks[phase], int(size))

    for index, layer in enumerate(layers):
        upstream = passes = 0
        whole = sum(p.numel() for p in layer.parameters()) * item
        changed = 0  # bytes of what the layer has become, which no file stands behind
        groups = [group_in(layer, spec, "") for spec in plan.specs[index]]
        for group in groups:
            width = plan.widths[group.kind][index]
            left = group.num_parameters - (group.num_units - width) * group.unit_cost
            held = (0 if one_memory else whole) + changed * disk_to_disk * one_memory
            if (index, group.kind) in repaired or profiled.loss is not None:
                experts, routed = group.spec.experts or 1, group.spec.routed or 1
                *_, outputs, inputs = group.weight.shape
                kept = width * group.columns
                pass_bytes = batch * (item * 3 * max(inputs, width_of_stream) + 4 * inputs)
                targets = outputs * (targeted and not group.spec.experts)
                square, entries = solve_item * inputs**2, solve_item * outputs * inputs
            if profiled.loss is not None:
                operations["profile"] += 2 * tokens * (3 * group.num_parameters)
                operations["profile"] += tokens * inputs**2 + 2 * inputs**3
                moments = _half_square(inputs, 4)
                at_peak("profile", held + moments + 2.5 * square + 3 * entries + pass_bytes)
            if (index, group.kind) in repaired:
                removed = inputs - kept
                refits = config.refit_steps > 0 and group.spec.linear is not None
                collects = 1 + refits
                passes += collects + folds
                before = _parameters_per_token(group) - routed * inputs * outputs
                operations["forward"] += 2 * tokens * (upstream + before) * (collects + folds)
                moments = _moments(inputs, targets) * (4 + hold_out) // 4
                after = _moments(kept, targets)
                operations["gram"] += tokens * routed * (moments + (refits + (folds > 0)) * after)
                if refits:
                    steps = config.refit_steps / refit_stride(config.refit_steps)
                    operations["refit"] += int(6 * tokens * group.num_parameters * steps)
                each = (kept**3 // 3 + 2 * outputs * kept**2) * (collects + dampings)
                each += outputs * kept**2 * dampings + 2 * outputs * inputs**2
                operations["solve"] += experts * each
                if removed and eliminates:
                    greedy = 5 * inputs**3 // 3 + 2 * outputs * inputs**2
                    operations["select"] += experts * greedy

                fold = 1 + hold_out
                # Summed in the precision of the solve, and held in fp32.
                sums = fold * (_half_square(inputs, 4) + 4 * targets * inputs)
                fewer = fold * (_half_square(kept, 4) + 4 * outputs * kept)
                summed = experts * sums * solve_item // 4
                kept_square, kept_entries = solve_item * kept**2, solve_item * outputs * kept
                pass_bytes += 4 * (batch * (inputs + outputs) + targets * inputs)
                at_peak("gram", held + summed + pass_bytes)
                select = 2 * entries
                if removed and eliminates:
                    select = square + entries + solve_item * 2 * _PANEL * (inputs + outputs)
                solve = experts * sums * (experts > 1) + fewer + kept_square + 3 * kept_entries
                solve += solve_item * kept**2 // 2 * hold_out
                at_peak("select", held + experts * sums + select)
                at_peak("solve", held + max(experts * sums + fewer + entries, solve))
                changed += left * item
                held += left * item * disk_to_disk * one_memory
                if refits:
                    linear = group.projection(str(group.spec.linear)).weight
                    rows = linear.shape[0] * kept // inputs
                    vectors = solve_item * (rows**2 + 4 * rows * linear.shape[1])
                    vectors += solve_item * linear.shape[1] ** 2 + 3 * item * rows * linear.shape[1]
                    at_peak("refit", held + max(vectors + pass_bytes, solve - kept_square // 2))
                    part = tokens // refit_stride(config.refit_steps)
                    inputs_of_refit = part * (linear.shape[1] * item + outputs * 4)
            upstream += left * _parameters_per_token(group) // max(group.num_parameters, 1)
        operations["forward"] += 2 * tokens * upstream
        operations["forward"] += 2 * tokens * sum(map(_parameters_per_token, groups)) * targeted
        passes += 1 + targeted
        channels = sum(g.num_units * g.columns for g in groups if g.kind == ATTENTION)
        operations["forward"] += 2 * tokens * length * channels * passes
        widest = max([width_of_stream, *(g.weight.shape[-1] for g in groups if g.num_units)])
        held = changed * disk_to_disk if one_memory else whole
        at_peak("forward", held + batch * item * 6 * widest)
        at_peak("write", 2 * (changed if one_memory else whole))
    total = sum(p.numel() for p in model.parameters()) * item
    outside = total - sum(p.numel() for layer in layers for p in layer.parameters()) * item
    at_peak("embed", batch * item * 4 * width_of_stream)
    at_peak("write", outside)

    hidden = hidden_state_bytes(model, plan, config, tokens)
    variants = 0
    if profiled.divergences:
        most = min(tokens, max(2 * HELD_OUT_TOKENS, tokens // LEAST_WINDOWS))
        variants = 3 * len(plan.reduced) * most * width_of_stream * item
    generation = tokens * width_of_stream * item * (1 + targeted)
    in_host = config.hidden_states == "host" or (one_memory and config.hidden_states != "disk")
    in_host |= config.hidden_states == AUTO
    on_accelerator = config.hidden_states == "accelerator" and not one_memory
    phases = {}
    for name in (*_PHASES, *(["write"] * disk_to_disk)):
        if not peaks[name] and not operations[name]:
            continue
        peaks[name] += _SCRATCH * one_memory
        kept_states = {"embed": generation // (1 + targeted), "profile": generation + variants}.get(
            name, hidden + inputs_of_refit * (name == "refit")
        )
        working = peaks[name] if name != "write" else 0
        phases[name] = Cost(
            working + kept_states * on_accelerator,
            (peaks[name] if one_memory or name == "write" else 0) + kept_states * in_host,
            operations[name],
        )
    return Estimate(
        tokens,
        phases,
        weights_bytes=0 if disk_to_disk else total,
        hidden_bytes=hidden,
        disk_bytes=plan.total_parameters[1] * item + 2 * generation * disk_to_disk,
        one_memory=one_memory,
    )


def _half_square(size: int, item: int) -> int:
    """Bytes of `gram.Symmetric`."""
    return item * size * (size + BLOCK) // 2 if size > BLOCK else item * size**2


def _moments(inputs: int, targets: int) -> int:
    """Multiplications a token for the moments of inputs and targets, twice."""
    return inputs * (inputs + min(inputs, BLOCK)) + 2 * inputs * targets


def hidden_state_bytes(model: PreTrainedModel, plan: Plan, config: GrailConfig, tokens: int) -> int:
    """What hidden states take together, of so many tokens."""
    # With a target: the dense hidden states in front of and behind a layer, and its outputs.
    copies = 1 + config.targeted * (2 + len(plan.specs[0]))
    each: int = model.config.get_text_config().hidden_size * model.dtype.itemsize
    return tokens * each * copies


def _parameters_per_token(group: Group) -> int:
    """Parameters of the group's projections that a token meets: of experts, those routed to."""
    spec = group.spec
    return (
        group.num_parameters * spec.routed // spec.experts
        if spec.experts
        else (group.num_parameters)
    )
