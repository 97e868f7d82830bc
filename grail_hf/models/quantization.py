"""Quantised models: detecting them, and loading their checkpoints as floats.

A model's weights decide whether it is quantised. Its `hf_quantizer` and `quantization_config` do
not: transformers leaves both on a model that it has read from a GGUF file and dequantised.
The semi-private uses of transformers' quantisers are in this module alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
_KEY = "quantization_config"
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # not int64, the dtype of positions


def check_not_quantised(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose weights are quantised, naming how to load it as floats.

    A model on the meta device that no quantizer has loaded is judged by its config.
    """
    settings = _quantization(model.config)
    quantizer = getattr(model, "hf_quantizer", None)
    if settings is None and quantizer is None:
        return
    unloaded = quantizer is None and all(parameter.is_meta for parameter in model.parameters())
    if not unloaded and all(_is_plain(tensor) for tensor in _tensors(model)):
        return
    method = _method(settings)
    kind = _offers_dequantization(settings)
    as_floats = ""
    if kind is not None:
        as_floats = (
            f"load it with quantization_config={kind.__name__}(dequantize=True) (on the command "
            "line --dequantize), or "
        )
    raise ValueError(
        f"the model is quantised{f' ({method})' if method else ''}: {as_floats}compress the "
        "full-precision model; then quantise the result"
    )


def dequantizing(config: PreTrainedConfig) -> Any:
    """The settings with which `from_pretrained` loads a checkpoint's quantised weights as floats.

    Args:
        config: of the checkpoint.

    Returns:
        The argument `quantization_config`; None for a checkpoint that is not quantised.

    Raises:
        ValueError: this transformers cannot dequantise such weights while it loads them.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    stored = _quantization(config)
    if stored is None:
        return None
    if _offers_dequantization(stored) is None:
        raise ValueError(
            f"transformers cannot dequantise {_method(stored)} weights while it loads them: "
            "compress the full-precision model"
        )
    settings: Any = AutoQuantizationConfig.from_dict(copy.deepcopy(stored))
    settings.dequantize = True
    return settings


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config without quantisation settings."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        vars(part).pop(_KEY, None)
    return config


def forget_quantization_(model: PreTrainedModel) -> None:
    """Remove, in place, the traces of quantisation from a model whose weights are floats.

    Otherwise `save_pretrained` refuses a model that was read from a GGUF file, and saves the
    weights of a dequantised model under the names of quantised tensors (transformers < 5.24).
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for part in (model.config, model.config.get_text_config()):
        vars(part).pop(_KEY, None)
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [op for each in conversions for op in getattr(each, "operations", ())]
    if any(hasattr(operation, "hf_quantizer") for operation in operations):
        vars(model).pop("_weight_conversions")  # saving then uses those of the model type


def _quantization(config: PreTrainedConfig) -> Any:
    """The quantisation settings in a config: a dict, transformers' own class, or None."""
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, _KEY, None))), None)


def _method(settings: Any) -> str | None:
    """The name of the method: "fp8", "mxfp4", "gptq", …"""
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    return None if method is None else str(getattr(method, "value", method))


def _offers_dequantization(settings: Any) -> type | None:
    """transformers' settings class for the method, if it has the argument `dequantize`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind: type | None = AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method(settings) or "")
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return None
    return kind


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters, and the buffers that may hold packed weights."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.dtype in _PACKED and b.dim() > 1)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is an ordinary parameter of floating-point numbers of 16 bits or more."""
    return type(tensor) is nn.Parameter and tensor.is_floating_point() and tensor.itemsize > 1
