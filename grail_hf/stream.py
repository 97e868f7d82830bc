"""Calibration hidden states, one decoder layer at a time.

A first, cheap pass over the embeddings replaces every decoder layer by a recorder, so that each
layer is later called with exactly the arguments that the full model would give it: its own mask
(full, sliding, padded), rotary embeddings and flags. Replaying the first layer's arguments on all
layers, as is usual, is wrong wherever layers differ. Then only one layer at a time needs the
accelerator: the hidden states in front of it are run through it and replaced by what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from grail_hf import processes
from grail_hf.architectures import GroupSpec
from grail_hf.config import widest_float
from grail_hf.experts import Expert, ExpertsGroup, group_in
from grail_hf.gram import GramStats
from grail_hf.groups import Group
from grail_hf.meter import Meter
from grail_hf.offload import HiddenStates, Homes, Place, input_device
from grail_hf.progress import Bar
from grail_hf.reduction import Reduction
from grail_hf.selectors import RegionalGradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass
class _MicroBatch(HiddenStates):
    """The hidden states of some samples, and every layer's other arguments for them.

    Attributes:
        tokens: [b * T] bool, those that are not padding; None where all count.
        held_out: [b * T] bool, those on which a damping is judged; no padding.
        calls: every layer's other arguments.
        outputs: of each of the layer's consumers in the dense model, [b, T, O], where the target
            needs them.
        following: the hidden states after the layer, where a pass over it as it is has made them.
    """

    tokens: Tensor | None
    held_out: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    following: Tensor | None = None

    def through(self, layer: nn.Module, index: int, hidden: Tensor, device: torch.device) -> Tensor:
        """What `layer` makes of `hidden`, [b, T, D] on `device`."""
        from accelerate.utils import send_to_device

        args, kwargs = send_to_device(self.calls[index], device)
        return _hidden_states(layer(hidden.to(device), *args, **kwargs))

    def rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the tokens that are not padding."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.tokens is None else x[self.tokens.to(x.device)]

    def without_padding(self, x: Tensor) -> Tensor:
        """[b, T, O] with the rows of padding zero."""
        if self.tokens is None:
            return x
        return x * self.tokens.to(x.device).reshape(*x.shape[:-1], 1)

    def held_out_rows(self, x: Tensor) -> Tensor:
        """[b, T, H] to [n, H]: the held-out tokens."""
        return x.reshape(-1, x.shape[-1])[self.held_out.to(x.device)]


@dataclass(frozen=True)
class Run:
    """A block's call on one micro-batch, to be repeated with other weights.

    Attributes:
        module: the attention or the MLP.
        args, kwargs: what the layer calls it with, where hidden states are kept.
        target: [b, T, O], what it should put out, likewise.
        batch: the micro-batch.
        device: where the module runs.
        dtype: that the module computes in, where it is not the model's float16.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    batch: _MicroBatch
    device: torch.device
    dtype: torch.dtype | None = None

    def output(self) -> Tensor:
        """[b, T, O], what the block puts out now."""
        from accelerate.utils.operations import recursively_apply

        args, kwargs = recursively_apply(self._moved, (self.args, self.kwargs))
        return _hidden_states(self.module(*args, **kwargs))

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


