"""A `Group` in a live decoder layer: its units, producers, consumer; slicing, folding, repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import Repair
from grail_hf.methods.selectors import RegionalGradient, Units
from grail_hf.models.capture import Call
from grail_hf.models.modeling_grail import LayerConfig, names_read_after_init
from grail_hf.models.schema import GroupSpec, Producer


@dataclass(frozen=True)
class Projection:
    """A linear module, its weight [out, in] whichever way it is stored.

    Methods that end in an underscore change the module.
    """

    module: Any
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """[out, in], a view of what is stored, detached."""
        weight: Tensor = self.module.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        bias: Tensor | None = self.module.bias
        return bias

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] the way in which the module stores its own."""
        return weight.T if self.transposed else weight

    def put_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give the module another weight [out, in] and, unless it is None, another bias [out].

        Its sizes follow.
        """
        module = self.module
        if bias is not None:
            module.bias = parameter_like(
                module.weight if module.bias is None else module.bias, bias
            )
        module.weight = parameter_like(module.weight, self.stored(weight))
        outputs, inputs = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        setattr(module, outputs, weight.shape[0])
        setattr(module, inputs, weight.shape[1])


@dataclass(frozen=True)
class Rows:
    """Some rows of a projection: K of its outputs.

    Methods that end in an underscore change the module.

    Attributes:
        projection: whose rows they are.
        index: of the rows, in the order of the projection.
    """

    projection: Projection
    index: slice | Tensor

    @property
    def weight(self) -> Tensor:
        """[K, in], detached."""
        return self.projection.weight[self.index]

    def of_stored(self, whole: Tensor) -> Tensor:
        """[K, in], of a tensor stored as the module stores its weight, such as its gradient."""
        return self.projection.stored(whole)[self.index]

    def put_(self, weight: Tensor) -> None:
        """Give these rows another weight [K, in], which may be of another dtype."""
        whole = self.projection.weight.clone()
        whole[self.index] = weight.to(whole.dtype)
        self.projection.put_(whole)


class Part(Units, Protocol):
    """What is reduced by itself: a group, or an expert of one."""

    gradient: RegionalGradient | None

    @property
    def kind(self) -> str: ...

    @property
    def num_units(self) -> int: ...

    @property
    def scarce_damping(self) -> float: ...

    def reads(self, call: Call, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


class Group:
    """All units upstream of one consumer of a live decoder layer.

    Methods that end in an underscore change the layer's weights. A group is reduced part by part,
    each with statistics of its own: a plain group is its only part, a mixture's experts are parts
    of theirs (`experts.ExpertsGroup`).

    Attributes:
        gradient: the regional gradient, while a selector that needs it chooses.
    """

    gradient: RegionalGradient | None = None
    # The least damping of a repair that is fitted to fewer tokens than there are kept channels.
    scarce_damping: ClassVar[float] = 0.0
    # Whether the dense model's output is a target for each part.
    targeted: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, spec: GroupSpec, layer_name: str, seed: int = 0) -> None:
        self.layer = layer
        self.layer_name = layer_name
        self.spec = spec
        self.name = f"{layer_name}.{spec.name}"
        self.seed = seed

    def in_units_of(self, spec: GroupSpec) -> Group:
        """The same block, its channels divided into other units."""
        group = type(self)(self.layer, spec, self.layer_name, self.seed)
        group.gradient = self.gradient
        return group

    @property
    def parts(self) -> Sequence[Part]:
        """What is reduced by itself, each with its own statistics."""
        return (self,)

    def at_once(self, item: int) -> int:
        """Parts whose Grams, of `item` bytes a number, are held at a time."""
        return 1

    def reads(self, call: Call, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the consumer reads in a call of it.

        Args:
            call: the arguments of `consumer`.
            tokens: [b * T] bool, those that count; None where all do.

        Returns:
            [n, H], of the tokens that count, and which of all b * T they are, as `tokens`.
        """
        (x, *_), _ = call
        x = x.reshape(-1, x.shape[-1])
        return (x if tokens is None else x[tokens.to(x.device)]), tokens

    @torch.no_grad()
    def narrow_(self, *solutions: tuple[Reduction, Repair]) -> None:
        """Reduce each part to its units, and give its consumer the repaired weight.

        Raises:
            FloatingPointError: a weight or a bias does not fit the model's dtype.
        """
        ((reduction, repair),) = solutions
        self.shrink_(reduction)
        self.repair_(repair.weight, repair.bias)

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
    def consumer(self) -> Any:
        """The module that reads the units: a Linear, or another that computes the same."""
        return self.layer.get_submodule(self.spec.consumer)

    @property
    def weight(self) -> Tensor:
        """[O, H], the consumer's weight, detached."""
        return self.projection(self.spec.consumer).weight

    @property
    def regional_gradient(self) -> RegionalGradient:
        """By the consumer's weight. Raises RuntimeError where it is not computed."""
        return required_gradient(self)

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Of each section of a producer, [num_units, features]: a unit's rows, with biases."""
        found = []
        for producer in self.spec.producers:
            projection = self.projection(producer.path)
            rows = projection.weight
            if projection.bias is not None:
                rows = torch.cat([rows, projection.bias.detach()[:, None]], dim=1)
            sizes = [self.num_units * per_unit for per_unit in producer.rows]
            sections = torch.split(rows[: sum(sizes)], sizes)
            found += [section.reshape(self.num_units, -1) for section in sections]
        return tuple(found)

    @property
    def bias(self) -> Tensor | None:
        """[O], the consumer's."""
        return self.projection(self.spec.consumer).bias

    def projection(self, path: str) -> Projection:
        """The projection at `path` in the layer. Raises TypeError for anything else."""
        module = self.layer.get_submodule(path)
        # transformers' Conv1D, which stores its weight transposed, is no subclass of Linear.
        if not isinstance(module, nn.Linear) and not (
            self.spec.transposed and hasattr(module, "nf")
        ):
            kind = type(module)
            raise TypeError(
                f"{path} of {self.name} is a {kind.__module__}.{kind.__qualname__}, not a "
                "torch.nn.Linear"
            )
        return Projection(module, self.spec.transposed)

    @property
    def linear(self) -> Rows | None:
        """The rows in which the block's output is linear, as the layer is now, if there are any."""
        rows = self.spec.linear
        if rows is None:
            return None
        projection = self.projection(rows.path)
        total, units = projection.weight.shape[0], self.weight.shape[1] // self.columns
        if not rows.interleaved:
            number = rows.count or units * rows.size
            return Rows(projection, slice(total - number, total))
        each = torch.arange(total, device=projection.weight.device).view(units, -1)
        return Rows(projection, each[:, -rows.size :].flatten())

    @property
    def fixed(self) -> tuple[str, ...]:
        """Paths of the producers without `linear` rows: while those change, their outputs do not.

        None where there is no linear producer.
        """
        linear = self.spec.linear
        paths = (producer.path for producer in self.spec.producers)
        return tuple(path for path in paths if linear is not None and path != linear.path)

    @property
    def widest(self) -> int:
        """Numbers a token that the consumer reads and the `fixed` producers output."""
        rows = [self.projection(path).weight.shape[0] for path in self.fixed if self.num_units]
        return sum(rows) + self.num_units * self.columns

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the block's projections, and of whatever else of it stays whole."""
        producers = (producer.path for producer in self.spec.producers)
        return (*producers, *self.spec.unshrunk, self.spec.consumer)

    @property
    def projections(self) -> dict[str, Projection]:
        """Every projection of the block by its path; none of a block without units."""
        return {path: self.projection(path) for path in self.paths if self.num_units}

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The block's projections, and whatever else of it stays whole."""
        return map(self.layer.get_submodule, self.paths)

    @property
    def num_parameters(self) -> int:
        """Parameters of the block's projections, each once; of a block without units, all."""
        return sum({p: p.numel() for m in self.modules for p in m.parameters()}.values())

    @property
    def unit_cost(self) -> int:
        """Parameters that one unit holds: its producers' rows and biases, its consumer columns."""
        if not self.num_units:
            return 0
        cost = self.spec.columns * self.weight.shape[0]
        for producer in self.spec.producers:
            projection = self.projection(producer.path)
            cost += sum(producer.rows) * (
                projection.weight.shape[1] + (projection.bias is not None)
            )
        return cost

    def missing_biases(self, width: int) -> int:
        """Parameters that `add_biases_` would add to the block with `width` units."""
        removed = {p.path: (self.num_units - width) * sum(p.rows) for p in self.spec.producers}
        return sum(
            projection.weight.shape[0] - removed.get(path, 0)
            for path, projection in self.projections.items()
            if projection.bias is None
        )

    @torch.no_grad()
    def add_biases_(self) -> None:
        """Give each of the block's projections that has no bias one of zeros."""
        for projection in self.projections.values():
            if projection.bias is None:
                weight = projection.weight
                projection.put_(weight, weight.new_zeros(weight.shape[0]))

    @property
    def norm_cost(self) -> int:
        """Parameters of norms, and bare ones, that one unit holds."""
        return sum(
            row.numel()
            for norm in self.spec.norms
            for _, _, parameter in self._parameters_at(norm.path)
            for row in parameter[: sum(norm.rows)]
        )

    def _parameters_at(self, path: str) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name, parameter) of the parameter at `path`, or of all of the module there."""
        owner, _, name = path.rpartition(".")
        module = self.layer.get_submodule(owner)
        found = getattr(module, name)
        if isinstance(found, nn.Parameter):
            return [(module, name, found)]
        return [(found, own, parameter) for own, parameter in found.named_parameters()]

    @torch.no_grad()
    def shrink_(self, reduction: Reduction) -> None:
        """Slice the producers to the kept units, or average them over each cluster.

        The consumer is left for `repair_`.
        """
        for producer in self.spec.producers:
            projection = self.projection(producer.path)
            bias = projection.bias
            projection.put_(
                reduced_rows(projection.weight, producer, reduction),
                None if bias is None else reduced_rows(bias, producer, reduction),
            )
        for norm in self.spec.norms:
            for module, name, parameter in self._parameters_at(norm.path):
                setattr(
                    module,
                    name,
                    parameter_like(parameter, reduced_rows(parameter, norm, reduction)),
                )
        self._show_width_(reduction.kept.numel())

    def _show_width_(self, width: int) -> None:
        """Set what modules know of their width, and what they will read of it in the config."""
        for path, factor in self.spec.attributes.items():
            owner, _, name = path.rpartition(".")
            if name in vars(self.layer.get_submodule(owner)):
                setattr(self.layer.get_submodule(owner), name, int(width * factor))
        values = self.spec.config_values(width)
        module: Any
        for module in self.layer.modules():
            held = vars(module).get("config")
            if held is not None and values.keys() & names_read_after_init(type(module)):
                module.config = LayerConfig(held, values)

    @torch.no_grad()
    def repair_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give the consumer its new weight [O, K], and add `bias` [O] to the one it has, if any.

        Raises:
            FloatingPointError: the weight or the bias does not fit the model's dtype.
        """
        consumer = self.projection(self.spec.consumer)
        if bias is not None and consumer.bias is not None:
            bias = bias + consumer.bias
        dtype = consumer.weight.dtype
        fitting = weight.to(dtype), None if bias is None else bias.to(dtype)
        if not all(torch.isfinite(new).all() for new in fitting if new is not None):
            raise FloatingPointError(
                f"the repaired {self.name} overflows {consumer.weight.dtype}: use more ridge, or "
                "load the model in bfloat16 or float32"
            )
        consumer.put_(*fitting)

    @contextmanager
    def reduced(self, reduction: Reduction) -> Iterator[None]:
        """Inside the context, the group is reduced and not repaired; after it, as it was."""
        before = [(vars(m), vars(m).copy(), m._parameters.copy()) for m in self.layer.modules()]
        try:
            self.repair_(reduction.of_consumer(self.weight, self.columns))
            self.shrink_(reduction)
            yield
        finally:
            for state, attributes, parameters in before:
                state.update(attributes)
                state["_parameters"].update(parameters)


def required_gradient(part: Part) -> RegionalGradient:
    """The regional gradient of a part.

    Raises:
        RuntimeError: it was not computed; only selectors that declare it get one.
    """
    if part.gradient is None:
        raise RuntimeError(
            f"the regional gradient of {part.name} is not computed: pass your selector as "
            "Selector(function, needs_gradient=True)"
        )
    return part.gradient


def reduced_rows(rows: Tensor, producer: Producer, reduction: Reduction) -> Tensor:
    """A producer's weight or bias [rows, ..] after the reduction, which each section undergoes.

    Rows after the last section stay.
    """
    reduced, start = [], 0
    for per_unit in producer.rows:
        end = start + per_unit * reduction.num_units
        reduced.append(reduction.of_producer(rows[start:end], per_unit))
        start = end
    return torch.cat([*reduced, rows[start:]])


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.detach().contiguous(), requires_grad=old.requires_grad)
