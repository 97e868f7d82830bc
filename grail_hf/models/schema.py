"""`Architecture`: where a model type has the projections of its decoder layers, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn

from grail_hf.config import ATTENTION, EXPERTS, MLP
from grail_hf.models.compatibility import Gguf, Refusal, Rehome, has_values, refusal_of


@dataclass(frozen=True)
class Producer:
    """A module whose weight's rows compute the units, in consecutive sections of rows.

    In a section of `n` rows per unit, unit `i` owns rows [i*n, (i+1)*n) from the section's start.
    Rows after the last section belong to no unit and are kept.

    Attributes:
        path: inside the decoder layer.
        rows: the rows that one unit owns, for each section.
    """

    path: str
    rows: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LinearRows:
    """The rows of a projection in whose weights a block's output is linear, all else fixed.

    They are the projection's last rows (the second half of [gate; up], the values of [q; k; v]) or,
    where the projection is laid out unit by unit, the last rows of each unit.

    Attributes:
        path: of the projection, inside the decoder layer and in the consumer's module.
        size: rows of one channel or head.
        count: number of rows where it does not depend on the width; None where each unit has
            `size` rows.
        interleaved: the projection is laid out unit by unit.
    """

    path: str
    size: int = 1
    count: int | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class GroupSpec:
    """All units that one consumer reads, resolved for one decoder layer.

    Attributes:
        kind: `ATTENTION` or `MLP`; in a mixture of experts, `EXPERTS` or `SHARED`.
        num_units: number of units, per expert in a mixture; 0 where the block has no units that
            could be removed.
        producers: the projections that shrink with the units.
        consumer: path, inside the decoder layer, of the projection that reads the units.
        columns: consumer columns per unit: unit `i` owns [i*columns, (i+1)*columns).
        linear: the rows in which the block's output is linear; None where there are none.
        partitions: the units form this many runs of equal length, and each run keeps equally many.
        unshrunk: modules of the block whose size does not depend on the width.
        norms: norms, and bare parameters, with rows for each unit: they shrink with the units.
        transposed: the projections store their weights as [in, out].
        config_per_unit: config key -> what one kept unit adds to its value.
        config_pinned: config keys that a stock config would otherwise derive from the widths.
        attributes: attribute path in the layer -> factor: the attribute, where it exists, is
            width * factor.
        bias_key: config key that, where true, gives each of the block's projections a bias.
        refusal: why the units cannot be removed; None where they can.
        residual_scale: factor with which the block's output is added to the residual stream; None
            where more than a factor lies in between, so that the output cannot compensate for
            errors in the stream.
        post_norm: norm between the block's output and the residual stream; None where there is
            none.
        experts: number of experts, each with its own units, all of one width; 0 outside a mixture.
        routed: number of experts that a token is routed to.
        tied_to: kind whose config key also holds this width, so that both keep the same fraction
            of their units in a layer; None where this kind has its own key.
    """

    kind: str
    num_units: int
    producers: tuple[Producer, ...]
    consumer: str
    columns: int
    linear: LinearRows | None = None
    partitions: int = 1
    unshrunk: tuple[str, ...] = ()
    norms: tuple[Producer, ...] = ()
    transposed: bool = False
    config_per_unit: dict[str, int] = field(default_factory=dict)
    config_pinned: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Fraction] = field(default_factory=dict)
    bias_key: str | None = None
    refusal: str | None = None
    residual_scale: float | None = 1.0
    post_norm: str | None = None
    experts: int = 0
    routed: int = 0
    tied_to: str | None = None

    @property
    def name(self) -> str:
        """The block's name inside the decoder layer, for example `self_attn`."""
        return self.consumer.rpartition(".")[0] or self.consumer

    @property
    def offered(self) -> bool:
        """Whether units can be removed."""
        return self.num_units > 0 and self.refusal is None

    def config_values(self, width: int) -> dict[str, Any]:
        """The config keys that represent `width` units, with their values."""
        return {key: width * n for key, n in self.config_per_unit.items()} | self.config_pinned


