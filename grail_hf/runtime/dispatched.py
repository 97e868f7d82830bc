"""Layers and models that accelerate has dispatched, and evaluation on a device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grail_hf.runtime import devices
from grail_hf.runtime.hooks import (
    ChangedWeights,
    computes_on,
    hooks_of,
    is_dispatched,
    is_offloaded,
    offloaded_in,
    offloading_paused,
)
from grail_hf.runtime.layers import LayerPlacement, bytes_of, move_

# The share of free memory for the weights of a model that is evaluated; the rest is for activations
# and logits.
WEIGHTS_SHARE = 3 / 4


class DispatchedPlacement(LayerPlacement):
    """Decoder layers that accelerate has dispatched: on devices, in host memory, on disk.

    A layer on an accelerator runs there. Any other runs on the device of its hooks, or on `device`
    if that was asked for. Weights that its hooks offload are read once, and changed weights are
    written once (`ChangedWeights`). The hooks are kept, and serve the compressed model as before.

    Attributes:
        model: with accelerate's hooks.
        asked: whether `device` was asked for, rather than a default.
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool
    ) -> None:
        super().__init__(layers, device)
        self.model = model
        self.asked = asked
        self._changed = ChangedWeights()

    @contextmanager
    def rest_of_model(self) -> Iterator[None]:
        inside = {module for layer in self.layers for module in layer.modules()}
        offloaded = offloaded_in(self.model, set(self.model.modules()) - inside)
        shells = [one.tensor for one in offloaded]
        try:
            for one in offloaded:
                one.put_(one.read().to(one.device))
            with offloading_paused([one.hook for one in offloaded]):
                yield
        finally:
            for one, shell in zip(offloaded, shells, strict=True):
                setattr(one.owner, one.name, shell)

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        layer, device = self.layers[index], self._device_of(index)
        offloaded = offloaded_in(self.model, set(layer.modules()))
        placement = {
            module: tensors[0].device for module in layer.modules() if (tensors := _held(module))
        }
        tensors = self.transfer.receive(index) or [one.read().to(device) for one in offloaded]
        arrived = {}
        try:
            while offloaded:
                one = offloaded.pop()
                one.put_(tensors.pop())
                # Weak: a layer that becomes narrower is not kept in its old width.
                arrived[one.owner, one.name] = weakref.ref(one.tensor), one.tensor._version
            layer.to(device)
            if index + 1 < len(self.layers):
                following = offloaded_in(self.model, set(self.layers[index + 1].modules()))
                size = sum(one.tensor.nbytes for one in following)
                reads = [one.read for one in following]
                self.transfer.send(index + 1, reads, size, self._device_of(index + 1))
            with offloading_paused(hooks_of(layer), device):
                yield device
        finally:
            offloaded = offloaded_in(self.model, set(layer.modules()))
            here = [one for one in offloaded if not one.tensor.is_meta]
            known = [arrived.get((one.owner, one.name)) for one in here]
            changed = [o for o, old in zip(here, known, strict=True) if not o.is_unchanged(old)]
            self._changed.store(changed)
            for one in offloaded:
                one.put_(one.tensor.detach().to("meta"))
            for module, original in placement.items():
                for tensor in _held(module):
                    tensor.data = tensor.data.to(original)

    def _device_of(self, index: int) -> torch.device:
        layer = self.layers[index]
        own = computes_on(layer)
        if not is_dispatched(layer):
            return self.device if own.type == "cpu" else own
        resident = own.type != "cpu" and not is_offloaded(layer)
        return self.device if self.asked and not resident else own


def placement_of(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool = False
) -> LayerPlacement:
    """The placement of a model's decoder layers.

    Args:
        model: in memory, or dispatched by accelerate.
        layers: its decoder layers.
        device: the device that they run on. Layers that accelerate has dispatched run on it only
            if it was `asked` for, and not if they are on another accelerator.
        asked: whether `device` was asked for, rather than a default.
    """
    if is_dispatched(model):
        return DispatchedPlacement(model, layers, device, asked)
    return LayerPlacement(layers, device)


@contextmanager
def whole_on_device(
    model: nn.Module, layers: nn.ModuleList, device: torch.device
) -> Iterator[None]:
    """The whole model computes on `device` inside the context, and then returns to its own device.

    Where its weights would fill too much of the device's free memory, the last decoder layers stay
    where they are, and each is moved for its own part of a forward pass alone.

    Args:
        model: in memory, all of it on one device.
        layers: its decoder layers.
        device: where to compute.
    """
    original = next(model.parameters()).device
    sizes = [bytes_of(layer) for layer in layers]
    excess = 0.0
    if original != device:
        excess = bytes_of(model) - WEIGHTS_SHARE * devices.free_bytes(device)
    visiting = len(sizes)
    while visiting and excess > 0:
        if visiting == len(sizes):
            excess += max(sizes)  # one of those that stay is on the device too
        visiting -= 1
        excess -= sizes[visiting]
    staying = list(layers)[visiting:]
    hooks = []
    try:
        for layer in staying:
            hooks += [
                layer.register_forward_pre_hook(lambda layer, _: move_(layer, device)),
                layer.register_forward_hook(
                    lambda layer, *_: move_(layer, original), always_call=True
                ),
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
        model.to(original)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name, tied ones once. Offloaded ones are read one at a time."""
    offloaded = {id(one.tensor): one for one in offloaded_in(model, set(model.modules()))}
    for name, parameter in model.named_parameters():
        one = offloaded.get(id(parameter))
        yield name, parameter if one is None else one.read()


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors of the module itself that have values."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None and not tensor.is_meta]
