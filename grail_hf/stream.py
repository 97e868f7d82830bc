"""Calibration hidden states, one decoder layer at a time.

A first, cheap pass over the embeddings replaces every decoder layer by a recorder, so that each
layer is later called with exactly the arguments that the full model would give it: its own mask
(full, sliding, padded), rotary embeddings and flags. Replaying the first layer's arguments on all
layers, as is usual, is wrong wherever layers differ. Then only one layer at a time needs the
accelerator: the hidden states in front of it are run through it and replaced by what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from grail_hf.architectures import GroupSpec
from grail_hf.gram import GramStats
from grail_hf.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _MicroBatch:
    """The hidden states of some samples, and every layer's other arguments for them.

    Attributes:
        hidden: [b, T, D] in front of the layer, on the compressed path.
        tokens: [b * T] bool, those that are not padding; None where all count.
        calls: every layer's other arguments.
        dense: [b, T, D] in front of the layer in the dense model, where the target needs it.
        outputs: of each of the layer's consumers in the dense model, [b, T, O], likewise.
    """

    hidden: Tensor
    tokens: Tensor | None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    dense: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)

    def through(self, layer: nn.Module, index: int, hidden: Tensor, device: torch.device) -> Tensor:
        """What `layer` makes of `hidden`, [b, T, D] on `device`."""
        from accelerate.utils import send_to_device

        args, kwargs = send_to_device(self.calls[index], device)
        return _hidden_states(layer(hidden.to(device), *args, **kwargs))

    def rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the tokens that are not padding."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.tokens is None else x[self.tokens.to(x.device)]


@dataclass(frozen=True)
class Run:
    """A block's call on one micro-batch, to be repeated with other weights.

    Attributes:
        module: the attention or the MLP.
        args, kwargs: what the layer calls it with.
        target: [b, T, O], what it should put out.
        batch: the micro-batch.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    batch: _MicroBatch

    def output(self) -> Tensor:
        """[b, T, O], what the block puts out now."""
        return _hidden_states(self.module(*self.args, **self.kwargs))

    def rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the tokens that are not padding."""
        return self.batch.rows(x)

    def without_padding(self, x: Tensor) -> Tensor:
        """[b, T, O] with the rows of padding zero."""
        tokens = self.batch.tokens
        return x if tokens is None else x * tokens.to(x.device).reshape(*x.shape[:-1], 1)


@dataclass(frozen=True)
class Block:
    """A decoder layer on the accelerator, with the calibration hidden states in front of it."""

    index: int
    name: str
    layer: nn.Module
    groups: tuple[Group, ...]
    device: torch.device
    target: str
    batches: Sequence[_MicroBatch]
    progress: tqdm[Any]

    @torch.no_grad()
    def collect(self, group: Group) -> GramStats:
        """Second moments of the inputs and targets of the group's consumer, as the layer is now.

        The layer runs up to the consumer and no further. Padding does not count.

        Raises:
            FloatingPointError: an input is NaN or Inf.
        """
        self.progress.set_postfix_str(f"{group.name} Gram")
        consumer = group.consumer
        outputs, channels = group.weight.shape
        stats = GramStats.zeros(channels, self.device, None if self.target == "self" else outputs)
        position = self.groups.index(group)
        for batch in self.batches:
            with (
                captured_outputs([earlier.consumer for earlier in self.groups[:position]]) as seen,
                captured_input(consumer) as inputs,
            ):
                batch.through(self.layer, self.index, batch.hidden, self.device)
            target = self._target(batch, position, seen)
            if target is not None and group.bias is not None:
                target = target - group.bias.float()  # the bias stays: the weight's part is left
            stats.update_(batch.rows(inputs[0]), None if target is None else batch.rows(target))
            self.progress.update()
        stats.check_finite(group.name)
        return stats

    @torch.no_grad()
    def runs(self, group: Group) -> list[Run]:
        """The group's block as a function of its weights alone: its calls, and their targets."""
        self.progress.set_postfix_str(f"{group.name} refit")
        position = self.groups.index(group)
        module = self.layer.get_submodule(group.spec.name)
        runs = []
        for batch in self.batches:
            with (
                captured_outputs([g.consumer for g in self.groups[: position + 1]]) as seen,
                captured_call(module) as calls,
            ):
                batch.through(self.layer, self.index, batch.hidden, self.device)
            target = self._target(batch, position, seen)
            if target is None:
                raise ValueError("a refit needs a target of the dense model: 'dense' or 'residual'")
            runs.append(Run(module, *calls[0], target, batch))
            self.progress.update()
        return runs

    def _target(self, batch: _MicroBatch, position: int, seen: Sequence[Tensor]) -> Tensor | None:
        """What the consumer at `position` should put out, [b, T, O]; None for its own output.

        "residual" adds to the dense output what the residual stream lacks in front of it: the
        difference of the layer's inputs, and of what earlier groups have put out (in a parallel
        block too, where they are added together). A block whose output is scaled by s on its way
        makes up for 1/s of that; one whose output is normed cannot, and keeps the dense output.
        """
        if self.target == "self" or batch.dense is None:
            return None
        target = batch.outputs[position].to(self.device, torch.float32)
        groups = self.groups[: position + 1]
        scales = [s for s in (group.spec.residual_scale for group in groups) if s is not None]
        if self.target == "residual" and len(scales) == len(groups):
            lack = (batch.dense.float() - batch.hidden.float()).to(self.device)
            for scale, dense, compressed in zip(scales[:-1], batch.outputs, seen, strict=False):
                missing = dense.to(self.device).float() - compressed.float()
                lack += scale * missing.reshape(lack.shape)
            target = target + lack.reshape(target.shape) / scales[-1]
        return target

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states in front of the layer by those behind it."""
        self.progress.set_postfix_str(f"{self.name} forward")
        for batch in self.batches:
            hidden = batch.through(self.layer, self.index, batch.hidden, self.device)
            batch.hidden = hidden.to(batch.hidden.device)
            self.progress.update()


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    layers_path: str,
    specs: Sequence[Sequence[GroupSpec]],
    batches: Sequence[dict[str, Tensor]],
    device: torch.device,
    target: str = "self",
    seed: int = 0,
    progress: bool = True,
    group_passes: int | None = None,
    returns_tuple: bool = False,
) -> Iterator[Block]:
    """Yield each decoder layer as a `Block` on `device`; what follows sees what it has become.

    The hidden states stay where the model is; a layer is moved to `device` while its block is
    out and moved back afterwards. Targets of the dense model ("dense", "residual") take a second
    set of hidden states, which runs through each layer before it is changed.

    Args:
        model: any decoder-only transformers model, whole on one device.
        layers_path: path of the decoder layers in `model.base_model`.
        specs: of each layer, its groups in the order in which they run.
        batches: of `{input_ids [b, T], attention_mask [b, T] (optional)}`.
        device: where layers run.
        target: of the statistics, see `GrailConfig.target`.
        seed: gives each group a seed of its own.
        progress: show a bar on standard error.
        group_passes: passes that the caller will make for groups, in all layers together, for
            the bar's estimate; by default one for each group.
        returns_tuple: the layers return a tuple whose first element is the hidden states.
    """
    layers = model.base_model.get_submodule(layers_path)
    assert isinstance(layers, nn.ModuleList)
    names = {id(module): name for name, module in model.named_modules()}
    micro_batches = record_calls(model, layers, batches, returns_tuple)
    if group_passes is None:
        group_passes = sum(map(len, specs))
    passes = group_passes + len(layers) * (1 + (target != "self")) - 1
    with tqdm(
        total=passes * len(micro_batches),
        desc="Calibrating",
        unit="batch",
        disable=not progress,
    ) as bar:
        for index, layer in enumerate(layers):
            name, home = names[id(layer)], next(layer.parameters()).device
            groups = tuple(
                Group(layer, spec, name, seed=(seed * 1_000_003 + index * 101 + number) % 2**63)
                for number, spec in enumerate(specs[index])
            )
            layer.to(device)
            try:
                block = Block(index, name, layer, groups, device, target, micro_batches, bar)
                following = _dense_pass(block) if target != "self" else []
                yield block
                if index + 1 < len(layers):
                    block.advance()
                for batch, hidden in zip(micro_batches, following, strict=False):
                    batch.dense = hidden
            finally:
                layer.to(home)


def _dense_pass(block: Block) -> list[Tensor]:
    """Run the unchanged layer on the dense hidden states; keep its consumers' outputs.

    Returns the hidden states behind the layer.
    """
    block.progress.set_postfix_str(f"{block.name} dense forward")
    following = []
    for batch in block.batches:
        hidden = batch.hidden if batch.dense is None else batch.dense
        home = hidden.device
        with captured_outputs([group.consumer for group in block.groups]) as outputs:
            behind = batch.through(block.layer, block.index, hidden, block.device)
        batch.dense, batch.outputs = hidden, [output.to(home) for output in outputs]
        following.append(behind.to(home))
        block.progress.update()
    return following


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    returns_tuple: bool = False,
) -> list[_MicroBatch]:
    """Every layer's arguments for every batch, and the hidden states in front of layer 0.

    Masks and rotary embeddings that are equal between layers or batches are stored once.
    """
    shared = _Shared()
    micro_batches = []
    for inputs in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        mask = inputs.get("attention_mask")
        batch = _MicroBatch(
            torch.empty(0), mask.flatten().bool() if mask is not None and not mask.all() else None
        )

        def record(*args: Any, batch: _MicroBatch = batch, **kwargs: Any) -> Any:
            hidden: Tensor
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            if not batch.calls:
                batch.hidden = hidden
            batch.calls.append(shared.store((args, kwargs)))
            return (hidden, None) if returns_tuple else hidden

        with _forwards_replaced(layers, record):
            model.base_model(**inputs, use_cache=False)
        micro_batches.append(batch)
    return micro_batches


@contextmanager
def _forwards_replaced(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer's `forward` is `forward` inside the context, and as it was after it."""
    originals = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            del layer.forward
            if original is not None:
                layer.forward = original


