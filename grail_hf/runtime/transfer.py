"""Copies to an accelerator that go on while it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from grail_hf.runtime import devices
from grail_hf.runtime.devices import with_index

AHEAD_SHARE = 1 / 8


class Transfer:
    """Brings tensors to a CUDA device while it computes: in a thread, and a stream of its own.

    They go through pinned memory, from which the device reads at full speed. Nothing is brought to
    other devices, or to one that has little room.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: dict[int, Future[list[Tensor]]] = {}

    def send(
        self, label: int, reads: Sequence[Callable[[], Tensor]], size: int, device: torch.device
    ) -> None:
        """Begin to read tensors, of `size` bytes together, and to bring them to the device."""
        device = with_index(device)  # another thread has another current device
        if device.type == "cuda" and reads and size <= AHEAD_SHARE * devices.free_bytes(device):
            self._thread = self._thread or ThreadPoolExecutor(1, "read-ahead")
            self._under_way[label] = self._thread.submit(_bring, reads, device)

    def receive(self, label: int) -> list[Tensor]:
        """What was sent under the label, in its order; nothing where nothing was.

        Raises what reading raised.
        """
        if label not in self._under_way:
            return []
        tensors = self._under_way.pop(label).result()
        for tensor in tensors:
            # They were allocated for the transfer's stream, which might else reuse them too early.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors


def _bring(reads: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
    """The tensors that `reads` give, whole on a CUDA device."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.stream(stream):
        tensors = []
        for read in reads:
            tensor = read()
            tensor = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
            tensors.append(tensor.to(device, non_blocking=True))
    stream.synchronize()
    return tensors
