"""Run a decoder layer and find by gradients which module depends on which."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 16  # enough for an activation that is zero for half of its inputs
TOLERANCE = 1e-5
HIDDEN = "the residual stream"


@dataclass(frozen=True)
class Example:
    """A decoder layer with random weights in float32, and a call of it.

    Attributes:
        index: of the layer.
        layer: the copy.
        args, kwargs: the arguments that the model calls it with, after the hidden states.
        hidden: [1, T, D], random.
    """

    index: int
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor

    def output(self, layer: nn.Module | None = None, hidden: Tensor | None = None) -> Tensor:
        """[1, T, D], the output of this layer, or of another in its place."""
        args, kwargs = copy.copy(self.args), copy.copy(self.kwargs)
        out = (layer or self.layer)(self.hidden if hidden is None else hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def is_projection(module: nn.Module) -> bool:
    # transformers' Conv1D, which stores its weight transposed, is not a subclass of Linear.
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


class Trace:
    """A pass of an example in which every projection's output is a leaf.

    Attributes:
        example: the layer.
        projections: path -> module, in the order of the layer's definition.
        inputs: path of a projection, or of another module with weights -> its input, in the order
            of the calls.
        leaves: path of a projection -> its output; `HIDDEN` -> the layer's input.
        output: [1, T, D].
    """

    def __init__(self, example: Example) -> None:
        self.example = example
        layer = example.layer
        weighted = {
            path: module
            for path, module in layer.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        self.projections = {p: module for p, module in weighted.items() if is_projection(module)}
        self.inputs: dict[str, Tensor] = {}
        self.leaves = {HIDDEN: example.hidden.clone().requires_grad_()}
        handles = []
        for path, module in weighted.items():
            handles.append(module.register_forward_pre_hook(self._look(path), with_kwargs=True))
        for path, module in self.projections.items():
            handles.append(module.register_forward_hook(self._cut(path)))
        try:
            # A layer may add to its input in place, which a leaf does not allow.
            self.output = example.output(hidden=self.leaves[HIDDEN].clone())
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, path: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if tensors:
                self.inputs[path] = tensors[0]

        return look

    def _cut(self, path: str) -> Any:
        def cut(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if path in self.leaves:
                raise ValueError(f"{path} runs more than once in a layer")
            self.leaves[path] = output.detach().requires_grad_()
            return self.leaves[path].clone()

        return cut

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Gradients of sum(x * noise): path -> [T, …], for the leaves that `x` depends on."""
        total = (x * noise(x)).sum()
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(
            total, list(self.leaves.values()), retain_graph=True, allow_unused=True
        )
        return {
            path: gradient.reshape(TOKENS, -1)
            for path, gradient in zip(self.leaves, found, strict=True)
            if gradient is not None and gradient.any()
        }

    def consumers(self) -> dict[str, dict[str, Tensor]]:
        """Path -> gradients of its last token's input by the projections that this depends on."""
        consumers = {}
        for path in self.gradients(self.output):
            if path not in self.projections:
                continue
            x = self.inputs[path].reshape(TOKENS, -1)
            sources = self.gradients(x[-1])
            if sources and HIDDEN not in sources:
                # In the order of the layer's definition.
                consumers[path] = {p: sources[p] for p in self.projections if p in sources}
        return consumers

    def linear_in(self, path: str, source: str, rows: slice | Tensor = slice(None)) -> bool:
        """Whether the input of the projection at `path` is linear in these outputs of `source`."""
        seen: list[Tensor] = []

        def scale(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            scaled = output.clone()
            scaled[..., rows] *= -2
            return scaled

        handles = [
            self.projections[source].register_forward_hook(scale),
            self.projections[path].register_forward_pre_hook(lambda _, x: seen.append(x[0])),
        ]
        try:
            with torch.no_grad():
                self.example.output()
        finally:
            for handle in handles:
                handle.remove()
        return relative_error(seen[0], -2 * self.inputs[path]) < TOLERANCE

    def residual_scale(self, path: str) -> float | None:
        """The factor with which a leaf is added to the output; None where it is not a factor."""
        weights = noise(self.output).reshape(TOKENS, -1)
        gradient = self.gradients(self.output).get(path)
        if gradient is None or gradient.shape != weights.shape:
            return None
        factor = ((gradient * weights).sum() / weights.square().sum()).item()
        scale = float(f"{factor:.5g}")  # the config's value, without float32 noise
        return scale if relative_error(gradient, scale * weights) < 10 * TOLERANCE else None

    def norm_after(self, path: str) -> str | None:
        """The first module with weights that reads the output of the projection at `path`."""
        for other, x in self.inputs.items():
            if other not in self.projections and path in self.gradients(x):
                return other
        return None


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal numbers in a tensor's shape, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error: float = ((actual - expected).norm() / expected.norm()).item()
    return error
