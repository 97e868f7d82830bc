"""An `Architecture` for a model type that the table does not know, read off a model and checked.

How it is found. In one pass of a decoder layer every projection's output is replaced by a leaf of
autograd, so that gradients show what is made of what, with no other projection in between:

- a consumer is a projection that the layer's output is made of and whose input is made of other
  projections' outputs alone (the projections at the front read the residual stream);
- an MLP's consumer reads its own token, attention's reads other tokens too;
- of three projections in front of attention, the query's alone matters at its own token only, and
  the value's is the one that the consumer's input is linear in.

How rows fall to units, and which config keys hold the widths, is proposed from shapes and values.

How it is checked. With random weights, so that nothing hangs on those of the model at hand: a
decoder layer from which units are cut must compute what the layer with these units' consumer
columns zeroed computes, and so must the layer that the model's own class builds from the config
that says the new width, with the cut weights in it. What fails is not offered.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from posixpath import commonpath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.methods.reduction import Reduction
from grail_hf.models.architectures import INNER_CONFIG
from grail_hf.models.capture import hidden_states_of, layer_calls, takes_tuples
from grail_hf.models.configs import compressed_config
from grail_hf.models.decoder import check_model, evaluation_mode, vocabulary_size
from grail_hf.models.groups import Group
from grail_hf.models.modeling_grail import layer_classes
from grail_hf.models.schema import Architecture, Attention, Block, GroupSpec, Mlp, Refusal, Whole
from grail_hf.models.trace import (
    HIDDEN,
    TOKENS,
    TOLERANCE,
    Example,
    Trace,
    is_projection,
    noise,
    relative_error,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
# What cutting units must change at the least, for the comparison to mean anything.
EFFECT = 1e-4
WIDTHS_TRIED = 64
# What configs and models raise on values that they were not made for.
UNBUILT = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def infer_architecture(model: PreTrainedModel) -> Architecture:
    """Propose the entry for a decoder-only model whose type is not in the table, and check it.

    What the check does not confirm stays whole in the proposal, with the reason. The model is not
    changed; its weights do not matter (a model `from_config` with few layers will do), but they
    must be there.

    Returns:
        An entry for `compress(model, …, architecture=entry)`; `architecture_source(entry)` is the
        line for the table in `grail_hf/models/architectures.py`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder-decoder, a quantised model, one on the meta device; no decoder
            layers, or layers that are not attention and an MLP (experts, for example); or nothing
            can become narrower.
    """
    check_model(model)
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        raise ValueError("the model's config has values for single layers, which are not inferred")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: build it with from_config elsewhere")
    model_type = model.config.model_type
    with evaluation_mode(model):
        subject = _Subject(model, _layers_path(model))
        examples = _examples(subject)
        found = [blocks for example in examples for blocks in _blocks(subject, example)]
    attention, mlp, others = _merged([block for block, _ in found])
    entry = Architecture(
        model_type,
        layers=subject.layers_path,
        attention=attention,
        mlp=mlp,
        others=others,
        residual_scale_key=_residual_scale_key(subject, [scale for _, scale in found]),
        per_layer=_per_layer(subject),
    )
    specs = [spec for layer in subject.layers for spec in entry.groups(model.config, layer)]
    if not any(spec.offered for spec in specs):
        reasons = dict.fromkeys(f"its {spec.kind} because {spec.refusal}" for spec in specs)
        raise ValueError(f"a {model_type} can become narrower nowhere; {'; '.join(reasons)}")
    return entry


@dataclass(frozen=True)
class _Subject:
    """The model, and where its decoder layers lie in its base model."""

    model: PreTrainedModel
    layers_path: str

    @property
    def config(self) -> Any:
        """The text decoder's part of the config."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        return _layers(self.model, self.layers_path)