@dataclass(frozen=True)
class Attention:
    """Paths inside a decoder layer, and config keys, of grouped-query attention.

    Attributes:
        inputs: the query, key and value projection, or the single one that holds all three.
        interleaved: the single projection holds [queries, key, value] for each KV head in turn,
            instead of [queries; keys; values].
        query_rows: rows of the query projection for each channel of a head (2: with a gate).
        output: the projection after the heads.
        linear_if: config values under which the output is linear in the values; None where it never
            is.
        head_norms: norms of queries and of keys whose weights are [heads, head_dim].
        sinks: the parameter [heads] of attention sinks, one logit per query head.
        post_norm: a norm between the output and the residual stream, in layers that have it.
        transposed: see `GroupSpec`.
        refused: why heads cannot be removed.
        bias_key: see `GroupSpec`.
    """

    kind: ClassVar[str] = ATTENTION
    inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    query_rows: int = 1
    output: str = "self_attn.o_proj"
    linear_if: Mapping[str, Any] | None = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    sinks: str | None = None
    post_norm: str | None = None
    transposed: bool = False
    refused: tuple[Refusal, ...] = ()
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    bias_key: str | None = None

    def group(self, config: Any, layer: nn.Module, unit: str) -> GroupSpec:
        """The attention group; `unit` is "kv_group" or "query_head" (see `GrailConfig`).

        With one query head per KV head the two are the same.
        """
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // getattr(config, self.heads_key)
        heads = _shape(layer, self.output, self.transposed)[1] // head_dim
        rows = sum(_shape(layer, path, self.transposed)[0] for path in self.inputs)
        kv_heads = (rows // head_dim - heads * self.query_rows) // 2
        spec = self._by_kv_group(config, layer, head_dim, heads // kv_heads, kv_heads)
        if unit == "kv_group" or heads == kv_heads or self.interleaved:
            return spec
        return self._by_query_head(spec, head_dim, heads, kv_heads)

    def _by_kv_group(
        self, config: Any, layer: nn.Module, head_dim: int, group_size: int, kv_heads: int
    ) -> GroupSpec:
        linear = None
        if self.linear_if is not None and has_values(config, self.linear_if):
            linear = LinearRows(self.inputs[-1], head_dim, interleaved=self.interleaved)
        norms = [path for path in self.head_norms if _has(layer, path)]
        sinks = (self.sinks,) if self.sinks else ()
        return GroupSpec(
            ATTENTION,
            num_units=kv_heads,
            producers=self._producers(group_size, head_dim),
            consumer=self.output,
            columns=group_size * head_dim,
            linear=linear,
            norms=(
                *(Producer(path, (n,)) for path, n in zip(norms, (group_size, 1), strict=False)),
                *(Producer(path, (group_size,)) for path in sinks),
            ),
            transposed=self.transposed,
            config_per_unit={self.heads_key: group_size, self.kv_heads_key: 1},
            config_pinned={"head_dim": head_dim},
            attributes=self._attributes(
                num_heads=group_size, num_attention_heads=group_size, num_key_value_heads=1
            ),
            bias_key=self.bias_key,
            refusal=refusal_of(self.refused, config),
        )

    def _by_query_head(
        self, spec: GroupSpec, head_dim: int, heads: int, kv_heads: int
    ) -> GroupSpec:
        """The group by KV groups, with single query heads as units; keys and values are kept."""
        return replace(
            spec,
            num_units=heads,
            producers=(Producer(self.inputs[0], (self.query_rows * head_dim,)),),
            columns=head_dim,
            linear=spec.linear and replace(spec.linear, count=kv_heads * head_dim),
            partitions=kv_heads,
            unshrunk=self.inputs[1:],
            # Key norms have a row per KV head, and those stay.
            norms=tuple(Producer(n.path) for n in spec.norms if n.path not in self.head_norms[1:]),
            config_per_unit={self.heads_key: 1},
            config_pinned={self.kv_heads_key: kv_heads, "head_dim": head_dim},
            attributes=self._attributes(
                num_heads=1, num_attention_heads=1, num_key_value_groups=Fraction(1, kv_heads)
            ),
        )

    def _attributes(self, **factors: int | Fraction) -> dict[str, Fraction]:
        """Attributes of the attention module and their values per unit, as in `GroupSpec`."""
        block = self.output.rpartition(".")[0]
        return {f"{block}.{name}": Fraction(factor) for name, factor in factors.items()}

    def _producers(self, group_size: int, head_dim: int) -> tuple[Producer, ...]:
        rows = (self.query_rows * group_size * head_dim, head_dim, head_dim)
        if len(self.inputs) == 3:
            return tuple(Producer(path, (n,)) for path, n in zip(self.inputs, rows, strict=True))
        return (Producer(self.inputs[0], (sum(rows),) if self.interleaved else rows),)


@dataclass(frozen=True)
class Mlp:
    """Paths inside a decoder layer, and the config key, of an MLP, gated or not.

    Attributes:
        inputs: the projections before the activation.
        sections: of each input; 2 where one projection holds [gate; up].
        linear: the input in whose last section the output is linear; None where there is none.
        output: the projection after the activation.
        width_key: config key of the width; None where the routed experts' key holds it too.
        pins: config values without which the config would give the layers another width.
        kind: `MLP`, or `SHARED` for experts that see every token, beside the routed ones.
        gate: the projection that scales the output of shared experts token by token.
        post_norm, transposed, refused, bias_key: as in `Attention`.
    """

    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    sections: int = 1
    linear: str | None = "mlp.up_proj"
    output: str = "mlp.down_proj"
    width_key: str | None = "intermediate_size"
    pins: Mapping[str, Any] = field(default_factory=dict)
    kind: str = MLP
    gate: str | None = None
    post_norm: str | None = None
    transposed: bool = False
    refused: tuple[Refusal, ...] = ()
    bias_key: str | None = None

    def group(self, config: Any, layer: nn.Module, unit: str) -> GroupSpec:
        """The MLP's group; `unit` concerns attention alone."""
        block = self.output.rpartition(".")[0]
        return GroupSpec(
            self.kind,
            num_units=_shape(layer, self.output, self.transposed)[1],
            producers=tuple(Producer(path, (1,) * self.sections) for path in self.inputs),
            consumer=self.output,
            columns=1,
            linear=LinearRows(self.linear) if self.linear else None,
            unshrunk=(self.gate,) if self.gate else (),
            transposed=self.transposed,
            config_per_unit={self.width_key: 1} if self.width_key else {},
            config_pinned=dict(self.pins),
            attributes={f"{block}.intermediate_size": Fraction(1)},
            bias_key=self.bias_key,
            refusal=refusal_of(self.refused, config),
            residual_scale=None if self.gate else 1.0,
            tied_to=None if self.width_key else EXPERTS,
        )


@dataclass(frozen=True)
class Experts:
    """Paths inside a decoder layer, and the config key, of a mixture's routed experts.

    One module holds the gated MLPs of all experts in tensors whose first dimension is the expert:
    `gate_up_proj` and `down_proj`, with or without biases.

    Attributes:
        path: of that module.
        router: of the module that routes tokens to experts.
        interleaved: a unit's gate and up rows lie side by side, instead of in [gate; up].
        transposed: an expert's weights are stored as [in, out].
        width_key: config key of an expert's width.
        refused: why experts cannot be narrowed.
        post_norm: as in `Attention`.
    """

    kind: ClassVar[str] = EXPERTS
    path: str = "mlp.experts"
    router: str = "mlp.gate"
    interleaved: bool = False
    transposed: bool = False
    width_key: str = "moe_intermediate_size"
    refused: tuple[Refusal, ...] = ()
    post_norm: str | None = None

    @property
    def output(self) -> str:
        """Path of the weights after the activation."""
        return f"{self.path}.down_proj"

    def group(self, config: Any, layer: nn.Module, unit: str) -> GroupSpec:
        """The group of all experts; `unit` concerns attention alone."""
        weight: Any = layer.get_submodule(self.path).down_proj
        block = self.path.rpartition(".")[0]
        names = (f"{self.path}.intermediate_size", f"{self.path}.intermediate_dim")
        return GroupSpec(
            EXPERTS,
            num_units=weight.shape[1 if self.transposed else 2],
            producers=(
                Producer(f"{self.path}.gate_up_proj", (2,) if self.interleaved else (1, 1)),
            ),
            consumer=self.output,
            columns=1,
            unshrunk=(self.router,),
            transposed=self.transposed,
            config_per_unit={self.width_key: 1},
            attributes=dict.fromkeys((*names, f"{block}.ffn_dim"), Fraction(1)),
            refusal=refusal_of(self.refused, config),
            experts=len(weight),
            routed=config.num_experts_per_tok,
        )


@dataclass(frozen=True)
class Whole:
    """A block without units that could be removed: it is kept as it is.

    Its parameters count towards the sparsity, and later blocks are calibrated on its output on the
    compressed path.

    Attributes:
        kind: `ATTENTION` or `MLP`: what it is, or what it replaces in the layer.
        path: of the block inside the decoder layer.
        output: path of the module whose output is added to the residual stream.
        reason: a clause that follows "because".
        post_norm: as in `Attention`.
    """

    kind: str
    path: str
    output: str
    reason: str
    post_norm: str | None = None

    def group(self, config: Any, layer: nn.Module, unit: str) -> GroupSpec:
        """A group without units."""
        return GroupSpec(
            self.kind,
            num_units=0,
            producers=(),
            consumer=self.output,
            columns=0,
            unshrunk=(self.path,),
            refusal=self.reason,
        )


Block = Attention | Mlp | Experts | Whole


@dataclass(frozen=True)
class Architecture:
    """One model type: where its decoder layers are in the base model, and what they consist of.

    Attributes:
        model_type: of the config.
        layers: path of the decoder layers in the base model.
        attention, mlp: the blocks of a decoder layer.
        experts: a mixture of experts that some or all layers have instead of the MLP.
        shared: experts beside the routed ones that see every token.
        shared_first: the shared experts run before the routed ones.
        others: blocks that some layers have instead of attention or the MLP.
        residual_scale_key: config key of the factor with which a block's output is added to the
            residual stream.
        additive: config values under which the stream is the sum of the blocks' outputs.
        per_layer: why layers cannot differ in width.
        refused: why the type cannot be compressed at all.
        rehome: the model type that it can be converted to.
        exports: other types that a checkpoint can be exported as, or why it cannot.
        gguf: llama.cpp's architectures for it; the first that fits is used.
        vllm_ignores: config values or weights of a compressed model that vLLM's own code for the
            type ignores, `HEAD_DIM` or `OUTPUT_BIAS`, for the model card (vLLM 0.33.0, 4ba787ec9:
            `vllm/model_executor/models`).
        note: a remark for the table of architectures.
    """

    model_type: str
    layers: str = "layers"
    attention: Attention | Whole = Attention()
    mlp: Mlp | Whole = Mlp()
    experts: Experts | None = None
    shared: Mlp | None = None
    shared_first: bool = False
    others: tuple[Block, ...] = ()
    residual_scale_key: str | None = None
    additive: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Refusal | None = None
    refused: tuple[Refusal, ...] = ()
    rehome: Rehome | None = None
    exports: dict[str, Rehome | str] = field(default_factory=dict)
    gguf: tuple[Gguf, ...] = ()
    vllm_ignores: str = ""
    note: str = ""

    def groups(
        self, config: Any, layer: nn.Module, attention_unit: str = "kv_group"
    ) -> tuple[GroupSpec, ...]:
        """The groups of a decoder layer in the order in which they run.

        Args:
            config: the model's; of a model that contains a text decoder, the decoder's part is
                used.
            layer: the decoder layer, which may be on the meta device. Blocks and their sizes are
                read off its modules.
            attention_unit: "kv_group" or "query_head".

        Raises:
            ValueError: the type cannot be compressed, or the layer has none of the known blocks.
        """
        config = config.get_text_config()
        if reason := refusal_of(self.refused, config):
            raise ValueError(f"this {self.model_type} cannot be compressed because {reason}")
        groups = []
        for block in self._blocks(layer):
            spec = block.group(config, layer, attention_unit)
            norm = block.post_norm if block.post_norm and _has(layer, block.post_norm) else None
            normed = norm is not None or spec.residual_scale is None
            scale = None if normed else self._residual_scale(config)
            groups.append(replace(spec, residual_scale=scale, post_norm=norm))
        return tuple(groups)

    def _blocks(self, layer: nn.Module) -> list[Block]:
        """The blocks that the layer has, in the order in which they run."""
        found: list[Block] = []
        usual: tuple[tuple[Block | None, ...], ...] = ((self.attention,), (self.mlp, self.experts))
        for kind, of_place in zip((ATTENTION, MLP), usual, strict=True):
            others = (block for block in self.others if block.kind == kind)
            blocks = [block for block in (*of_place, *others) if block is not None]
            block = next((block for block in blocks if _has(layer, block.output)), None)
            if block is None:
                raise ValueError(
                    f"a {type(layer).__name__} has none of "
                    f"{', '.join(block.output for block in blocks)}: the entry for "
                    f"{self.model_type} in grail_hf/models/architectures.py does not describe it"
                )
            found.append(block)
        if found[-1] is self.experts and self.shared and _has(layer, self.shared.output):
            found.insert(-1 if self.shared_first else len(found), self.shared)
        return found

    def _residual_scale(self, config: Any) -> float | None:
        if not has_values(config, self.additive):
            return None
        return getattr(config, self.residual_scale_key) if self.residual_scale_key else 1.0


def _has(layer: nn.Module, path: str) -> bool:
    module: Any = layer
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _shape(layer: nn.Module, path: str, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a projection."""
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)
