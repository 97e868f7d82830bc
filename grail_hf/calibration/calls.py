"""Micro-batches of hidden states, with every layer's other arguments; and calls to repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.models.capture import Call, hidden_states_of, layer_calls, not_run, takes_tuples
from grail_hf.runtime import processes
from grail_hf.runtime.devices import input_device
from grail_hf.runtime.placement import HiddenStates, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Memory:
    """What a decoder layer has made of a micro-batch so far, and need not make again.

    Attributes:
        returned: what each block returns whose group is done, in the order of the groups.
        lack: [b, T, D] fp32, what the residual stream lacks of the dense model's after those
            blocks; None where it is not needed, or before the first of them.
        inputs: [b, T, H], what the consumer of the group at work reads; None where it is to be
            computed.
        others: what that group's block returns besides the output of the consumer.
        fixed: path -> [b, T, rows], the outputs of its producers that no refit changes.
    """

    returned: list[Any] = field(default_factory=list)
    lack: Tensor | None = None
    inputs: Tensor | None = None
    others: tuple[Any, ...] | None = None
    fixed: dict[str, Tensor] = field(default_factory=dict)

    def forget_group_(self) -> None:
        """Forget what is known of the group at work."""
        self.inputs, self.others, self.fixed = None, None, {}


@dataclass
class MicroBatch(HiddenStates):
    """The hidden states of some samples, and every layer's other arguments for them.

    Attributes:
        tokens: [b * T] bool, those that are not padding; None where all count.
        held_out: [b * T] bool, those on which a damping is judged; no padding.
        calls: every layer's other arguments.
        outputs: of each of the layer's consumers in the dense model, [b, T, O], where the target
            needs them.
        following: the hidden states after the layer, where a pass over it as it is has made them.
        memory: of the layer at work.
    """

    tokens: Tensor | None
    held_out: Tensor
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    following: Tensor | None = None
    memory: Memory = field(default_factory=Memory)

    def through(self, layer: nn.Module, index: int, hidden: Tensor, device: torch.device) -> Tensor:
        """What `layer` makes of `hidden`, [b, T, D] on `device`."""
        from accelerate.utils import send_to_device

        args, kwargs = send_to_device(self.calls[index], device)
        return hidden_states_of(layer(hidden.to(device), *args, **kwargs))

    def brought_(self, place: Place) -> None:
        """Keep the hidden states at another place."""
        self.hidden = place.keep(self.hidden)
        if self.dense is not None:
            self.dense = place.keep(self.dense)

    def rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the tokens that are not padding."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.tokens is None else x[self.tokens.to(x.device)]

    def without_padding(self, x: Tensor) -> Tensor:
        """[b, T, O] with the rows of padding zero."""
        if self.tokens is None:
            return x
        return x * self.tokens.to(x.device).reshape(*x.shape[:-1], 1)


@dataclass(frozen=True)
class Run:
    """A block's call on one micro-batch, to be repeated with other weights.

    Attributes:
        module: the attention or the MLP.
        args, kwargs: what the layer calls it with, where hidden states are kept.
        target: [b, T, O], what it should output, likewise.
        batch: the micro-batch.
        device: where the module runs.
        fixed: modules in it -> what they output, whatever the weights that change.
        dtype: that the module computes in, where it is not the model's float16.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    batch: MicroBatch
    device: torch.device
    fixed: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def output(self) -> Tensor:
        """[b, T, O], what the block outputs now."""
        from accelerate.utils.operations import recursively_apply

        args, kwargs = recursively_apply(self._moved, (self.args, self.kwargs))
        with not_run({module: self._moved(output) for module, output in self.fixed.items()}):
            return hidden_states_of(self.module(*args, **kwargs))

    def miss(self, output: Tensor) -> Tensor:
        """[b, T, O] fp32, what an output lacks of the target."""
        return self.target.to(output.device).float() - output.float()

    def _moved(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.dtype == torch.float16 else None
        return tensor.to(self.device, dtype or tensor.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the tokens that are not padding."""
        return self.batch.rows(x)

    def without_padding(self, x: Tensor) -> Tensor:
        """[b, T, O] with the rows of padding zero."""
        return self.batch.without_padding(x)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        tokens = self.batch.tokens
        return self.target[..., 0].numel() if tokens is None else int(tokens.sum())


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    place: Place | None = None,
) -> list[MicroBatch]:
    """Every layer's arguments for this process's batches, and the hidden states before layer 0.

    Masks and rotary embeddings that are equal between layers or batches are stored once. They stay
    where the model takes its inputs, and so do the hidden states, unless they have a `place`.
    """
    shared = _Shared()
    device = input_device(model)
    place = place or Place(device)
    in_tuple = takes_tuples(model, layers)
    micro_batches = []
    held_out = held_out_tokens(batches)
    for number in processes.share(len(batches)):
        inputs = {name: tensor.to(device) for name, tensor in batches[number].items()}
        mask = inputs.get("attention_mask")
        hidden, calls = layer_calls(model, layers, inputs, in_tuple)
        batch = MicroBatch(
            number,
            place.keep(hidden),
            None,
            mask.flatten().bool() if mask is not None and not mask.all() else None,
            held_out[number],
            [shared.store(call) for call in calls],
        )
        micro_batches.append(batch)
    return micro_batches


def held_out_tokens(batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """[b * T] bool a batch: the tokens that a fit leaves out, to be judged on them.

    Whole samples, since neighbouring tokens are alike: a quarter of them (rounded down, at least
    one), evenly spread, whatever the batch size. Of a single sample it is the last quarter of its
    tokens, rounded down. Padding is never held out.
    """
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    samples = sum(len(mask) for mask in masks)
    if samples == 1:
        (mask,) = masks
        count = int(mask.sum())
        return [(mask.bool() & (mask.cumsum(dim=1) > count - count // 4)).flatten()]
    number = torch.arange(samples + 1) * max(1, samples // 4) // samples
    chosen = torch.split(number.diff() > 0, [len(mask) for mask in masks])
    return [
        (mask.bool() & rows[:, None].to(mask.device)).flatten()
        for mask, rows in zip(masks, chosen, strict=True)
    ]


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
