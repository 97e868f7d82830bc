"""What an `Architecture` is: where the projections of a decoder layer are, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn

from grail_hf.config import ATTENTION, EXPERTS, MLP


@dataclass(frozen=True)
class Producer:
    """A module whose weight's rows make the units, the rows in consecutive sections.

    In a section of `n` rows a unit, unit `i` owns the rows [i*n, (i+1)*n) from the section's start.
    Rows behind the last section are no unit's and stay.

    Attributes:
        path: inside the decoder layer.
        rows: of each section, the rows that one unit owns.
    """

    path: str
    rows: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LinearRows:
    """Rows of a projection in whose weights a block's output is linear, all else fixed.

    They are the projection's last ones (the second half of [gate; up], the values of [q; k; v]) or,
    where a projection goes unit by unit, the last ones of each unit.

    Attributes:
        path: of the projection, inside the decoder layer and in the consumer's module.
        size: rows of one channel or head.
        count: rows that there are whatever the width; None where there are `size` for each unit.
        interleaved: the projection goes unit by unit.
    """

    path: str
    size: int = 1
    count: int | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class GroupSpec:
    """All units in front of one consumer, resolved for one decoder layer.

    Attributes:
        kind: `ATTENTION`, `MLP`, or of a mixture `EXPERTS` and `SHARED` experts.
        num_units: units there are; 0 where the block has none that could be removed. Of experts,
            those of one.
        producers: the projections that shrink with the units.
        consumer: path, inside the decoder layer, of the projection that reads the units.
        linear: the rows in which the block's output is linear; None where there are none.
        columns: consumer columns a unit owns: unit `i` owns [i*columns, (i+1)*columns).
        partitions: the units form this many equal runs, each of which keeps equally many.
        unshrunk: modules of the block that stay whole whatever the width.
        norms: norms, and bare parameters, with rows for each unit: they shrink with the units.
        transposed: the projections store their weights as [in, out].
        config_per_unit: config key -> what one kept unit adds to its value.
        config_pinned: config keys that a stock config would otherwise derive from the widths.
        attributes: attribute path in the layer -> factor: where there is such an attribute, its
            value is width * factor.
        bias_key: config key that, where true, gives each of the block's projections a bias.
        refusal: why the units cannot be removed; None where they can.
        residual_scale: factor with which the block's output is added to the residual stream; None
            where something else than a factor lies in between, so that no output can make up for
            what the stream lacks.
        post_norm: norm between the block's output and the residual stream; None where there is
            none.
        experts: experts there are, each with units of its own and all of one width; 0 where the
            units are one block's.
        routed: of these, the experts that a token goes to.
        tied_to: kind whose config key says this width too, so that both keep the same fraction of
            their units in a layer; None where there is a key of its own.
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
        """The config keys, and their values, that say `width` units."""
        return {key: width * n for key, n in self.config_per_unit.items()} | self.config_pinned


@dataclass(frozen=True)
class Refusal:
    """Why something is not offered, and for which configs.

    Attributes:
        reason: to be read after "because".
        unless: config values under which it is offered after all; empty where it never is.
    """

    reason: str
    unless: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, config: Any) -> bool:
        return not self.unless or not _has_values(config, self.unless)