@dataclass(frozen=True)
class Block:
    """A decoder layer on the accelerator, with the calibration hidden states in front of it.

    Of several processes, each has its own share of the hidden states; the statistics are those of
    all, in `dtype`.
    """

    index: int
    name: str
    layer: nn.Module
    groups: tuple[Group, ...]
    device: torch.device
    place: Place
    target: str
    batches: Sequence[_MicroBatch]
    progress: Bar
    dtype: torch.dtype
    meter: Meter

    @torch.no_grad()
    def collect(
        self, group: Group, hold_out: bool = False, targets: Sequence[Tensor] | None = None
    ) -> GramStats:
        """Second moments of the inputs and targets of the group's consumer, as the layer is now.

        The layer runs up to the consumer and no further. Padding does not count.

        Args:
            group: of this layer.
            hold_out: sum the moments of the held-out tokens (`held_out_tokens`) by themselves too;
                they lie where hidden states are kept.
            targets: other targets than the block's, as `outputs` gives them.

        Raises:
            FloatingPointError: an input is NaN or Inf.
        """
        self.progress.set_postfix_str(f"{group.name} Gram")
        consumer = group.consumer
        outputs, channels = group.weight.shape
        targeted = None if self.target == "self" and targets is None else outputs
        stats = GramStats.zeros(channels, self.device, targeted, self.dtype)
        if hold_out:
            stats.held_out = GramStats.zeros(channels, self.device, targeted, self.dtype)
        position = self.groups.index(group)
        for number, batch in enumerate(self.batches):
            with (
                captured_outputs([earlier.consumer for earlier in self.groups[:position]]) as seen,
                captured_input(consumer) as inputs,
            ):
                batch.through(self.layer, self.index, batch.hidden, self.device)
            if targets is None:
                target = self._target(batch, position, seen)
            else:
                target = self._widened(targets[number])
            if target is not None and group.bias is not None:
                target = target - group.bias.float()  # the bias stays: the weight's part is left
            stats.update_(batch.rows(inputs[0]), None if target is None else batch.rows(target))
            if stats.held_out is not None:
                stats.held_out.update_(
                    batch.held_out_rows(inputs[0]),
                    None if target is None else batch.held_out_rows(target),
                )
            self.progress.update()
        _sum_statistics_([stats], group.name)
        stats.check_finite(group.name)
        if stats.held_out is not None:
            # Only the choice of the damping reads them; until then, selection needs the memory.
            keep = partial(self.place.keep, dtype=torch.float32)
            stats.held_out = stats.held_out.moved(keep)
        return stats.round_()

    @torch.no_grad()
    def collect_experts(
        self, group: ExpertsGroup, experts: Sequence[Expert], hold_out: bool = False
    ) -> list[GramStats]:
        """Second moments of what each of some experts' consumers reads, as the layer is now.

        An expert's tokens are those that are routed to it, padding not among them. Its target is
        its own output: what a block's output lacks belongs to no one expert.

        Args:
            group: of this layer.
            experts: of the group.
            hold_out: as in `collect`.

        Raises:
            FloatingPointError: an input is NaN or Inf.
        """
        self.progress.set_postfix_str(f"{group.name} Grams")
        channels = group.weight.shape[2]
        every = [GramStats.zeros(channels, self.device, dtype=self.dtype) for _ in experts]
        if hold_out:
            for stats in every:
                stats.held_out = GramStats.zeros(channels, self.device, dtype=self.dtype)
        for batch in self.batches:
            with captured_call(group.consumer) as calls:
                batch.through(self.layer, self.index, batch.hidden, self.device)
            hidden, chosen = group.routed(*calls[0])
            held_out = batch.held_out.to(hidden.device)
            for expert, stats in zip(experts, every, strict=True):
                own = (chosen == expert.index).any(dim=-1)
                if batch.tokens is not None:
                    own &= batch.tokens.to(own.device)
                x = expert.inner(hidden[own])
                stats.update_(x)
                if stats.held_out is not None:
                    stats.held_out.update_(x[held_out[own]])
            self.progress.update()
        _sum_statistics_(every, group.name)
        for expert, stats in zip(experts, every, strict=True):
            stats.check_finite(expert.name)
            stats.round_()
        return every

    def collect_folded(
        self, group: Group, reduction: Reduction, hold_out: bool = False
    ) -> GramStats:
        """The moments [K] that `collect` will find behind the folded producers; nothing is changed.

        Behind a gate or an attention, the mean of producers does not put out the mean of what they
        put out, so this takes another pass. The targets are those before the fold; where that is
        the block's own output, one pass more.
        """
        targets = self.outputs(group) if self.target == "self" else None
        with group.reduced(reduction):
            return self.collect(group, hold_out, targets)

    @torch.no_grad()
    def outputs(self, group: Group) -> list[Tensor]:
        """What the group's consumer puts out now: [b, T, O] a micro-batch, kept."""
        self.progress.set_postfix_str(f"{group.name} output")
        outputs = []
        for batch in self.batches:
            with captured_input(group.consumer) as inputs:
                batch.through(self.layer, self.index, batch.hidden, self.device)
            outputs.append(self.place.keep(group.consumer(inputs[0])))
            self.progress.update()
        return outputs

    def regional_gradient(self, group: Group) -> RegionalGradient:
        """The gradient of the norm of the layer's output by the group's consumer, as it is now.

        The norm is over the tokens of a sample, padding not among them. Samples do not see each
        other, so that one pass back to the consumer's output has the gradients of all samples of a
        micro-batch, each in its own rows. No parameter gets a `grad`.
        """
        self.progress.set_postfix_str(f"{group.name} gradient")
        squares = torch.zeros_like(group.weight, dtype=torch.float32)
        for batch in self.batches:
            with torch.enable_grad(), detached_output(group.consumer) as seen:
                behind = batch.through(self.layer, self.index, batch.hidden, self.device)
                behind = batch.without_padding(behind.float())
                inputs, output = seen
                norms = torch.linalg.vector_norm(behind, dim=(1, 2))
                gradients = torch.autograd.grad(norms.sum(), output)[0]
            samples = len(batch.hidden)
            x = inputs.detach().float().reshape(samples, -1, inputs.shape[-1])
            g = gradients.float().reshape(samples, -1, gradients.shape[-1])
            for one in range(samples):
                squares += (g[one].mT @ x[one]).square()
        processes.sum_([squares], group.name)
        numbers = [len(batch.hidden) for batch in self.batches]
        samples = sum(processes.gather(numbers, group.name))
        return RegionalGradient((squares / samples).sqrt(), samples)

    def once(self, group: Group, function: Callable[[], T]) -> T:
        """`processes.once`, where `function` may ask for the group's regional gradient.

        That takes all processes. So the first one leaves off where it asks, all of them compute the
        gradient, and it begins anew.
        """
        gradient = group.differentiate
        if processes.count() == 1 or gradient is None:
            return processes.once(function, group.name)

        def wanted() -> RegionalGradient:
            raise _GradientWanted

        group.differentiate = wanted
        try:
            return processes.once(function, group.name)
        except _GradientWanted:
            found = gradient()
            group.differentiate = lambda: found
            return processes.once(function, group.name)
        finally:
            group.differentiate = gradient

    @torch.no_grad()
    def runs(self, group: Group) -> list[Run]:
        """The group's block as a function of its weights alone: its calls, and their targets."""
        self.progress.set_postfix_str(f"{group.name} refit")
        position = self.groups.index(group)
        module = self.layer.get_submodule(group.spec.name)
        runs = []
        for batch in self.batches:
            with (
                captured_outputs([earlier.consumer for earlier in self.groups[:position]]) as seen,
                captured_call(module) as calls,
            ):
                batch.through(self.layer, self.index, batch.hidden, self.device)
            target = self._target(batch, position, seen)
            if target is None:
                raise ValueError("a refit needs a target of the dense model: 'dense' or 'residual'")
            args, kwargs = self.place.keep_all(calls[0])
            target = self.place.keep(target)
            runs.append(Run(module, args, kwargs, target, batch, self.device))
            self.progress.update()
        return runs

    @torch.no_grad()
    def behind(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the layer makes of other hidden states: one tensor [b, T, D] a micro-batch."""
        return [
            self.place.keep(batch.through(self.layer, self.index, states, self.device))
            for batch, states in zip(self.batches, hidden, strict=True)
        ]

    @torch.no_grad()
    def collect_all(self) -> list[tuple[GramStats, float]]:
        """Of each group the moments that `collect` gives, and its energy, in one whole pass.

        The layer has to stay as it is: what the pass makes of the hidden states is kept for
        `advance`. There is no target but the layer's own outputs.

        The energy is what a consumer's squared error is relative to: the sum of squares of the
        residual stream after the block, over the gain with which the consumer's output reaches the
        stream. That is the square of the block's factor or, where a norm lies in between, the
        energy that the norm puts out over the energy that it gets, since a norm changes the scale
        of an error as it does the output's. Where the stream itself is normed after the block, it
        is taken as it is before.
        """
        self.progress.set_postfix_str(f"{self.name} Grams")
        every = [
            GramStats.zeros(group.weight.shape[1], self.device, dtype=self.dtype)
            for group in self.groups
        ]
        streams, given, added = ([0.0] * len(self.groups) for _ in range(3))
        norms = (group.spec.post_norm for group in self.groups)
        pairs = [
            (group.consumer, self.layer.get_submodule(norm) if norm else None)
            for group, norm in zip(self.groups, norms, strict=True)
        ]
        for batch in self.batches:
            with captured_calls([module for pair in pairs for module in pair if module]) as calls:
                following = batch.through(self.layer, self.index, batch.hidden, self.device)
            remaining = iter(calls)
            after = self._widened(batch.hidden)
            for number, (group, stats) in enumerate(zip(self.groups, every, strict=True)):
                inputs, output = next(remaining)
                stats.update_(batch.rows(inputs))
                output = output.float()
                scale = group.spec.residual_scale
                part = next(remaining)[1].float() if pairs[number][1] else output * (scale or 1.0)
                after = after + part.reshape(after.shape)
                for energies, x in ((streams, after), (given, output), (added, part)):
                    rows = batch.rows(x).to(widest_float(x.device))
                    energies[number] += rows.square().sum().item()
            batch.following = self.place.keep(following)
            self.progress.update()
        _sum_statistics_(every, self.name)
        sums = processes.total([*streams, *given, *added], self.name)
        found = []
        for number, (group, stats) in enumerate(zip(self.groups, every, strict=True)):
            stats.check_finite(group.name)
            stream, energy, gained = sums[number :: len(self.groups)]
            found.append((stats.round_(), stream * energy / gained if gained else stream))
        return found

    def _target(self, batch: _MicroBatch, position: int, seen: Sequence[Tensor]) -> Tensor | None:
        """What the consumer at `position` should put out, [b, T, O]; None for its own output.

        "residual" adds to the dense output what the residual stream lacks in front of it: the
        difference of the layer's inputs, and of what earlier groups have put out (in a parallel
        block too, where they are added together). A block whose output is scaled by s on its way
        makes up for 1/s of that; one whose output is normed cannot, and keeps the dense output.
        """
        if self.target == "self" or batch.dense is None:
            return None
        target = self._widened(batch.outputs[position])
        groups = self.groups[: position + 1]
        scales = [s for s in (group.spec.residual_scale for group in groups) if s is not None]
        if self.target == "residual" and len(scales) == len(groups):
            lack = self._widened(batch.dense) - self._widened(batch.hidden)
            for scale, dense, compressed in zip(scales[:-1], batch.outputs, seen, strict=False):
                missing = self._widened(dense) - compressed.float()
                lack += scale * missing.reshape(lack.shape)
            target = target + lack.reshape(target.shape) / scales[-1]
        return target

    def _widened(self, kept: Tensor) -> Tensor:
        """Of what is kept, in fp32 where the layer is; the few bytes of half precision travel."""
        return kept.to(self.device).float()

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states in front of the layer by those behind it."""
        self.progress.set_postfix_str(f"{self.name} forward")
        for batch in self.batches:
            if batch.following is None:
                hidden = batch.through(self.layer, self.index, batch.hidden, self.device)
                batch.following = self.place.keep(hidden)
            batch.hidden, batch.following = batch.following, None
            self.progress.update()


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    homes: Homes,
    specs: Sequence[Sequence[GroupSpec]],
    batches: Sequence[dict[str, Tensor]],
    place: Place | None = None,
    target: str = "self",
    seed: int = 0,
    progress: bool = True,
    group_batches: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Block]:
    """Yield each decoder layer as a `Block` at work; what follows sees what it has become.

    Targets of the dense model ("dense", "residual") take a second set of hidden states, which runs
    through each layer before it is changed. Of several processes, each gets the hidden states of
    its own share of the batches, and the blocks' statistics are those of all.

    Args:
        model: any decoder-only transformers model.
        homes: where its decoder layers lie, and where they work.
        specs: of each layer, its groups in the order in which they run.
        batches: of `{input_ids [b, T], attention_mask [b, T] (optional)}`.
        place: where hidden states are kept; by default where the model takes its inputs.
        target: of the statistics, see `GrailConfig.target`.
        seed: gives each group a seed of its own.
        progress: show a bar on standard error.
        group_batches: batches that the caller will run for groups, in all layers together, for
            the bar's estimate; by default all of them once for each group.
        dtype: in which the micro-batches' moments are summed. In fp32 the order of the batches
            decides between units that are alike, and so does what processes share them.
    """
    layers = homes.layers
    names = {id(module): name for name, module in model.named_modules()}
    with homes.meter.phase("embed"), homes.surroundings():
        place = place or Place(input_device(model))
        micro_batches = record_calls(model, layers, batches, place)
    homes.start(micro_batches)
    left = range(homes.first, len(layers))
    if group_batches is None:
        group_batches = sum(len(specs[index]) for index in left) * len(micro_batches)
    passes = len(left) * (1 + (target != "self")) - 1
    with Bar(
        total=group_batches + passes * len(micro_batches),
        desc="Calibrating",
        unit="batch",
        shown=progress,
        parts=len(left),
    ) as bar:
        for index in left:
            layer, name = layers[index], names[id(layers[index])]
            groups = tuple(
                group_in(layer, spec, name, seed=(seed * 1_000_003 + index * 101 + number) % 2**63)
                for number, spec in enumerate(specs[index])
            )
            with homes.at_work(index) as device:
                block = Block(
                    *(index, name, layer, groups, device, place, target, micro_batches, bar),
                    *(dtype, homes.meter),
                )
                for group in groups:
                    group.differentiate = partial(block.regional_gradient, group)
                try:
                    with homes.meter.phase("forward"):
                        following = _dense_pass(block) if target != "self" else []
                    yield block
                    if index + 1 < len(layers):
                        with homes.meter.phase("forward"):
                            block.advance()
                finally:
                    for group in groups:
                        group.differentiate = None  # it holds the hidden states
                for batch, hidden in zip(micro_batches, following, strict=False):
                    batch.dense = hidden
            homes.done(index, micro_batches)


