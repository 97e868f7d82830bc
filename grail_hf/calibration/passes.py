"""Passes of calibration hidden states through a decoder layer, none of which is made twice.

A layer's groups are worked on in their order. What a block returns when its group is done is
remembered, so that the block does not run again for the groups after it; and so is what a consumer
reads, from which follows what it outputs with a new weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grail_hf.calibration.calls import MicroBatch
from grail_hf.calibration.statistics import Solution
from grail_hf.models.capture import (
    BlockPass,
    captured_outputs,
    captured_return,
    hidden_states_of,
    not_run,
    passed_through,
)
from grail_hf.models.groups import Group, reduced_rows
from grail_hf.runtime.placement import Place


def remembered_bytes(groups: Sequence[Group], stream: int, item: int, targeted: bool) -> int:
    """The most that a layer's passes remember, in bytes a token.

    What a consumer reads and its other producers output, what every block returns, and in fp32 what
    the stream lacks of a dense model's.

    Args:
        groups: of the layer.
        stream: D, the hidden size.
        item: bytes per number.
        targeted: there is a dense model to compare with.
    """
    widest = max((group.widest for group in groups if group.targeted), default=0)
    return item * (widest + len(groups) * stream) + 4 * stream * targeted


@dataclass(frozen=True)
class LayerPasses:
    """A decoder layer on the device that it runs on, and the hidden states before it.

    Attributes:
        index, name: of the layer.
        layer: the live one.
        groups: of the layer, in the order in which they run.
        device: that it runs on.
        place: where hidden states between layers are kept.
        near: where all that is needed again within the layer is kept; None where there is no room
            for what consumers read, which is computed again then.
        target: of the statistics, see `GrailConfig.target`.
        batches: the micro-batches.
    """

    index: int
    name: str
    layer: nn.Module
    groups: tuple[Group, ...]
    device: torch.device
    place: Place
    near: Place | None
    target: str
    batches: Sequence[MicroBatch]

    def _up_to_consumer(
        self, group: Group, batch: MicroBatch, watched: Sequence[str] = ()
    ) -> BlockPass:
        """The pass to the end of the group's block, as far as it is not remembered.

        The outputs of the modules at the paths `watched` are captured.
        """
        modules = [self._module(path) for path in watched]
        block, outputs = self._module(group.spec.name), group.weight.shape[-2]
        with (
            self._done_before(batch, self.groups.index(group)),
            not_run(self._fixed(batch)),
            passed_through(block, group.consumer, outputs, modules) as seen,
        ):
            batch.through(self.layer, self.index, batch.hidden, self.device)
        return seen

    def _fixed(self, batch: MicroBatch) -> dict[nn.Module, Tensor]:
        """Producers of the group at work -> their outputs, which are remembered."""
        return {self._module(path): output for path, output in batch.memory.fixed.items()}

    def _remember_(
        self, batch: MicroBatch, seen: BlockPass, watched: Sequence[str], ends: bool
    ) -> None:
        """Keep of a pass what need not be computed again.

        Args:
            batch: the micro-batch.
            seen: what the pass found.
            watched: paths of the producers whose outputs it captured.
            ends: the block returns its consumer's output, so that what it returns with another
                weight of the consumer follows from what that reads.
        """
        assert self.near is not None
        memory = batch.memory
        memory.fixed |= dict(zip(watched, map(self.near.keep, seen.outputs), strict=True))
        if ends:
            (x, *_), _ = seen.call
            memory.inputs = self.near.keep(x)
            memory.others = self.near.keep_all(_others(seen.returned))

    @torch.no_grad()
    def narrow_(self, group: Group, *solutions: Solution) -> None:
        """Narrow a group (`Group.narrow_`), and with it what is remembered of it."""
        group.narrow_(*solutions)
        for batch in self.batches:
            memory = batch.memory
            if memory.inputs is None and not memory.fixed:
                continue
            ((reduction, _),) = solutions
            if reduction.folds:  # the mean of producers does not output the mean of their outputs
                memory.forget_group_()
                continue
            if memory.inputs is not None:
                memory.inputs = self._narrowed(
                    memory.inputs, reduction.kept_channels(group.columns)
                )
            for producer in group.spec.producers:
                output = memory.fixed.get(producer.path)
                if output is not None:
                    rows = torch.arange(output.shape[-1], device=self.device)
                    left = reduced_rows(rows, producer, reduction)
                    memory.fixed[producer.path] = self._narrowed(output, left)

    def _narrowed(self, kept: Tensor, index: Tensor) -> Tensor:
        assert self.near is not None
        if len(index) == kept.shape[-1]:
            return kept
        return self.near.keep(kept[..., index.to(kept.device)])

    def forget_group_(self) -> None:
        """The group at work has changed: nothing that is remembered of it holds."""
        for batch in self.batches:
            batch.memory.forget_group_()

    @contextmanager
    def _done_before(self, batch: MicroBatch, position: int) -> Iterator[None]:
        """Inside the context, the blocks of the groups before `position` do not run.

        What they return is remembered. Where it is not yet, it is found first.
        """
        from accelerate.utils import send_to_device

        memory = batch.memory
        while len(memory.returned) < position:
            self._finish_(batch, len(memory.returned))
        names = [group.spec.name for group in self.groups]
        with not_run(
            {
                self._module(name): send_to_device(memory.returned[number], self.device)
                for number, name in enumerate(names[:position])
                if not any(f"{later}.".startswith(f"{name}.") for later in names[number + 1 :])
            }
        ):
            yield

    def _finish_(self, batch: MicroBatch, position: int) -> None:
        """Remember what the block at `position` returns, whose group is done."""
        memory, group = batch.memory, self.groups[position]
        if memory.inputs is None:
            with (
                self._done_before(batch, position),
                captured_outputs([group.consumer]) as outputs,
                captured_return(self._module(group.spec.name)) as seen,
            ):
                batch.through(self.layer, self.index, batch.hidden, self.device)
            (output,), (returned,) = outputs, seen
            first, others = hidden_states_of(returned), _others(returned)
        else:
            first = output = group.consumer(memory.inputs)
            others = memory.others
        near, scale = self.near or self.place, group.spec.residual_scale
        if self.target == "residual" and batch.dense is not None and scale is not None:
            missing = self._widened(batch.outputs[position]) - output.float()
            lack = self._lack(batch)
            memory.lack = near.keep(lack + scale * missing.reshape(lack.shape))
        memory.forget_group_()
        memory.returned.append(near.keep_all(first if others is None else (first, *others)))

    def _module(self, path: str) -> nn.Module:
        return self.layer.get_submodule(path)

    def _target(self, batch: MicroBatch, position: int) -> Tensor | None:
        """What the consumer at `position` should output, [b, T, O]; None for its own output.

        "residual" adds to the dense output what the residual stream lacks before it: the
        difference of the layer's inputs, and of what earlier groups have output (in a parallel
        block too, where they are added together). A block whose output is scaled by s on its way
        makes up for 1/s of that; one whose output is normed cannot, and keeps the dense output.
        """
        if self.target == "self" or batch.dense is None:
            return None
        target = self._widened(batch.outputs[position])
        scales = [group.spec.residual_scale for group in self.groups[: position + 1]]
        if self.target == "residual" and scales[-1] is not None and None not in scales:
            target = target + self._lack(batch).reshape(target.shape) / scales[-1]
        return target

    def _lack(self, batch: MicroBatch) -> Tensor:
        """[b, T, D] fp32, what the stream lacks of the dense model's after the blocks done so far.

        Of a layer in which an output is normed before it is added, nothing useful.
        """
        if batch.memory.lack is not None:
            return batch.memory.lack.to(self.device)
        assert batch.dense is not None
        return self._widened(batch.dense) - self._widened(batch.hidden)

    def _widened(self, kept: Tensor) -> Tensor:
        """Of what is kept, in fp32 where the layer is; the few bytes of half precision travel."""
        return kept.to(self.device).float()


def _others(returned: Any) -> tuple[Any, ...] | None:
    """What a block returns after its output; None where it returns that alone.

    There is None for what is larger than the output: attention's probabilities, [b, heads, T, T],
    which no decoder layer reads.
    """
    if not isinstance(returned, tuple):
        return None
    first, *others = returned
    return tuple(
        None if isinstance(other, Tensor) and other.numel() > first.numel() else other
        for other in others
    )
