"""Where hidden states are kept between layers: the accelerator, host memory, or disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from grail_hf.config import AUTO
from grail_hf.runtime import devices

_NUMBERS_AT_ONCE = 2**22  # written to a file at a time
# The shares of free memory that hidden states may take with "auto"; Grams and solves need the rest.
ACCELERATOR_SHARE = 1 / 4
HOST_SHARE = 1 / 2
# Of an accelerator that hidden states are kept from, for what is needed again within a layer.
NEAR_BYTES = 2**30


@dataclass
class HiddenStates:
    """The hidden states of one micro-batch before a decoder layer.

    Attributes:
        number: index of the micro-batch in the calibration.
        hidden: [b, T, D] in the compressed model.
        dense: [b, T, D] in the dense model, where the target needs it and they differ.
    """

    number: int
    hidden: Tensor
    dense: Tensor | None


@dataclass(frozen=True)
class Place:
    """Where hidden states are kept: on a device, or in files that are mapped into memory.

    Attributes:
        device: that they are kept on without a folder.
        folder: of the files. The files have no name (on Linux; elsewhere only while one is being
            opened), and are deleted with the tensors, or with the process, however it ends.
        least_mapped: bytes; smaller tensors are not worth a file and stay on the device.
    """

    device: torch.device
    folder: Path | None = None
    least_mapped: ClassVar[int] = 2**20

    def keep(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, kept here in `dtype`, or its own. Raises OSError where the disk is full."""
        dtype = dtype or tensor.dtype
        if self.folder is None or tensor.nbytes < self.least_mapped:
            return tensor.to(self.device, dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Written, not copied into the map, where a full disk would kill the process.
                for part in torch.split(tensor.detach().flatten(), _NUMBERS_AT_ONCE):
                    file.write(part.to(dtype).cpu().view(torch.uint8).numpy().data)
                file.flush()
                name = f"/dev/fd/{file.fileno()}"
                mapped = torch.from_file(name, size=tensor.numel(), dtype=dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"hidden states and moments cannot be kept in {self.folder} ({error.strerror}): "
                "free some space, lower num_samples, or choose another disk, from disk to disk by "
                "the output folder, else by the environment variable TMPDIR",
            ) from error
        return mapped.view(tensor.shape)

    def keep_all(self, data: Any) -> Any:
        """Nested tuples, lists and dicts, with their tensors kept here."""
        from accelerate.utils.operations import recursively_apply

        kept: Any = recursively_apply(self.keep, data)
        return kept


def choose_place(
    wanted: str, size: int, accelerator: torch.device, folder: Path | None = None
) -> Place:
    """Where to keep hidden states.

    Args:
        wanted: `GrailConfig.hidden_states`.
        size: bytes of all hidden states.
        accelerator: the device that layers run on.
        folder: for "disk"; by default the one for temporary files.
    """
    host = torch.device("cpu")
    if wanted == AUTO:
        if accelerator.type != "cpu" and size <= ACCELERATOR_SHARE * devices.free_bytes(
            accelerator
        ):
            wanted = "accelerator"
        else:
            wanted = "host" if size <= HOST_SHARE * devices.free_bytes(host) else "disk"
    if wanted == "disk":
        return Place(host, folder or Path(tempfile.gettempdir()))
    return Place(accelerator if wanted == "accelerator" else host)


def choose_near(place: Place, device: torch.device, size: int) -> Place | None:
    """Where to keep what is needed again within a layer: where it runs, or nowhere.

    From an accelerator to the host and back takes as long as computing it again. An accelerator
    that hidden states are kept from, to spare its memory, gets little of this either.

    Args:
        place: of the hidden states between layers.
        device: that the layer runs on.
        size: bytes that are needed again.
    """
    if place.folder is not None:
        return place if device.type == "cpu" else None
    if device.type == "cpu":
        room = HOST_SHARE * devices.free_bytes(device)
    else:
        room = ACCELERATOR_SHARE * devices.free_bytes(device)
        room = room if place.device == device else min(room, NEAR_BYTES)
    return Place(device) if size <= room else None
