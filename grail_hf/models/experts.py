"""A mixture's experts in a live decoder layer: one group, each expert with units of its own.

transformers fuses the experts of a layer: `gate_up_proj` [E, 2 I, D] and `down_proj` [E, D, I] (or
both transposed) are parameters of one module, which is called with the tokens [n, D], the experts
that each takes [n, k], and their weights [n, k]. So all experts have one width, and each keeps
channels of its own. What that module keeps to itself is used here alone: the order of those
arguments and `_apply_gate`, the activation between the two products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grail_hf.methods.linalg import half_square
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.ridge import Repair
from grail_hf.methods.selectors import RegionalGradient
from grail_hf.models.capture import Call
from grail_hf.models.groups import Group, parameter_like, reduced_rows, required_gradient
from grail_hf.models.schema import GroupSpec, Producer

# With fewer tokens than channels an expert's Gram is singular, and any small damping fits noise.
SCARCE_DAMPING = 0.1


@dataclass
class Expert:
    """One expert of a layer: the units upstream of its consumer."""

    group: ExpertsGroup
    index: int
    gradient: RegionalGradient | None = None
    scarce_damping: ClassVar[float] = SCARCE_DAMPING
    columns: ClassVar[int] = 1
    partitions: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"{self.group.name}.{self.index}"

    @property
    def kind(self) -> str:
        return self.group.kind

    @property
    def num_units(self) -> int:
        return self.group.num_units

    @property
    def seed(self) -> int:
        return (self.group.seed * 10_007 + self.index) % 2**63

    @property
    def weight(self) -> Tensor:
        """[D, I], the consumer's weight, detached."""
        return self.group.weight[self.index]

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Of the gate and the up-projection, [I, D]: a unit's rows, with biases."""
        rows, bias = self.group.stacked("gate_up_proj")[self.index], self.group.producer_bias
        if bias is not None:
            rows = torch.cat([rows, bias[self.index][:, None]], dim=1)
        sizes = [self.num_units * per_unit for per_unit in self.group.producer.rows]
        return tuple(part.reshape(self.num_units, -1) for part in torch.split(rows, sizes))

    @property
    def regional_gradient(self) -> RegionalGradient:
        """Raises RuntimeError: it is not computed for experts."""
        return required_gradient(self)

    def reads(self, call: Call, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the expert's consumer reads for the tokens that are routed to it.

        Args:
            call: of the experts' module.
            tokens: [b * T] bool, those that count; None where all do.

        Returns:
            [n, I], and which of the b * T tokens they are.
        """
        hidden, chosen = self.group.routed(*call)
        own = (chosen == self.index).any(dim=-1)
        if tokens is not None:
            own &= tokens.to(own.device)
        return self.inner(hidden[own]), own

    def inner(self, x: Tensor) -> Tensor:
        """[n, D] to [n, I]: what the consumer reads for these tokens."""
        bias = self.group.producer_bias
        rows = nn.functional.linear(
            x,
            self.group.stacked("gate_up_proj")[self.index],
            None if bias is None else bias[self.index],
        )
        inner: Tensor = self.group.consumer._apply_gate(rows)
        return inner


class ExpertsGroup(Group):
    """All experts of a layer: each is a part. Its `consumer` is the module that holds them.

    An expert has its own output as its target: what a block's output lacks belongs to no one of
    them.

    Raises TypeError where that module does not hold fused, gated experts.
    """

    targeted = False

    def __init__(self, layer: nn.Module, spec: GroupSpec, layer_name: str, seed: int = 0) -> None:
        super().__init__(layer, spec, layer_name, seed)
        weights = [getattr(self.consumer, name, None) for name in ("gate_up_proj", "down_proj")]
        fused = all(isinstance(w, Tensor) and w.shape[0] == spec.experts for w in weights)
        if not (fused and hasattr(self.consumer, "_apply_gate")):
            raise TypeError(
                f"{self.name} is a {type(self.consumer).__name__}, which does not hold all experts "
                "in gate_up_proj and down_proj with a gate between them: this transformers is not "
                "one that grail_hf knows the experts of"
            )

    @property
    def consumer(self) -> Any:
        """The experts' module: what it outputs is the sum over the experts of each token."""
        return self.layer.get_submodule(self.spec.name)

    @property
    def parts(self) -> tuple[Expert, ...]:
        return tuple(Expert(self, index) for index in range(self.spec.experts))

    def at_once(self, item: int) -> int:
        """Experts whose Grams, of `item` bytes a number, are no larger than all experts' weights.

        One at least. It decides how often a layer is run for them, and about nothing else.
        """
        gram = item * half_square(self.num_units)
        weights = self.num_parameters * self.weight.element_size()
        return min(self.spec.experts, max(1, weights // gram)) if self.num_units else 1

    @property
    def producer(self) -> Producer:
        """Which rows of `gate_up_proj` are a unit's."""
        (producer,) = self.spec.producers
        return producer

    def stacked(self, name: str) -> Tensor:
        """[E, out, in], a view of what is stored, detached."""
        weight: Tensor = getattr(self.consumer, name).detach()
        return weight.mT if self.spec.transposed else weight

    @property
    def weight(self) -> Tensor:
        """[E, D, I], the consumers' weights, detached."""
        return self.stacked("down_proj")

    @property
    def producer_bias(self) -> Tensor | None:
        """[E, 2 I], detached."""
        bias = getattr(self.consumer, "gate_up_proj_bias", None)
        return None if bias is None else bias.detach()

    @property
    def bias(self) -> Tensor | None:
        """None: the experts' biases are not fitted."""
        return None

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The experts' module and the router."""
        return map(self.layer.get_submodule, (self.spec.name, *self.spec.unshrunk))

    @property
    def unit_cost(self) -> int:
        """Parameters of one unit in every expert: rows of gate and up, and a column."""
        rows = sum(self.producer.rows)
        features = self.stacked("gate_up_proj").shape[2] + (self.producer_bias is not None)
        return self.spec.experts * (rows * features + self.weight.shape[1])

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of a call of the module: its tokens [n, D], and the experts [n, k] that each takes."""
        hidden, chosen, _ = (*args, *kwargs.values())
        return hidden, chosen

    @torch.no_grad()
    def narrow_(self, *solutions: tuple[Reduction, Repair]) -> None:
        """Slice every expert to its own kept units, equally many, and repair its consumer.

        Raises:
            FloatingPointError: a weight does not fit the model's dtype.
        """
        reductions, repairs = zip(*solutions, strict=True)
        self._shrink_each_(reductions)
        self._repair_each_([repair.weight for repair in repairs])

    def _shrink_each_(self, reductions: Sequence[Reduction]) -> None:
        """Slice every expert's producers to its own kept units."""
        rows = (
            reduced_rows(own, self.producer, reduction)
            for own, reduction in zip(self.stacked("gate_up_proj"), reductions, strict=True)
        )
        bias = self.producer_bias
        if bias is not None:
            biases = [
                reduced_rows(own, self.producer, reduction)
                for own, reduction in zip(bias, reductions, strict=True)
            ]
            self._put_("gate_up_proj_bias", torch.stack(biases))
        self._put_("gate_up_proj", self._stored(rows))
        self._show_width_(reductions[0].kept.numel())

    def _repair_each_(self, weights: Sequence[Tensor]) -> None:
        """Give every expert's consumer its new weight [D, K]."""
        dtype = self.weight.dtype
        fitting = [weight.to(dtype) for weight in weights]
        for index, weight in enumerate(fitting):
            if not torch.isfinite(weight).all():
                raise FloatingPointError(
                    f"the repaired {self.name}.{index} overflows {dtype}: use more ridge, or load "
                    "the model in bfloat16 or float32"
                )
        self._put_("down_proj", self._stored(fitting))

    def _stored(self, weights: Iterable[Tensor]) -> Tensor:
        """Weights [out, in] of all experts the way in which the module stores them."""
        stacked = torch.empty(0)
        for index, weight in enumerate(weights):
            if index == 0:
                stacked = weight.new_empty(self.spec.experts, *weight.shape)
            stacked[index] = weight
        return stacked.mT if self.spec.transposed else stacked

    def _put_(self, name: str, new: Tensor) -> None:
        setattr(self.consumer, name, parameter_like(getattr(self.consumer, name), new))


def group_in(layer: nn.Module, spec: GroupSpec, layer_name: str, seed: int = 0) -> Group:
    """The group that `spec` describes in a live layer."""
    group_class = ExpertsGroup if spec.experts else Group
    return group_class(layer, spec, layer_name, seed)
