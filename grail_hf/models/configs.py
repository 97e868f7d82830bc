"""Config edits: how a stock `config.json` says the new widths, and another type where it cannot.

Nothing of grail_hf is needed to load the result, unless widths differ between layers (see
`modeling_grail`): the live model is given the very config that a plain `from_pretrained` will read,
and, where it moves to another model type, that type's own modules around the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from grail_hf.config import ATTENTION
from grail_hf.models.modeling_grail import AUTO_MAP, has_own_widths
from grail_hf.models.schema import GroupSpec, Rehome

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
ALLOW = "allow_global_per_layer_attribute_access"


def compressed_config(
    config: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    widths: Mapping[str, Sequence[int]],
    rehome: Rehome | None = None,
) -> PreTrainedConfig:
    """A config that says `widths`, of the same model type or, failing that, of `rehome`'s.

    Where layers differ, the widest gives the config's own values, and `per_layer_config` those of
    the others; `modeling_grail` is what reads it. Of a model with a text decoder inside, only the
    decoder's part changes.

    Args:
        config: of the dense model; not changed.
        specs: of each decoder layer, its groups.
        widths: kind -> units kept, one width a decoder layer.
        rehome: where the model may move; None forbids it.

    Raises:
        ValueError: neither type's config can say the widths, or this transformers knows no config
            whose layers differ.
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
        config: is not changed; if its layers differ, those of the result do not, but by `layers`.
        specs: of each decoder layer, its groups, for what a refusal says.
        edits: config key -> value, of all layers.
        rehome: where the model may move; None forbids it.
        layers: the layers that differ from that -> their own values.

    Raises:
        ValueError: neither type's config can say it, or this transformers knows no config whose
            layers differ.
    """
    says = ", ".join(f"{key}={value}" for key, value in edits.items())
    config = uniform_config(config)
    if layers:
        _check_own_widths(config)
    try:
        return _with_own_widths(_edited(config, edits), layers)
    except _Unsayable as error:
        refusal = f"a stock {config.model_type} config cannot say {says} ({error})"
        remedy = "choose another sparsity, attention_sparsity or attention_unit"
        if said := said_widths(config, specs):
            kept = ", ".join(map(str, sorted(said)))
            remedy += f"; of {max(said)} attention units a layer it can keep {kept}"
        if rehome is None:
            raise ValueError(f"{refusal}; {remedy}") from error
        if obstacles := rehome.obstacles(config):
            raise ValueError(
                f"{refusal}, and {', '.join(obstacles)} keeps it from being saved as "
                f"{rehome.model_type}; {remedy}"
            ) from error
    return _with_own_widths(rehomed_config(config, rehome, edits), layers)


def said_widths(
    config: PreTrainedConfig, specs: Sequence[Sequence[GroupSpec]]
) -> frozenset[int] | None:
    """The attention widths that a config of this type can say of all layers alike.

    The full width is always among them. None where no attention units can be removed.

    Args:
        config: of the dense model; not changed.
        specs: of each decoder layer, its groups.
    """
    attention = (s for layer in specs for s in layer if s.kind == ATTENTION and s.offered)
    spec = next(attention, None)
    if spec is None:
        return None
    config = uniform_config(config.get_text_config())
    said = {spec.num_units}
    for width in range(spec.partitions, spec.num_units, spec.partitions):
        with suppress(_Unsayable):
            _edited(config, spec.config_values(width))
            said.add(width)
    return frozenset(said)


def uniform_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config in which every layer is as wide as the widest.

    It has no `auto_map`: the stock class loads such a model, and code from the hub may compute a
    width from others. A model that is itself made of such code names it again when it is saved.
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
    """Have the compressed model's config say biases for the groups that it reduces.

    Returns:
        The kinds of group whose projections now have biases and had none. Where the model moves to
        another type, that is none: the other type may not know the key.
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


class _Unsayable(ValueError):
    """What a config class says of values that it does not take."""


def _edited(config: PreTrainedConfig, edits: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy with other values. Raises `_Unsayable` where the class does not take them."""
    from huggingface_hub.errors import StrictDataclassError

    edited = copy.deepcopy(config)
    try:
        for key, value in edits.items():
            setattr(edited, key, value)
        edited.validate()
    except (StrictDataclassError, ValueError) as error:
        raise _Unsayable(str(error).strip().splitlines()[-1].strip()) from error
    return edited


def _with_own_widths(
    config: PreTrainedConfig, layers: Mapping[int, Mapping[str, int]] | None
) -> PreTrainedConfig:
    """Give some layers values of their own, in place.

    This comes after all other edits: transformers compares these values with the config's, and it
    warns when a config whose layers differ is validated.
    """
    if layers:
        vars(config).update({ALLOW: True, "auto_map": dict(AUTO_MAP)})
        config.per_layer_config = {index: dict(own) for index, own in layers.items()}
    return config


def _check_own_widths(config: PreTrainedConfig) -> None:
    """Raise ValueError where no config can have layers that differ."""
    from transformers import __version__

    if not hasattr(type(config), "per_layer_config"):
        raise ValueError(
            f"transformers {__version__} has no config whose layers differ (per_layer_config): "
            "update transformers, or give every layer the same width (allocation='uniform' and no "
            "single layers in ignore)"
        )


def rehomed_config(
    config: PreTrainedConfig, rehome: Rehome, edits: Mapping[str, object] | None = None
) -> PreTrainedConfig:
    """The config as `rehome`'s model type, with `edits` and the keys that the type knows."""
    from transformers import AutoConfig

    to = rehome.model_type
    known = AutoConfig.for_model(to).to_dict().keys() - {"model_type", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    rehomed = AutoConfig.for_model(to, **(values | dict(edits or {}) | rehome.values(config)))
    rehomed.name_or_path = config.name_or_path
    return rehomed