def _layers(model: PreTrainedModel, path: str) -> nn.ModuleList:
    layers = model.base_model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _layers_path(model: PreTrainedModel) -> str:
    """Path in the base model of the list of as many blocks with projections as there are layers."""
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
            f"{model.config.model_type!r} has no decoder layers that can be told: {len(found)} "
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
    """The lists' modules that run on text, each with the hidden states it gets and returns."""
    ran: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in ran:
            raise ValueError(f"a {type(module).__name__} runs more than once in a pass")
        hidden = args[0] if args else kwargs.get("hidden_states")
        behind = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or not isinstance(behind, Tensor):
            raise ValueError(
                f"a {type(module).__name__} returns a {type(output).__name__}: a decoder layer "
                "takes hidden_states and returns them, alone or as the first of a tuple"
            )
        ran[module] = hidden.clone(), behind.clone()

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
def _examples(subject: _Subject) -> list[Example]:
    """One example for each structure among the layers.

    Raises ValueError where a layer cannot be run by itself on what it is called with.
    """
    from accelerate.utils.operations import recursively_apply

    model, layers = subject.model, subject.layers
    ran = _modules_run(model, [layers])
    ids = _token_ids(model)
    _, calls = layer_calls(model, layers, {"input_ids": ids}, takes_tuples(model, layers))
    examples: dict[Any, Example] = {}
    for index, layer in enumerate(layers):
        front, behind = ran[layer]
        try:
            args, kwargs = calls[index]
            again = hidden_states_of(layer(front, *args, **kwargs))
        except (RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"layer {index} cannot be run by itself: {error}") from error
        if not torch.allclose(again, behind, rtol=1e-3, atol=1e-3 * behind.abs().max().item()):
            raise ValueError(
                f"layer {index} depends on more than what it is called with: layers cannot be "
                "calibrated one at a time"
            )
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        if shapes not in examples:
            args, kwargs = recursively_apply(
                lambda x: x.float() if x.is_floating_point() else x, calls[index]
            )
            examples[shapes] = Example(index, _randomised(layer), args, kwargs, noise(front))
    return list(examples.values())


def _randomised(layer: nn.Module) -> nn.Module:
    """A copy in float32, in which no weight, bias or norm is near a neutral value."""
    twin = copy.deepcopy(layer).float().requires_grad_(False)
    for seed, parameter in enumerate(twin.parameters(), start=1):
        change = noise(parameter, seed)
        if parameter.ndim < 2:
            parameter.copy_(1 + 0.3 * change)
        else:
            parameter.copy_(change * (2 / sum(parameter.shape)) ** 0.5)
    return twin


def _check_plain(layer: nn.Module, layer_name: str) -> None:
    """Raise ValueError for weights that are not one Linear's, as experts have them."""
    for name, module in layer.named_modules(prefix=layer_name):
        many = isinstance(module, nn.ModuleList) and len(module) > 1
        if many and any(is_projection(inner) for inner in module.modules()):
            raise ValueError(
                f"{name} holds {len(module)} modules with projections, as of experts, which are "
                "not offered"
            )
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise ValueError(
                    f"{name}.{key} of shape {list(parameter.shape)} is no Linear's weight; experts "
                    "and the like are not offered"
                )


class _Unfit(Exception):
    """Why a block stays whole, to be read after "because"."""


@torch.enable_grad()
def _blocks(subject: _Subject, example: Example) -> list[tuple[Block, float | None]]:
    """The example's attention and MLP, each with the factor in front of its output."""
    trace = Trace(example)
    consumers: dict[str, dict[str, dict[str, Tensor]]] = {ATTENTION: {}, MLP: {}}
    for path, sources in trace.consumers().items():
        mixes = any(bool(gradient[:-1].any()) for gradient in sources.values())
        consumers[ATTENTION if mixes else MLP][path] = sources
    blocks = []
    for kind, found in consumers.items():
        if len(found) != 1:
            raise ValueError(
                f"layer {example.index} has {len(found)} blocks ({', '.join(found) or 'none'}) in "
                f"place of one {kind}: only layers of one attention and one MLP are described"
            )
        ((path, sources),) = found.items()
        scale = trace.residual_scale(path)
        if kind == ATTENTION and trace.residual_scale(HIDDEN) != 1:
            scale = None  # what an earlier layer lacks does not reach the output as it is
        post_norm = trace.norm_behind(path) if scale is None else None
        if scale is None and post_norm is None:
            raise ValueError(f"what lies between {path} and the residual stream cannot be told")
        propose = _attention if kind == ATTENTION else _mlp
        try:
            block = propose(subject, trace, path, sources)
        except _Unfit as error:
            parent = commonpath([name.replace(".", "/") for name in (path, *sources)])
            block = Whole(kind, parent.replace("/", ".") or path, path, str(error))
        blocks.append((replace(block, post_norm=post_norm), scale))
    return blocks


