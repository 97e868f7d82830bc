"""A `Group` in a live decoder layer: its units, producers, consumer; slicing, folding, repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grail_hf.architectures import GroupSpec
from grail_hf.reduction import Reduction
from grail_hf.selectors import RegionalGradient


class Group:
    """All units in front of one consumer of a live decoder layer.

    Methods that end in an underscore change the layer's weights.

    Attributes:
        differentiate: gives the regional gradient; set where there are calibration hidden states.
    """

    differentiate: Callable[[], RegionalGradient] | None = None

    def __init__(self, layer: nn.Module, spec: GroupSpec, layer_name: str, seed: int = 0) -> None:
        self.layer = layer
        self.spec = spec
        self.name = f"{layer_name}.{spec.name}"
        self.seed = seed

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def num_units(self) -> int:
        return self.spec.num_units

    @property
    def columns(self) -> int:
        return self.spec.columns

    @property
    def partitions(self) -> int:
        return self.spec.partitions

    @property
    def consumer(self) -> nn.Linear:
        return _linear(self.layer, self.spec.consumer, self.name)

    @property
    def weight(self) -> Tensor:
        """[O, H], the consumer's weight, detached."""
        return self.consumer.weight.detach()

    def regional_gradient(self) -> RegionalGradient:
        """By the consumer's weight, computed when asked for: a pass forward and one back."""
        if self.differentiate is None:
            raise RuntimeError(f"{self.name} has no calibration hidden states to differentiate at")
        return self.differentiate()

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Of each producer, [num_units, features]: a unit's weight rows and, if any, biases."""
        found = []
        for producer in self.spec.producers:
            linear = _linear(self.layer, producer.path, self.name)
            rows = linear.weight.detach()
            if linear.bias is not None:
                rows = torch.cat([rows, linear.bias.detach()[:, None]], dim=1)
            found.append(rows.reshape(self.num_units, -1))
        return tuple(found)

    @property
    def projections(self) -> Iterator[nn.Linear]:
        """Every projection of the block: producers, those that stay whole, and the consumer."""
        for path in (
            *(producer.path for producer in self.spec.producers),
            *self.spec.unshrunk,
            self.spec.consumer,
        ):
            yield _linear(self.layer, path, self.name)

    @property
    def num_parameters(self) -> int:
        """Parameters of the block's projections."""
        return sum(p.numel() for linear in self.projections for p in linear.parameters())

    @property
    def unit_cost(self) -> int:
        """Parameters that one unit holds: its producers' rows and biases, its consumer columns."""
        cost = self.spec.columns * self.consumer.out_features
        for producer in self.spec.producers:
            linear = _linear(self.layer, producer.path, self.name)
            cost += producer.rows * (linear.in_features + (linear.bias is not None))
        return cost

    def missing_biases(self, width: int) -> int:
        """Parameters that `add_biases_` would add to the block with `width` units."""
        rows = {producer.path: width * producer.rows for producer in self.spec.producers}
        paths = (*rows, *self.spec.unshrunk, self.spec.consumer)
        return sum(
            rows.get(path, linear.out_features)
            for path, linear in zip(paths, self.projections, strict=True)
            if linear.bias is None
        )

    @torch.no_grad()
    def add_biases_(self) -> None:
        """Give each of the block's projections that has no bias one of zeros."""
        for linear in self.projections:
            if linear.bias is None:
                weight = linear.weight
                linear.bias = _like(weight, weight.new_zeros(linear.out_features))

    @torch.no_grad()
    def shrink_(self, reduction: Reduction) -> None:
        """Slice the producers to the kept units, or average them over each cluster.

        The consumer is left for `repair_`.
        """
        for producer in self.spec.producers:
            linear = _linear(self.layer, producer.path, self.name)
            rows = producer.rows
            linear.weight = _like(linear.weight, reduction.of_producer(linear.weight, rows))
            if linear.bias is not None:
                linear.bias = _like(linear.bias, reduction.of_producer(linear.bias, rows))
            linear.out_features = reduction.kept.numel() * rows
        for path, divisor in self.spec.attributes.items():
            owner, _, name = path.rpartition(".")
            setattr(self.layer.get_submodule(owner), name, reduction.kept.numel() // divisor)

    @torch.no_grad()
    def repair_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give the consumer its new weight [O, K], and add `bias` [O] to the one it has, if any.

        Raises:
            FloatingPointError: the weight or the bias does not fit the model's dtype.
        """
        consumer = self.consumer
        if bias is not None and consumer.bias is not None:
            bias = bias + consumer.bias
        fitting = [new.to(consumer.weight.dtype) for new in (weight, bias) if new is not None]
        if not all(torch.isfinite(new).all() for new in fitting):
            raise FloatingPointError(
                f"the repaired {self.name} overflows {consumer.weight.dtype}: use more ridge, or "
                "load the model in bfloat16 or float32"
            )
        consumer.weight = _like(consumer.weight, fitting[0])
        consumer.in_features = weight.shape[1]
        if bias is not None:
            old = consumer.weight if consumer.bias is None else consumer.bias
            consumer.bias = _like(old, fitting[1])

    @contextmanager
    def reduced(self, reduction: Reduction) -> Iterator[None]:
        """Inside the context, the group is reduced and not repaired; after it, as it was."""
        paths = [*(producer.path for producer in self.spec.producers), self.spec.consumer]
        names = ("weight", "bias", "in_features", "out_features")
        attributes = [f"{path}.{name}" for path in paths for name in names]
        owners = [path.rpartition(".") for path in (*attributes, *self.spec.attributes)]
        places = [(self.layer.get_submodule(owner), name) for owner, _, name in owners]
        before = [getattr(module, name) for module, name in places]
        try:
            self.repair_(reduction.of_consumer(self.weight, self.columns))
            self.shrink_(reduction)
            yield
        finally:
            for (module, name), value in zip(places, before, strict=True):
                setattr(module, name, value)


def _linear(layer: nn.Module, path: str, name: str) -> nn.Linear:
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{path} of {name} is a {type(module).__name__}, not a Linear")
    return module


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
