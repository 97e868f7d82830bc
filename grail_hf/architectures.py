"""Where each architecture keeps its projections: data, one entry a model type.

An `Architecture` names the modules of a decoder layer and the config keys that hold its widths.
`Architecture.groups(config, …)` resolves them against a model's config into `GroupSpec`s, which
everything else works with: no other file knows a model type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from grail_hf.config import unknown_name

ATTENTION = "attention"
MLP = "mlp"


@dataclass(frozen=True)
class Producer:
    """A projection whose output rows make the units: unit `i` owns rows [i*rows, (i+1)*rows)."""

    path: str
    rows: int


@dataclass(frozen=True)
class GroupSpec:
    """All units in front of one consumer, resolved for one model's config.

    Attributes:
        kind: `ATTENTION` or `MLP`.
        num_units: units there are.
        producers: the projections that shrink with the units.
        consumer: path, inside the decoder layer, of the projection that reads the units.
        linear: the producer in whose weight the block's output is linear, all else fixed; None
            where there is none.
        columns: consumer columns a unit owns: unit `i` owns [i*columns, (i+1)*columns).
        partitions: the units form this many equal runs, each of which keeps equally many.
        unshrunk: projections of the block that stay whole whatever the width.
        config_per_unit: config key -> what one kept unit adds to its value.
        config_pinned: config keys that a stock config would otherwise derive from the widths.
        attributes: attribute path in the layer -> divisor: its value is width // divisor.
        bias_key: config key that, where true, gives each of the block's projections a bias.
    """

    kind: str
    num_units: int
    producers: tuple[Producer, ...]
    consumer: str
    columns: int
    linear: str | None = None
    partitions: int = 1
    unshrunk: tuple[str, ...] = ()
    config_per_unit: dict[str, int] = field(default_factory=dict)
    config_pinned: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    bias_key: str | None = None

    @property
    def name(self) -> str:
        """The block's name inside the decoder layer, for example `self_attn`."""
        return self.consumer.rpartition(".")[0] or self.consumer

    def config_values(self, width: int) -> dict[str, int]:
        """The config keys, and their values, that say `width` units."""
        return {key: width * n for key, n in self.config_per_unit.items()} | self.config_pinned


@dataclass(frozen=True)
class Attention:
    """Paths inside a decoder layer, and config keys, of grouped-query attention."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    group_size_attribute: str = "self_attn.num_key_value_groups"
    bias_key: str | None = None

    def group(self, config: Any, unit: str) -> GroupSpec:
        """The attention group; `unit` is "kv_group" or "query_head" (see `GrailConfig`).

        With one query head to a KV head the two are the same.
        """
        heads, kv_heads = getattr(config, self.heads_key), getattr(config, self.kv_heads_key)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        group_size = heads // kv_heads
        if unit == "query_head" and group_size > 1:
            return GroupSpec(
                ATTENTION,
                num_units=heads,
                producers=(Producer(self.query, head_dim),),
                consumer=self.output,
                columns=head_dim,
                linear=self.value,
                partitions=kv_heads,
                unshrunk=(self.key, self.value),
                config_per_unit={self.heads_key: 1},
                config_pinned={self.kv_heads_key: kv_heads, "head_dim": head_dim},
                attributes={self.group_size_attribute: kv_heads},
                bias_key=self.bias_key,
            )
        return GroupSpec(
            ATTENTION,
            num_units=kv_heads,
            producers=(
                Producer(self.query, group_size * head_dim),
                Producer(self.key, head_dim),
                Producer(self.value, head_dim),
            ),
            consumer=self.output,
            columns=group_size * head_dim,
            linear=self.value,
            config_per_unit={self.heads_key: group_size, self.kv_heads_key: 1},
            config_pinned={"head_dim": head_dim},
            bias_key=self.bias_key,
        )


@dataclass(frozen=True)
class Mlp:
    """Paths inside a decoder layer, and the config key, of a (gated) MLP."""

    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    linear: str | None = "mlp.up_proj"
    output: str = "mlp.down_proj"
    width_key: str = "intermediate_size"
    width_attribute: str = "mlp.intermediate_size"
    bias_key: str | None = None

    def group(self, config: Any) -> GroupSpec:
        return GroupSpec(
            MLP,
            num_units=getattr(config, self.width_key),
            producers=tuple(Producer(path, 1) for path in self.inputs),
            consumer=self.output,
            columns=1,
            linear=self.linear,
            config_per_unit={self.width_key: 1},
            attributes={self.width_attribute: 1},
            bias_key=self.bias_key,
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


@dataclass(frozen=True)
class Architecture:
    """One model type: where its decoder layers lie in the base model, and what is in them.

    `exports` names the other types that a checkpoint can be exported as, or why it cannot be;
    `gguf` holds llama.cpp's architectures for it, of which the first that fits is taken.
    """

    model_type: str
    layers: str = "layers"
    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    rehome: Rehome | None = None
    exports: dict[str, Rehome | str] = field(default_factory=dict)
    gguf: tuple[Gguf, ...] = ()

    def groups(self, config: Any, attention_unit: str = "kv_group") -> tuple[GroupSpec, ...]:
        """The groups of a decoder layer in the order in which they run."""
        return (self.attention.group(config, attention_unit), self.mlp.group(config))


def find_architecture(model_type: str) -> Architecture:
    """The entry for a config's `model_type`. Raises ValueError with the nearest known name."""
    if model_type not in ARCHITECTURES:
        where = "ARCHITECTURES in grail_hf/architectures.py"
        raise unknown_name("architecture", model_type, ARCHITECTURES, where)
    return ARCHITECTURES[model_type]


