"""accelerate's hooks: where modules compute, and which of their weights are offloaded.

The semi-private uses of accelerate are in this module alone.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def own_hooks(module: nn.Module) -> list[Any]:
    """The hooks of the module itself that give it a device."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def hooks_of(root: nn.Module) -> list[Any]:
    """The hooks of all modules under `root` that give them a device."""
    return [hook for module in root.modules() for hook in own_hooks(module)]


def is_dispatched(model: nn.Module) -> bool:
    """Whether hooks give the model's modules their devices."""
    return bool(hooks_of(model))


def computes_on(module: nn.Module) -> torch.device:
    """The device that the module's hooks run it on, or that its parameters are on."""
    for hook in hooks_of(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def is_offloaded(module: nn.Module) -> bool:
    """Whether hooks bring weights of the module for each forward pass."""
    return any(hook.offload for hook in hooks_of(module))


@contextmanager
def offloading_paused(hooks: Iterable[Any], device: torch.device | None = None) -> Iterator[None]:
    """Inside the context the hooks leave weights alone, and move inputs to `device`, if given."""
    before = [(hook, hook.offload, hook.execution_device) for hook in dict.fromkeys(hooks)]
    try:
        for hook, _, own in before:
            hook.offload = False
            hook.execution_device = own if device is None else device
        yield
    finally:
        for hook, offload, own in before:
            hook.offload, hook.execution_device = offload, own


def replace_hooked_forward_(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have the module's hooks, if it has any, call another class's `forward`."""
    if "_old_forward" in vars(module):
        method = MethodType(forward, module)
        vars(module)["_old_forward"] = method
        update_wrapper(module.forward, method)


@dataclass(frozen=True)
class Offloaded:
    """A tensor that a hook keeps in its map of weights.

    Attributes:
        owner: the module that has the tensor, on the meta device.
        name: of the tensor in the owner.
        hook: brings the tensor for each forward pass.
        key: of the tensor in the hook's map.
    """

    owner: nn.Module
    name: str
    hook: Any
    key: str

    @property
    def tensor(self) -> Tensor:
        """The owner's tensor, which has values only while the owner is on a device."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor

    @property
    def device(self) -> Any:
        """The device that the hook brings the tensor to."""
        return self.hook.execution_device

    @property
    def slot(self) -> tuple[Any, str]:
        """The map that holds the values, without maps that only add a prefix, and the key in it."""
        from accelerate.utils import PrefixedDataset

        weights, key = self.hook.weights_map, self.key
        while isinstance(weights, PrefixedDataset):
            weights, key = weights.dataset, weights.prefix + key
        return weights, key

    def read(self) -> Tensor:
        """The values, in the owner's dtype."""
        tensor: Tensor = self.hook.weights_map[self.key]
        return tensor.detach().to(self.tensor.dtype)

    def put_(self, tensor: Tensor) -> None:
        """Give the owner another tensor in place of this one."""
        if isinstance(self.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
        setattr(self.owner, self.name, tensor)

    def is_unchanged(self, known: tuple[weakref.ref[Tensor], int] | None) -> bool:
        """Whether the owner still has the tensor `known`, at the same version."""
        if known is None:
            return False
        reference, version = known
        return reference() is self.tensor and self.tensor._version == version


def offloaded_in(model: nn.Module, owners: Collection[nn.Module]) -> list[Offloaded]:
    """The tensors of `owners` that hooks anywhere in the model offload."""
    found = []
    for module in model.modules():
        for hook in own_hooks(module):
            if not hook.offload:
                continue
            from accelerate.utils import named_module_tensors

            for key, _ in named_module_tensors(
                module,
                include_buffers=hook.offload_buffers,
                recurse=hook.place_submodules,
                remove_non_persistent=True,
            ):
                path, _, name = key.rpartition(".")
                owner = module.get_submodule(path)
                if owner in owners:
                    found.append(Offloaded(owner, name, hook, key))
    return found


class ChangedWeights:
    """Stores the new values of offloaded tensors where their hooks read them.

    Values that were on disk go to a file in a new folder beside the old ones (or in the folder for
    temporary files), which is deleted with the map that reads it. Values that are in no map yet,
    which are new biases, are kept in host memory: they are small.
    """

    def __init__(self) -> None:
        self._folders: dict[int, Path] = {}

    def store(self, changed: Sequence[Offloaded]) -> None:
        """Store tensors that have values. Raises OSError where a disk is full."""
        from accelerate.utils import OffloadedWeightsLoader

        loaders: dict[int, Any] = {}
        for_disk: dict[int, dict[str, Tensor]] = {}
        for one in changed:
            weights, key = one.slot
            tensor = one.tensor.detach().cpu()
            if not isinstance(weights, OffloadedWeightsLoader):
                weights[key] = tensor
            elif key in weights.index and key not in weights.state_dict:
                loaders[id(weights)] = weights
                for_disk.setdefault(id(weights), {})[key] = tensor.contiguous()
            else:
                weights.state_dict[key] = tensor
                if key not in weights.all_keys:
                    weights.all_keys.append(key)
            devices = one.hook.original_devices
            devices.setdefault(one.key, next(iter(devices.values())))
        for name, tensors in for_disk.items():
            file = _save(tensors, self._folder(loaders[name]))
            for key, tensor in tensors.items():
                loaders[name].index[key] = {
                    "safetensors_file": str(file),
                    "weight_name": key,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }

    def _folder(self, loader: Any) -> Path:
        """The folder for new values that `loader` reads from disk."""
        if id(loader) not in self._folders:
            folder = Path(tempfile.mkdtemp(prefix="grail-offload-", dir=loader.save_folder))
            weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
            self._folders[id(loader)] = folder
        return self._folders[id(loader)]


def _save(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A new file of tensors. Raises OSError, and leaves no file, where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors", delete=False) as new:
        file = Path(new.name)
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        file.unlink()
        raise OSError(f"the layer's new weights cannot be written in {folder}: {error}") from error
    return file
