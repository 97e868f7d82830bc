"""Refit of the producers that a block's output is linear in, by conjugate gradients.

With its queries and keys fixed, attention is linear in the value projection; with its gate fixed, a
gated MLP is linear in the up-projection. Either may be rows of a projection that has others too
([q; k; v], [gate; up]). So after the consumer is solved for, what the block still
misses is a linear least-squares problem in the weight U [K, D] of that producer,

    minimise ||Y - A(U)||^2 + damping ||U - U_0||^2,    A linear,

too large for a Cholesky factorisation (K D unknowns), but not for conjugate gradients: A(U) is the
block run with U in place, and its adjoint the derivative of that run, which is exact since A is
linear. No loss is descended and no labels are needed.

Few steps suffice because the problem is nearly separable. In the coordinates T = U L, with
L L^T = X^T X over the producer's inputs, a step in any direction changes the producer's outputs
alike, and what couples the rows is nearly one matrix for all directions,

    M = (W^T W) * E[g g^T]    (elementwise),

with W the consumer and g what multiplies each of its inputs (the gate; the context that a head
attends to). M preconditions the steps; as with K-FAC (arXiv 1503.05671), only their number depends
on how good an approximation it is.

The weights of a direction and their gradients have magnitudes beyond float16's range. So a float16
block is run here as a bfloat16 copy of itself, which is as fast on an accelerator. Its coarser
rounding does little harm, since the steps solve for a small change of the weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grail_hf.calibration.block import Block
from grail_hf.calibration.calls import Run
from grail_hf.config import GrailConfig, widest_float
from grail_hf.methods.linalg import (
    Symmetric,
    add_,
    cholesky_,
    cholesky_solve_,
    damped_cholesky,
    sum_of_products,
)
from grail_hf.methods.ridge import reconstruction_error, ridge
from grail_hf.models.capture import captured_input
from grail_hf.models.groups import Group, Projection, Rows
from grail_hf.runtime import processes

logger = logging.getLogger(__name__)

_INPUT_DAMPING = 1e-3
# For a few steps every second micro-batch serves nearly as well as all of them.
QUICK_STEPS = 2
# Rows of a square matrix that are worked on at a time.
_ROWS_AT_ONCE = 256
# An error that two solves of the same problem may differ by, relative to it.
_SAME = 1e-6


def refit_stride(steps: int) -> int:
    """A refit of so many steps uses every n-th micro-batch, for the n that this returns."""
    return 2 if steps <= QUICK_STEPS else 1


def refit_batches(steps: int, number: int) -> int:
    """Batches that `refit_` runs, with `number` of calibration, for an estimate of the time."""
    # The calls, their inputs and the right-hand side come first, and a probe of one batch.
    return (steps + 3) * number + 1


class Refit(NamedTuple):
    """The outcome of a refit, as `GroupReport.refit` has it, and what it left if it was done.

    Attributes:
        outcome: "done", "undone", "not linear", "plain pruning" or "own output".
        error: that is left, relative to the target's energy on the calibration tokens.
        damping: that the consumer's repair took.
    """

    outcome: str
    error: float | None = None
    damping: float | None = None


def refit_group_(
    block: Block,
    group: Group,
    before: tuple[float, float | None],
    intercept: bool,
    config: GrailConfig,
) -> Refit:
    """Refit a repaired group's linear producer, and its consumer again to what that outputs.

    With the damping that the consumer took before: on tokens that the refit has seen, less would
    seem to do. Where the numbers overflow or the block's error grows, the group is put back as it
    was, with a warning that names it.

    Args:
        block: the decoder layer and its calibration hidden states.
        group: of it, reduced and repaired.
        before: the error that the repair left, and the damping that it took.
        intercept: the consumer has a bias that is fitted.
        config: the settings.
    """
    error, damping = before
    if not group.targeted:
        return Refit("own output")  # there is nothing else to refit to
    if group.spec.linear is None:
        return Refit("not linear")
    if damping is None or math.isinf(damping):
        return Refit("plain pruning")  # nothing fitted to these tokens holds on others
    with block.meter.phase("refit"), _kept_if_it_fails(block, group):
        stride = refit_stride(config.refit_steps)
        part = replace(block, batches=[b for b in block.batches if b.number % stride == 0])
        weight = group.weight.to(config.solve_torch_dtype)
        refit_(part, group, config.refit_steps)
        stats = block.collect(group, remember=())
        repair = processes.once(
            partial(ridge, weight, stats, None, damping, group.name, intercept), group.name
        )
        group.repair_(repair.weight, repair.bias)
        left = processes.once(
            lambda: reconstruction_error(weight, repair.weight, stats, bias=repair.bias), group.name
        )
        if not left <= (1 + _SAME) * error:
            raise FloatingPointError(f"it leaves an error of {left:.4g}, up from {error:.4g}")
        return Refit("done", left, repair.damping)
    return Refit("undone")


@contextmanager
def _kept_if_it_fails(block: Block, group: Group) -> Iterator[None]:
    """After an ArithmeticError inside, the group is as it was, and a warning names it."""
    linear = group.linear
    assert linear is not None
    before = [
        (module, name, getattr(module, name))
        for module in (linear.projection.module, group.consumer)
        for name in ("weight", "bias")
    ]
    try:
        yield
    except ArithmeticError as reason:
        logger.warning("%s is repaired but not refitted: %s", group.name, reason)
        for module, name, parameter in before:
            setattr(module, name, parameter)
        block.forget_group_()


@torch.no_grad()
def refit_(block: Block, group: Group, steps: int, damping: float = 0.1) -> None:
    """Change the group's linear producer in `steps` conjugate gradient steps towards the target.

    Args:
        block: the decoder layer and its calibration hidden states.
        group: already shrunk and repaired; without a linear producer, or with one that the block's
            output does not depend on, nothing is done.
        steps: conjugate gradient steps.
        damping: of each row, relative to its own curvature M_ii.

    Raises:
        ArithmeticError: the fitted weight is not finite, or a step's length is not.
    """
    linear = group.linear
    if linear is None or steps == 0:
        return
    start = linear.weight
    runs = block.runs(group)
    with (
        in_wider_range(block.layer.get_submodule(group.spec.name)) as dtype,
        replaceable_weight(linear.projection, linear.index) as put,
    ):
        runs = [replace(run, dtype=dtype) for run in runs]
        inputs = _input_moments(block, group, linear, runs)
        factor, _ = damped_cholesky(inputs.dense, _INPUT_DAMPING, group.name)
        del inputs
        problem = _LeastSquares(block, group, linear, runs, put, factor)
        change = problem.change_from(start, steps, damping)
    if change is None:
        return  # a dead block: whatever the weight, it outputs the same
    fitted = processes.once(lambda: add_(change, start).to(start.dtype), group.name)
    if not torch.isfinite(fitted).all():
        raise FloatingPointError(f"the refitted weight is not finite in {start.dtype}")
    linear.put_(fitted)


@dataclass(frozen=True)
class _LeastSquares:
    """The problem in the coordinates T = U L, in which a step changes all outputs alike.

    Attributes:
        block: the decoder layer.
        group: of it.
        linear: the rows U [K, D] of its linear producer.
        runs: the block's calls.
        put: gives the producer another U, and returns its whole weight.
        factor: L [D, D], lower, of the inputs' moments.
    """

    block: Block
    group: Group
    linear: Rows
    runs: Sequence[Run]
    put: Callable[[Tensor], nn.Parameter]
    factor: Tensor

    def change_from(self, start: Tensor, steps: int, damping: float) -> Tensor | None:
        """[K, D], what `steps` of conjugate gradients add to U_0; None for a dead block."""
        factor = self.factor
        # With one random vector for all rows, the consumer's inputs are g (r^T x).
        generator = torch.Generator().manual_seed(self.group.seed)
        probe = torch.randint(0, 2, (1, start.shape[1]), generator=generator).to(factor) * 2 - 1
        self.put(self.to_weight(probe.expand(start.shape)))
        coupling = _coupling(self.block, self.group, self.linear, self.runs).div_(start.shape[1])
        if not coupling.any():
            return None
        rows = coupling.diagonal()[:, None].clone()
        rows = rows.clamp_min(1e-6 * rows.max().clamp_min(torch.finfo(rows.dtype).tiny))
        preconditioner, _ = cholesky_(coupling, damping * rows.flatten())
        rows = rows.to(factor)

        def preconditioned(residual: Tensor) -> Tensor:
            copied = residual.to(preconditioner, copy=True)  # it is overwritten
            return cholesky_solve_(copied, preconditioner, left=True)

        # What is added to weights in the end need not be more exact than they are.
        solution = torch.zeros_like(start, dtype=torch.float32)
        residual = self.adjoint(self.put(start), Run.miss)
        direction = preconditioned(residual).to(residual)
        norm = sum_of_products(residual, direction)
        for _ in range(steps):
            if norm <= 0:
                break
            image = self.normal(direction).addcmul_(rows, direction, value=damping)
            length = norm / sum_of_products(direction, image)
            add_(solution, direction, length)
            residual.sub_(image, alpha=length)
            del image
            scaled = preconditioned(residual)
            previous, norm = norm, sum_of_products(residual, scaled)
            add_(direction.mul_(norm / previous), scaled)
            del scaled  # before the next step makes its own
        del residual, direction
        return self.to_weight(solution.to(factor))

    def to_weight(self, t: Tensor) -> Tensor:
        """U of T: solves U L = T."""
        weight: Tensor = torch.linalg.solve_triangular(self.factor, t, upper=False, left=False)
        return weight

    def _to_t_(self, gradient: Tensor) -> Tensor:
        """Overwrite the gradient g by U by that by T, h: solves h L^T = g."""
        torch.linalg.solve_triangular(
            self.factor.mT, gradient, upper=True, left=False, out=gradient
        )
        return gradient

    def adjoint(self, weight: nn.Parameter, towards: Callable[[Run, Tensor], Tensor]) -> Tensor:
        """A^T of what `towards` makes of each run's output, as a gradient by T."""
        total = torch.zeros_like(self.linear.weight, dtype=self.factor.dtype)
        for run in self.runs:
            with torch.enable_grad():
                output = run.output()
            goal = run.without_padding(towards(run, output.detach())).to(output.dtype)
            add_(total, self.linear.of_stored(torch.autograd.grad(output, weight, goal)[0]))
            self.block.progress.update()
        processes.sum_([total], self.group.name)
        return self._to_t_(total)

    def normal(self, t: Tensor) -> Tensor:
        """A^T A t. Biases are not in A."""
        with without_biases(self.linear, self.group.consumer):
            return self.adjoint(self.put(self.to_weight(t)), lambda run, output: output)


