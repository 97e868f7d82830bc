"""Estimate what a recovery takes from shapes alone: memory, disk and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from grail_hf.models.decoder import decoder_layers, vocabulary_size
from grail_hf.planning.plan import Plan
from grail_hf.recovery.adapters import BYTES_TRAINED, adapted_modules
from grail_hf.recovery.config import FULL, RecoveryConfig, recomputes
from grail_hf.recovery.targets import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel
_FP32 = 4


@dataclass(frozen=True)
class RecoveryCosts:
    """What training a compressed model towards the dense model's predictions takes.

    Attributes:
        accelerator_bytes: peak where it is trained: weights, trained parameters with gradients and
            moments, activations, logits.
        host_bytes: copies of the projections, in case the outcome is dropped.
        disk_bytes: the predictions, and two checkpoints.
        operations: floating-point operations of predictions and training, trials of learning rates
            included.
    """

    accelerator_bytes: int
    host_bytes: int
    disk_bytes: int
    operations: int


def recovery_costs(
    model: PreTrainedModel, plan: Plan, config: RecoveryConfig, device: torch.device
) -> RecoveryCosts:
    """The costs of a recovery after a plan.

    Adapters and activations are counted at the dense model's widths, an upper bound.

    Args:
        model: the dense one; it may be on the meta device.
        plan: the compression's.
        config: the settings, with a rank.
        device: that trains; this machine may lack it.
    """
    layers = decoder_layers(model, plan.architecture)
    modules = [module for _, module in adapted_modules(model, layers)]
    sizes = [sum(module.weight.shape) for module in modules]  # inputs and outputs
    (_, kept), (dense, small) = plan.projection_parameters, plan.total_parameters
    full = config.rank == FULL
    trained = kept if full else int(config.rank or 0) * sum(sizes)
    in_fp32 = full or device.type == "cpu"
    item = _FP32 if in_fp32 else model.dtype.itemsize
    untrained = small - trained if full else small
    weights = item * untrained + BYTES_TRAINED * trained
    places = config.batch_size * config.seq_length
    wide = sum(sizes) * model.dtype.itemsize  # activations of all layers for one token
    if recomputes(config, device):
        stream = model.config.get_text_config().hidden_size * model.dtype.itemsize
        wide = wide // len(layers) + stream * len(layers)
    vocabulary = vocabulary_size(model)
    # Logits as computed; in fp32; their gradient in fp32 and as computed.
    logits = vocabulary * (2 * model.dtype.itemsize + 2 * _FP32)
    tokens = config.num_samples * config.seq_length
    passes = (6 if full else 4) + 2 * recomputes(config, device)
    tried = 3 / 8 if isinstance(config.learning_rate, str) else 0
    return RecoveryCosts(
        accelerator_bytes=weights + places * (wide + logits),
        host_bytes=kept * model.dtype.itemsize,
        disk_bytes=tokens * min(config.top_k, vocabulary) * BYTES_PER_TOKEN
        + 2 * (_FP32 * (small if full else trained) + 8 * trained),
        operations=int(tokens * (2 * dense + (config.epochs + tried) * passes * small)),
    )
