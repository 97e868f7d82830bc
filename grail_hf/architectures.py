"""Where each architecture keeps its projections: data, one entry a model type.

An `Architecture` names the modules of a decoder layer and the config keys that hold its widths.
`Architecture.groups(config, …)` resolves them against a model's config into `GroupSpec`s, which
everything else works with: no other file knows a model type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """

    model_type: str
    sets: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)

    def obstacles(self, config: Any) -> list[str]:
        """Why this config cannot move, as `key=value` strings; empty where it can."""
        return [
            f"{key}={getattr(config, key)!r}"
            for key, value in self.requires.items()
            if getattr(config, key, value) != value
        ]


@dataclass(frozen=True)
class Architecture:
    """One model type: where its decoder layers lie in the base model, and what is in them."""

    model_type: str
    layers: str = "layers"
    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    rehome: Rehome | None = None

    def groups(self, config: Any, attention_unit: str = "kv_group") -> tuple[GroupSpec, ...]:
        """The groups of a decoder layer in the order in which they run."""
        return (self.attention.group(config, attention_unit), self.mlp.group(config))


def find_architecture(model_type: str) -> Architecture:
    """The entry for a config's `model_type`. Raises ValueError with the nearest known name."""
    if model_type not in ARCHITECTURES:
        where = "ARCHITECTURES in grail_hf/architectures.py"
        raise unknown_name("architecture", model_type, ARCHITECTURES, where)
    return ARCHITECTURES[model_type]


ARCHITECTURES: dict[str, Architecture] = {
    # A llama config refuses a head count that does not divide the hidden size; a mistral without
    # a sliding window is the same function and takes any, but has no biases.
    "llama": Architecture(
        "llama",
        attention=Attention(bias_key="attention_bias"),
        mlp=Mlp(bias_key="mlp_bias"),
        rehome=Rehome(
            "mistral",
            sets={"sliding_window": None},
            requires={"attention_bias": False, "mlp_bias": False},
        ),
    ),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", attention=Attention(bias_key="attention_bias")),
}
