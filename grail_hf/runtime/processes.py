"""Several processes that share one compression: its calibration batches, and sums over them.

Each process runs the same program on the same model. The micro-batches are divided into consecutive
shares. Sums over batches are summed over the processes too, and the first process alone decides and
solves on these sums, and sends its results to the others. With a single process, everything here
does nothing. All processes must make the same calls in the same order.

Processes take part where the program has joined them, by accelerate or by torch.distributed. Only
the command line joins those that `accelerate launch` or `torchrun` has started (`join`): a script
under a launcher may well call the library in one process alone. The exchange is torch.distributed's
own, because accelerate copies the tensors that it reduces, which takes too much memory for a Gram.
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
# The others wait while the first process solves, evaluates or saves. A process that ends is noticed
# at once; this is for one that hangs, or whose machine is lost.
TIMEOUT = timedelta(hours=6)


class ProcessGroupError(RuntimeError):
    """Another process has ended or does not answer, and this one cannot continue alone."""


def join(device: str | None = None) -> None:
    """Join the processes that a launcher has started, if any, unless they are joined already.

    For the command line. With accelerators, the current device of each process becomes its own
    (`cuda:LOCAL_RANK`).

    Args:
        device: that layers will run on, as in `GrailConfig.device`.
    """
    if count() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        settings: dict[str, Any] = {"timeout": TIMEOUT}
        if not torch.accelerator.is_available() or device == "cpu":
            settings["cpu"] = True
        elif torch.cuda.is_available():
            settings["backend"] = "cpu:gloo,cuda:nccl"  # gloo exchanges Python objects
        PartialState(**settings)


def silence_copies() -> None:
    """Silence the warnings and bars of all processes but the first, whose copies they are."""
    if not is_first():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.getLogger("grail_hf").setLevel(logging.ERROR)


def count() -> int:
    """Number of processes that share the work."""
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


def index() -> int:
    """Index of this process among them."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process decides, shows, evaluates and writes."""
    return index() == 0


def own_device(device: torch.device) -> torch.device:
    """The device, with this process's own index where processes share the work.

    Raises ValueError for an accelerator that belongs to another process.
    """
    if count() == 1 or device.type == "cpu" or not torch.accelerator.is_available():
        return device
    own = torch.accelerator.current_device_index()
    if device.index not in (None, own):
        raise ValueError(
            f"process {index()} of {count()} cannot use {device}: its own device is "
            f"{device.type}:{own}; use device={device.type!r}, and load the model on the CPU"
        )
    return torch.device(device.type, own)


def share(number: int) -> range:
    """This process's share of `number` micro-batches: consecutive, and as large as the others'.

    Raises ValueError where there are fewer micro-batches than processes.
    """
    if number < count():
        raise ValueError(
            f"{number} calibration batches are too few for {count()} processes: use a smaller "
            "batch_size, more num_samples, or fewer processes"
        )
    return range(number * index() // count(), number * (index() + 1) // count())


def sum_(tensors: Sequence[Tensor], name: str) -> None:
    """Replace each tensor by its sum over all processes, in its dtype, the same bits in each.

    Args:
        tensors: of the same shapes and dtypes in each process.
        name: of the group in question, for messages.

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
    """The sum of each number over all processes; integers stay integers. Raises as `sum_`."""
    return [sum(column) for column in zip(*gather([numbers], name), strict=True)]


def once(function: Callable[[], T], name: str) -> T:
    """Call `function` in the first process, and return or raise its result in all of them.

    Args:
        function: without collective operations of its own. Its result is pickled; tensors in it
            go to the other processes' own devices.
        name: of the group in question, for messages.

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
    """Enter the context in the first process, and yield its value in all of them.

    An error that it raises on entry, or on an exit without an error, is raised in all of them.
    """
    with ExitStack() as stack:
        yield once(partial(stack.enter_context, context), name)
        once(stack.pop_all().close, name)


class _Pickler(pickle.Pickler):
    """Lists the tensors instead of pickling them: they are sent from device to device."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if not isinstance(item, Tensor):
            return None
        self.tensors.append(item.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the listed tensors back in their places."""

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
        # Only the type of a device: the index is the receiver's own.
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
    """The tensor on a device that the group's backend supports: NCCL has no CPU tensors."""
    if f"{tensor.device.type}:" not in distributed.get_backend_config():
        tensor = tensor.to(torch.accelerator.current_accelerator())
    return tensor.contiguous()


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its message where its type cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    same = type(copy) is type(error) and str(copy) == str(error)
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _ended_at(name: str) -> Iterator[None]:
    """Name the group in question in the error of an exchange that fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessGroupError(
            f"another process of {count()} ended at {name}, or did not answer for {TIMEOUT}"
        ) from error
