"""Copy tensors to an accelerator while it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from grail_hf.runtime import devices
from grail_hf.runtime.devices import with_index

# The share of free memory for a layer that is read ahead; Grams and solves need the rest.
AHEAD_SHARE = 1 / 8


class Transfer:
    """Copies tensors to a CUDA device while it computes, in a thread and a stream of its own.

    They go through pinned memory, from which the device reads at full speed. Nothing is copied to
    other devices, or to a device with little free memory.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: dict[int, Future[list[Tensor]]] = {}

    def send(
        self, label: int, reads: Sequence[Callable[[], Tensor]], size: int, device: torch.device
    ) -> None:
        """Start to read tensors, of `size` bytes in total, and to copy them to the device."""
        device = with_index(device)  # the thread has its own current device
        if device.type == "cuda" and reads and size <= AHEAD_SHARE * devices.free_bytes(device):
            self._thread = self._thread or ThreadPoolExecutor(1, "read-ahead")
            self._under_way[label] = self._thread.submit(self.copy, reads, device)

    def receive(self, label: int) -> list[Tensor]:
        """The tensors that were sent under the label, in their order; empty where none were.

        Raises what reading raised.
        """
        if label not in self._under_way:
            return []
        tensors = self._under_way.pop(label).result()
        for tensor in tensors:
            # Allocated for the transfer's stream, which might otherwise reuse the memory too early.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def copy(self, reads: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
        """The tensors that `reads` return, completely copied to a CUDA device."""
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.no_grad(), torch.cuda.stream(stream):
            tensors = []
            for read in reads:
                tensor = read()
                tensor = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
                tensors.append(tensor.to(device, non_blocking=True))
        stream.synchronize()
        return tensors
