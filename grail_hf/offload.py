"""Where decoder layers and hidden states lie while they are not at work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Smaller tensors are not worth a file.
_LEAST_MAPPED = 2**20


@dataclass
class HiddenStates:
    """The hidden states of one micro-batch in front of a decoder layer.

    Attributes:
        number: the micro-batch's, of all that there are.
        hidden: [b, T, D] on the compressed path.
        dense: [b, T, D] in the dense model, where the target needs it and they differ.
    """

    number: int
    hidden: Tensor
    dense: Tensor | None


@dataclass(frozen=True)
class Place:
    """Where hidden states are kept: on a device, or in files that are mapped into memory.

    Attributes:
        device: to keep them on, if there is no folder.
        folder: of the files. They have no name there, and are gone with the tensors, or with the
            process, however that ends.
    """

    device: torch.device
    folder: Path | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, moved here. Raises OSError where the disk is full."""
        if self.folder is None or tensor.nbytes < _LEAST_MAPPED:
            return tensor.to(self.device)
        tensor = tensor.detach().cpu().contiguous()
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="hidden-states-") as file:
            # Written, not copied into the map: a full disk would kill the process there.
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape)

    def keep_all(self, data: Any) -> Any:
        """Nested tuples, lists and dicts with their tensors kept."""
        from accelerate.utils.operations import recursively_apply

        kept: Any = recursively_apply(self.keep, data)
        return kept


class Homes:
    """Decoder layers that lie in the model itself: each goes to a device to work, and comes home.

    Attributes:
        layers: the model's.
        device: where they work.
        first: layers in front of it were done earlier.
    """

    first = 0

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.layers = layers
        self.device = device

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """All of the model but its decoder layers has its weights inside the context."""
        yield

    def start(self, batches: Sequence[HiddenStates]) -> None:
        """Give the batches, which have hidden states in front of layer 0, those of `first`."""

    @contextmanager
    def at_work(self, index: int) -> Iterator[torch.device]:
        """The layer has its weights, on the device that this gives; it goes home as it then is."""
        layer = self.layers[index]
        home = next(layer.parameters()).device
        layer.to(self.device)
        try:
            yield self.device
        finally:
            layer.to(home)

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        """Layer `index` went home; unless it is the last, the batches hold what it put out."""
