"""Decoder layers of different widths, in transformers' own models.

A checkpoint whose layers grail_hf has narrowed by different amounts lists their widths in its
config under transformers' own `per_layer_config`, which most model code does not read. This file
closes that gap. It needs torch and transformers alone, and is used in two ways:

- `import grail_hf` installs it, and such a checkpoint then loads like any other.
- A copy is saved beside the weights: `from_pretrained(…, trust_remote_code=True)` runs it, and
  grail_hf is not needed.

Either way the model is of the stock class, and each decoder layer is built with its own layer's
config. Models of other configs are built as usual.

Two classes of transformers are patched: `PreTrainedModel.__init__`, because no hook runs before a
model builds its layers, and `PreTrainedConfig.save_pretrained`, which writes the copy. Importing
them takes seconds, and vLLM calls `install_hook` in each of its processes, so a finder in
`sys.meta_path` patches them right after transformers imports them for its own use. All of this can
be removed once transformers builds each decoder layer from `config.per_layer_config[layer_idx]`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

MODELS = "transformers.modeling_utils"
MARK = "_knows_grail"


class GrailForCausalLM:
    """The class in the config's `auto_map`: it builds the stock causal LM of the config.

    The methods are those that transformers calls on a class that it finds beside the weights.
    """

    mapping = "MODEL_FOR_CAUSAL_LM_MAPPING"

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> Any:
        install_hook()
        return cls._stock(config).from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        install_hook()
        return cls._stock(config)._from_config(config, **kwargs)

    @classmethod
    def _stock(cls, config: Any) -> Any:
        import transformers

        return getattr(transformers, cls.mapping)[type(config)]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `auto_map` is in the config, and saving the config copies this file."""


class GrailModel(GrailForCausalLM):
    """The same for the base model, which has no head."""

    mapping = "MODEL_MAPPING"


AUTO_MAP = {
    "AutoModel": f"modeling_grail.{GrailModel.__name__}",
    "AutoModelForCausalLM": f"modeling_grail.{GrailForCausalLM.__name__}",
}


def has_own_widths(config: Any) -> bool:
    """Whether grail_hf wrote this config, with widths that differ between layers."""
    auto_map = getattr(config, "auto_map", None) or {}
    name = auto_map.get("AutoModelForCausalLM")
    # Older transformers write `repository--module.class` where the code came from a repository.
    ours = isinstance(name, str) and name.endswith(AUTO_MAP["AutoModelForCausalLM"])
    return ours and getattr(config, "is_heterogeneous", False)


def install_hook() -> None:
    """Let transformers build, load and save such models.

    Patches `PreTrainedModel.__init__` and `PreTrainedConfig.save_pretrained`, each once: now, or
    when transformers imports them.
    """
    if MODELS in sys.modules:
        _patch_(sys.modules[MODELS])
    elif not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


class _PatchOnImport(MetaPathFinder):
    """Patches transformers' models right after their import, without importing them itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                _patch_(module)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch_(models: ModuleType) -> None:
    model_class, config_class = models.PreTrainedModel, models.PreTrainedConfig
    build, save = model_class.__init__, config_class.save_pretrained
    if hasattr(build, MARK):
        return

    @functools.wraps(build)
    def build_model(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # Runs before the model's own `__init__` makes its layers.
        build(self, config, *args, **kwargs)
        if has_own_widths(config):
            for layer_class in layer_classes(type(self)):
                _patch_layer_class_(layer_class)

    @functools.wraps(save)
    def save_config(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save(self, save_directory, *args, **kwargs)
        if has_own_widths(self):
            here = Path(__file__)
            Path(save_directory, here.name).write_bytes(here.read_bytes())

    setattr(build_model, MARK, True)
    model_class.__init__, config_class.save_pretrained = build_model, save_config


def layer_classes(model_class: type) -> Iterator[type]:
    """The classes of a model's decoder layers: those that transformers does not split."""
    for name in getattr(model_class, "_no_split_modules", None) or ():
        for base in model_class.__mro__:
            found = getattr(sys.modules.get(base.__module__), name, None)
            if isinstance(found, type):
                yield found
                break


def _patch_layer_class_(layer_class: Any) -> None:
    """Patch `layer_class(config, layer_idx)` to be built with its own layer's config."""
    build = layer_class.__init__
    signature = inspect.signature(build)
    if hasattr(build, MARK) or not {"config", "layer_idx"} <= signature.parameters.keys():
        return

    @functools.wraps(build)
    def build_layer(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        config, index = call.arguments["config"], call.arguments.get("layer_idx")
        if index is None or not has_own_widths(config):
            build(self, *args, **kwargs)
            return
        own = call.arguments["config"] = config.per_layer_config[index]
        build(*call.args, **call.kwargs)
        share_config_(self, own, config, index)

    setattr(build_layer, MARK, True)
    layer_class.__init__ = build_layer


def share_config_(layer: nn.Module, old: Any, config: Any, index: int) -> None:
    """Replace `old` in the layer's modules by `config`, with the layer's widths where needed.

    A module that kept a copy would not see later changes to the model's config, such as another
    attention implementation, and would silently compute something else.

    Args:
        layer: the decoder layer; changed in place.
        old: the config that is replaced.
        config: the model's.
        index: the layer's.
    """
    names = config.per_layer_attributes or set()
    widths = {name: getattr(config.per_layer_config[index], name) for name in names}
    module: Any
    for module in layer.modules():
        held = vars(module).get("config")
        if held is old or isinstance(held, LayerConfig):
            reads = widths.keys() & names_read_after_init(type(module))
            module.config = LayerConfig(config, widths) if reads else config


def names_read_after_init(module_class: type) -> set[str]:
    """Names that the class's methods use after construction, such as keys of a config."""
    methods = inspect.getmembers(module_class, inspect.isfunction)
    return {
        name
        for method, function in methods
        if method != "__init__"
        for name in inspect.unwrap(function).__code__.co_names
    }


class LayerConfig:
    """The model's live config, overridden by one layer's widths.

    It serves the few modules that read a width from their config at each forward pass.
    """

    def __init__(self, config: Any, widths: dict[str, Any]) -> None:
        vars(self).update(widths, _config=config)

    def __getattr__(self, name: str) -> Any:
        # Called for keys other than the widths. `copy` looks keys up before `_config` is set.
        if name == "_config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._config, name)
