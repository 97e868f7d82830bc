"""`Forecast`: what compressing a model will do and take, as tables and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from grail_hf.config import GrailConfig
from grail_hf.models.decoder import context_length
from grail_hf.planning.costs import Estimate, estimate
from grail_hf.planning.plan import Plan, plan_compression, refits
from grail_hf.recovery.config import RecoveryConfig
from grail_hf.recovery.costs import RecoveryCosts, recovery_costs
from grail_hf.recovery.recover import with_rank
from grail_hf.report import size, width_range
from grail_hf.runtime.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Forecast:
    """What compressing a model will do and take.

    Attributes:
        model_type: before.
        config: the settings, with the dtype that the device supports.
        plan: widths and sizes; its widths are a forecast where the allocation measures them.
        in_memory, disk_to_disk: the costs of the two ways.
        recovery: the costs of the recovery that is to follow, if one is.
    """

    model_type: str
    config: GrailConfig
    plan: Plan
    in_memory: Estimate
    disk_to_disk: Estimate
    recovery: RecoveryCosts | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, config: GrailConfig) -> Forecast:
        """The forecast from shapes alone: the model may be on the meta device.

        `config.device` need not be a device of this machine. Raises ValueError as
        `plan_compression` does.
        """
        device = torch.device(config.device) if config.device else choose_device(model, None)
        config = config.resolved_on(device)
        plan = plan_compression(model, config)
        return cls(
            model.config.model_type,
            config,
            plan,
            estimate(model, plan, config, device),
            estimate(model, plan, config, device, disk_to_disk=True),
            _recovery(model, plan, config, device) if config.recover else None,
        )

    def tables(self, source: str) -> tuple[Table, ...]:
        """Shapes before and after, and the peaks of both ways by phase."""
        return (
            self._shapes(source),
            _peaks("in memory", self.in_memory),
            _peaks("disk to disk", self.disk_to_disk),
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        plan = self.plan
        return {
            "model_type": self.model_type,
            "new_model_type": plan.config.model_type,
            "sparsity": plan.sparsity,
            "allocation": plan.allocation,
            "attention_units": plan.attention_units,
            "units": plan.units,
            "widths": plan.widths,
            "refits": refits(plan, self.config),
            "projection_parameters": plan.projection_parameters,
            "total_parameters": plan.total_parameters,
            "recovery": self.recovery and asdict(self.recovery),
            "estimate": self.in_memory.to_dict(),
            "estimate_disk_to_disk": self.disk_to_disk.to_dict(),
        }

    def _shapes(self, source: str) -> Table:
        plan, costs = self.plan, self.in_memory
        table = Table("", "before", "after", title=f"{source}: {100 * plan.sparsity:.2f}% removed")
        for kind, units in plan.units.items():
            table.add_row(f"{kind} units per layer", f"{units:,}", width_range(plan.widths[kind]))
        for title, (before, after) in (
            ("projection parameters", plan.projection_parameters),
            ("total parameters", plan.total_parameters),
        ):
            table.add_row(title, f"{before:,}", f"{after:,}")
        table.add_row("model type", self.model_type, plan.config.model_type)
        if plan.measures:
            table.caption = (
                f"a forecast: the widths are measured (allocation {plan.allocation}, attention "
                f"unit {' or '.join(plan.attention_units)})"
            )
        for kind, (number, repaired) in refits(plan, self.config).items():
            table.add_row(f"{kind} groups refitted", "", f"{number} of {repaired}")
        table.add_section()
        table.add_row("calibration tokens", "", f"{costs.tokens:,}")
        hidden_states = f"hidden states ({self.config.hidden_states})"
        table.add_row(hidden_states, "", size(costs.hidden_bytes))
        table.add_row("dense weights", "", size(costs.weights_bytes))
        if (recovery := self.recovery) is not None:
            table.add_section()
            table.add_row("recovery: memory where it trains", "", size(recovery.accelerator_bytes))
            table.add_row("recovery: host memory beside", "", size(recovery.host_bytes))
            table.add_row("recovery: on disk meanwhile", "", size(recovery.disk_bytes))
            arithmetic = f"{recovery.operations / 1e12:.3g} TFLOP"
            table.add_row("recovery: arithmetic", "", arithmetic)
        return table


def _recovery(
    model: PreTrainedModel, plan: Plan, config: GrailConfig, device: torch.device
) -> RecoveryCosts:
    length = min(config.seq_length, context_length(model) or config.seq_length)
    settings = RecoveryConfig.following(replace(config, seq_length=length))
    return recovery_costs(model, plan, with_rank(settings, model, plan.architecture), device)


def _peaks(title: str, costs: Estimate) -> Table:
    """What one way of compressing takes, by phase."""
    host = "host memory" + (", the accelerator's with it" if costs.one_memory else "")
    table = Table("", "accelerator memory", host, "arithmetic", title=f"peaks, {title}")
    for phase, cost in costs.phases.items():
        table.add_row(
            phase,
            size(cost.accelerator_bytes),
            size(cost.host_bytes),
            f"{cost.operations / 1e12:.3g} TFLOP",
        )
    table.add_section()
    totals = f"{sum(costs.operations.values()) / 1e12:.3g} TFLOP"
    with_weights = " with the dense weights" if costs.weights_bytes else ""
    peak = f"{size(costs.host_bytes)}{with_weights}"
    table.add_row("at the peak", size(costs.accelerator_bytes), peak, totals)
    table.caption = f"on disk: {size(costs.disk_bytes)}"
    return table
