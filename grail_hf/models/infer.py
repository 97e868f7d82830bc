"""Infer an `Architecture` for a model type that the table does not know, and check it.

How it is found. In one pass of a decoder layer every projection's output is replaced by a leaf of
autograd, so that gradients show which projections an activation depends on directly:

- a consumer is a projection that the layer's output depends on and whose input depends on outputs
  of other projections alone (the first projections of a block read the residual stream);
- an MLP's consumer reads its own token, attention's reads other tokens too;
- of the three projections before attention, only the query's matters at its own token alone, and
  the value's is the one in which the consumer's input is linear.

How rows belong to units, and which config keys hold the widths, is proposed from shapes and values.

How it is checked: `infer_checks`. Blocks that fail the check are not pruned.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from posixpath import commonpath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.models.architectures import INNER_CONFIG
from grail_hf.models.compatibility import Refusal
from grail_hf.models.decoder import check_model, evaluation_mode
from grail_hf.models.groups import Group
from grail_hf.models.infer_checks import Unfit, check_fit, first_representable
from grail_hf.models.infer_layers import Subject, layer_examples, layers_path
from grail_hf.models.modeling_grail import layer_classes
from grail_hf.models.schema import Architecture, Attention, Block, Mlp, Whole
from grail_hf.models.trace import HIDDEN, Example, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def infer_architecture(model: PreTrainedModel) -> Architecture:
    """Propose the entry for a decoder-only model whose type is not in the table, and check it.

    A block that the check does not confirm is kept whole in the proposal, with the reason. The
    model is not changed. The values of its weights do not matter (a model `from_config` with few
    layers suffices), but they must exist.

    Returns:
        An entry for `compress(model, …, architecture=entry)`; `architecture_source(entry)` is its
        Python source for the table in `grail_hf/models/architectures.py`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder-decoder, a quantised model, or one on the meta device; no decoder
            layers, or layers that are not attention and an MLP (experts, for example); or no block
            can be pruned.
    """
    check_model(model)
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        raise ValueError("the config has values for single layers, which cannot be inferred")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: build it with from_config on the CPU")
    model_type = model.config.model_type
    with evaluation_mode(model):
        subject = Subject(model, layers_path(model))
        examples = layer_examples(subject)
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
        reasons = dict.fromkeys(f"its {spec.kind}, because {spec.refusal}" for spec in specs)
        raise ValueError(f"no block of a {model_type} can be pruned: not {'; not '.join(reasons)}")
    return entry


@torch.enable_grad()
def _blocks(subject: Subject, example: Example) -> list[tuple[Block, float | None]]:
    """The example's attention and MLP, each with the factor on its output in the stream."""
    trace = Trace(example)
    consumers: dict[str, dict[str, dict[str, Tensor]]] = {ATTENTION: {}, MLP: {}}
    for path, sources in trace.consumers().items():
        mixes = any(bool(gradient[:-1].any()) for gradient in sources.values())
        consumers[ATTENTION if mixes else MLP][path] = sources
    blocks = []
    for kind, found in consumers.items():
        if len(found) != 1:
            raise ValueError(
                f"layer {example.index} has {len(found)} blocks ({', '.join(found) or 'none'}) "
                f"instead of one {kind}: only layers of one attention and one MLP are supported"
            )
        ((path, sources),) = found.items()
        scale = trace.residual_scale(path)
        if kind == ATTENTION and trace.residual_scale(HIDDEN) != 1:
            scale = None  # errors of earlier layers do not reach the output unchanged
        post_norm = trace.norm_after(path) if scale is None else None
        if scale is None and post_norm is None:
            raise ValueError(f"unknown operations lie between {path} and the residual stream")
        propose = _attention if kind == ATTENTION else _mlp
        try:
            block = propose(subject, trace, path, sources)
        except Unfit as error:
            parent = commonpath([name.replace(".", "/") for name in (path, *sources)])
            block = Whole(kind, parent.replace("/", ".") or path, path, str(error))
        blocks.append((replace(block, post_norm=post_norm), scale))
    return blocks


def _mlp(subject: Subject, trace: Trace, path: str, sources: Mapping[str, Tensor]) -> Block:
    width = _size(trace, path)[1]
    rows = {_size(trace, source)[0] for source in sources}
    if len(rows) != 1 or min(rows) % width:
        raise Unfit(f"{', '.join(sources)} have {sorted(rows)} rows for {width} channels")
    sections = min(rows) // width
    block = Mlp(
        inputs=tuple(sources),
        sections=sections,
        linear=None,
        output=path,
        transposed=_transposed(trace, path),
    )
    check_fit(subject, trace.example, block)
    for source in sources:
        refitted = replace(block, linear=source)
        block = refitted if _is_linear(subject, trace, refitted) else block
    assert block.width_key is not None
    keys = _keys(subject.config, width, block.width_key, unset=True)
    named = [replace(block, width_key=key) for key in keys]
    reason = "no key of its config gives its MLP another width"
    return first_representable(subject, trace.example, named) or _refused(block, reason)


