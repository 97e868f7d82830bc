"""What stock configs and other programs cannot represent, and the model types that can.

Each limit is data beside the architecture that has it (`architectures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What vLLM's own code for a model type ignores (`Architecture.vllm_ignores`).
HEAD_DIM = "head_dim: it takes hidden_size / num_attention_heads"
OUTPUT_BIAS = "the bias of o_proj, without a warning"


@dataclass(frozen=True)
class Refusal:
    """Why a block, or a whole model type, cannot be pruned, and for which configs.

    Attributes:
        reason: a clause that follows "because".
        unless: config values for which the refusal does not hold; empty where it always holds.
    """

    reason: str
    unless: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, config: Any) -> bool:
        return not self.unless or not has_values(config, self.unless)


@dataclass(frozen=True)
class Rehome:
    """Another model type that computes the same function and whose config represents more shapes.

    Attributes:
        model_type: the other type.
        sets: config values that make the other type compute the same function.
        requires: values that this type's config must have, because the other has no other values.
        derives: config key -> its value, computed from this type's config.
    """

    model_type: str
    sets: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    derives: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    def values(self, config: Any) -> dict[str, Any]:
        """The config values that the other type needs to compute the same as `config`."""
        return self.sets | {key: derive(config) for key, derive in self.derives.items()}

    def obstacles(self, config: Any) -> list[str]:
        """What prevents the conversion, as `key=value` strings; empty where nothing does."""
        return _unmet(self.requires, config)


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp computes a model type.

    Attributes:
        name: llama.cpp's name for the architecture.
        interleaved: its rotary embedding rotates neighbours (2i, 2i + 1) where transformers'
            rotates (i, i + d/2): the rows of q and k are reordered.
        rope_factors: it reads a tensor that divides each rotary frequency.
        square: its query heads together are as wide as the hidden state.
        requires: values that the config must have, because llama.cpp computes no others.
    """

    name: str
    interleaved: bool = False
    rope_factors: bool = False
    square: bool = False
    requires: dict[str, Any] = field(default_factory=dict)

    def obstacles(self, config: Any) -> list[str]:
        """What llama.cpp computes differently, as `key=value` strings; empty if nothing."""
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


def has_values(config: Any, values: Mapping[str, Any]) -> bool:
    """Whether the config has all these values."""
    return all(getattr(config, key, None) == value for key, value in values.items())


def refusal_of(refusals: tuple[Refusal, ...], config: Any) -> str | None:
    """The reason of the first refusal that holds for the config."""
    return next((refusal.reason for refusal in refusals if refusal.holds(config)), None)


def _unmet(requires: Mapping[str, Any], config: Any) -> list[str]:
    """The config's own values that differ from the required ones, as `key=value` strings."""
    return [
        f"{key}={getattr(config, key)!r}"
        for key, value in requires.items()
        if getattr(config, key, value) != value
    ]
