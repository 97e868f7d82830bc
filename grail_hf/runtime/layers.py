"""Decoder layers of a model in memory, each moved to the device that it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grail_hf.runtime.meter import Meter
from grail_hf.runtime.placement import HiddenStates
from grail_hf.runtime.transfer import Transfer


class LayerPlacement:
    """Decoder layers that are in the model itself: each runs on a device, and is moved back.

    Attributes:
        layers: the model's decoder layers.
        device: that they run on.
        first: index of the first layer that is not done yet.
        meter: measures memory and time by phase.
    """

    first = 0

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.transfer = Transfer()
        self.meter = Meter(device)
        self._read_ahead: list[Tensor] = []

    @contextmanager
    def rest_of_model(self) -> Iterator[None]:
        """The model has the weights outside its decoder layers inside the context."""
        yield

    def start(self, batches: Sequence[HiddenStates]) -> None:
        """Replace the batches' hidden states, those before layer 0, by those before `first`."""

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        """The layer has its weights inside the context, on the device that this yields.

        Afterwards the layer, with any changes, is moved back. Meanwhile the next layer's weights
        are read, if they are to be moved to a CUDA device.
        """
        layer = self.layers[index]
        original = next(layer.parameters()).device
        self._receive_(index)
        layer.to(self.device)
        if index + 1 < len(self.layers):
            # Kept, not looked up again on arrival: buffers that layers share are on the device now.
            self._read_ahead = self._offloaded_tensors(index + 1)
            size = sum(tensor.nbytes for tensor in self._read_ahead)
            reads = [tensor.detach for tensor in self._read_ahead]
            self.transfer.send(index + 1, reads, size, self.device)
        try:
            yield self.device
        finally:
            layer.to(original)

    def _receive_(self, index: int) -> None:
        """Give the layer's tensors their values that were read ahead, if any."""
        tensors, self._read_ahead = self._read_ahead, []
        if arrived := self.transfer.receive(index):
            for tensor, values in zip(tensors, arrived, strict=True):
                tensor.data = values

    def _offloaded_tensors(self, index: int) -> list[Tensor]:
        """The layer's tensors in host memory."""
        layer = self.layers[index]
        return [t for t in (*layer.parameters(), *layer.buffers()) if t.device.type == "cpu"]

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        """Layer `index` is done; unless it is the last, the batches hold its outputs."""


def move_(module: nn.Module, device: torch.device) -> None:
    # Returns nothing: a value that a hook returns replaces the module's inputs or outputs.
    module.to(device)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
