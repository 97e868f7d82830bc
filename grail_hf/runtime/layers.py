"""Where the decoder layers of a model in memory lie, and how each gets to where it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grail_hf.runtime.meter import Meter
from grail_hf.runtime.placement import HiddenStates
from grail_hf.runtime.transfer import Transfer


class LayerPlacement:
    """Decoder layers that lie in the model itself: each goes to a device to work, and comes home.

    Attributes:
        layers: the model's.
        device: where they work.
        first: layers in front of it were done earlier.
        meter: of what the work on them takes.
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
        """All of the model but its decoder layers has its weights inside the context."""
        yield

    def start(self, batches: Sequence[HiddenStates]) -> None:
        """Give the batches, which have hidden states in front of layer 0, those of `first`."""

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        """The layer has its weights, on the device that this gives; it goes home as it then is.

        The next layer's weights are read meanwhile, where a CUDA device waits for them.
        """
        layer = self.layers[index]
        home = next(layer.parameters()).device
        self._receive_(index)
        layer.to(self.device)
        if index + 1 < len(self.layers):
            # Kept, not looked up again when they arrive: what layers share is on the device now.
            self._read_ahead = self._offloaded_tensors(index + 1)
            size = sum(tensor.nbytes for tensor in self._read_ahead)
            reads = [tensor.detach for tensor in self._read_ahead]
            self.transfer.send(index + 1, reads, size, self.device)
        try:
            yield self.device
        finally:
            layer.to(home)

    def _receive_(self, index: int) -> None:
        """Give the layer's tensors the values that were read ahead, if any were."""
        tensors, self._read_ahead = self._read_ahead, []
        if brought := self.transfer.receive(index):
            for tensor, values in zip(tensors, brought, strict=True):
                tensor.data = values

    def _offloaded_tensors(self, index: int) -> list[Tensor]:
        """The layer's tensors that lie in host memory."""
        layer = self.layers[index]
        return [t for t in (*layer.parameters(), *layer.buffers()) if t.device.type == "cpu"]

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        """Layer `index` went home; unless it is the last, the batches hold what it put out."""


def move_(module: nn.Module, device: torch.device) -> None:
    # Returns nothing: what a hook returns takes the place of inputs or outputs.
    module.to(device)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