@dataclass(frozen=True)
class Attention:
    """Paths inside a decoder layer, and config keys, of grouped-query attention.

    Attributes:
        inputs: the query, key and value projection, or the one that holds all three.
        interleaved: the one projection holds [queries, key, value] for each KV head in turn, and
            not [queries; keys; values].
        query_rows: rows of the query projection for each channel of a head (2: with a gate).
        output: the projection behind the heads.
        linear_if: config values under which the output is linear in the values; None where it never
            is.
        head_norms: norms of queries and of keys whose weights are [heads, head_dim].
        sinks: the parameter [heads] of attention sinks, a logit a query head.
        post_norm: a norm between the output and the residual stream, in layers that have it.
        transposed: see `GroupSpec`.
        refused: why heads stay.
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

        With one query head to a KV head the two are the same.
        """
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // getattr(config, self.heads_key)
        heads = _shape(layer, self.output, self.transposed)[1] // head_dim
        rows = sum(_shape(layer, path, self.transposed)[0] for path in self.inputs)
        kv_heads = (rows // head_dim - heads * self.query_rows) // 2
        group_size = heads // kv_heads
        linear = None
        if self.linear_if is not None and _has_values(config, self.linear_if):
            linear = LinearRows(self.inputs[-1], head_dim, interleaved=self.interleaved)
        norms = [path for path in self.head_norms if _has(layer, path)]
        sinks = (self.sinks,) if self.sinks else ()
        block = self.output.rpartition(".")[0]

        def attributes(heads: int | Fraction, kv_heads: int, size: int | Fraction) -> Any:
            """Factors of what attention modules call their numbers; 0 where it stays."""
            factors = {
                "num_heads": heads,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "num_key_value_groups": size,
            }
            return {f"{block}.{name}": Fraction(n) for name, n in factors.items() if n}

        spec = GroupSpec(
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
            attributes=attributes(group_size, 1, 0),
            bias_key=self.bias_key,
            refusal=_refusal(self.refused, config),
        )
        if unit == "kv_group" or group_size == 1 or self.interleaved:
            return spec
        return replace(
            spec,
            num_units=heads,
            producers=(Producer(self.inputs[0], (self.query_rows * head_dim,)),),
            columns=head_dim,
            linear=linear and replace(linear, count=kv_heads * head_dim),
            partitions=kv_heads,
            unshrunk=self.inputs[1:],
            norms=tuple(Producer(path) for path in (*norms[:1], *sinks)),
            config_per_unit={self.heads_key: 1},
            config_pinned={self.kv_heads_key: kv_heads, "head_dim": head_dim},
            attributes=attributes(1, 0, Fraction(1, kv_heads)),
        )

    def _producers(self, group_size: int, head_dim: int) -> tuple[Producer, ...]:
        rows = (self.query_rows * group_size * head_dim, head_dim, head_dim)
        if len(self.inputs) == 3:
            return tuple(Producer(path, (n,)) for path, n in zip(self.inputs, rows, strict=True))
        return (Producer(self.inputs[0], (sum(rows),) if self.interleaved else rows),)


@dataclass(frozen=True)
class Mlp:
    """Paths inside a decoder layer, and the config key, of an MLP, gated or not.

    Attributes:
        inputs: the projections in front of the activation.
        sections: of each input; 2 where one projection holds [gate; up].
        linear: the input in whose last section the output is linear; None where there is none.
        output: the projection behind it.
        width_key: config key of the width; None where the routed experts' key says it too.
        pins: config values without which the config would give the layers another width.
        kind: `MLP`, or `SHARED` for experts that see every token, beside the routed ones.
        gate: of shared experts, the projection that scales their output token by token.
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
        """The MLP's group; `unit` is attention's."""
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
            refusal=_refusal(self.refused, config),
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
        router: of the module that gives a token its experts.
        interleaved: a unit's gate and up rows lie side by side, and not in [gate; up].
        transposed: an expert's weights are stored as [in, out].
        width_key: config key of an expert's width.
        refused: why experts keep their width.
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
        """Path of the weights behind the activation."""
        return f"{self.path}.down_proj"

    def group(self, config: Any, layer: nn.Module, unit: str) -> GroupSpec:
        """The group of all experts; `unit` is attention's."""
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
            refusal=_refusal(self.refused, config),
            experts=len(weight),
            routed=config.num_experts_per_tok,
        )


