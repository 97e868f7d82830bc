"""Give a narrowed model in memory the config and the class that its checkpoint will have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grail_hf.models.decoder import skeleton_like
from grail_hf.models.modeling_grail import LayerConfig, layer_classes, share_config_
from grail_hf.runtime.hooks import replace_hooked_forward_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def apply_config_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give the live, already narrowed model its new config, and its new type if that differs."""
    if config.model_type != model.config.model_type:
        _convert_(model, config)
        return
    # Replaced, not edited: other models may have been built from the same config object.
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
            module.config = text  # a nested decoder may hold a copy of its part


def _convert_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Convert the model to the stock causal LM of `config`: each module takes the other's class.

    Modules remain the same objects, with their parameters, buffers, hooks and training flags.
    Attributes that only the other type's constructor sets are copied from a skeleton of it.
    """
    stock = skeleton_like(model, config)
    pairs = list(zip(stock.named_modules(), model.named_modules(), strict=True))
    for (new_name, new), (name, module) in pairs:
        expected = {key: p.shape for key, p in new.named_parameters(recurse=False)}
        present = {key: p.shape for key, p in module.named_parameters(recurse=False)}
        if new_name != name or expected != present:
            raise RuntimeError(
                f"{type(model).__name__} and {type(stock).__name__} no longer agree: {present} at "
                f"{name!r} versus {expected} at {new_name!r}"
            )
    for (_, new), (_, module) in pairs:
        state = vars(module)
        state.update({key: value for key, value in vars(new).items() if key not in state})
        if "config" in state:
            state["config"] = config
        replace_hooked_forward_(module, type(new).forward)
        module.__class__ = type(new)