def _attention(subject: Subject, trace: Trace, path: str, sources: Mapping[str, Tensor]) -> Block:
    config, channels = subject.config, _size(trace, path)[1]
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    if not head_dim or channels % head_dim:
        raise Unfit(f"{path} has {channels} inputs, which do not form heads of {head_dim}")
    heads, inputs = channels // head_dim, _query_key_value(trace, path, sources)
    rows = sum(_size(trace, source)[0] for source in inputs)
    misfit = Unfit(f"the {rows} rows of {', '.join(inputs)} are not those of {heads} heads")
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
            check_fit(subject, trace.example, block)
        except Unfit as error:
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
        return first_representable(subject, trace.example, named) or _refused(block, reason)
    raise misfit


def _is_linear(subject: Subject, trace: Trace, block: Attention | Mlp) -> bool:
    """Whether the block is linear in the rows it names, and they lie in the consumer's module."""
    spec = block.group(subject.config, trace.example.layer, ATTENTION_UNITS[0])
    linear = Group(trace.example.layer, spec, "").linear
    if spec.linear is None or linear is None or _parent(spec.linear.path) != _parent(block.output):
        return False
    return trace.linear_in(block.output, spec.linear.path, linear.index)


def _query_key_value(trace: Trace, path: str, sources: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The query, key and value projections, in this order, or the single one of all three."""
    if len(sources) == 1:
        return tuple(sources)
    queries = [source for source, gradient in sources.items() if not gradient[:-1].any()]
    values = [source for source in sources if trace.linear_in(path, source)]
    if len(sources) != 3 or len(queries) != 1 or len(values) != 1:
        raise Unfit(
            f"exactly one of {', '.join(sources)} should be read at its own token alone "
            f"({', '.join(queries) or 'none'} is), and its output should be linear in exactly one "
            f"({', '.join(values) or 'none'})"
        )
    if {_parent(source) for source in sources} != {_parent(path)}:
        raise Unfit("its projections are in several modules")
    (key,) = set(sources) - {*queries, *values}
    return (*queries, key, *values)


def _head_norms(trace: Trace, inputs: Sequence[str]) -> tuple[str, ...]:
    """Norms with a row for each head: that of the queries, then that of the keys."""
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
    """Config keys that hold `value`, the usual name first; with `unset`, then those that hold None.

    The usual name alone where no key holds it.
    """
    values = {usual: getattr(config, usual, None)} | config.to_dict()
    keys = [key for key, held in values.items() if type(held) is int and held == value]
    if unset:
        keys += [key for key, held in config.to_dict().items() if held is None]
    return keys or [usual]


def _merged(blocks: Sequence[Block]) -> tuple[Any, Any, tuple[Block, ...]]:
    """Attention, MLP and the other blocks; the first of each kind with units is the usual one."""
    usual: list[Any] = []
    others: list[Block] = []
    for kind in (ATTENTION, MLP):
        of_kind: dict[str, Block] = {}
        for block in blocks:
            if block.kind != kind:
                continue
            known = of_kind.setdefault(block.output, block)
            # Whether a layer has the norm is looked up in the layer itself.
            post_norm = known.post_norm or block.post_norm
            of_kind[block.output] = replace(known, post_norm=post_norm)
            if replace(block, post_norm=post_norm) != of_kind[block.output]:
                raise ValueError(f"{block.output} differs between layers: {known} and {block}")
        first = sorted(of_kind.values(), key=lambda block: isinstance(block, Whole))
        usual.append(first[0])
        others += first[1:]
    attention, mlp = usual
    return attention, mlp, tuple(others)


def _residual_scale_key(subject: Subject, scales: Sequence[float | None]) -> str | None:
    """The config key of the factor on the blocks' outputs; None where the factor is 1."""
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


def _per_layer(subject: Subject) -> Refusal | None:
    """Why layers cannot differ in width."""
    if subject.config is not subject.model.config:
        return INNER_CONFIG
    layer_class = type(subject.layers[0])
    known = layer_class in layer_classes(type(subject.model))
    parameters = inspect.signature(layer_class.__init__).parameters.keys()
    if known and {"config", "layer_idx"} <= parameters:
        return None
    return Refusal("its decoder layers are not built from a config and a layer index")
