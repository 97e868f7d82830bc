"""Where hidden states are kept between layers: the accelerator, host memory, or disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail_hf.config import AUTO
from grail_hf.runtime import devices

# Smaller tensors are not worth a file.
_LEAST_MAPPED = 2**20
_NUMBERS_AT_ONCE = 2**22  # numbers that are written to a file at a time
# Of the memory that is free, what "auto" lets hidden states have, and what a layer that is read
# ahead may take of the accelerator's: Grams and solves come after it.
ACCELERATOR_SHARE = 1 / 4
HOST_SHARE = 1 / 2


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
        folder: of the files. They have no name there (on Linux; elsewhere for no longer than it
            takes to open one), and are gone with the tensors, or with the process, however it ends.
    """

    device: torch.device
    folder: Path | None = None

    def keep(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, moved here, in a dtype or its own. Raises OSError where the disk is full."""
        dtype = dtype or tensor.dtype
        if self.folder is None or tensor.nbytes < _LEAST_MAPPED:
            return tensor.to(self.device, dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Written, not copied into the map: a full disk would kill the process there.
                for part in torch.split(tensor.detach().flatten(), _NUMBERS_AT_ONCE):
                    file.write(part.to(dtype).cpu().view(torch.uint8).numpy().data)
                file.flush()
                name = f"/dev/fd/{file.fileno()}"
                mapped = torch.from_file(name, size=tensor.numel(), dtype=dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"hidden states and moments cannot be kept in {self.folder} ({error.strerror}): "
                "make room, lower num_samples, or choose another disk, from disk to disk by the "
                "output, else by the environment variable TMPDIR",
            ) from error
        return mapped.view(tensor.shape)

    def keep_all(self, data: Any) -> Any:
        """Nested tuples, lists and dicts with their tensors kept."""
        from accelerate.utils.operations import recursively_apply

        kept: Any = recursively_apply(self.keep, data)
        return kept


def choose_place(
    wanted: str, size: int, accelerator: torch.device, folder: Path | None = None
) -> Place:
    """Where to keep hidden states.

    Args:
        wanted: `GrailConfig.hidden_states`.
        size: bytes of all of them together.
        accelerator: where layers run.
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
