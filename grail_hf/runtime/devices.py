"""Which device computes, and how much memory it has left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grail_hf.runtime import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def free_bytes(device: torch.device) -> int:
    """Memory that is not in use; what torch holds in reserve is free for its tensors."""
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        reserve = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + reserve)
    import psutil

    return int(psutil.virtual_memory().available)  # MPS has the host's


def with_index(device: torch.device) -> torch.device:
    """The device with its index, where it names the current accelerator by its type alone."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.index is not None or accelerator is None or accelerator.type != device.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks give the model's modules their devices."""
    return bool(hooks_of(model))


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: where its embeddings lie or, if offloaded, compute."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return computes_on(embeddings)


def hooks_of(root: nn.Module) -> list[Any]:
    """accelerate's hooks under `root` that give modules a device."""
    return [hook for module in root.modules() for hook in own_hooks(module)]


def own_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def computes_on(module: nn.Module) -> torch.device:
    """Where accelerate's hooks have the module compute, or where it lies."""
    for hook in hooks_of(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def choose_device(model: PreTrainedModel, wanted: str | None) -> torch.device:
    """Where layers run: as wanted, else the model's accelerator, else the machine's, else CPU.

    A model that accelerate has dispatched runs where it takes its inputs, a CPU too. Of several
    processes, each has an accelerator of its own. An accelerator has its index, as tensors have.

    Raises ValueError where this machine does not have the wanted device, or it is another
    process's.
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
