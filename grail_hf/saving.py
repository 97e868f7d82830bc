"""Config edits: how a stock `config.json` says the new widths, and another type where it cannot.

Nothing of grail_hf is needed to load the result: the live model is given the very config that a
plain `from_pretrained` will read, and, where it moves to another model type, that type's own
modules around the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.architectures import GroupSpec, Rehome

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def compressed_config(
    config: PreTrainedConfig,
    specs: Sequence[GroupSpec],
    widths: Mapping[str, int],
    rehome: Rehome | None = None,
) -> PreTrainedConfig:
    """A config that says `widths`, of the same model type or, failing that, of `rehome`'s.

    Args:
        config: of the dense model; not changed.
        specs: the groups of a decoder layer.
        widths: kind -> units kept.
        rehome: where the model may move; None forbids it.

    Raises:
        ValueError: neither type's stock config can say the widths.
    """
    from huggingface_hub.errors import StrictDataclassError

    edits: dict[str, int] = {}
    for spec in specs:
        if widths[spec.kind] < spec.num_units:
            edits |= spec.config_values(widths[spec.kind])
    edited = copy.deepcopy(config)
    try:
        for key, value in edits.items():
            setattr(edited, key, value)
        edited.validate()
        return edited
    except (StrictDataclassError, ValueError) as error:
        says = ", ".join(f"{key}={value}" for key, value in edits.items())
        refusal = f"a stock {config.model_type} config cannot say {says} ({_reason(error)})"
        if rehome is None:
            raise ValueError(
                f"{refusal}; choose another sparsity or attention_unit, or, for a causal LM that "
                "can be saved as another stock type, leave rehome=True"
            ) from error
        if obstacles := rehome.obstacles(config):
            raise ValueError(
                f"{refusal}, and {', '.join(obstacles)} keeps it from being saved as "
                f"{rehome.model_type}; choose another sparsity or attention_unit"
            ) from error
    return _rehomed(config, edits | rehome.sets, rehome.model_type)


def _rehomed(config: PreTrainedConfig, edits: Mapping[str, object], to: str) -> PreTrainedConfig:
    """The config as model type `to`, with the keys that the type knows."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(to).to_dict().keys() - {"model_type", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    rehomed = AutoConfig.for_model(to, **(values | dict(edits)))
    rehomed.name_or_path = config.name_or_path
    return rehomed


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def is_stock_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the model is just what `AutoModelForCausalLM` makes of its config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return type(model) is mapping.get(type(model.config), None)


def apply_config_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give the live, already narrowed model its new config, and its new type if that differs."""
    if config.model_type != model.config.model_type:
        _rehome_(model, config)
        return
    # Replaced rather than edited: other models may have been built from the same config object.
    dense = model.config
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is dense:
            module.config = config


def _rehome_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Turn the model into `config`'s stock causal LM around the same parameters and buffers.

    The object stays the same, its submodules are new; hooks on the old ones are gone.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    for (new_name, new), (old_name, old) in zip(
        fresh.named_modules(), model.named_modules(), strict=True
    ):
        new_shapes = {name: p.shape for name, p in new.named_parameters(recurse=False)}
        old_shapes = {name: p.shape for name, p in old.named_parameters(recurse=False)}
        if new_name != old_name or new_shapes != old_shapes:
            raise RuntimeError(
                f"{type(model).__name__} and {type(fresh).__name__} no longer agree at "
                f"{old_name!r}: {old_shapes} against {new_shapes} at {new_name!r}"
            )
        new._parameters, new._buffers = old._parameters, old._buffers
    fresh.train(model.training)
    fresh.generation_config = model.generation_config
    model.__class__ = fresh.__class__
    model.__dict__ = fresh.__dict__
