"""An accelerator that is none: its tensors compute on the CPU, and refuse to meet the CPU's.

So a tensor that was left on the wrong device is found on a machine without an accelerator. What is
particular to CUDA (streams, pinned memory, its statistics) is not shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
aten = torch.ops.aten
# Shapes of the tensors that were copied to the device or from it, while this is a list.
crossings: list[torch.Size] | None = None
COPIES = (aten.copy_.default, aten._to_copy.default)
# Indices may lie on the CPU.
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
FACTORIES = (
    *(torch.arange, torch.as_tensor, torch.eye, torch.full, torch.ones, torch.randint),
    *(torch.randn, torch.tensor, torch.zeros),
)


class PretendTensor(Tensor):
    """A tensor whose device is not the CPU, for all that torch can tell.

    Attributes:
        inner: the same on the CPU.
        lacking: a dtype that the device does not have.
    """

    inner: Tensor
    lacking: torch.dtype | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        if inner.dtype == cls.lacking:
            raise TypeError(f"this device does not have {inner.dtype}")  # as MPS does
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatched(operator, *args, **(kwargs or {}))


def dispatched(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the inner tensors. Raises RuntimeError where devices are mixed."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    meeting = [tensor for tensor in tensors if tensor.ndim > 0]  # a number on the CPU may
    if operator in INDEXED:
        meeting = meeting[:1]
    places = {isinstance(tensor, PretendTensor) for tensor in meeting}
    if len(places) > 1 and operator not in COPIES:
        raise RuntimeError(f"{operator} got tensors on {[str(t.device) for t in tensors]}")
    onto = kwargs.get("device")
    pretended = bool(ours) if onto is None else torch.device(onto).type == NAME
    if operator is aten.copy_.default:
        pretended = isinstance(args[0], PretendTensor)
    if operator in COPIES and crossings is not None:
        source = args[1] if operator is aten.copy_.default else args[0]
        if isinstance(source, PretendTensor) != pretended:
            crossings.append(source.shape)
    if onto is not None:
        kwargs["device"] = torch.device("cpu")
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, PretendTensor) else leaf, (args, kwargs)
    )
    if operator is aten.histc.default and not inner_args[0].is_floating_point():
        result = operator(inner_args[0].float(), *inner_args[1:], **inner_kwargs)
        result = result.to(inner_args[0].dtype)  # CUDA counts integers, the CPU does not
    else:
        result = operator(*inner_args, **inner_kwargs)
    known = {id(tensor.inner): tensor for tensor in ours}

    def outer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in known:
            return known[id(leaf)]
        return PretendTensor(leaf) if pretended else leaf

    return tree_map(outer, result)


class _Mode(TorchFunctionMode):
    """What torch does with a device's name, or with a tensor's values, without dispatching."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        onto = kwargs.get("device")
        if function in FACTORIES and onto is not None and torch.device(onto).type == NAME:
            return function(*args, **kwargs | {"device": "cpu"}).to(onto)
        if function is Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].inner.tolist()
        if function is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            return function(args[0], index)
        return function(*args, **kwargs)


class _NotByItself(_DummyBackendModule):
    """No program comes to the device unless it names it; it cannot be unregistered."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


_library = torch.library.Library("_", "IMPL")


@contextmanager
def pretend_device(lacking: torch.dtype | None = None) -> Iterator[str]:
    """There is such a device inside the context, without a dtype; its name."""
    if torch.utils.backend_registration._privateuse1_backend_name != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_NotByItself())
        _library.fallback(dispatched, "PrivateUse1")
    PretendTensor.lacking = lacking
    try:
        with _Mode():
            yield NAME
    finally:
        PretendTensor.lacking = None