def _dense_pass(block: Block) -> list[Tensor]:
    """Run the unchanged layer on the dense hidden states; keep its consumers' outputs.

    Returns the hidden states behind the layer.
    """
    block.progress.set_postfix_str(f"{block.name} dense forward")
    following = []
    for batch in block.batches:
        hidden = batch.hidden if batch.dense is None else batch.dense
        with captured_outputs([group.consumer for group in block.groups]) as outputs:
            behind = batch.through(block.layer, block.index, hidden, block.device)
        batch.dense, batch.outputs = hidden, [block.place.keep(output) for output in outputs]
        following.append(block.place.keep(behind))
        block.progress.update()
    return following


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    place: Place | None = None,
) -> list[_MicroBatch]:
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
        batch = _MicroBatch(
            number,
            torch.empty(0),
            None,
            mask.flatten().bool() if mask is not None and not mask.all() else None,
            held_out[number],
        )

        def record(*args: Any, batch: _MicroBatch = batch, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            if not batch.calls:
                batch.hidden = place.keep(hidden)
            batch.calls.append(shared.store((args, kwargs)))
            return as_returned(hidden, in_tuple)

        with forwards_replaced(layers, record):
            model.base_model(**inputs, use_cache=False)
        micro_batches.append(batch)
    return micro_batches


def _sum_statistics_(every: Sequence[GramStats], name: str) -> None:
    """Add to statistics what the other processes' batches gave for them."""
    processes.sum_([sums for stats in every for sums in stats.sums], name)
    parts = [part for stats in every for part in (stats, stats.held_out) if part is not None]
    numbers = [number for part in parts for number in (part.count, part.target_energy)]
    totals = iter(processes.total(numbers, name))
    for part in parts:
        part.count, part.target_energy = int(next(totals)), next(totals)


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


@contextmanager
def forwards_replaced(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
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


class _GradientWanted(Exception):
    """A selector asks for the regional gradient, which all processes compute together."""


class _Reached(Exception):
    """The forward pass has come to the module that was waited for."""


@contextmanager
def _stopped_at(
    module: nn.Module, take: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """The pass inside the context goes as far as `module`, whose arguments `take` is given.

    Raises RuntimeError where the pass never comes to the module.
    """

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, kwargs)
        raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    except _Reached:
        return
    finally:
        handle.remove()
    raise RuntimeError(f"the layer's forward pass never calls its {type(module).__name__}")


@contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input [.., H] of `module`, at which the pass inside the context stops.

    The list is empty until then. Raises RuntimeError where the pass never comes to the module.
    """
    seen: list[Tensor] = []
    with _stopped_at(module, lambda args, kwargs: seen.append(args[0])):
        yield seen


@contextmanager
def captured_call(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of `module`, at which the pass inside the context stops.

    The list is empty until then. Raises RuntimeError where the pass never comes to the module.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with _stopped_at(module, lambda args, kwargs: seen.append((args, kwargs))):
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
        seen.append((inputs[0], output.clone()))  # some layers go on to add to it in place

    handles = [module.register_forward_hook(take) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def detached_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input and the output of `module` in the pass inside the context.

    The output is a leaf: derivatives are taken from what follows it back to it, and no further.
    """
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((inputs[0], output.detach().requires_grad_()))
        return seen[1].clone()  # some layers go on to add to it in place

    handle = module.register_forward_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def takes_tuples(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Whether the model expects its decoder layers to return a tuple, not a tensor.

    This differs between model types and between versions of transformers. So the first layer is
    replaced by one that returns a tensor: a model that expects a tuple takes element 0 of that, and
    hands on hidden states that lack the batch dimension. No decoder layer runs or needs its
    weights.
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


def as_returned(hidden: Tensor, in_tuple: bool) -> Any:
    """Hidden states as the model expects a decoder layer to return them, see `takes_tuples`."""
    return (hidden, None) if in_tuple else hidden


def _hidden_states(output: Any) -> Tensor:
    """A decoder layer returns its hidden states, alone or as the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
