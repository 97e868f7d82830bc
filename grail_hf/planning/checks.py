"""Refusals of settings, each with its reason, before weights or calibration tokens are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grail_hf.config import ATTENTION, MLP, GrailConfig
from grail_hf.methods.allocation import find_allocation
from grail_hf.methods.selectors import Selector
from grail_hf.models.groups import Group
from grail_hf.models.schema import GroupSpec


def check_offered(groups: Sequence[Sequence[Group]], model_type: str, config: GrailConfig) -> None:
    """Raise ValueError if the config narrows a kind of block that this model type keeps whole."""
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
                f"{kind}_sparsity={asked:g} cannot be reached: a stock {model_type} keeps its "
                f"{kind} whole, because {reason}; use {kind}_sparsity=0, or sparsity alone"
            )
    if config.sparsity and len(refused) == 2:
        raise ValueError(
            f"sparsity={config.sparsity:g} cannot be reached: no block of a stock {model_type} can "
            "be narrowed; "
            + "; ".join(f"its {kind} stays whole because {why}" for kind, why in refused.items())
            + "; choose a model of another type"
        )


def check_experts(
    specs: Sequence[Sequence[GroupSpec]], select: Selector, config: GrailConfig
) -> None:
    """Raise ValueError for settings that a mixture of experts does not support."""
    if not any(spec.experts for layer in specs for spec in layer):
        return
    if find_allocation(config.allocation).measures:
        raise ValueError(
            f"allocation={config.allocation!r} measures the loss of each width of a block, which "
            "is not defined for experts, since each has its own tokens: use allocation='uniform'"
        )
    if config.mlp_sparsity == 0:
        return
    if select.folds:
        raise ValueError(
            f"selector={config.selector_name!r} folds units together, which is not offered for "
            "experts: choose a selector that removes them, or mlp_sparsity=0"
        )
    if select.needs_gradient:
        raise ValueError(
            f"selector={config.selector_name!r} needs a gradient, which is not computed for "
            "experts: choose another selector, for example 'wanda', or mlp_sparsity=0"
        )


def check_comparable(select: Selector, config: GrailConfig) -> None:
    """Raise ValueError if the allocation compares scores that only rank the units of one group."""
    if find_allocation(config.allocation).compares_scores and (select.folds or select.ranks_only):
        raise ValueError(
            f"allocation={config.allocation!r} compares the scores of all groups, and "
            f"selector={config.selector_name!r} only orders the units of each: use "
            "selector='flap', or another that measures, or allocation='error'"
        )


def check_tied(groups: Sequence[Sequence[Group]], widths: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if two blocks of a layer would need two values of one config key."""
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
    """Raise ValueError if the allocation gives each layer a width of its own."""
    if find_allocation(config.allocation).per_layer:
        raise ValueError(
            f"allocation={config.allocation!r} gives layers widths that differ, which a "
            f"{model_type} cannot represent because {reason}: use allocation='uniform'"
        )


def check_equal(widths: Mapping[str, Sequence[int]], model_type: str, reason: str) -> None:
    """Raise ValueError if layers that have units of one kind differ in their number."""
    for kind, numbers in widths.items():
        different = sorted(set(numbers) - {0})
        if len(different) > 1:
            raise ValueError(
                f"the layers' {kind} widths {different} differ, which a {model_type} "
                f"cannot represent because {reason}: give every layer the same width (no "
                "single layers in ignore)"
            )
