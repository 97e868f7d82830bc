"""Count the floating-point operations of a compression, by phase, from shapes alone.

A pass of N tokens takes 2 N operations per parameter of a projection, and causal attention 2 N T
per query channel. A group with H inputs, K of them kept, to O outputs takes the pass up to its
consumer, 2 N for each number stored of its Gram and 2 N O H for the moments with a target of the
dense model (and a dense pass for it), and 2 N O K for what it outputs in the end. Where that does
not follow from what the consumer reads, as in a mixture or after a fold, the block runs again.

A refit on M tokens takes the Gram of the producer's inputs and, for each step and once before, the
linear producer and the consumer forward and backward; then the moments at the new width and the
solve once more. A solve is K^3/3 + 4 O K^2. Choosing the ridge takes as much, and the error on the
tokens held out, for each damping that is tried. Each expert of a mixture has a Gram and a solve,
and its share of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from grail_hf.calibration.refit import refit_stride
from grail_hf.config import ATTENTION, GrailConfig
from grail_hf.methods.allocation import find_allocation
from grail_hf.methods.elimination import elimination_operations
from grail_hf.methods.linalg import half_square
from grail_hf.methods.ridge import DAMPINGS
from grail_hf.methods.widths import splits
from grail_hf.models.groups import Group
from grail_hf.planning.plan import Plan
from grail_hf.planning.profiling import profile_stride, single_widths

PHASES = ("profile", "embed", "forward", "gram", "select", "solve", "refit", "write")
# Backward through attention, to queries, keys and values, against forward.
_ATTENTION_BACKWARD = 5 / 2


@dataclass
class Arithmetic:
    """Floating-point operations of a compression, added up layer by layer.

    Attributes:
        plan, config: the compression's.
        tokens: N, of calibration.
        length: T, of the longest sequence.
        batch: tokens of the largest micro-batch.
        watched: tokens on which divergences are measured.
        head: parameters of the language-model head.
        operations: phase -> operations.
    """

    plan: Plan
    config: GrailConfig
    tokens: int
    length: int
    batch: int
    watched: int
    head: int
    operations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))

    def __post_init__(self) -> None:
        self.rule = find_allocation(self.plan.allocation)
        self.repaired = {(index, spec.kind) for index, spec in self.plan.repaired}
        plan, tries = self.plan, self.plan.measures and self.rule.splits
        self.candidates = splits(plan.budgets, self.config) if tries else []
        self.variants = len(self.candidates) * len(plan.attention_units)

    def add(self, phase: str, operations: float) -> None:
        self.operations[phase] += int(operations)

    def add_layer(self, index: int, groups: Sequence[Group]) -> None:
        """Add a decoder layer with its groups, in the order in which they run."""
        last = index + 1 == len(self.plan.specs)
        targeted, works = self.config.targeted, False
        if self.plan.measures:
            self._add_profile(index, groups)
        if targeted:
            self.add("forward", sum(self._pass(group, group.num_units) for group in groups))
        pending = 0.0  # what the blocks before a group still have to output
        for group in groups:
            width = self.plan.widths[group.kind][index]
            if (index, group.kind) not in self.repaired:
                pending += self._pass(group, width)
                continue
            self.add("gram", pending)
            works, pending = True, self._finish(group, width)
            self._add_gram(group, width)
            self._add_select(group, width)
            self._add_solve(group, width)
            if self.refits(group):
                self._add_refit(group, width)
        if not last:
            whole = sum(self._pass(group, group.num_units) for group in groups)
            self.add("forward", pending if works else whole)

    def _pass(self, group: Group, width: int, consumer: bool = True) -> float:
        """Of all tokens through a block with `width` units; up to its consumer or with it."""
        left = group.num_parameters - (group.num_units - width) * group.unit_cost
        share = group.spec.routed / group.spec.experts if group.spec.experts else 1
        if not consumer and not group.spec.experts:
            left -= group.weight.shape[-2] * width * group.columns
        return 2 * self.tokens * (left * share + self._scores(group, width))

    def _scores(self, group: Group, width: int) -> int:
        """Multiplications a token of attention's scores and their products with the values."""
        return self.length * width * group.columns * (group.kind == ATTENTION)

    def _finish(self, group: Group, width: int) -> float:
        """What the block takes to output what it does when its group is done."""
        if group.spec.experts or self.plan.select.folds:
            return self._pass(group, width)
        return 2 * self.tokens * group.weight.shape[-2] * width * group.columns

    def targets(self, group: Group) -> int:
        """Outputs of the consumer for which there is a target of the dense model."""
        return group.weight.shape[-2] * (self.config.targeted and group.targeted)

    def _moments(self, inputs: int, targets: int) -> int:
        """Operations a token."""
        return 2 * half_square(inputs) + 2 * inputs * targets

    def _add_gram(self, group: Group, width: int) -> None:
        *_, outputs, inputs = group.weight.shape
        targets = self.targets(group)
        if group.spec.experts:  # each expert's own part is run once for its tokens
            passed = self._pass(group, group.num_units)
            passed -= 2 * self.tokens * group.spec.routed * outputs * inputs
        else:
            passed = self._pass(group, group.num_units, consumer=False)
        self.add("gram", passed)
        routed = group.spec.routed or 1
        self.add("gram", self.tokens * routed * self._moments(inputs, targets))
        if self.plan.select.folds:
            kept = width * group.columns
            if not self.config.targeted:
                self.add("gram", passed + 2 * self.tokens * outputs * inputs)
            self.add("gram", self._pass(group, width, consumer=False))
            self.add("gram", self.tokens * self._moments(kept, outputs))

    def _add_select(self, group: Group, width: int) -> None:
        if self.eliminates(group, width):
            self.add("select", self._selection(group, width, bool(self.targets(group))))

    def eliminates(self, group: Group, width: int) -> bool:
        """Whether greedy elimination, or a selector like it, chooses the group's units."""
        return self.plan.select.inverts_gram and width < group.num_units

    def _selection(self, group: Group, width: int, targeted: bool) -> float:
        """Greedy elimination to a width, from the weight that fits the target best."""
        *_, outputs, inputs = group.weight.shape
        order = elimination_operations(inputs, outputs, width * group.columns)
        best = 4 * outputs * inputs**2 * targeted
        return (group.spec.experts or 1) * (inputs**3 + best + order)  # with factor and inverse

    def _add_solve(self, group: Group, width: int) -> None:
        *_, outputs, inputs = group.weight.shape
        kept, held_out = width * group.columns, self.config.holds_out
        error = 2 * outputs * half_square(kept)
        solve = 0.0
        if not self.targets(group):
            solve += (1 + held_out) * 2 * outputs * inputs**2  # the consumer's own moments
        if self.config.compensate:
            tried = len(DAMPINGS) * held_out
            solve += (1 + tried) * (kept**3 / 3 + 2 * outputs * kept**2)
            solve += (1 + held_out) * 2 * outputs * kept**2 + (tried + held_out) * error
        solve += 2 * error  # for the report
        self.add("solve", (group.spec.experts or 1) * solve)

    def refits(self, group: Group) -> bool:
        """Whether a group that is repaired is refitted too."""
        return self.config.refit_steps > 0 and group.spec.linear is not None and group.targeted

    def _add_refit(self, group: Group, width: int) -> None:
        linear = group.linear
        assert linear is not None
        outputs, inputs = group.weight.shape
        kept, steps = width * group.columns, self.config.refit_steps
        rows, stream = len(linear.weight) * kept // inputs, linear.weight.shape[1]
        tokens = self.tokens / refit_stride(steps)
        scores = 2 * self._scores(group, width)
        fixed: float = self._pass(group, width, consumer=False) / self.tokens - scores
        fixed -= 2 * rows * stream
        again = 0.0 if group.fixed else fixed  # what fused producers output is not remembered
        forward: float = 2 * rows * stream + 2 * outputs * kept + scores + again
        backward = 2 * rows * stream + 2 * outputs * kept + _ATTENTION_BACKWARD * scores + again
        self.add("refit", tokens * (2 * half_square(stream) + (steps + 1) * (forward + backward)))
        # The coupling, on one batch, and the factors and solves of the steps.
        coupling: float = 2 * (outputs + self.batch) * kept**2
        coupling += self.batch * (2 * rows * stream + scores + again)
        triangular = (2 * steps + 3) * rows * stream**2 + (steps + 1) * 2 * rows**2 * stream
        self.add("refit", coupling + triangular + (rows**3 + stream**3) / 3)
        # The moments that it leaves, the consumer once more, and the error.
        passed = 2 * rows * stream + scores + again + self._moments(kept, self.targets(group))
        self.add("refit", self.tokens * passed)
        self.add("refit", kept**3 / 3 + 4 * outputs * kept**2 + 2 * outputs * half_square(kept))

    def _add_profile(self, index: int, groups: Sequence[Group]) -> None:
        """Add what a layer takes while an allocation is measured."""
        layers = len(self.plan.specs)
        stride = 1 if self.rule.divergences else profile_stride(self.tokens, self.plan)
        fitted = (self.tokens - self.watched) / stride
        passed = sum(self._pass(group, group.num_units) for group in groups) / self.tokens
        self.add("profile", (fitted + self.watched) * passed)
        self.add("profile", self.variants * self.watched * passed)
        for group in groups:
            *_, outputs, inputs = group.weight.shape
            experts, share = group.spec.experts or 1, group.spec.routed or 1
            self.add("profile", fitted * share * self._moments(inputs, 0))
            if (index, group.kind) not in self.repaired:
                continue
            budget = self.plan.budgets[group.kind]
            singles = single_widths(self.rule, budget, self.plan.sparsity)
            tried = {widths[group.kind][index] for widths in self.candidates} - {group.num_units}
            if not (tried or self.rule.loss):
                continue
            # For a loss the order of all units, and the error at every width; else whether fp32 is
            # enough, and the order down to the least width.
            self.add("profile", experts * inputs**3 / 3)
            if self.rule.loss:
                self.add("profile", experts * 2 * outputs * inputs**2)
            if self.plan.select.inverts_gram:
                least = 0 if self.rule.loss else min(tried)
                self.add("profile", self._selection(group, least, False))
            for width in [*tried, *singles]:
                kept = width * group.columns
                solve = 2 * outputs * inputs**2 + 4 * outputs * kept**2 + kept**3 / 3
                self.add("profile", experts * solve)
            # Each goes through the layers from its own on, and through the head.
            self.add("profile", len(singles) * self.watched * passed * (layers - index))
            self.add("profile", 2 * len(singles) * self.watched * self.head)
        if index == 0:
            self.add("profile", 2 * (1 + self.variants) * self.watched * self.head)
