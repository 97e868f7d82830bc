"""A decoder layer at work: the statistics of its groups on the calibration hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grail_hf.calibration.calls import Memory, MicroBatch, Run
from grail_hf.calibration.passes import LayerPasses
from grail_hf.calibration.statistics import Statistics
from grail_hf.config import GrailConfig, widest_float
from grail_hf.methods.gram import GramStats
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.selectors import RegionalGradient
from grail_hf.models.capture import (
    Call,
    captured_call,
    captured_calls,
    detached_output,
)
from grail_hf.models.groups import Group, Part
from grail_hf.runtime import processes
from grail_hf.runtime.meter import Meter
from grail_hf.runtime.progress import Bar


@dataclass(frozen=True)
class Block(LayerPasses):
    """A decoder layer on the accelerator, with the calibration hidden states before it.

    Of several processes, each has its own share of the hidden states; the statistics are those of
    all, in `dtype`.
    """

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
        """Second moments of what a group's consumers read and should output, as the layer is now.

        The layer runs up to the consumer and no further. Padding does not count; of an expert, only
        the tokens that are routed to it do.

        Args:
            group: of this layer.
            parts: of the group.
            hold_out: sum the moments of the held-out tokens (`held_out_tokens`) by themselves too;
                they are kept where hidden states are.
            targets: other targets than the block's, as `outputs` gives them.
            remember: keep what the consumer reads, until the group changes otherwise than by
                `narrow_`, and what the producers at these paths output.

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
        self.forget_group_()
        with group.reduced(reduction):
            return self.collect(group, hold_out, targets)

    @torch.no_grad()
    def outputs(self, group: Group) -> list[Tensor]:
        """What the group's consumer outputs now: [b, T, O] a micro-batch, kept."""
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
            target = near.keep(target)
            fixed = self._fixed(batch)
            runs.append(Run(module, args, kwargs, target, batch, self.device, fixed))
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
        energy that the norm outputs over the energy that it gets, since a norm changes the scale
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

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states before the layer by those after it."""
        self.progress.set_postfix_str(f"{self.name} forward")
        for batch in self.batches:
            if batch.following is None:
                memory = batch.memory
                every = memory.inputs is not None  # else the last block may as well run in place
                done = len(self.groups) if every else len(memory.returned)
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
    held_out = (
        batch.held_out if tokens is None else batch.held_out[tokens.to(batch.held_out.device)]
    )
    for sums, rows in ((stats, ~held_out), (stats.held_out, held_out)):
        if rows.all():  # a whole micro-batch is not copied
            sums.update_(x, y)
        elif rows.any():
            index = rows.nonzero().flatten().to(x.device)
            sums.update_(x[index], None if y is None else y[index])


def _sum_statistics_(every: Sequence[GramStats], name: str) -> None:
    """Add to statistics what the other processes' batches gave for them."""
    processes.sum_([sums for stats in every for sums in stats.sums], name)
    parts = [part for stats in every for part in (stats, stats.held_out) if part is not None]
    numbers = [number for part in parts for number in (part.count, part.target_energy)]
    totals = iter(processes.total(numbers, name))
    for part in parts:
        part.count, part.target_energy = int(next(totals)), next(totals)
