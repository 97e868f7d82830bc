"""Several processes that share one compression: the calibration's batches, and what they sum up to.

Each process runs the same program on the same model. The micro-batches are cut into consecutive
shares; what is summed over them is summed over the processes too, and what is decided or solved
from the sums is so by the first process, and sent to the others. Everything here does nothing where
there is one process alone. All processes must come to the same calls in the same order.

Processes take part where the program has joined them, by accelerate or by torch.distributed. The
command line alone joins those that `accelerate launch` or `torchrun` has started (`join`): a script
that a launcher runs may well call the library in one process only. The exchange is
torch.distributed's own, because accelerate copies what it reduces, which is too much for a Gram.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
# The others wait while the first process solves, evaluates or saves. That a process has ended is
# noticed at once; this is for one that hangs, or whose machine is gone.
TIMEOUT = timedelta(hours=6)


class ProcessGroupError(RuntimeError):
    """Another process has ended, or does not answer: this one cannot go on alone."""


def join(device: str | None = None) -> None:
    """Join the other processes that a launcher has started, if it has and they are not joined yet.

    For the command line. On accelerators each process's current device is from then on its own
    (`cuda:LOCAL_RANK`).

    Args:
        device: where layers will run, as in `GrailConfig.device`.
    """
    if count() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        settings: dict[str, Any] = {"timeout": TIMEOUT}
        if not torch.accelerator.is_available() or device == "cpu":
            settings["cpu"] = True
        elif torch.cuda.is_available():
            settings["backend"] = "cpu:gloo,cuda:nccl"  # what is no tensor stays on the host
        PartialState(**settings)


def silence_copies() -> None:
    """Silence the warnings and bars of all but the first process: they would be copies."""
    if not is_first():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.getLogger("grail_hf").setLevel(logging.ERROR)


def count() -> int:
    """Processes that share the work."""
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


def index() -> int:
    """Of this process among them."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process decides, shows, evaluates and writes."""
    return index() == 0


def own_device(device: torch.device) -> torch.device:
    """The device with its index, where each process has one of its own.

    Raises ValueError for an accelerator that is another process's.
    """
    if count() == 1 or device.type == "cpu" or not torch.accelerator.is_available():
        return device
    own = torch.accelerator.current_device_index()
    if device.index not in (None, own):
        raise ValueError(
            f"process {index()} of {count()} cannot use {device}: its own is "
            f"{device.type}:{own}; use device={device.type!r}, and load the model on the CPU"
        )
    return torch.device(device.type, own)


def share(number: int) -> range:
    """Which of `number` micro-batches are this process's: consecutive ones, as many as others have.

    Raises ValueError where there are fewer than processes.
    """
    if number < count():
        raise ValueError(
            f"the calibration's batches, {number}, are too few for {count()} processes to share: "
            "use a smaller batch_size, more num_samples, or fewer processes"
        )
    return range(number * index() // count(), number * (index() + 1) // count())


def sum_(tensors: Sequence[Tensor], name: str) -> None:
    """Replace each tensor by the sum of all processes' own, in its dtype, bit-equal in all of them.

    Args:
        tensors: of the same shapes and dtypes in each process.
        name: of the group that is worked on, for messages.

    Raises:
        ProcessGroupError: another process has ended.
    """
    if count() == 1:
        return
    with _ended_at(name):
        for tensor in tensors:
            carried = _carried(tensor)
            distributed.all_reduce(carried)
            if carried is not tensor:
                tensor.copy_(carried)


def gather(items: Sequence[T], name: str) -> list[T]:
    """All processes' items, in the order of the processes. Raises as `sum_`."""
    if count() == 1:
        return list(items)
    found: list[Any] = [None] * count()
    with _ended_at(name):
        distributed.all_gather_object(found, list(items))
    return [item for part in found for item in part]


def total(numbers: Sequence[float], name: str) -> list[float]:
    """Of each number, the sum of all processes' own; integers stay integers. Raises as `sum_`."""
    return [sum(column) for column in zip(*gather([numbers], name), strict=True)]


def once(function: Callable[[], T], name: str) -> T:
    """What `function` returns or raises, called in the first process, in all of them.

    Args:
        function: of no collective operation of its own. What it returns is pickled; tensors in it
            come to the other processes' own devices.
        name: of the group that is worked on, for messages.

    Raises:
        ProcessGroupError: another process has ended.
    """
    if count() == 1:
        return function()
    if not is_first():
        value, error = _sent(None, name)
        if error is not None:
            raise error
        result: T = value
        return result
    try:
        result = function()
    except Exception as error:
        _sent((None, _picklable(error)), name)
        raise
    _sent((result, None), name)
    return result


@contextmanager
def first_within(context: AbstractContextManager[T], name: str) -> Iterator[T]:
    """The first process is in the context, and all have what it gives.

    What it raises at its beginning, or at an end without an error, all raise.
    """
    with ExitStack() as stack:
        yield once(partial(stack.enter_context, context), name)
        once(stack.pop_all().close, name)


class _Pickler(pickle.Pickler):
    """Leaves out the tensors, which go from device to device, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if not isinstance(item, Tensor):
            return None
        self.tensors.append(item.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the tensors in where they were left out."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _sent(data: Any, name: str) -> Any:
    """The first process's data, in all processes."""
    header: list[Any] = [None]
    tensors: list[Tensor] = []
    if is_first():
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(data)
        tensors = pickler.tensors
        # Of a device only the type: its index is the receiver's own.
        kinds = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        header = [(file.getvalue(), kinds)]
    with _ended_at(name):
        distributed.broadcast_object_list(header, src=0)
        content, kinds = header[0]
        if not is_first():
            tensors = [torch.empty(s, dtype=dtype, device=kind) for s, dtype, kind in kinds]
        for tensor in tensors:
            carried = _carried(tensor)
            distributed.broadcast(carried, src=0)
            if carried is not tensor and not is_first():
                tensor.copy_(carried)
    return data if is_first() else _Unpickler(io.BytesIO(content), tensors).load()


def _carried(tensor: Tensor) -> Tensor:
    """The tensor as the group's backend takes it: NCCL alone takes none of the host's."""
    if f"{tensor.device.type}:" not in distributed.get_backend_config():
        tensor = tensor.to(torch.accelerator.current_accelerator())
    return tensor.contiguous()


def _picklable(error: Exception) -> Exception:
    """The error, or one that says the same where its type cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    same = type(copy) is type(error) and str(copy) == str(error)
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _ended_at(name: str) -> Iterator[None]:
    """An exchange that fails says what for, and where the work was."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessGroupError(
            f"another process of {count()} ended at {name}, or did not answer for {TIMEOUT}"
        ) from error
