"""Config edits that represent new widths, in the model's own type or in another one.

The result loads without grail_hf, unless widths differ between layers (see `modeling_grail`). The
live model is given the very config that a plain `from_pretrained` will read; where it is converted
to another model type, `surgery` gives it that type's modules around the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from grail_hf.config import ATTENTION
from grail_hf.models.compatibility import Rehome
from grail_hf.models.modeling_grail import AUTO_MAP, has_own_widths
from grail_hf.models.schema import GroupSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
ALLOW = "allow_global_per_layer_attribute_access"


def compressed_config(
    config: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    widths: Mapping[str, Sequence[int]],
    rehome: Rehome | None = None,
) -> PreTrainedConfig:
    """A config that represents `widths`, of the same model type or, failing that, of `rehome`'s.

    Where layers differ, the config's own values are those of the widest layer, and
    `per_layer_config` holds those of the others, which `modeling_grail` reads. Of a model that
    contains a text decoder, only the decoder's part changes.

    Args:
        config: of the dense model; not changed.
        specs: the groups of each decoder layer.
        widths: kind -> units kept, one width per decoder layer.
        rehome: the model type that the model may be converted to; None forbids a conversion.

    Raises:
        ValueError: neither type's config can represent the widths, or this transformers has no
            configs whose layers differ.
    """
    text = config.get_text_config()
    if text is not config:
        decoder = compressed_config(text, specs, widths)
        return _edited(uniform_config(config), {"text_config": decoder})
    edits: dict[str, Any] = {}
    layers: dict[int, dict[str, int]] = {}
    for kind, of_kind in widths.items():
        offered = [
            (index, spec, of_kind[index])
            for index, layer in enumerate(specs)
            for spec in layer
            if spec.kind == kind and spec.offered
        ]
        widest = max((width for _, _, width in offered), default=0)
        for index, spec, width in offered:
            if width < spec.num_units:
                edits |= spec.config_values(widest)
            if width < widest:
                own = {key: width * n for key, n in spec.config_per_unit.items()}
                layers[index] = layers.get(index, {}) | own
    return edited_config(config, specs, edits, rehome, layers)


def edited_config(
    config: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    edits: dict[str, Any],
    rehome: Rehome | None = None,
    layers: Mapping[int, Mapping[str, int]] | None = None,
) -> PreTrainedConfig:
    """A config with `edits`, of the same model type or, failing that, of `rehome`'s.

    Args:
        config: not changed. Where its layers differ, the result's differ by `layers` alone.
        specs: the groups of each decoder layer, for the error message.
        edits: config key -> value, in all layers.
        rehome: the model type that the model may be converted to; None forbids a conversion.
        layers: layer -> its own values, of the layers that differ from `edits`.

    Raises:
        ValueError: neither type's config can represent the edits, or this transformers has no
            configs whose layers differ.
    """
    config = uniform_config(config)
    if layers:
        _check_own_widths(config)
    try:
        return _with_own_widths(_edited(config, edits), layers)
    except _NotRepresentable as error:
        values = ", ".join(f"{key}={value}" for key, value in edits.items())
        refusal = f"a stock {config.model_type} config cannot represent {values} ({error})"
        remedy = "choose another sparsity, attention_sparsity or attention_unit"
        if widths := representable_widths(config, specs):
            kept = ", ".join(map(str, sorted(widths)))
            remedy += f"; it can keep {kept} of the {max(widths)} attention units in a layer"
        if rehome is None:
            raise ValueError(f"{refusal}; {remedy}") from error
        if obstacles := rehome.obstacles(config):
            raise ValueError(
                f"{refusal}, and {', '.join(obstacles)} prevents a conversion to "
                f"{rehome.model_type}; {remedy}"
            ) from error
    return _with_own_widths(rehomed_config(config, rehome, edits), layers)


def representable_widths(
    config: PreTrainedConfig, specs: Sequence[Sequence[GroupSpec]]
) -> frozenset[int] | None:
    """The attention widths that a config of this type can represent, equal in all layers.

    They include the full width. None where no attention units can be removed.

    Args:
        config: of the dense model; not changed.
        specs: the groups of each decoder layer.
    """
    attention = (s for layer in specs for s in layer if s.kind == ATTENTION and s.offered)
    spec = next(attention, None)
    if spec is None:
        return None
    config = uniform_config(config.get_text_config())
    widths = {spec.num_units}
    for width in range(spec.partitions, spec.num_units, spec.partitions):
        with suppress(_NotRepresentable):
            _edited(config, spec.config_values(width))
            widths.add(width)
    return frozenset(widths)


def uniform_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config in which every layer is as wide as the widest.

    It has no `auto_map`: the stock class loads such a model, and code from the hub may compute one
    width from another. A model whose class comes from such code names it again when it is saved.
    """
    config = copy.deepcopy(config)
    if has_own_widths(config):
        config.per_layer_config = None
        del config.__dict__[ALLOW]
    vars(config).pop("auto_map", None)
    return config


