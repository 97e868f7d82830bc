"""The decoder layers of a model whose type is unknown, found and run one at a time.

Layers are the blocks with projections of which there are as many as `num_hidden_layers`. One of
each structure serves as an example: a copy with random weights, so that no result depends on the
weights of the model at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.models.capture import hidden_states_of, layer_calls, takes_tuples
from grail_hf.models.decoder import vocabulary_size
from grail_hf.models.trace import TOKENS, Example, is_projection, noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """The model, and the path of its decoder layers in its base model."""

    model: PreTrainedModel
    layers_path: str

    @property
    def config(self) -> Any:
        """The text decoder's part of the config."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        return layers_at(self.model, self.layers_path)


def layers_at(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """The decoder layers at this path in the base model."""
    layers = model.base_model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_path(model: PreTrainedModel) -> str:
    """Path in the base model of its decoder layers.

    Raises:
        ValueError: none, or several, of the model's lists can be its decoder layers.
    """
    config: Any = model.config.get_text_config()
    number = getattr(config, "num_hidden_layers", None)
    lists: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
        if all(any(map(is_projection, list(layer.modules())[1:])) for layer in module)
    }
    inner = {name for name in lists for other in lists if name.startswith(f"{other}.")}
    outer = {name: layers for name, layers in lists.items() if name not in inner}
    for name, layers in outer.items():
        for index, layer in enumerate(layers):
            _check_plain(layer, f"{name}.{index}")
    ran = _modules_run(model, list(outer.values()))
    found = [name for name, layers in outer.items() if all(layer in ran for layer in layers)]
    if len(found) != 1:
        raise ValueError(
            f"the decoder layers of {model.config.model_type!r} cannot be identified: {len(found)} "
            f"lists ({', '.join(found) or 'none'}) hold num_hidden_layers={number} blocks of "
            "projections that run on text"
        )
    return found[0]


def _token_ids(model: PreTrainedModel) -> Tensor:
    """[1, T] int64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(model), (1, TOKENS), generator=generator)
    return ids.to(model.device)


@torch.no_grad()
def _modules_run(
    model: PreTrainedModel, lists: Sequence[nn.ModuleList]
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The lists' modules that run on text, each with the hidden states it takes and returns."""
    ran: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in ran:
            raise ValueError(f"a {type(module).__name__} runs more than once in a pass")
        hidden = args[0] if args else kwargs.get("hidden_states")
        returned = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or not isinstance(returned, Tensor):
            raise ValueError(
                f"a {type(module).__name__} returns a {type(output).__name__}: a decoder layer "
                "takes hidden_states and returns them, alone or as the first element of a tuple"
            )
        ran[module] = hidden.clone(), returned.clone()

    handles = [
        layer.register_forward_hook(look, with_kwargs=True) for layers in lists for layer in layers
    ]
    try:
        model.base_model(input_ids=_token_ids(model), use_cache=False)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the model does not run on token ids alone: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return ran


@torch.no_grad()
def layer_examples(subject: Subject) -> list[Example]:
    """One example of each structure among the layers.

    Raises:
        ValueError: a layer cannot be run by itself on the arguments it is called with.
    """
    from accelerate.utils.operations import recursively_apply

    model, layers = subject.model, subject.layers
    ran = _modules_run(model, [layers])
    ids = _token_ids(model)
    _, calls = layer_calls(model, layers, {"input_ids": ids}, takes_tuples(model, layers))
    examples: dict[Any, Example] = {}
    for index, layer in enumerate(layers):
        before, after = ran[layer]
        try:
            args, kwargs = calls[index]
            again = hidden_states_of(layer(before, *args, **kwargs))
        except (RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"layer {index} cannot be run by itself: {error}") from error
        if not torch.allclose(again, after, rtol=1e-3, atol=1e-3 * after.abs().max().item()):
            raise ValueError(
                f"layer {index} depends on more than its arguments, so the layers cannot be "
                "calibrated one at a time"
            )
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        if shapes not in examples:
            args, kwargs = recursively_apply(
                lambda x: x.float() if x.is_floating_point() else x, calls[index]
            )
            examples[shapes] = Example(index, _randomised(layer), args, kwargs, noise(before))
    return list(examples.values())


def _randomised(layer: nn.Module) -> nn.Module:
    """A copy in float32 in which no weight, bias or norm is near a neutral value."""
    twin = copy.deepcopy(layer).float().requires_grad_(False)
    for seed, parameter in enumerate(twin.parameters(), start=1):
        change = noise(parameter, seed)
        if parameter.ndim < 2:
            parameter.copy_(1 + 0.3 * change)
        else:
            parameter.copy_(change * (2 / sum(parameter.shape)) ** 0.5)
    return twin


def _check_plain(layer: nn.Module, layer_name: str) -> None:
    """Raise ValueError for weights that belong to no single Linear, such as those of experts."""
    for name, module in layer.named_modules(prefix=layer_name):
        many = isinstance(module, nn.ModuleList) and len(module) > 1
        if many and any(is_projection(inner) for inner in module.modules()):
            raise ValueError(
                f"{name} holds {len(module)} modules with projections, like experts, which are not "
                "supported"
            )
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise ValueError(
                    f"{name}.{key} of shape {list(parameter.shape)} is not the weight of a Linear; "
                    "experts and the like are not supported"
                )
