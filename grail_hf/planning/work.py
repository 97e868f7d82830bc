"""Add up what the layers of a compression take: memory, and arithmetic, by phase.

With s bytes per number in the solve, the moments are half a square and O H numbers in fp32,
and as much for the tokens held out, which are put aside with the hidden states during the
selection. Greedy elimination adds a square and O H numbers of s bytes, and panels. Choosing the
ridge works on K channels, with the moments in fp32, those of the fit, a square, and twice O K
numbers. A refit has K^2 numbers in fp32 and three and a half times K D in fp64. A fold's k-means
has the producers' rows twice, two squares of units in fp64, and five times the distances of units
from centres; its linear form, moments at K channels, is held while the moments after the fold are
summed, for which target "self" keeps the block's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from grail_hf.calibration.passes import remembered_bytes
from grail_hf.calibration.refit import refit_stride
from grail_hf.config import AUTO, GrailConfig
from grail_hf.methods.allocation import find_allocation
from grail_hf.methods.elimination import CANDIDATES, PANEL
from grail_hf.methods.linalg import BLOCK, half_square
from grail_hf.methods.ridge import ROWS_TRIED
from grail_hf.models.experts import group_in
from grail_hf.models.groups import Group
from grail_hf.planning.arithmetic import PHASES, Arithmetic
from grail_hf.planning.plan import Plan, window_length
from grail_hf.planning.profiling import held_out_windows, wanted_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel
# On a CPU: buffers into which matrix products pack their arguments, and freed memory that the C
# library has not returned to the system yet.
SCRATCH = 2**26
_FP32, _FP64 = 4, 8  # bytes per number
# The phases within a layer.
INSIDE = ("forward", "gram", "select", "solve", "refit")


@dataclass(frozen=True)
class Cost:
    """What a phase takes.

    Attributes:
        accelerator_bytes: peak of memory on the device that layers run on.
        host_bytes: peak of the host's anonymous memory, above that of the process at the start.
        operations: floating-point operations.
    """

    accelerator_bytes: int = 0
    host_bytes: int = 0
    operations: int = 0


@dataclass
class Work:
    """Properties of a compression, and what its layers take, added up layer by layer.

    Attributes:
        plan, config: the compression's.
        arithmetic: of the same layers.
        tokens: calibration tokens.
        length: tokens of the longest sequence.
        batch: tokens of the largest micro-batch.
        stream: D, the hidden size.
        item: bytes per weight.
        one_memory, disk_to_disk: as in `Estimate` and `estimate`.
        reads_ahead: the next layer is brought to the accelerator while one is in use.
        peaks: phase -> peak in bytes on the device that layers run on, without hidden states.
        near: bytes of what is needed again within a layer.
        refit_inputs: bytes kept for a refit: a block's calls and their targets.
        aside: bytes of moments that are put aside with the hidden states during the selection.
        fold_outputs: bytes of a consumer's outputs that are kept as the targets after a fold.
    """

    plan: Plan
    config: GrailConfig
    arithmetic: Arithmetic
    tokens: int
    length: int
    batch: int
    stream: int
    item: int
    one_memory: bool
    disk_to_disk: bool
    reads_ahead: bool
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    near: int = 0
    refit_inputs: int = 0
    aside: int = 0
    fold_outputs: int = 0

    def __post_init__(self) -> None:
        self.solve_item = self.config.solve_torch_dtype.itemsize
        self.measures = self.plan.measures

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        plan: Plan,
        config: GrailConfig,
        device: torch.device,
        disk_to_disk: bool,
        batches: Sequence[Mapping[str, torch.Tensor]] | None,
    ) -> Work:
        """The work before any layer is added; takes the arguments of `estimate`."""
        tokens, length, batch = _calibration_tokens(model, config, batches)
        rule = find_allocation(plan.allocation)
        watched = held_out_windows(tokens // length, tokens, wanted_tokens(rule)) * length
        return cls(
            plan,
            config,
            Arithmetic(plan, config, tokens, length, batch, watched, _head(model)),
            tokens=tokens,
            length=length,
            batch=batch,
            stream=model.config.get_text_config().hidden_size,
            item=model.dtype.itemsize,
            one_memory=device.type == "cpu",
            disk_to_disk=disk_to_disk,
            reads_ahead=device.type == "cuda" and not disk_to_disk,
        )

    @property
    def generation(self) -> int:
        """Bytes of the hidden states before a layer; those of the dense model too, with targets."""
        return self.tokens * self.stream * self.item * (1 + self.config.targeted)

    def hidden_states(self) -> dict[str, int]:
        """phase -> bytes of hidden states, and of what is put aside with them."""
        one = self.tokens * self.stream * self.item
        # Those of the compressed model; with targets also the dense model's before and after a
        # layer, and the outputs of its consumers.
        hidden = one * (1 + self.config.targeted * (2 + len(self.plan.specs[0])))
        return dict.fromkeys(PHASES, hidden) | {
            "embed": one,
            "profile": self.measures * (2 * one + self.variants),
            "refit": hidden + self.refit_inputs,
            "select": hidden + self.aside,
            "gram": hidden + self.fold_outputs,
        }

    def costs(self, kept: Mapping[str, int]) -> dict[str, Cost]:
        """phase -> its cost, with its bytes of hidden states `kept` where they are kept.

        What is needed again within a layer is kept with them; the estimate takes it that there is
        room for it.
        """
        states = self.config.hidden_states
        on_accelerator = states == "accelerator" and not self.one_memory
        in_host = states in ("host", AUTO) or (self.one_memory and states == "accelerator")
        phases = {}
        for name in PHASES if self.disk_to_disk else PHASES[:-1]:
            peak = self.peaks[name]
            operations = self.arithmetic.operations[name]
            if not peak and not operations:
                continue
            peak += SCRATCH * self.one_memory
            all_kept = kept[name] + self.near * (self._remembers and name in INSIDE)
            phases[name] = Cost(
                peak * (name != "write") + all_kept * on_accelerator,
                peak * (self.one_memory or name == "write") + all_kept * in_host,
                operations,
            )
        return phases

    def at_peak(self, phase: str, size: int) -> None:
        """Record that the phase holds this many bytes at a time."""
        self.peaks[phase] = max(self.peaks[phase], size)

    @property
    def variants(self) -> int:
        """Bytes of the hidden states of the model variants whose divergence is measured."""
        rule = self.arithmetic.rule
        each = 3 * rule.divergences + rule.sensitivities
        number = self.arithmetic.variants + each * len(self.plan.reduced)
        return number * self.arithmetic.watched * self.stream * self.item

    def add_layer(self, index: int, layer: nn.Module) -> None:
        """Add a decoder layer and its groups."""
        whole = num_parameters(layer) * self.item
        groups = [group_in(layer, spec, "") for spec in self.plan.specs[index]]
        self.arithmetic.add_layer(index, groups)
        each = remembered_bytes(groups, self.stream, self.item, self.config.targeted)
        self.near = max(self.near, self.tokens * each)
        changed = 0
        for group in groups:
            left = group.num_parameters
            left -= (group.num_units - self.plan.widths[group.kind][index]) * group.unit_cost
            held = changed * self._maps if self.one_memory else whole * (1 + self.reads_ahead)
            if self.measures:
                self._add_profile(group, held, [g for g in groups if g is not group])
            if (index, group.kind) in self.arithmetic.repaired:
                self._add_repair(index, group, held, left * self.item)
                changed += left * self.item
        widest = max([self.stream, *(g.weight.shape[-1] for g in groups if g.num_units)])
        held = changed * self._maps if self.one_memory else whole * (1 + self.reads_ahead)
        self.at_peak("forward", held + self.batch * self.item * 6 * widest)
        self.at_peak("write", 2 * (changed if self.one_memory else whole))

    def _add_profile(self, group: Group, held: int, others: Sequence[Group]) -> None:
        """Add what a group takes while an allocation is measured.

        The moments of all the layer's groups, which include the `others`, are summed in one pass,
        with `held` bytes of the layer in memory.
        """
        *_, outputs, inputs = group.weight.shape
        square, entries = self.solve_item * inputs**2, self.solve_item * outputs * inputs
        moments = half_square(inputs) + sum(half_square(g.weight.shape[-1]) for g in others)
        working = 5 * square // 2 + 3 * entries
        self.at_peak("profile", held + _FP32 * moments + working)
        passing = self._pass_bytes(inputs, outputs)
        self.at_peak("profile", held + self.solve_item * moments + passing)

    def _add_repair(self, index: int, group: Group, held: int, left: int) -> None:
        """Add a group's selection, solve and refit.

        Args:
            index: of the layer.
            group: in this layer.
            held: bytes of the layer in memory.
            left: bytes of the group's projections afterwards.
        """
        kept = self.plan.widths[group.kind][index] * group.columns
        targets = self.arithmetic.targets(group)
        moments = self._add_moments(group, kept, targets, held)
        solve = self._add_solve(group, kept, held, moments, left)
        if self.plan.select.folds:
            self._add_fold(group, kept, held, moments[0], solve)
        if self.arithmetic.refits(group):
            self._add_refit(group, kept, held + left * self._maps, solve)

    def _add_moments(self, group: Group, kept: int, targets: int, held: int) -> tuple[int, int]:
        """Add the memory of a group's moments and of the selection.

        Returns the bytes of the moments, and how many of them are put aside for the selection.
        """
        number, held_out = self.solve_item, self.config.holds_out
        at_once = self.plan.experts_at_once if group.spec.experts else 1
        *_, outputs, inputs = group.weight.shape
        one = _FP32 * (half_square(inputs) + targets * inputs)
        sums = at_once * (1 + held_out) * one
        pass_bytes = self._pass_bytes(inputs, outputs) + _FP32 * min(targets, BLOCK) * inputs
        aside = one * (self._puts_aside and held_out and not group.spec.experts)
        self.aside = max(self.aside, aside)
        # Summed in the precision of the solve, then rounded to fp32, one matrix at a time. Moments
        # that are put aside make room for that.
        rounding = _FP32 * half_square(inputs) * (number > _FP32 and not aside)
        self.at_peak("gram", held + sums * number // _FP32 + max(pass_bytes, rounding))
        select = 2 * number * outputs * inputs
        if self.arithmetic.eliminates(group, kept // group.columns):
            panel = PANEL * (6 * inputs + CANDIDATES * outputs)
            select = number * (inputs**2 + outputs * inputs + panel)
        self.at_peak("select", held + sums - aside + select)
        return sums, aside

    def _add_solve(
        self,
        group: Group,
        kept: int,
        held: int,
        moments: tuple[int, int],
        left: int,
    ) -> int:
        """Add the memory of a group's solve, and return the bytes that the solve alone takes."""
        (sums, aside), number, held_out = moments, self.solve_item, self.config.holds_out
        *_, outputs, inputs = group.weight.shape
        fewer = (1 + held_out) * _FP32 * (half_square(kept) + outputs * kept)
        square, entries = number * kept**2, number * outputs * kept
        solve = fewer + square + 2 * entries
        if held_out:
            solve += number * (half_square(kept) + 2 * min(outputs, ROWS_TRIED) * kept)
        widened = sums - aside + fewer + number * outputs * inputs
        if group.spec.experts:
            # The repaired weights wait until all experts have theirs, and are then stacked.
            repaired = self.item * group.spec.experts * outputs * kept
            widened = max(widened, sums + solve) + repaired
            self.at_peak("solve", held + left + repaired)
        self.at_peak("solve", held + max(widened, solve))
        return solve

    def _add_fold(self, group: Group, kept: int, held: int, sums: int, solve: int) -> None:
        """Add a fold to `kept` inputs, with `sums` bytes of moments, and `solve` for the solve."""
        number, copies = self.solve_item, 1 + self.config.holds_out
        outputs, inputs = group.weight.shape
        # k-means: the points twice, their inner products, and distances to all centres.
        units, clusters = group.num_units, kept // group.columns
        rows = group.num_parameters - outputs * inputs
        each = (units // group.partitions) * (clusters // group.partitions)
        points = 2 * rows + units**2 * (1 + group.partitions) // group.partitions
        self.at_peak("select", held + sums + _FP64 * (points + 5 * each))
        # The linear form, as if the inputs were folded, held until the measured form is solved.
        linear = number * (half_square(kept) + outputs * kept)
        means = number * (2 * inputs**2 + inputs * kept + 3 * outputs * inputs)
        self.at_peak("solve", held + sums + means + linear)
        self.at_peak("solve", held + copies * linear + solve)
        # After the folded producers moments are summed anew, with targets of any kind.
        anew = copies * number * (half_square(kept) + outputs * kept) + number * outputs * kept
        passed = self._pass_bytes(inputs, outputs)
        self.at_peak("gram", held + copies * linear + anew + passed)
        if not self.config.targeted:
            self.fold_outputs = max(self.fold_outputs, self.tokens * outputs * self.item)

    def _add_refit(self, group: Group, kept: int, held: int, solve: int) -> None:
        """Add a refit of a group with `kept` inputs, whose last solve takes `solve` bytes."""
        linear = group.linear
        assert linear is not None
        *_, outputs, inputs = group.weight.shape
        rows, width = len(linear.weight) * kept // inputs, linear.weight.shape[1]
        whole = len(linear.projection.weight) * kept // inputs
        stride = refit_stride(self.config.refit_steps)
        # The solution; the residual, the direction and its image; weights and their gradients.
        vectors = width * (rows * (_FP32 + 3 * _FP64) + 3 * self.item * whole)
        squares = _FP32 * rows**2 + _FP64 * width**2
        working = vectors + squares + self._pass_bytes(inputs, outputs)
        if linear.weight.dtype == torch.float16:
            # The block's bfloat16 copy.
            working += self.item * (group.num_parameters * kept // inputs)
        # The weights before the refit, to undo it in case it does harm.
        before = self.item * (whole * width + outputs * kept)
        self.at_peak("refit", held + before + max(working, solve))
        each = width * self.item + outputs * _FP32
        self.refit_inputs = max(self.refit_inputs, self.tokens // stride * each)

    def _pass_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a micro-batch in the pass to a consumer, with inputs and targets in fp32."""
        wide = self.item * 3 * max(inputs, self.stream)
        return self.batch * (wide + _FP32 * (2 * inputs + outputs))

    @property
    def _remembers(self) -> bool:
        """Whether what is needed again within a layer is kept, and where hidden states are."""
        return self.one_memory or self.config.hidden_states == "accelerator"

    @property
    def _maps(self) -> bool:
        """Whether a layer is mapped from a file, and only its changed weights take memory."""
        return self.one_memory and self.disk_to_disk

    @property
    def _puts_aside(self) -> bool:
        """Whether hidden states are kept elsewhere than on the device that layers run on."""
        states = self.config.hidden_states
        return states == "disk" if self.one_memory else states != "accelerator"


def _calibration_tokens(
    model: PreTrainedModel,
    config: GrailConfig,
    batches: Sequence[Mapping[str, torch.Tensor]] | None,
) -> tuple[int, int, int]:
    """Tokens: of the calibration, of its longest sequence, and of its largest micro-batch."""
    if not batches:
        length = window_length(model, config)
        number = config.num_samples
        return number * length, length, min(config.batch_size, number) * length
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    sizes = [rows * length for rows, length in shapes]
    return sum(sizes), max(length for _, length in shapes), max(sizes)


def _head(model: PreTrainedModel) -> int:
    """Parameters of the language-model head, if there is one."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return 0 if head is None else num_parameters(head)


def num_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
