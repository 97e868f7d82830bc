"""Properties of any decoder-only model: its layers, vocabulary, context length and class.

The semi-private uses of transformers' model classes are in this module and `modeling_grail`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grail_hf.models.quantization import check_not_quantised
from grail_hf.models.schema import Architecture
from grail_hf.runtime.dispatched import weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def decoder_layers(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The model's decoder layers."""
    layers = model.base_model.get_submodule(architecture.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{architecture.layers} is a {type(layers).__name__}, not a ModuleList")
    return layers


def check_apart(layers: nn.ModuleList) -> None:
    """Raise ValueError where decoder layers share a parameter, since each is cut by itself."""
    owners: dict[int, tuple[int, str]] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            owner, own = owners.setdefault(id(parameter), (index, name))
            if owner != index:
                raise ValueError(
                    f"decoder layers {owner} and {index} share a parameter ({own} and {name}), and "
                    "each layer is cut and repaired by itself: give every layer a copy of its own"
                )


def check_model(model: object) -> None:
    """Raise TypeError or ValueError for a model that cannot be compressed by any settings."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a {type(model).__name__} is not a transformers model; load one with "
            "AutoModelForCausalLM.from_pretrained (and merge_and_unload() PEFT adapters first)"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{model.config.model_type!r} is an encoder-decoder; grail_hf compresses decoder-only "
            "models"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters: merge them into it and save it (PeftModel's "
            "merge_and_unload()), or load it without them"
        )
    check_not_quantised(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise ValueError(
                f"{name} is sharded over processes (tensor parallelism or FSDP): load the model "
                "without tp_plan or distributed_config; to use several accelerators, load it with "
                "device_map='auto', or start one process for each, which loads the whole model"
            )


def check_weights(model: PreTrainedModel) -> None:
    """Raise FloatingPointError naming the first parameter that holds NaN or Inf.

    Raises ValueError where a parameter has no values: it is on the meta device, and accelerate has
    not offloaded it.
    """
    for name, parameter in weights_of(model):
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model with its weights")
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} holds NaN or Inf; the model has not been changed")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding, an upper bound of the token ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions that the model was trained for; None where its config has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_positions(model: PreTrainedModel, length: int, name: str) -> None:
    """Warn where sequences of `length` tokens, called `name`, exceed the model's context length.

    Raises ValueError where the model has a table of position embeddings, which ends there. Rotary
    embeddings are computed for any position, at whatever quality.
    """
    limit = context_length(model)
    if limit is None or length <= limit:
        return
    excess = f"{name} has sequences of {length} tokens, more than the model's {limit} positions"
    if not hasattr(type(model.config.get_text_config()), "rope_parameters"):
        raise ValueError(f"{excess}: cut them")
    logger.warning("%s: its predictions beyond these may be poor, cut the sequences", excess)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each of its modules back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def causal_lm_name(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """Name of the class that the model has under the config, which may be of another type."""
    return str(_class_under(model, config).__name__)


def skeleton_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the config on the meta device, with the dtype and the attention of `model`.

    It is of the model's own class, or of the other type's causal LM if the config is of another.
    """
    model_class = _class_under(model, config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    return skeleton


def _class_under(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.model_type == model.config.model_type:
        return type(model)
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


def is_stock_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the model's class is the one that `AutoModelForCausalLM` gives for its config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return type(model) is mapping.get(type(model.config), None)


def auto_class(model_type: str) -> Any:
    """The auto class that loads a whole model of this type.

    It is `AutoModelForCausalLM`, or `AutoModelForImageTextToText` where that gives another class,
    which contains the text decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto as names

    whole = names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if whole in (None, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText
