"""Estimate what a compression takes from shapes alone: memory, disk and arithmetic by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.config import GrailConfig
from grail_hf.models.decoder import decoder_layers
from grail_hf.planning.plan import Plan
from grail_hf.planning.work import Cost, Work, num_parameters
from grail_hf.runtime.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """What a compression will take, from shapes alone.

    Attributes:
        tokens: calibration tokens.
        phases: phase -> its cost, in the order of the work: "profile" (where an allocation is
            measured), "embed", "forward", "gram", "select", "solve", "refit", "write" (from disk
            to disk).
        weights_bytes: of the dense model, where all of it is in host memory; else 0.
        hidden_bytes: peak of the hidden states, and of moments put aside with them, wherever they
            are kept; where that is host memory, the phases' host memory includes them.
        disk_bytes: of the new checkpoint and, from disk to disk, two generations of hidden states;
            not of hidden states that are kept on disk.
        one_memory: layers run on the CPU, and the accelerator's bytes are part of the host's.
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
        """phase -> floating-point operations, of the phases that have any."""
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

    Args:
        model: the dense one.
        plan: of the same model.
        config: the settings; with `hidden_states="auto"`, they count as kept in host memory.
        device: the device that layers will run on; by default the one they would run on here.
        disk_to_disk: for `compress_checkpoint`: no model is in memory, and layers are mapped.
        batches: those of the calibration, once they are known; else their number follows from
            `config`.
    """
    device = device or choose_device(model, config.device)
    config = config.resolved_on(device)
    layers = decoder_layers(model, plan.architecture)
    work = Work.of(model, plan, config, device, disk_to_disk, batches)
    for index, layer in enumerate(layers):
        work.add_layer(index, layer)
    total, inside = (sum(map(num_parameters, modules)) * work.item for modules in ([model], layers))
    work.at_peak("embed", work.batch * work.item * 4 * work.stream)
    work.at_peak("write", total - inside)
    kept = work.hidden_states()
    return Estimate(
        work.tokens,
        work.costs(kept),
        weights_bytes=0 if disk_to_disk else total,
        hidden_bytes=max(kept.values()),
        disk_bytes=plan.total_parameters[1] * work.item + 2 * work.generation * disk_to_disk,
        one_memory=work.one_memory,
    )
