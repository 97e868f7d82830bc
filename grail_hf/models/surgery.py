"""Give a narrowed model in memory the config, and the class, that its checkpoint will have."""

from __future__ import annotations

from functools import update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.models.modeling_grail import LayerConfig, layer_classes, share_config_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def apply_config_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give the live, already narrowed model its new config, and its new type if that differs."""
    if config.model_type != model.config.model_type:
        _rehome_(model, config)
        return
    # Replaced rather than edited: other models may have been built from the same config object.
    dense, text = model.config, config.get_text_config()
    kinds = tuple(layer_classes(type(model)))
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if text is config:
        for index, layer in enumerate(layers):
            share_config_(layer, dense, config, index)
    module: Any
    for module in model.modules():
        held = getattr(module, "config", None)
        if held is dense:
            module.config = config
        elif text is not config and isinstance(held, (type(text), LayerConfig)):
            module.config = text  # the decoder inside may hold a copy of its part


def _rehome_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Turn the model into `config`'s stock causal LM: each module takes the other type's class.

    Modules stay the objects they are, with their parameters, buffers, hooks and training flags;
    what the other type's constructor sets and this one's does not is taken from a model of the
    other type on the meta device.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    pairs = list(zip(stock.named_modules(), model.named_modules(), strict=True))
    for (new_name, new), (name, module) in pairs:
        expected = {key: p.shape for key, p in new.named_parameters(recurse=False)}
        present = {key: p.shape for key, p in module.named_parameters(recurse=False)}
        if new_name != name or expected != present:
            raise RuntimeError(
                f"{type(model).__name__} and {type(stock).__name__} no longer agree: {present} at "
                f"{name!r} against {expected} at {new_name!r}"
            )
    for (_, new), (_, module) in pairs:
        state = vars(module)
        state.update({key: value for key, value in vars(new).items() if key not in state})
        if "config" in state:
            state["config"] = config
        if "_old_forward" in state:  # what accelerate's hook calls
            module._old_forward = MethodType(type(new).forward, module)
            update_wrapper(module.forward, module._old_forward)
        module.__class__ = type(new)