@dataclass(frozen=True)
class Whole:
    """A block that has no units which could be removed: it stays as it is.

    Its parameters count, and what it puts out on the compressed path is known to the blocks
    behind it.

    Attributes:
        kind: what it is or stands in the place of.
        path: of the block inside the decoder layer.
        output: of the module whose output goes to the residual stream.
        reason: why, to be read after "because".
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


@dataclass(frozen=True)
class Rehome:
    """Another model type that computes the same function and whose config can say more shapes.

    Attributes:
        model_type: the other type.
        sets: config values that make the other type compute the same function.
        requires: values that this type's config must have, because the other cannot say others.
        derives: config key -> its value, from this type's config.
    """

    model_type: str
    sets: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    derives: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    def values(self, config: Any) -> dict[str, Any]:
        """The config values that the other type needs to compute the same as `config`."""
        return self.sets | {key: derive(config) for key, derive in self.derives.items()}

    def obstacles(self, config: Any) -> list[str]:
        """Why this config cannot move, as `key=value` strings; empty where it can."""
        return _unmet(self.requires, config)


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp computes a model type.

    Attributes:
        name: llama.cpp's name for the architecture.
        interleaved: its rotary embedding turns neighbours (2i, 2i + 1) where transformers' turns
            (i, i + d/2): the rows of q and k are reordered.
        rope_factors: it reads a tensor that divides each rotary frequency.
        square: its query heads are as wide together as the hidden state.
        requires: values that the config must have, because llama.cpp computes no others.
    """

    name: str
    interleaved: bool = False
    rope_factors: bool = False
    square: bool = False
    requires: dict[str, Any] = field(default_factory=dict)

    def obstacles(self, config: Any) -> list[str]:
        """Why llama.cpp's architecture is another function, as `key=value`; empty if it is not."""
        found = _unmet({"hidden_act": "silu"} | self.requires, config)
        kind = config.rope_parameters["rope_type"]
        if kind not in ("default", "linear") and not (kind == "llama3" and self.rope_factors):
            found.append(f"rope_type={kind!r}")
        if self.square and config.num_attention_heads * head_dim(config) != config.hidden_size:
            found.append(f"num_attention_heads={config.num_attention_heads!r}")
        return found


def head_dim(config: Any) -> int:
    """Channels of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _unmet(requires: dict[str, Any], config: Any) -> list[str]:
    return [
        f"{key}={getattr(config, key)!r}"
        for key, value in requires.items()
        if getattr(config, key, value) != value
    ]


Block = Attention | Mlp | Experts | Whole
HEAD_DIM = "head_dim: it takes hidden_size / num_attention_heads"
OUTPUT_BIAS = "the bias of o_proj, without a word"


@dataclass(frozen=True)
class Architecture:
    """One model type: where its decoder layers lie in the base model, and what is in them.

    Attributes:
        model_type: of the config.
        layers: path of the decoder layers in the base model.
        attention, mlp: the blocks of a decoder layer.
        experts: a mixture that some or all layers have in place of the MLP.
        shared: experts beside these that see every token.
        shared_first: these run before the routed ones.
        others: blocks that some layers have in place of attention or the MLP.
        residual_scale_key: config key of the factor with which a block's output is added to the
            residual stream.
        additive: config values under which the stream is the sum of the blocks' outputs.
        per_layer: why layers cannot differ in width.
        refused: why the type cannot be compressed at all.
        rehome: where it may move.
        exports: other types that a checkpoint can be exported as, or why it cannot be.
        gguf: llama.cpp's architectures for it, of which the first that fits is taken.
        vllm_ignores: what vLLM's own code for the type does not read and a result may have,
            `HEAD_DIM` or `OUTPUT_BIAS`, for the model card (vLLM 0.33.0, 4ba787ec9:
            `vllm/model_executor/models`).
        note: what else there is to know, for the table.
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
            config: the model's; of a model with a text decoder inside, the decoder's part counts.
            layer: the decoder layer, which may be on the meta device: blocks are told apart by the
                modules that it has, and their sizes are its own.
            attention_unit: "kv_group" or "query_head".

        Raises:
            ValueError: the type cannot be compressed, or the layer has none of the known blocks.
        """
        config = config.get_text_config()
        if reason := _refusal(self.refused, config):
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
        if not _has_values(config, self.additive):
            return None
        return getattr(config, self.residual_scale_key) if self.residual_scale_key else 1.0


def _has(layer: nn.Module, path: str) -> bool:
    module: Any = layer
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _has_values(config: Any, values: Mapping[str, Any]) -> bool:
    return all(getattr(config, key, None) == value for key, value in values.items())


def _refusal(refusals: tuple[Refusal, ...], config: Any) -> str | None:
    return next((refusal.reason for refusal in refusals if refusal.holds(config)), None)


def _shape(layer: nn.Module, path: str, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a projection."""
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)
