"""A decoder layer at work: the statistics of its groups on the calibration hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from grail_hf.calibration.calls import Memory, MicroBatch, Run
from grail_hf.calibration.statistics import Solution, Statistics
from grail_hf.config import GrailConfig, widest_float
from grail_hf.methods.gram import GramStats
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.selectors import RegionalGradient
from grail_hf.models.capture import (
    BlockPass,
    Call,
    captured_call,
    captured_calls,
    captured_outputs,
    captured_return,
    detached_output,
    not_run,
    passed_through,
)
from grail_hf.models.groups import Group, Part, reduced_rows
from grail_hf.runtime import processes
from grail_hf.runtime.meter import Meter
from grail_hf.runtime.placement import Place
from grail_hf.runtime.progress import Bar


@dataclass(frozen=True)
class Block:
    """A decoder layer on the accelerator, with the calibration hidden states before it.

    Its groups are worked on in their order, one after the other is done. What a block returns when
    its group is done is remembered, and the block does not run again. Of several processes, each
    has its own share of the hidden states; the statistics are those of all, in `dtype`.

    Attributes:
        place: where hidden states between layers are kept.
        near: where all that is needed again within the layer is kept; None where there is no room
            for what consumers read, which is computed again then.
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
    progress: Bar
    dtype: torch.dtype
    meter: Meter

    def collect(
        self,
        group: Group,
        hold_out: bool = False,
        targets: Sequence[Tensor] | None = None,
        remember: Sequence[str] | None = None,
    ) -> GramStats:
        """`collect_parts` of a group that is its only part."""
        (stats,) = self.collect_parts(group, group.parts, hold_out, targets, remember)
        return stats

    @torch.no_grad()
    def collect_parts(
        self,
        group: Group,
        parts: Sequence[Part],
        hold_out: bool = False,
        targets: Sequence[Tensor] | None = None,
        remember: Sequence[str] | None = None,
    ) -> list[GramStats]:
        """Second moments of what a group's consumers read and should put out, as the layer is now.

        The layer runs up to the consumer and no further. Padding does not count; of an expert, only
        the tokens that are routed to it do.

        Args:
            group: of this layer.
            parts: of the group.
            hold_out: sum the moments of the held-out tokens (`held_out_tokens`) by themselves too;
                they are kept where hidden states are.
            targets: other targets than the block's, as `outputs` gives them.
            remember: keep what the consumer reads, for as long as `narrow_` alone changes the group,
                and what these of its producers put out, by path.

        Returns:
            The moments of each part.

        Raises:
            FloatingPointError: an input is NaN or Inf.
        """
        self.progress.set_postfix_str(f"{group.name} Gram")
        position = self.groups.index(group)
        every = [self._zeros(group, part, hold_out, targets is not None) for part in parts]
        ends = False
        for number, batch in enumerate(self.batches):
            seen = self._up_to_consumer(group, batch, remember or ())
            if remember is not None and self.near:
                # Of one batch, since looking at the numbers is a wait for an accelerator.
                ends = ends if number else seen.ends_with_consumer
                self._remember_(batch, seen, remember, ends)
            target = None
            if targets is not None:
                target = self._widened(targets[number])
            elif group.targeted:
                target = self._target(batch, position)
            if target is not None and group.bias is not None:
                target = target - group.bias.float()  # the bias stays: the weight's part is left
            for part, stats in zip(parts, every, strict=True):
                _add_(stats, part, seen.call, batch, target)
            self.progress.update()
        for stats in every:
            if stats.held_out is not None:
                stats.add_(stats.held_out)  # so far they are of the other tokens alone
        _sum_statistics_(every, group.name)
        for part, stats in zip(parts, every, strict=True):
            stats.check_finite(part.name)
            if stats.held_out is not None:
                # Only the choice of the damping reads them; until then, selection needs the memory.
                keep = partial(self.place.keep, dtype=torch.float32)
                stats.held_out = stats.held_out.moved(keep)
            stats.round_()
        return every

    def _up_to_consumer(
        self, group: Group, batch: MicroBatch, watched: Sequence[str] = ()
    ) -> BlockPass:
        """The pass to the end of the group's block, as far as it is not remembered.

        The outputs of the modules at the paths `watched` are captured.
        """
        memory = batch.memory
        fixed = {self._module(path): value for path, value in memory.fixed.items()}
        modules = [self._module(path) for path in watched]
        block, outputs = self._module(group.spec.name), group.weight.shape[-2]
        with (
            self._done_before(batch, self.groups.index(group)),
            not_run({module: value.to(self.device) for module, value in fixed.items()}),
            passed_through(block, group.consumer, outputs, modules) as seen,
        ):
            batch.through(self.layer, self.index, batch.hidden, self.device)
        return seen

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
            memory.inputs, memory.others = self.near.keep(x), self.near.keep_all(seen.others)

    @torch.no_grad()
    def narrow_(self, group: Group, *solutions: Solution) -> None:
        """Narrow a group (`Group.narrow_`), and with it what is remembered of it."""
        group.narrow_(*solutions)
        for batch in self.batches:
            memory = batch.memory
            if memory.inputs is None and not memory.fixed:
                continue
            ((reduction, _),) = solutions
            if reduction.folds:  # the mean of producers does not put out the mean of their outputs
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

    def forget(self, group: Group) -> None:
        """The group has changed: nothing that is remembered of it holds."""
        for batch in self.batches:
            batch.memory.forget_group_()

    @contextmanager
    def _done_before(self, batch: MicroBatch, position: int) -> Iterator[None]:
        """Inside the context, the blocks of the groups before `position` do not run.

        What they return is remembered. Where it is not yet, it is found first.
        """
        memory = batch.memory
        while len(memory.returned) < position:
            self._finish_(batch, len(memory.returned))
        from accelerate.utils import send_to_device

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
        else:
            output = group.consumer(memory.inputs.to(self.device))
            returned = output if memory.others is None else (output, *memory.others)
        near = self.near or self.place
        if self.target == "residual" and batch.dense is not None and group.spec.residual_scale:
            missing = self._widened(batch.outputs[position]) - output.float()
            lack = self._lack(batch)
            memory.lack = near.keep(lack + group.spec.residual_scale * missing.reshape(lack.shape))
        memory.forget_group_()
        memory.returned.append(near.keep_all(returned))

    def _module(self, path: str) -> nn.Module:
        return self.layer.get_submodule(path)

    def _zeros(self, group: Group, part: Part, hold_out: bool, given: bool) -> GramStats:
        """Moments of no tokens; with a cross moment where there are targets."""
        outputs, channels = part.weight.shape
        targeted = given or (group.targeted and self.target != "self")
        sizes = channels, self.device, outputs if targeted else None, self.dtype
        stats = GramStats.zeros(*sizes)
        if hold_out:
            stats.held_out = GramStats.zeros(*sizes)
        return stats

    def statistics(self, group: Group, config: GrailConfig) -> Iterator[Statistics]:
        """The statistics of each part of the group, as the layer is now.

        Of a mixture, the layer runs once for as many experts as `Group.at_once` allows.
        """
        hold_out, parts = config.holds_out, group.parts
        remember = (group.fixed if config.refit_steps else ()) if group.targeted else None
        step = group.at_once(self.dtype.itemsize * (1 + hold_out))
        for start in range(0, len(parts), step):
            some = parts[start : start + step]
            with self.meter.phase("gram"):
                every = self.collect_parts(group, some, hold_out, remember=remember)
            for part in some:
                # Popped, so that nothing but the statistics holds the moments: they are used up.
                yield Statistics(self, group, part, config, every.pop(0))

    def collect_folded(
        self, group: Group, reduction: Reduction, hold_out: bool = False
    ) -> GramStats:
        """The moments [K] that `collect` will find after the folded producers; nothing is changed.

        Averaging producers does not average their outputs once a gate or attention follows, so this
        takes another pass. The targets are those before the fold; where that is
        the block's own output, one pass more.
        """
        targets = self.outputs(group) if self.target == "self" else None
        self.forget(group)
        with group.reduced(reduction):
            return self.collect(group, hold_out, targets)

    @torch.no_grad()
    def outputs(self, group: Group) -> list[Tensor]:
        """What the group's consumer puts out now: [b, T, O] a micro-batch, kept."""
        self.progress.set_postfix_str(f"{group.name} output")
        outputs = []
        for batch in self.batches:
            (x, *_), _ = self._up_to_consumer(group, batch).call
            outputs.append(self.place.keep(group.consumer(x)))
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
            with (
                self._done_before(batch, self.groups.index(group)),
                torch.enable_grad(),
                detached_output(group.consumer) as seen,
            ):
                after = batch.through(self.layer, self.index, batch.hidden, self.device)
                after = batch.without_padding(after.float())
                inputs, output = seen
                norms = torch.linalg.vector_norm(after, dim=(1, 2))
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

    @torch.no_grad()
    def runs(self, group: Group) -> list[Run]:
        """The group's block as a function of its weights alone: its calls, and their targets."""
        self.progress.set_postfix_str(f"{group.name} refit")
        position = self.groups.index(group)
        module, near = self._module(group.spec.name), self.near or self.place
        runs = []
        for batch in self.batches:
            with self._done_before(batch, position), captured_call(module) as calls:
                batch.through(self.layer, self.index, batch.hidden, self.device)
            target = self._target(batch, position)
            if target is None:
                raise ValueError("a refit needs a target of the dense model: 'dense' or 'residual'")
            args, kwargs = near.keep_all(calls[0])
            fixed = {self._module(path): value for path, value in batch.memory.fixed.items()}
            runs.append(Run(module, args, kwargs, near.keep(target), batch, self.device, fixed))
            self.progress.update()
        return runs

    @torch.no_grad()
    def after(self, hidden: Sequence[Tensor]) -> list[Tensor]:
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

    def _target(self, batch: MicroBatch, position: int) -> Tensor | None:
        """What the consumer at `position` should put out, [b, T, O]; None for its own output.

        "residual" adds to the dense output what the residual stream lacks before it: the
        difference of the layer's inputs, and of what earlier groups have put out (in a parallel
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

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states before the layer by those after it."""
        self.progress.set_postfix_str(f"{self.name} forward")
        for batch in self.batches:
            if batch.following is None:
                done = len(self.groups) if batch.memory.holds_any else 0
                with self._done_before(batch, done):
                    hidden = batch.through(self.layer, self.index, batch.hidden, self.device)
                batch.following = self.place.keep(hidden)
            batch.hidden, batch.following, batch.memory = batch.following, None, Memory()
            self.progress.update()


def _add_(
    stats: GramStats, part: Part, call: Call, batch: MicroBatch, target: Tensor | None
) -> None:
    """Add a micro-batch's tokens to a part's moments, the held-out ones to theirs."""
    x, tokens = part.reads(call, batch.tokens)
    y = None if target is None else batch.rows(target)
    if stats.held_out is None:
        stats.update_(x, y)
        return
    held_out = batch.held_out.to(x.device)
    held_out = held_out if tokens is None else held_out[tokens.to(x.device)]
    for sums, rows in ((stats, ~held_out), (stats.held_out, held_out)):
        sums.update_(x[rows], None if y is None else y[rows])


def _sum_statistics_(every: Sequence[GramStats], name: str) -> None:
    """Add to statistics what the other processes' batches gave for them."""
    processes.sum_([sums for stats in every for sums in stats.sums], name)
    parts = [part for stats in every for part in (stats, stats.held_out) if part is not None]
    numbers = [number for part in parts for number in (part.count, part.target_energy)]
    totals = iter(processes.total(numbers, name))
    for part in parts:
        part.count, part.target_energy = int(next(totals)), next(totals)