def _mlp(subject: _Subject, trace: Trace, path: str, sources: Mapping[str, Tensor]) -> Block:
    width = _size(trace, path)[1]
    rows = {_size(trace, source)[0] for source in sources}
    if len(rows) != 1 or min(rows) % width:
        raise _Unfit(f"{', '.join(sources)} have {sorted(rows)} rows for {width} channels")
    sections = min(rows) // width
    block = Mlp(
        inputs=tuple(sources),
        sections=sections,
        linear=None,
        output=path,
        transposed=_transposed(trace, path),
    )
    _check_fit(subject, trace.example, block)
    for source in sources:
        refitted = replace(block, linear=source)
        block = refitted if _is_linear(subject, trace, refitted) else block
    assert block.width_key is not None
    keys = _keys(subject.config, width, block.width_key, unset=True)
    named = [replace(block, width_key=key) for key in keys]
    reason = "no key of its config gives its MLP another width"
    return _first_sayable(subject, trace.example, named) or _refused(block, reason)


def _attention(subject: _Subject, trace: Trace, path: str, sources: Mapping[str, Tensor]) -> Block:
    config, channels = subject.config, _size(trace, path)[1]
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    if not head_dim or channels % head_dim:
        raise _Unfit(f"{path} has {channels} inputs, which are no heads of {head_dim}")
    heads, inputs = channels // head_dim, _query_key_value(trace, path, sources)
    rows = sum(_size(trace, source)[0] for source in inputs)
    misfit = _Unfit(f"the {rows} rows of {', '.join(inputs)} are not those of {heads} heads")
    for interleaved, query_rows in ((False, 1), (True, 1), (False, 2), (True, 2)):
        kv_heads, rest = divmod(rows - heads * query_rows * head_dim, 2 * head_dim)
        if rest or kv_heads < 1 or heads % kv_heads or (interleaved and len(inputs) == 3):
            continue
        block = Attention(
            inputs=inputs,
            interleaved=interleaved,
            query_rows=query_rows,
            output=path,
            head_norms=_head_norms(trace, inputs),
            transposed=_transposed(trace, path),
        )
        try:
            _check_fit(subject, trace.example, block)
        except _Unfit as error:
            misfit = error
            continue
        if not _is_linear(subject, trace, block):
            block = replace(block, linear_if=None)
        named = [
            replace(block, heads_key=heads_key, kv_heads_key=kv_heads_key)
            for heads_key in _keys(config, heads, block.heads_key)
            for kv_heads_key in _keys(config, kv_heads, block.kv_heads_key)
            if kv_heads_key != heads_key
        ]
        reason = "no values of its config give it fewer heads of the same size"
        return _first_sayable(subject, trace.example, named) or _refused(block, reason)
    raise misfit


def _is_linear(subject: _Subject, trace: Trace, block: Attention | Mlp) -> bool:
    """Whether what the block says to be linear is, and lies in the consumer's module."""
    spec = block.group(subject.config, trace.example.layer, ATTENTION_UNITS[0])
    linear = Group(trace.example.layer, spec, "").linear
    if spec.linear is None or linear is None or _parent(spec.linear.path) != _parent(block.output):
        return False
    return trace.linear_in(block.output, spec.linear.path, linear.index)