def switch_on_biases_(
    new: PreTrainedConfig,
    dense: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    widths: Mapping[str, Sequence[int]],
) -> set[str]:
    """Enable biases in the compressed model's config, in place, for the groups that are reduced.

    Returns:
        The kinds of group whose projections now have biases and had none. None are enabled where
        the model is converted to another type, which may not have the key.
    """
    if new.model_type != dense.model_type:
        return set()
    new, dense = new.get_text_config(), dense.get_text_config()
    every = [(index, spec) for index, layer in enumerate(specs) for spec in layer]
    keys = {
        spec.bias_key
        for index, spec in every
        if spec.bias_key
        and widths[spec.kind][index] < spec.num_units
        and not getattr(dense, spec.bias_key)
    }
    for key in keys:
        setattr(new, key, True)
    return {spec.kind for _, spec in every if spec.bias_key in keys}


class _NotRepresentable(ValueError):
    """The message of a config class that rejects its values."""


def _edited(config: PreTrainedConfig, edits: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy with other values. Raises `_NotRepresentable` where the class rejects them."""
    from huggingface_hub.errors import StrictDataclassError

    edited = copy.deepcopy(config)
    try:
        for key, value in edits.items():
            setattr(edited, key, value)
        edited.validate()
    except (StrictDataclassError, ValueError) as error:
        raise _NotRepresentable(str(error).strip().splitlines()[-1].strip()) from error
    return edited


def _with_own_widths(
    config: PreTrainedConfig, layers: Mapping[int, Mapping[str, int]] | None
) -> PreTrainedConfig:
    """Give some layers values of their own, in place.

    This comes after all other edits, because transformers compares these values with the config's
    and warns when a config whose layers differ is validated.
    """
    if layers:
        vars(config).update({ALLOW: True, "auto_map": dict(AUTO_MAP)})
        config.per_layer_config = {index: dict(own) for index, own in layers.items()}
    return config


def _check_own_widths(config: PreTrainedConfig) -> None:
    """Raise ValueError where this transformers has no configs whose layers differ."""
    from transformers import __version__

    if not hasattr(type(config), "per_layer_config"):
        raise ValueError(
            f"transformers {__version__} has no configs whose layers differ (per_layer_config): "
            "update transformers, or give every layer the same width (allocation='uniform' and no "
            "single layers in ignore)"
        )


def rehomed_config(
    config: PreTrainedConfig, rehome: Rehome, edits: Mapping[str, object] | None = None
) -> PreTrainedConfig:
    """The config converted to `rehome`'s model type, with `edits` and the keys of that type."""
    from transformers import AutoConfig

    to = rehome.model_type
    known = AutoConfig.for_model(to).to_dict().keys() - {"model_type", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    rehomed = AutoConfig.for_model(to, **(values | dict(edits or {}) | rehome.values(config)))
    rehomed.name_or_path = config.name_or_path
    return rehomed