# A mistral without a sliding window is a llama without biases that takes any number of heads.
_MISTRAL = Rehome(
    "mistral",
    sets={"sliding_window": None},
    requires={"attention_bias": False, "mlp_bias": False},
)
_FULL_ATTENTION = {"sliding_window": None}
# A granite is a llama with four more factors, which are 1 or the usual one here; it takes any
# number of heads, and biases everywhere.
_GRANITE = Rehome(
    "granite",
    sets={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
    requires=_FULL_ATTENTION,
    derives={
        "head_dim": head_dim,
        "attention_multiplier": lambda config: head_dim(config) ** -0.5,
    },
)
_GGUF_LLAMA = Gguf("llama", interleaved=True, rope_factors=True, requires=_FULL_ATTENTION)
_QK_NORM = "it normalises queries and keys, and a {} does not"

ARCHITECTURES: dict[str, Architecture] = {
    # A llama config refuses a head count that does not divide the hidden size.
    "llama": Architecture(
        "llama",
        attention=Attention(bias_key="attention_bias"),
        mlp=Mlp(bias_key="mlp_bias"),
        rehome=_MISTRAL,
        exports={"mistral": _MISTRAL, "granite": _GRANITE},
        gguf=(_GGUF_LLAMA,),
    ),
    "mistral": Architecture(
        "mistral",
        exports={
            "mistral": replace(_MISTRAL, requires=_FULL_ATTENTION),
            "granite": _GRANITE,
        },
        gguf=(_GGUF_LLAMA,),
    ),
    "qwen2": Architecture(
        "qwen2",
        exports={
            "mistral": "it has biases on q, k and v, and a mistral has none",
            "granite": replace(_GRANITE, sets=_GRANITE.sets | {"attention_bias": True}),
        },
        # llama.cpp's qwen2 has no other number of heads; its llama takes biases, and any number.
        gguf=(Gguf("qwen2", square=True, requires=_FULL_ATTENTION), _GGUF_LLAMA),
    ),
    "qwen3": Architecture(
        "qwen3",
        attention=Attention(bias_key="attention_bias"),
        exports={name: _QK_NORM.format(name) for name in ("mistral", "granite")},
        gguf=(Gguf("qwen3", requires=_FULL_ATTENTION | {"attention_bias": False}),),
    ),
}