class _Shared:
    """Stores equal tensors once: the masks and rotary embeddings of like batches are the same."""

    # Enough for the distinct tensors of one batch (two masks, some rotary tables, positions); more
    # would only compare the masks of batches that are padded differently with each other.
    RECENT = 16

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def store(self, data: Any) -> Any:
        from accelerate.utils.operations import recursively_apply

        stored: Any = recursively_apply(self._store, data)
        return stored

    def _store(self, tensor: Tensor) -> Tensor:
        for known in reversed(self.tensors[-self.RECENT :]):
            if known is tensor:
                return known
            if (
                known.shape == tensor.shape
                and known.dtype == tensor.dtype
                and torch.equal(known, tensor)
            ):
                return known
        self.tensors.append(tensor)
        return tensor


class _Reached(Exception):
    """The forward pass has come to the module that was waited for."""


@contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input [.., H] of `module` when the pass inside the context comes to it and stops there.

    The list is empty until then. Raises RuntimeError where the pass never comes to the module.
    """
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(take)
    try:
        yield seen
    except _Reached:
        return
    finally:
        handle.remove()
    raise RuntimeError(f"the layer's forward pass never calls its {type(module).__name__}")


@contextmanager
def captured_call(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of the calls of `module` in the pass inside the context."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def captured_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of `modules`, in the order in which the pass inside the context calls them."""
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.clone())  # some layers go on to add to it in place

    handles = [module.register_forward_hook(take) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(output: Any) -> Tensor:
    """A decoder layer returns its hidden states, alone or as the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
