"""Models that accelerate has dispatched: layers it offloads, and where it keeps them.

The semi-private uses of accelerate are here alone.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grail_hf.runtime import devices
from grail_hf.runtime.devices import computes_on, hooks_of, is_dispatched, own_hooks
from grail_hf.runtime.layers import LayerPlacement, bytes_of, move_

# What the weights of a model that is evaluated may take: activations and logits come to them.
WEIGHTS_SHARE = 3 / 4


class DispatchedPlacement(LayerPlacement):
    """Decoder layers that accelerate has dispatched: on devices, in host memory, on disk.

    A layer that lies on an accelerator works there. Any other works where its hooks would have it,
    or on `device` if that was asked for. What its hooks have offloaded is read once, and what has
    changed is written once: into the same host memory, or to a file beside the offloaded weights
    (in a folder for temporary files, where they lie in the checkpoint itself). That file is gone
    with the model. The hooks stay, and serve the model afterwards as before.

    Attributes:
        model: with accelerate's hooks.
        asked: `device` is no default.
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool
    ) -> None:
        super().__init__(layers, device)
        self.model = model
        self.asked = asked
        self._folders: dict[int, Path] = {}

    @contextmanager
    def rest_of_model(self) -> Iterator[None]:
        inside = {module for layer in self.layers for module in layer.modules()}
        offloaded = _offloaded(self.model, set(self.model.modules()) - inside)
        shells = [one.tensor for one in offloaded]
        try:
            for one in offloaded:
                one.put_(one.read().to(one.hook.execution_device))
            with _quiet([one.hook for one in offloaded]):
                yield
        finally:
            for one, shell in zip(offloaded, shells, strict=True):
                setattr(one.owner, one.name, shell)

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        layer, device = self.layers[index], self._works_on(index)
        offloaded = _offloaded(self.model, set(layer.modules()))
        placement = {
            module: tensors[0].device for module in layer.modules() if (tensors := _held(module))
        }
        tensors = self.transfer.receive(index) or [one.read().to(device) for one in offloaded]
        arrived = {}
        try:
            while offloaded:
                one = offloaded.pop()
                one.put_(tensors.pop())
                # A layer that becomes narrower need not be kept in its old width.
                arrived[one.owner, one.name] = weakref.ref(one.tensor), one.tensor._version
            layer.to(device)
            if index + 1 < len(self.layers):
                following = _offloaded(self.model, set(self.layers[index + 1].modules()))
                size = sum(one.tensor.nbytes for one in following)
                reads = [one.read for one in following]
                self.transfer.send(index + 1, reads, size, self._works_on(index + 1))
            with _quiet(hooks_of(layer), device):
                yield device
        finally:
            offloaded = _offloaded(self.model, set(layer.modules()))
            here = [one for one in offloaded if not one.tensor.is_meta]
            known = [arrived.get((one.owner, one.name)) for one in here]
            self._write(
                [one for one, old in zip(here, known, strict=True) if not one.is_still(old)]
            )
            for one in offloaded:
                one.put_(one.tensor.detach().to("meta"))
            for module, home in placement.items():
                for tensor in _held(module):
                    tensor.data = tensor.data.to(home)

    def _works_on(self, index: int) -> torch.device:
        hooks = hooks_of(self.layers[index])
        own = computes_on(self.layers[index])
        if not hooks:
            return self.device if own.type == "cpu" else own
        resident = own.type != "cpu" and not any(hook.offload for hook in hooks)
        return self.device if self.asked and not resident else own

    def _write(self, changed: Sequence[_Offloaded]) -> None:
        """Put tensors back into their hooks' maps of weights. Raises OSError where a disk is full.

        Those that are in no map yet, new biases, go to host memory: they are small.
        """
        from accelerate.utils import OffloadedWeightsLoader

        loaders: dict[int, Any] = {}
        for_disk: dict[int, dict[str, Tensor]] = {}
        for one in changed:
            weights, key = one.place
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
        """For what has changed of the weights that `loader` reads from disk."""
        if id(loader) not in self._folders:
            folder = Path(tempfile.mkdtemp(prefix="grail-offload-", dir=loader.save_folder))
            weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
            self._folders[id(loader)] = folder
        return self._folders[id(loader)]


