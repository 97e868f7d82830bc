"""What a compression takes, by phase: memory, disk and arithmetic, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grail_hf.calibration.refit import refit_stride
from grail_hf.config import ATTENTION, AUTO, GrailConfig
from grail_hf.methods.allocation import find_allocation
from grail_hf.methods.elimination import PANEL
from grail_hf.methods.linalg import BLOCK, half_square
from grail_hf.methods.ridge import DAMPINGS
from grail_hf.methods.ridge import ROWS_TRIED as ROWS_TRIED
from grail_hf.methods.widths import MOST_SPLITS
from grail_hf.models.decoder import decoder_layers
from grail_hf.models.experts import ExpertsGroup, group_in
from grail_hf.models.groups import Group
from grail_hf.planning.plan import Plan, window_length
from grail_hf.planning.profiling import (
    FEW_HELD_OUT_TOKENS,
    HELD_OUT_TOKENS,
    LEAST_WINDOWS,
    profile_stride,
)
from grail_hf.runtime.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel
_PHASES = ("profile", "embed", "forward", "gram", "select", "solve", "refit", "write")
# On a CPU: what matrix products pack their arguments into, and what the C library has not given
# back yet.
_SCRATCH = 2**26
_FP32, _FP64 = 4, 8  # bytes a number


@dataclass(frozen=True)
class Cost:
    """What a phase takes.

    Attributes:
        accelerator_bytes: peak where layers run.
        host_bytes: peak of anonymous memory of the host, above what the process held at the start.
        operations: floating-point operations.
    """

    accelerator_bytes: int = 0
    host_bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Estimate:
    """What compressing will take, from shapes alone.

    Attributes:
        tokens: of calibration.
        phases: phase -> its cost, in the order of the work: "profile" (where an allocation is
            measured), "embed", "forward", "gram", "select", "solve", "refit", "write" (from disk
            to disk).
        weights_bytes: of the dense model, where it is in host memory as a whole; else 0.
        hidden_bytes: of the hidden states, and what is put aside with them, at their peak, wherever
            they are kept; the phases' host memory has them in it where that is host memory.
        disk_bytes: of the new checkpoint and, from disk to disk, two generations of hidden states;
            hidden states that are kept on disk come to it.
        one_memory: layers run on the CPU: the accelerator's bytes are among the host's.
    """

    tokens: int
    phases: dict[str, Cost]
    weights_bytes: int
    hidden_bytes: int
    disk_bytes: int
    one_memory: bool

    @property
    def accelerator_bytes(self) -> int:
        """Peak of all phases."""
        return max(cost.accelerator_bytes for cost in self.phases.values())

    @property
    def host_bytes(self) -> int:
        """Peak of all phases, with the dense weights."""
        return self.weights_bytes + max(cost.host_bytes for cost in self.phases.values())

    @property
    def operations(self) -> dict[str, int]:
        """By phase, of those that take any."""
        return {name: cost.operations for name, cost in self.phases.items() if cost.operations}

    def phases_to_dict(self) -> dict[str, dict[str, int]]:
        """phase -> its cost, as JSON."""
        return {name: asdict(cost) for name, cost in self.phases.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        totals = {
            "accelerator_bytes": self.accelerator_bytes,
            "host_bytes": self.host_bytes,
            "operations": self.operations,
        }
        return asdict(self) | totals


def estimate(
    model: PreTrainedModel,
    plan: Plan,
    config: GrailConfig,
    device: torch.device | None = None,
    *,
    disk_to_disk: bool = False,
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> Estimate:
    """Memory, disk and arithmetic of a compression; works on the meta device.

    With N tokens and H inputs, K of them kept, to O outputs, a group costs 2 N per projection
    parameter for the pass up to its consumer, N H^2 for half a Gram and 2 N O H for the moments
    with a target of the dense model (and a dense pass for it), and a quarter of the moments more
    for the tokens held out; for a refit, all this once more at the new width, and 6 N per parameter
    for a step (half as much for one or two steps). A solve is K^3/3 + 2 O K^2, the choice of the
    ridge that and O K^2 more for each damping tried, a selection at most 5/3 H^3 + 2 O H^2 (greedy
    elimination: factor, inverse and update), and the two errors in the report 2 O H^2. A fold takes
    a pass more, or two. Each of a mixture's experts has a Gram and a solve, and its share of the
    tokens. Causal attention adds 2 N T per query channel and pass.

    Memory, with s bytes a number in the solve: the moments are half a square and O H numbers in
    fp32, and as much for the tokens held out, which are put aside with the hidden states for the
    selection. Greedy elimination has a square and O H numbers of s bytes beside them; the choice of
    the ridge works at K channels, with the moments in fp32, those of the fit and a square, and
    twice O K numbers; a refit has K^2 numbers in fp32 and three and a half times K D in fp64.
    A fold's k-means has the producers' rows twice and two squares of units in fp64, and five times
    the distances of units from centres; its linear form, moments at K channels, is held while those
    behind the fold are summed, for which target "self" keeps the block's outputs.

    Args:
        model: the dense one.
        plan: of it.
        config: the settings; where hidden states are kept by choice ("auto"), they count as kept
            in host memory.
        device: where layers will run; by default where this machine would have them run.
        disk_to_disk: by `compress_checkpoint`: no model is in memory, and layers are mapped.
        batches: the calibration's, where they are known; else as many as the config asks for.
    """
    layers = decoder_layers(model, plan.architecture)
    length, tokens = window_length(model, config), config.num_samples * window_length(model, config)
    batch = min(config.batch_size, config.num_samples) * length
    if batches:
        shapes = [tuple(one["input_ids"].shape) for one in batches]
        length = max(shape[1] for shape in shapes)
        tokens, batch = (f(a * b for a, b in shapes) for f in (sum, max))
    device = device or choose_device(model, config.device)
    config = config.resolved_on(device)
    one_memory = device.type == "cpu"
    work = _Work(
        plan,
        config,
        *(tokens, length, batch, model.config.get_text_config().hidden_size),
        *(model.dtype.itemsize, one_memory, disk_to_disk),
        reads_ahead=device.type == "cuda" and not disk_to_disk,
    )
    for index, layer in enumerate(layers):
        work.add_layer(index, layer)
    total, inside = (sum(map(_size, m)) for m in ([model], layers))
    total, inside = total * work.item, inside * work.item
    work.at_peak("embed", batch * work.item * 4 * work.stream)
    work.at_peak("write", total - inside)

    generation = tokens * work.stream * work.item * (1 + config.targeted)
    # The path of the compressed model; in the dense one, in front of and behind a layer, and the
    # outputs of its consumers.
    hidden = tokens * work.stream * work.item * (1 + config.targeted * (2 + len(plan.specs[0])))
    kept = dict.fromkeys(_PHASES, hidden) | {
        "embed": generation // (1 + config.targeted),
        "profile": work.measures * (2 * generation // (1 + config.targeted) + work.variants),
        "refit": hidden + work.refit_inputs,
        "select": hidden + work.aside,
        "gram": hidden + work.fold_outputs,
    }
    states = config.hidden_states
    on_accelerator = states == "accelerator" and not one_memory
    in_host = states in ("host", AUTO) or (one_memory and states == "accelerator")
    phases = {}
    for name in _PHASES if disk_to_disk else _PHASES[:-1]:
        peak = work.peaks[name]
        if not peak and not work.operations[name]:
            continue
        peak += _SCRATCH * one_memory
        phases[name] = Cost(
            peak * (name != "write") + kept[name] * on_accelerator,
            peak * (one_memory or name == "write") + kept[name] * in_host,
            work.operations[name],
        )
    return Estimate(
        tokens,
        phases,
        weights_bytes=0 if disk_to_disk else total,
        hidden_bytes=max(kept.values()),
        disk_bytes=plan.total_parameters[1] * work.item + 2 * generation * disk_to_disk,
        one_memory=one_memory,
    )


@dataclass
class _Work:
    """What is known of a compression, and what its layers take, added up as they are looked at.

    Attributes:
        plan, config: the compression's.
        tokens: of calibration.
        length: of the longest sequence.
        batch: tokens of the largest micro-batch.
        stream: D, the hidden size.
        item: bytes of a weight.
        one_memory, disk_to_disk: as in `estimate`.
        reads_ahead: the next layer comes to the accelerator while one is at work.
        operations: phase -> floating-point operations.
        peaks: phase -> peak in bytes where layers run, without hidden states.
        refit_inputs: bytes kept for a refit, of a block's calls and their targets.
        aside: bytes of moments that lie with the hidden states while units are chosen.
        fold_outputs: bytes of a consumer's outputs that are kept as the targets behind a fold.
    """

    plan: Plan
    config: GrailConfig
    tokens: int
    length: int
    batch: int
    stream: int
    item: int
    one_memory: bool
    disk_to_disk: bool
    reads_ahead: bool
    operations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0))
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0))
    refit_inputs: int = 0
    aside: int = 0
    fold_outputs: int = 0

    def __post_init__(self) -> None:
        self.solve_item = self.config.solve_torch_dtype.itemsize
        self.rule = find_allocation(self.plan.allocation)
        self.measures = self.plan.measures
        every = 1 if self.rule.divergences else profile_stride(self.tokens, self.plan)
        self.profiled = self.tokens // min(every, max(1, self.tokens // self.batch))
        self.repaired = {(index, spec.kind) for index, spec in self.plan.repaired}

    def at_peak(self, phase: str, size: int) -> None:
        """The phase has so many bytes at a time."""
        self.peaks[phase] = max(self.peaks[phase], size)

    @property
    def variants(self) -> int:
        """Bytes of the hidden states of an allocation's variants, where it measures divergences."""
        each = 3 * self.rule.divergences + self.rule.sensitivities
        number = self.candidates + each * len(self.plan.reduced)
        return number * self.watched * self.stream * self.item

    @property
    def candidates(self) -> int:
        """The most splits between attention and MLP that are tried."""
        return MOST_SPLITS * len(self.plan.attention_units) * self.rule.splits

    @property
    def watched(self) -> int:
        """The most tokens that divergences are measured on."""
        wanted = HELD_OUT_TOKENS if self.rule.divergences else FEW_HELD_OUT_TOKENS
        return min(self.tokens, max(2 * wanted, self.tokens // LEAST_WINDOWS))

    def add_layer(self, index: int, layer: nn.Module) -> None:
        """A decoder layer and its groups."""
        targeted = self.config.targeted
        whole = _size(layer) * self.item
        groups = [group_in(layer, spec, "") for spec in self.plan.specs[index]]
        upstream = changed = 0
        passes = 1 + targeted
        for group in groups:
            left = group.num_parameters
            left -= (group.num_units - self.plan.widths[group.kind][index]) * group.unit_cost
            held = changed * self._maps if self.one_memory else whole * (1 + self.reads_ahead)
            if self.measures:
                self._add_profile(group, held, [g for g in groups if g is not group])
            if (index, group.kind) in self.repaired:
                passes += self._add_repair(index, group, upstream, held, left * self.item)
                changed += left * self.item
            upstream += left * _parameters_per_token(group) // max(group.num_parameters, 1)
        dense = sum(map(_parameters_per_token, groups)) * targeted
        channels = sum(g.num_units * g.columns for g in groups if g.kind == ATTENTION)
        self.operations["forward"] += 2 * self.tokens * (upstream + dense)
        self.operations["forward"] += 2 * self.tokens * self.length * channels * passes
        widest = max([self.stream, *(g.weight.shape[-1] for g in groups if g.num_units)])
        held = changed * self._maps if self.one_memory else whole * (1 + self.reads_ahead)
        self.at_peak("forward", held + self.batch * self.item * 6 * widest)
        self.at_peak("write", 2 * (changed if self.one_memory else whole))

    def _add_profile(
        self, group: Group | ExpertsGroup, held: int, others: Sequence[Group | ExpertsGroup]
    ) -> None:
        """A group's part in measuring an allocation, with `held` bytes of its layer in memory.

        The moments of all the layer's groups are summed in one pass.
        """
        *_, outputs, inputs = group.weight.shape
        square, entries = self.solve_item * inputs**2, self.solve_item * outputs * inputs
        self.operations["profile"] += 2 * self.profiled * group.num_parameters
        if group.kind == ATTENTION:
            self.operations["profile"] += 2 * self.profiled * self.length * inputs
        self.operations["profile"] += self.profiled * inputs**2 + 2 * inputs**3
        tried = 2 * self.watched * group.num_parameters + inputs**3 // 3 + 2 * outputs * inputs**2
        self.operations["profile"] += self.candidates * tried
        moments = half_square(inputs) + sum(half_square(g.weight.shape[-1]) for g in others)
        working = 5 * square // 2 + 3 * entries
        self.at_peak("profile", held + _FP32 * moments + working)
        passing = self._pass_bytes(inputs, outputs)
        self.at_peak("profile", held + self.solve_item * moments + passing)

    def _add_repair(
        self, index: int, group: Group | ExpertsGroup, upstream: int, held: int, left: int
    ) -> int:
        """A group's selection, solve and refit: the passes up to its consumer.

        Args:
            index: of the layer.
            group: of it.
            upstream: parameters that a token meets in the groups before it.
            held: bytes of the layer in memory.
            left: bytes of the group's projections afterwards.
        """
        config, tokens, number = self.config, self.tokens, self.solve_item
        experts, routed = group.spec.experts or 1, group.spec.routed or 1
        at_once = self.plan.experts_at_once if group.spec.experts else 1
        *_, outputs, inputs = group.weight.shape
        kept = self.plan.widths[group.kind][index] * group.columns
        targets = outputs * (config.targeted and not group.spec.experts)
        held_out = config.holds_out
        runs = self.plan.runs(group.spec)
        refits = config.refit_steps > 0 and group.spec.linear is not None
        folds = (1 if config.targeted else 2) * self.plan.select.folds
        eliminates = kept < inputs and self.plan.select.inverts_gram
        collects, dampings = 1 + refits, len(DAMPINGS) * held_out

        passed = _parameters_per_token(group) - routed * inputs * outputs
        passed += runs * upstream  # each expert's own part is run once
        self.operations["forward"] += 2 * tokens * passed * (collects + folds)
        wide, narrow = _moments(inputs, targets) * (4 + held_out) // 4, _moments(kept, targets)
        self.operations["gram"] += tokens * routed * (wide + (refits + (folds > 0)) * narrow)
        if eliminates:
            greedy = 5 * inputs**3 // 3 + 2 * outputs * inputs**2
            self.operations["select"] += experts * greedy
        solves = (kept**3 // 3 + 2 * outputs * kept**2) * (collects + dampings)
        solves += outputs * kept**2 * dampings + 2 * outputs * inputs**2
        self.operations["solve"] += experts * solves

        one = _FP32 * (half_square(inputs) + targets * inputs)
        sums = at_once * (1 + held_out) * one
        pass_bytes = self._pass_bytes(inputs, outputs) + _FP32 * min(targets, BLOCK) * inputs
        aside = one * (self._puts_aside and held_out and not group.spec.experts)
        self.aside = max(self.aside, aside)
        # Summed in the precision of the solve; then rounded to fp32, a matrix at a time. What is
        # put aside makes room for that.
        rounding = _FP32 * half_square(inputs) * (number > _FP32 and not aside)
        self.at_peak("gram", held + sums * number // _FP32 + max(pass_bytes, rounding))
        select = 2 * number * outputs * inputs
        if eliminates:
            select = number * (inputs**2 + outputs * inputs + 2 * PANEL * (inputs + outputs))
        self.at_peak("select", held + sums - aside + select)
        fewer = (1 + held_out) * _FP32 * (half_square(kept) + outputs * kept)
        square, entries = number * kept**2, number * outputs * kept
        solve = fewer + square + 2 * entries
        if held_out:
            solve += number * (half_square(kept) + 2 * min(outputs, ROWS_TRIED) * kept)
        widened = sums - aside + fewer + number * outputs * inputs
        if group.spec.experts:
            # The repaired weights wait until all experts have theirs; then come the stacked ones.
            repaired = self.item * experts * outputs * kept
            widened = max(widened, sums + solve) + repaired
            self.at_peak("solve", held + left + repaired)
        self.at_peak("solve", held + max(widened, solve))
        if folds:
            assert isinstance(group, Group)
            self._add_fold(group, kept, held, sums, solve)
        if refits:
            assert isinstance(group, Group)
            self._add_refit(group, kept, held + left * self._maps, solve)
        return runs * (collects + folds)

    def _add_fold(self, group: Group, kept: int, held: int, sums: int, solve: int) -> None:
        """A fold to `kept` inputs, with moments of `sums` bytes; its solve takes `solve` bytes."""
        number, copies = self.solve_item, 1 + self.config.holds_out
        outputs, inputs = group.weight.shape
        # k-means: the points twice, their inner products, and distances to all centres.
        units, clusters = group.num_units, kept // group.columns
        rows = group.num_parameters - outputs * inputs
        each = (units // group.partitions) * (clusters // group.partitions)
        points = 2 * rows + units**2 * (1 + group.partitions) // group.partitions
        self.at_peak("select", held + sums + _FP64 * (points + 5 * each))
        # The linear form, as if the fold were one of the inputs, held until the other is solved.
        linear = number * (half_square(kept) + outputs * kept)
        means = number * (2 * inputs**2 + inputs * kept + 3 * outputs * inputs)
        self.at_peak("solve", held + sums + means + linear)
        self.at_peak("solve", held + copies * linear + solve)
        # Behind the folded producers moments are summed anew, with targets of any kind.
        behind = copies * number * (half_square(kept) + outputs * kept) + number * outputs * kept
        passed = self._pass_bytes(inputs, outputs)
        self.at_peak("gram", held + copies * linear + behind + passed)
        if not self.config.targeted:
            self.fold_outputs = max(self.fold_outputs, self.tokens * outputs * self.item)

    def _add_refit(self, group: Group, kept: int, held: int, solve: int) -> None:
        """A refit of a group with `kept` inputs left, whose last solve takes `solve` bytes."""
        linear = group.linear
        assert linear is not None
        *_, outputs, inputs = group.weight.shape
        rows, width = len(linear.weight) * kept // inputs, linear.weight.shape[1]
        whole = len(linear.projection.weight) * kept // inputs
        stride = refit_stride(self.config.refit_steps)
        steps = self.config.refit_steps / stride
        self.operations["refit"] += int(6 * self.tokens * group.num_parameters * steps)
        # The solution; the residual, the direction and its image; weights and their gradients.
        vectors = width * (rows * (_FP32 + 3 * _FP64) + 3 * self.item * whole)
        squares = _FP32 * rows**2 + _FP64 * width**2
        working = vectors + squares + self._pass_bytes(inputs, outputs)
        if linear.weight.dtype == torch.float16:
            # The block's bfloat16 copy.
            working += self.item * (group.num_parameters * kept // inputs)
        # What was there before, in case that a refit does harm.
        kept_back = self.item * (whole * width + outputs * kept)
        self.at_peak("refit", held + kept_back + max(working, solve))
        each = width * self.item + outputs * _FP32
        self.refit_inputs = max(self.refit_inputs, self.tokens // stride * each)

    def _pass_bytes(self, inputs: int, outputs: int) -> int:
        """Of a micro-batch on its way to a consumer, whose inputs and targets are in fp32."""
        wide = self.item * 3 * max(inputs, self.stream)
        return self.batch * (wide + _FP32 * (2 * inputs + outputs))

    @property
    def _maps(self) -> bool:
        """A layer is mapped from a file, and takes memory for what has been changed of it."""
        return self.one_memory and self.disk_to_disk

    @property
    def _puts_aside(self) -> bool:
        """Hidden states are kept elsewhere than where layers run."""
        states = self.config.hidden_states
        return states == "disk" if self.one_memory else states != "accelerator"


def _moments(inputs: int, targets: int) -> int:
    """Multiplications a token for the moments of inputs and targets, twice."""
    return inputs * (inputs + min(inputs, BLOCK)) + 2 * inputs * targets


def _parameters_per_token(group: Group | ExpertsGroup) -> int:
    """Parameters of the group's projections that a token meets: of experts, those routed to."""
    parameters: int = group.num_parameters
    spec = group.spec
    return parameters * (spec.routed or 1) // spec.experts if spec.experts else parameters


def _size(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
