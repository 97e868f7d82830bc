"""Capture the inputs and outputs of modules in a forward pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grail_hf.runtime.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def forwards_replaced(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace every module's `forward` by `forward` inside the context."""
    originals = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in originals:
            module.forward = forward
        yield
    finally:
        for module, original in originals:
            del module.forward
            if original is not None:
                module.forward = original


@contextmanager
def not_run(returned: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside the context the modules do not run, and return copies of what is given.

    Copies, since some layers add to what a module returns in place.
    """
    with ExitStack() as stack:
        for module, value in returned.items():
            stack.enter_context(forwards_replaced([module], partial(_copied, value)))
        yield


def _copied(value: Any, *_: Any, **__: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module."""


class _Reached(Exception):
    """The forward pass has reached the module that it is to stop at."""


@contextmanager
def _stopped_at(
    module: nn.Module, take: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Stop the pass inside the context at `module`, and give the module's arguments to `take`.

    Raises RuntimeError where the pass never reaches the module.
    """

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, kwargs)
        raise _Reached

    with _removed_when_reached(module.register_forward_pre_hook(stop, with_kwargs=True), module):
        yield


@contextmanager
def _removed_when_reached(hook: RemovableHandle, module: nn.Module) -> Iterator[None]:
    """The pass inside the context ends when the hook of `module` raises `_Reached`.

    Raises RuntimeError where it does not.
    """
    try:
        yield
    except _Reached:
        return
    finally:
        hook.remove()
    raise RuntimeError(f"the layer's forward pass never calls its {type(module).__name__}")


@contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input [.., H] of `module`, at which the pass inside the context stops.

    The list is empty until then. Raises RuntimeError where the pass never reaches the module.
    """
    seen: list[Tensor] = []
    with _stopped_at(module, lambda args, kwargs: seen.append(args[0])):
        yield seen


@contextmanager
def captured_call(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of `module`, at which the pass inside the context stops.

    The list is empty until then. Raises RuntimeError where the pass never reaches the module.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with _stopped_at(module, lambda args, kwargs: seen.append((args, kwargs))):
        yield seen


# In place of a consumer's output; nothing but that output itself has it everywhere afterwards.
_STAND_IN = 41.0


@dataclass
class BlockPass:
    """A block's pass in which its consumer does not run: one number stands in for its output.

    Attributes:
        call: the arguments of the consumer.
        outputs: of the watched modules, in the order in which they were called.
        returned: what the block returned.
    """

    call: Call = ((), {})
    outputs: list[Tensor] = field(default_factory=list)
    returned: Any = None

    @property
    def ends_with_consumer(self) -> bool:
        """Whether the consumer's output is what the block returns, or the first of a tuple."""
        first = hidden_states_of(self.returned)
        return isinstance(first, Tensor) and bool((first == _STAND_IN).all())


@contextmanager
def passed_through(
    block: nn.Module, consumer: nn.Module, outputs: int, watched: Sequence[nn.Module] = ()
) -> Iterator[BlockPass]:
    """The pass inside the context stops at the end of `block`, and its consumer does not run.

    Args:
        block: the attention, the MLP or the experts.
        consumer: in it, or the same module.
        outputs: O, the numbers that the consumer outputs a token.
        watched: modules in the block whose outputs are captured.

    Raises:
        RuntimeError: the pass never reaches the end of the block.
    """
    found = BlockPass()

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        found.call = args, kwargs
        x: Tensor = args[0]
        return x.new_full((*x.shape[:-1], outputs), _STAND_IN)

    with (
        forwards_replaced([consumer], stand_in),
        captured_outputs(watched) as found.outputs,
        captured_return(block) as returned,
    ):
        yield found
    (found.returned,) = returned


@contextmanager
def captured_return(block: nn.Module) -> Iterator[list[Any]]:
    """What `block` returns; the pass inside the context stops there. Empty until then.

    Raises RuntimeError where the pass never reaches the end of the block.
    """
    seen: list[Any] = []

    def end(_: nn.Module, __: Any, returned: Any) -> None:
        seen.append(returned)
        raise _Reached

    with _removed_when_reached(block.register_forward_hook(end), block):
        yield seen


@contextmanager
def captured_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of `modules`, in the order in which the pass inside the context calls them."""
    outputs: list[Tensor] = []
    with captured_calls(modules) as calls:
        yield outputs
    outputs += [output for _, output in calls]


@contextmanager
def captured_calls(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of `modules`, in the order in which the pass in the context calls them."""
    seen: list[tuple[Tensor, Tensor]] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output.clone()))  # some layers add to it in place

    handles = [module.register_forward_hook(take) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def detached_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input and the output of `module` in the pass inside the context.

    The output is detached, a leaf: backpropagation from later modules ends there.
    """
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((inputs[0], output.detach().requires_grad_()))
        return seen[1].clone()  # some layers add to it in place

    handle = module.register_forward_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def takes_tuples(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Whether the model expects its decoder layers to return a tuple, not a tensor.

    This differs between model types and between versions of transformers. To find out, the first
    layer is replaced by one that returns a tensor: a model that expects a tuple takes element 0 of
    that, and passes on hidden states without the batch dimension. No decoder layer runs or needs
    its weights.
    """
    seen: list[Tensor] = []

    def look(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if len(seen) > 1:
            raise _Reached
        return seen[0]

    ids = torch.ones(2, 3, dtype=torch.int64, device=input_device(model))
    with forwards_replaced(layers, look), suppress(_Reached):
        seen.append(model.base_model(input_ids=ids, use_cache=False)[0])
    before, after = seen
    return before.shape[:-1] != after.shape[:-1]


def layer_calls(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: dict[str, Tensor], in_tuple: bool
) -> tuple[Tensor, list[Call]]:
    """The hidden states before layer 0, and every layer's other arguments for these inputs.

    No decoder layer runs: each passes on the hidden states that it gets.

    Args:
        model: any decoder-only transformers model.
        layers: its decoder layers.
        inputs: of the model: `input_ids` [b, T] and, optionally, `attention_mask` [b, T].
        in_tuple: the model expects its layers to return a tuple (`takes_tuples`).
    """
    seen: list[Tensor] = []
    calls: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        seen.append(hidden)
        calls.append((args, kwargs))
        return as_returned(hidden, in_tuple)

    with forwards_replaced(layers, record):
        model.base_model(**inputs, use_cache=False)
    return seen[0], calls


def as_returned(hidden: Tensor, in_tuple: bool) -> Any:
    """Hidden states as the model expects a decoder layer to return them (`takes_tuples`)."""
    return (hidden, None) if in_tuple else hidden


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, which may be a tuple that starts with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
