"""What the units of each kind of group cost, and the widths that each kind may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from grail_hf.config import ATTENTION, EXPERTS, GrailConfig
from grail_hf.methods.allocation import MLP_MULTIPLES, automatic_allocation
from grail_hf.methods.budget import Budget
from grail_hf.methods.widths import EXPERTS_STEP, TOLERANCE
from grail_hf.models.compatibility import Rehome
from grail_hf.models.configs import representable_widths
from grail_hf.models.groups import Group
from grail_hf.models.schema import GroupSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def budgets_of(
    groups: Sequence[Sequence[Group]], ignored: set[tuple[int, str]], config: GrailConfig
) -> dict[str, Budget]:
    """kind -> budget, attention's first.

    Args:
        groups: those of each decoder layer.
        ignored: (layer, kind) of the groups that keep their width.
        config: the settings.

    Raises:
        ValueError: the groups of one kind differ between layers.
    """
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
    """The budget of one kind's groups, at most one per layer.

    Groups in `ignored` layers, and those that cannot be pruned, keep their width. `total` is the
    number of projection parameters in all blocks.
    """
    present = [group for group in groups if group is not None]
    counted = [group for group in present if group.num_units]
    sizes = {(group.num_units, group.unit_cost) for group in counted}
    if len(sizes) > 1:
        raise ValueError(
            f"{counted[0].name} and the same block in other layers differ in (units, parameters "
            f"per unit): {sorted(sizes)}; compress the dense model instead"
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


def _step(group: Group, config: GrailConfig, units: float) -> int:
    """The widths of such groups are multiples of this.

    "auto" is the largest multiple that kernels like with which every sparsity can be reached: one
    step in all layers changes the sparsity by at most twice `TOLERANCE`.

    Args:
        group: one of them.
        config: the settings.
        units: units per layer if such units held all the parameters that the sparsity counts.
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


def with_representable_widths(
    budget: Budget,
    specs: Sequence[Sequence[GroupSpec]],
    dense: PreTrainedConfig,
    rehome: Rehome | None,
    allowed: bool,
) -> Budget:
    """Attention's budget, restricted to the widths that the result's config can represent.

    It is not restricted where the model may be converted to a type whose config represents any, nor
    where a layer keeps all its units: the config's own values are then those of the widest layer,
    and the other layers have entries of their own.

    Args:
        budget: attention's.
        specs: the groups of each decoder layer.
        dense: the config of the dense model.
        rehome: the type that the model can be converted to, if any.
        allowed: whether the settings allow that.
    """
    converts = rehome is not None and not rehome.obstacles(dense)
    if (converts and allowed) or budget.ignored > budget.absent:
        return budget
    widths = representable_widths(dense, specs)
    return replace(budget, representable=widths, remedy="rehome=True" if converts else "")


def resolved_allocation(budgets: Mapping[str, Budget], config: GrailConfig) -> str:
    """The rule that "auto" stands for: a mixture of experts has no split that can be measured."""
    free = [budget for budget in budgets.values() if len(budget.uniform_widths) > 1]
    fixed = config.mlp_sparsity is not None or config.attention_sparsity is not None
    a_choice = bool(config.sparsity) and not fixed and len(free) > 1
    return automatic_allocation(a_choice and EXPERTS not in budgets)