def _query_key_value(trace: Trace, path: str, sources: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The projections in front of attention's consumer, in this order, or the one of all three."""
    if len(sources) == 1:
        return tuple(sources)
    queries = [source for source, gradient in sources.items() if not gradient[:-1].any()]
    values = [source for source in sources if trace.linear_in(path, source)]
    if len(sources) != 3 or len(queries) != 1 or len(values) != 1:
        raise _Unfit(
            f"of {', '.join(sources)}, one alone should be read at its own token ("
            f"{', '.join(queries) or 'none'} is) and what it puts out be linear in one "
            f"({', '.join(values) or 'none'})"
        )
    if {_parent(source) for source in sources} != {_parent(path)}:
        raise _Unfit("its projections lie in several modules")
    (key,) = set(sources) - {*queries, *values}
    return (*queries, key, *values)


def _head_norms(trace: Trace, inputs: Sequence[str]) -> tuple[str, ...]:
    """Norms with a row for each head, of queries first and then of keys."""
    norms = {}
    for path, x in trace.inputs.items():
        weight = getattr(trace.example.layer.get_submodule(path), "weight", None)
        if path not in trace.projections and isinstance(weight, Tensor) and weight.ndim == 2:
            made_of = trace.gradients(x).keys() & set(inputs)
            norms[path] = min((inputs.index(source) for source in made_of), default=len(inputs))
    return tuple(path for path in sorted(norms, key=norms.__getitem__) if norms[path] < 2)


def _refused(block: Attention | Mlp, reason: str) -> Block:
    return replace(block, refused=(Refusal(reason),))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _size(trace: Trace, path: str) -> tuple[int, int]:
    """(outputs, inputs) of a projection."""
    rows, columns = trace.projections[path].weight.shape
    return (columns, rows) if _transposed(trace, path) else (rows, columns)


def _transposed(trace: Trace, path: str) -> bool:
    return not isinstance(trace.projections[path], nn.Linear)


def _keys(config: Any, value: int, usual: str, unset: bool = False) -> list[str]:
    """Config keys that hold `value`, the usual name first; if `unset`, then those that hold None.

    Where none holds it, the usual name.
    """
    values = {usual: getattr(config, usual, None)} | config.to_dict()
    keys = [key for key, held in values.items() if type(held) is int and held == value]
    if unset:
        keys += [key for key, held in config.to_dict().items() if held is None]
    return keys or [usual]


def _merged(blocks: Sequence[Block]) -> tuple[Any, Any, tuple[Block, ...]]:
    """Attention, MLP and the others; of each kind, the first with units is the usual one."""
    usual: list[Any] = []
    others: list[Block] = []
    for kind in (ATTENTION, MLP):
        of_kind: dict[str, Block] = {}
        for block in blocks:
            if block.kind != kind:
                continue
            known = of_kind.setdefault(block.output, block)
            # A norm that only some layers have is told by the layer.
            post_norm = known.post_norm or block.post_norm
            of_kind[block.output] = replace(known, post_norm=post_norm)
            if replace(block, post_norm=post_norm) != of_kind[block.output]:
                raise ValueError(f"{block.output} differs between layers: {known} and {block}")
        first = sorted(of_kind.values(), key=lambda block: isinstance(block, Whole))
        usual.append(first[0])
        others += first[1:]
    attention, mlp = usual
    return attention, mlp, tuple(others)


def _residual_scale_key(subject: _Subject, scales: Sequence[float | None]) -> str | None:
    """The config key of the factor in front of the blocks' outputs; None where that is 1."""
    factors = [scale for scale in scales if scale is not None]
    if all(factor == 1 for factor in factors):
        return None
    keys: list[str] = [
        key
        for key, value in subject.config.to_dict().items()
        if isinstance(value, float) and all(abs(f - value) < 1e-4 * abs(f) for f in factors)
    ]
    named = [key for key in keys if "residual" in key] or keys
    if len(named) != 1:
        raise ValueError(
            f"the blocks' outputs are added with the factors {sorted(set(factors))}, which "
            f"{'no config key holds' if not keys else ', '.join(keys) + ' all hold'}"
        )
    return named[0]


def _per_layer(subject: _Subject) -> Refusal | None:
    """Why layers cannot differ in width."""
    if subject.config is not subject.model.config:
        return INNER_CONFIG
    layer_class = type(subject.layers[0])
    known = layer_class in layer_classes(type(subject.model))
    parameters = inspect.signature(layer_class.__init__).parameters.keys()
    if known and {"config", "layer_idx"} <= parameters:
        return None
    return Refusal("its decoder layers are not known to be built from a config and their index")


def _check_fit(subject: _Subject, example: Example, block: Block) -> None:
    """Raise `_Unfit` where cutting the block's units is not zeroing what they feed."""
    specs = [block.group(subject.config, example.layer, unit) for unit in ATTENTION_UNITS]
    specs = [spec for spec in specs if spec.num_units > spec.partitions]
    if not specs:
        raise _Unfit("it has a single unit")
    for spec in specs:
        try:
            cut, zeroed = _cut_and_zeroed(example, spec, spec.num_units - spec.partitions)
            error = relative_error(example.output(cut), zeroed)
        except (RuntimeError, IndexError) as failure:
            raise _Unfit("the layer does not run with a unit less") from failure
        if not error < TOLERANCE:
            raise _Unfit("cutting a unit changes what the others put out")
        if not relative_error(zeroed, example.output()) > EFFECT:
            raise _Unfit("cutting a unit changes too little for a comparison")


@torch.no_grad()
def _cut_and_zeroed(example: Example, spec: GroupSpec, width: int) -> tuple[nn.Module, Tensor]:
    """The layer with `width` units, and [1, T, D], what it puts out with the others' columns 0."""
    reduction = _some_units(spec, width)
    zeroed = Group(copy.deepcopy(example.layer), spec, "")
    zeroed.weight[:, reduction.removed_channels(spec.columns)] = 0
    cut = copy.deepcopy(example.layer)
    _cut_(cut, spec, reduction)
    return cut, example.output(zeroed.layer)


def _some_units(spec: GroupSpec, width: int) -> Reduction:
    scores = torch.rand(spec.num_units, generator=torch.Generator().manual_seed(width))
    return Reduction.keep_top(scores, width, spec.partitions)


def _cut_(layer: nn.Module, spec: GroupSpec, reduction: Reduction) -> None:
    group = Group(layer, spec, "")
    group.shrink_(reduction)
    kept = reduction.kept_channels(spec.columns)
    group.projection(spec.consumer).put_(group.weight[:, kept])


def _first_sayable(subject: _Subject, example: Example, blocks: Sequence[Block]) -> Block | None:
    """The first of the blocks whose config keys say its widths."""
    return next((block for block in blocks if _sayable(subject, example, block)), None)


def _sayable(subject: _Subject, example: Example, block: Block) -> bool:
    """Whether a config of fewer units makes a model that computes what the cut one does."""
    unit = ATTENTION_UNITS[0]
    spec = block.group(subject.config, example.layer, unit)
    if spec.num_units == 1:
        unit = ATTENTION_UNITS[1]
        spec = block.group(subject.config, example.layer, unit)
    specs = [
        (block.group(subject.config, layer, unit),) if _has(layer, block) else ()
        for layer in subject.layers
    ]
    for width in range(spec.num_units - spec.partitions, 0, -spec.partitions)[:WIDTHS_TRIED]:
        widths = {block.kind: [width] * len(specs)}
        try:
            config = compressed_config(subject.model.config, specs, widths)
            built = _skeleton(subject.model, config)
        except UNBUILT:
            continue
        expected = _skeleton(subject.model, subject.model.config)
        for layer, of_layer in zip(_layers(expected, subject.layers_path), specs, strict=True):
            for group in of_layer:
                _cut_(layer, group, _some_units(group, width))
        if _shapes(built) != _shapes(expected):
            return False
        cut, zeroed = _cut_and_zeroed(example, spec, width)
        fresh = _layers(built, subject.layers_path)[example.index].eval()
        try:
            _fill_(fresh, cut)
            return relative_error(example.output(fresh), zeroed) < TOLERANCE
        except (RuntimeError, ValueError):
            return False
    return False


def _has(layer: nn.Module, block: Block) -> bool:
    return block.output in dict(layer.named_modules())


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    model_class: Any = type(model)
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class._from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    return skeleton


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Of parameters and buffers; those of a rotary embedding tell the size of the heads."""
    return {
        name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _fill_(layer: nn.Module, other: nn.Module) -> None:
    """Give the layer the parameters and buffers of another of the same shapes."""
    for module, twin in zip(layer.modules(), other.modules(), strict=True):
        module._parameters.update(twin._parameters)
        module._buffers.update(twin._buffers)