def placement_of(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool = False
) -> LayerPlacement:
    """The placement of a model's decoder layers, wherever they lie.

    Args:
        model: in memory, or dispatched by accelerate.
        layers: its decoder layers.
        device: where they work; where accelerate has given layers a device, only if `asked`, and
            not those that lie on another accelerator.
        asked: `device` was asked for, and is no default.
    """
    if is_dispatched(model):
        return DispatchedPlacement(model, layers, device, asked)
    return LayerPlacement(layers, device)


@contextmanager
def whole_on_device(
    model: nn.Module, layers: nn.ModuleList, device: torch.device
) -> Iterator[None]:
    """The whole model computes on `device` inside the context, and then is where it was.

    Where its weights fill too much of the device's free memory, the last of its decoder layers
    stay, and each is there for its own part of a forward pass alone.

    Args:
        model: in memory, all of it on one device.
        layers: its decoder layers.
        device: where to compute.
    """
    home = next(model.parameters()).device
    sizes = [bytes_of(layer) for layer in layers]
    excess = 0.0 if home == device else bytes_of(model) - WEIGHTS_SHARE * devices.free_bytes(device)
    visiting = len(sizes)
    while visiting and excess > 0:
        if visiting == len(sizes):
            excess += max(sizes)  # one of those that stay is there too
        visiting -= 1
        excess -= sizes[visiting]
    staying = list(layers)[visiting:]
    hooks = []
    try:
        for layer in staying:
            hooks += [
                layer.register_forward_pre_hook(lambda layer, _: move_(layer, device)),
                layer.register_forward_hook(lambda layer, *_: move_(layer, home), always_call=True),
            ]
        try:
            for index in range(visiting, len(sizes)):
                layers[index] = nn.Identity()
            model.to(device)
        finally:
            for index, layer in enumerate(staying, visiting):
                layers[index] = layer
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(home)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name, tied ones once; what is offloaded is read, one at a time."""
    offloaded = {id(one.tensor): one for one in _offloaded(model, set(model.modules()))}
    for name, parameter in model.named_parameters():
        one = offloaded.get(id(parameter))
        yield name, parameter if one is None else one.read()


@dataclass(frozen=True)
class _Offloaded:
    """A tensor that lies in the map of weights of one of accelerate's hooks.

    Attributes:
        owner: the module that has it, on the meta device.
        name: in the owner.
        hook: puts it there for each forward pass.
        key: in the hook's map.
    """

    owner: nn.Module
    name: str
    hook: Any
    key: str

    @property
    def tensor(self) -> Tensor:
        """What the owner has: without values, unless it is at work."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor

    @property
    def place(self) -> tuple[Any, str]:
        """The map that holds it, behind those that only add a prefix, and its key there."""
        from accelerate.utils import PrefixedDataset

        weights, key = self.hook.weights_map, self.key
        while isinstance(weights, PrefixedDataset):
            weights, key = weights.dataset, weights.prefix + key
        return weights, key

    def read(self) -> Tensor:
        """Its values, in the owner's dtype."""
        tensor: Tensor = self.hook.weights_map[self.key]
        return tensor.detach().to(self.tensor.dtype)

    def put_(self, tensor: Tensor) -> None:
        """Give the owner another tensor in its place."""
        if isinstance(self.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
        setattr(self.owner, self.name, tensor)

    def is_still(self, known: tuple[weakref.ref[Tensor], int] | None) -> bool:
        """Whether the owner's tensor is one of old, in the version of old."""
        if known is None:
            return False
        reference, version = known
        return reference() is self.tensor and self.tensor._version == version


def _offloaded(model: nn.Module, owners: Collection[nn.Module]) -> list[_Offloaded]:
    """What hooks anywhere in the model have offloaded of the tensors that `owners` own."""
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
                    found.append(_Offloaded(owner, name, hook, key))
    return found


@contextmanager
def _quiet(hooks: Iterable[Any], device: torch.device | None = None) -> Iterator[None]:
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


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors of the module itself, but for those without values."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None and not tensor.is_meta]


def _save(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A new file of tensors. Raises OSError, without a file, where it cannot be written."""
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
