"""A `Group` in a live decoder layer: its units, producers and consumer; slicing and repair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grail_hf.architectures import GroupSpec, Producer
from grail_hf.modeling_grail import LayerConfig, names_read_after_init
from grail_hf.reduction import Reduction


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

    def keep_rows_(self, rows: Tensor) -> None:
        """Keep these outputs, [kept] int64, in this order."""
        rows = rows.to(self.weight.device)
        self.put_(self.weight[rows])
        if self.bias is not None:
            self.module.bias = _like(self.bias, self.bias[rows])

    def put_(self, weight: Tensor) -> None:
        """Give the module another weight [out, in]; its sizes follow."""
        stored = weight.T if self.transposed else weight
        self.module.weight = _like(self.module.weight, stored)
        outputs, inputs = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        setattr(self.module, outputs, weight.shape[0])
        setattr(self.module, inputs, weight.shape[1])


class Group:
    """All units in front of one consumer of a live decoder layer.

    Methods that end in an underscore change the layer's weights.
    """

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
    def consumer(self) -> Any:
        """The module that reads the units: a Linear, or another that computes the same."""
        return self.layer.get_submodule(self.spec.consumer)

    @property
    def weight(self) -> Tensor:
        """[O, H], the consumer's weight, detached."""
        return self.projection(self.spec.consumer).weight

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
            raise TypeError(f"{path} of {self.name} is a {type(module).__name__}, not a Linear")
        return Projection(module, self.spec.transposed)

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The block's projections, and whatever else of it stays whole."""
        for producer in self.spec.producers:
            yield self.projection(producer.path).module
        for path in (*self.spec.unshrunk, self.spec.consumer):
            yield self.layer.get_submodule(path)

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

    @property
    def norm_cost(self) -> int:
        """Parameters of norms that one unit holds."""
        return sum(
            row.numel()
            for norm in self.spec.norms
            for parameter in self.layer.get_submodule(norm.path).parameters()
            for row in parameter[: sum(norm.rows)]
        )

    @torch.no_grad()
    def shrink_(self, reduction: Reduction) -> None:
        """Slice the producers to the kept units; the consumer is left for `repair_`."""
        for producer in self.spec.producers:
            projection = self.projection(producer.path)
            projection.keep_rows_(kept_rows(producer, reduction, projection.weight.shape[0]))
        for norm in self.spec.norms:
            module = self.layer.get_submodule(norm.path)
            for name, parameter in list(module.named_parameters()):
                rows = kept_rows(norm, reduction, parameter.shape[0]).to(parameter.device)
                setattr(module, name, _like(parameter, parameter[rows]))
        for path, factor in self.spec.attributes.items():
            owner, _, name = path.rpartition(".")
            module = self.layer.get_submodule(owner)
            if name in vars(module):
                setattr(module, name, int(reduction.kept.numel() * factor))
        self._show_width_(reduction.kept.numel())

    def _show_width_(self, width: int) -> None:
        """Let modules that read the width from the model's config when they run see this one."""
        values = self.spec.config_values(width)
        module: Any
        for module in self.layer.modules():
            held = vars(module).get("config")
            if held is not None and values.keys() & names_read_after_init(type(module)):
                module.config = LayerConfig(held, values)

    @torch.no_grad()
    def repair_(self, weight: Tensor) -> None:
        """Give the consumer its new weight [O, K].

        Raises:
            FloatingPointError: the weight does not fit the model's dtype.
        """
        consumer = self.projection(self.spec.consumer)
        fitting = weight.to(consumer.weight.dtype)
        if not torch.isfinite(fitting).all():
            raise FloatingPointError(
                f"the repaired {self.name} overflows {fitting.dtype}: use more ridge, or load the "
                "model in bfloat16 or float32"
            )
        consumer.put_(fitting)


def kept_rows(producer: Producer, reduction: Reduction, total: int) -> Tensor:
    """[kept] int64, ascending: the producer's rows, of `total`, that stay."""
    start, rows = 0, []
    for per_unit in producer.rows:
        rows.append(start + reduction.kept_channels(per_unit))
        start += per_unit * reduction.num_units
    rows.append(torch.arange(start, total, device=reduction.kept.device))
    return torch.cat(rows)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.detach().contiguous(), requires_grad=old.requires_grad)