def _input_moments(block: Block, group: Group, linear: Rows, runs: Sequence[Run]) -> Symmetric:
    """[D, D], X^T X over the inputs of the linear producer, in fp64 where the device has it."""
    weight = linear.projection.weight
    moments = Symmetric.zeros(weight.shape[1], weight.device, widest_float(weight.device))
    for run in runs:
        with captured_input(linear.projection.module) as inputs:
            run.output()
        moments.add_products_(run.rows(inputs[0]))
        block.progress.update()
    processes.sum_([moments.flat], group.name)
    return moments


def _coupling(block: Block, group: Group, linear: Rows, runs: Sequence[Run]) -> Tensor:
    """[K, K] fp32, (W^T W) * (Z^T Z) for Z the consumer's inputs as the block is now.

    That is precise enough for a preconditioner, which is damped by a tenth of its diagonal.
    Of grouped-query attention, rows of the values stand for the channels of all the query heads
    that read them. The longest batch is taken for all, of all processes' the first.
    """
    tokens = dict(
        processes.gather([(run.batch.number, run.num_tokens) for run in runs], group.name)
    )
    longest = max(tokens, key=lambda number: (tokens[number], -number))
    weight = group.weight.float()
    coupling = weight.mT @ weight
    z = coupling.new_zeros(0, len(coupling))  # one process has it
    for run in runs:
        if run.batch.number == longest:
            with without_biases(linear, group.consumer), captured_input(group.consumer) as inputs:
                run.output()
            block.progress.update()
            z = run.rows(inputs[0]).float()
    for start in range(0, len(coupling), _ROWS_AT_ONCE):
        products = z[:, start : start + _ROWS_AT_ONCE].mT @ z
        processes.sum_([products], group.name)
        coupling[start : start + _ROWS_AT_ONCE] *= products
    coupling *= sum(tokens.values()) / tokens[longest]
    assert group.spec.linear is not None
    rows, width = len(linear.weight), group.spec.linear.size
    heads = (rows // width, len(coupling) // rows, width)
    if heads[1] == 1:
        return coupling
    return coupling.reshape(*heads, *heads).sum(dim=(1, 4)).reshape(rows, rows)


@contextmanager
def in_wider_range(module: nn.Module) -> Iterator[torch.dtype | None]:
    """The module's float16 parameters and buffers are bfloat16 copies inside the context.

    Yields the dtype that its float16 arguments need then; None if nothing in it is float16.
    """
    found = [
        (part, name, tensor)
        for part in module.modules()
        for own in (part.named_parameters, part.named_buffers)
        for name, tensor in own(recurse=False)
        if tensor.dtype == torch.float16
    ]
    try:
        for part, name, tensor in found:
            copy = tensor.detach().to(torch.bfloat16)
            setattr(part, name, nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy)
        yield torch.bfloat16 if found else None
    finally:
        for part, name, tensor in found:
            setattr(part, name, tensor)


@contextmanager
def replaceable_weight(
    projection: Projection, index: slice | Tensor = slice(None)
) -> Iterator[Callable[[Tensor], nn.Parameter]]:
    """A function that puts another weight [K, in] into a projection's rows `index`, all by default.

    It returns the whole weight as it is stored. The projection's own is back after the context.
    """
    module = projection.module
    own = module.weight

    def put(weight: Tensor) -> nn.Parameter:
        whole = (own.detach().T if projection.transposed else own.detach()).clone()
        whole[index] = weight.to(whole.dtype)
        stored = nn.Parameter(projection.stored(whole))
        module.weight = stored
        return stored

    try:
        yield put
    finally:
        module.weight = own


@contextmanager
def without_biases(linear: Rows, consumer: Any) -> Iterator[None]:
    """Those rows of the producer and the whole consumer have biases of zero inside the context."""
    parts = ((linear.projection.module, linear.index), (consumer, slice(None)))
    biases = [module.bias for module, _ in parts]
    try:
        for (module, index), bias in zip(parts, biases, strict=True):
            if bias is not None:
                zeroed = bias.detach().clone()
                zeroed[index] = 0
                module.bias = nn.Parameter(zeroed)
        yield
    finally:
        for (module, _), bias in zip(parts, biases, strict=True):
            module.bias = bias
