"""Which device computes, and how much memory is free on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grail_hf.runtime import processes
from grail_hf.runtime.hooks import computes_on, is_dispatched

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def free_bytes(device: torch.device) -> int:
    """Memory that is not in use, with what torch's allocator has reserved for later tensors."""
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        reserve = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + reserve)
    import psutil

    return int(psutil.virtual_memory().available)  # MPS shares the host's


def with_index(device: torch.device) -> torch.device:
    """The device, with the current accelerator's index where it is one without an index."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.index is not None or accelerator is None or accelerator.type != device.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs: that of its embeddings, or that they compute on."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return computes_on(embeddings)


def choose_device(model: PreTrainedModel, wanted: str | None) -> torch.device:
    """The device that layers run on.

    It is the wanted one, else the model's accelerator, else the machine's, else the CPU. A model
    that accelerate has dispatched runs where it takes its inputs, even on a CPU. Each of several
    processes has its own accelerator. An accelerator is given with its index, as tensors give it.

    Raises:
        ValueError: this machine does not have the wanted device, or it belongs to another process.
    """
    if wanted is not None:
        device = usable_device(wanted)
    elif (own := input_device(model)).type not in ("cpu", "meta") or is_dispatched(model):
        device = own
    else:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return with_index(processes.own_device(device))


def usable_device(wanted: str) -> torch.device:
    """The device of this name. Raises ValueError where this machine does not have it."""
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={wanted!r} cannot be used here: {error}") from error
    return device
