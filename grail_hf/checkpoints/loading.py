"""Load a source's model and tokenizer: of a folder, or of a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail_hf.checkpoints.reader import damage_named
from grail_hf.checkpoints.sources import has_tokenizer
from grail_hf.models.decoder import auto_class
from grail_hf.models.quantization import dequantizing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str, revision: str | None = None, dequantize: bool = False, **settings: Any
) -> PreTrainedModel:
    """The model in the dtype that its config names.

    Args:
        source: a folder, or a name on the hub.
        revision: of the hub's repository.
        dequantize: load quantised weights as floats.
        settings: of `from_pretrained`.

    Raises:
        OSError: a file of weights is missing, cut short or damaged.
        ValueError: the weights are quantised and cannot be loaded as floats.
    """
    from transformers import AutoConfig

    with damage_named(f"a file of weights of {source}"):
        config = AutoConfig.from_pretrained(source, revision=revision)
        if dequantize and (floats := dequantizing(config)):
            settings["quantization_config"] = floats
        model: PreTrainedModel = auto_class(config.model_type).from_pretrained(
            source, revision=revision, dtype="auto", **settings
        )
    return model


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, or None for a folder without one."""
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    return tokenizer


def shallow_model(source: str, revision: str | None = None) -> PreTrainedModel:
    """A random model of the source's config, with the fewest layers that include every kind."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [""]
    depth = min(text.num_hidden_layers, max(1 + max(map(kinds.index, kinds)), 2))
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    model: PreTrainedModel = auto_class(config.model_type).from_config(config)
    return model
