"""Whether an inferred block describes a model: checks by random weights.

Units are cut from a decoder layer, which must compute what the whole layer computes with the
consumer's columns of these units set to zero. So must the layer that the model's own class builds
from the config of the new width, with the cut weights in it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grail_hf.config import ATTENTION_UNITS
from grail_hf.methods.reduction import Reduction
from grail_hf.models.configs import compressed_config
from grail_hf.models.decoder import skeleton_like
from grail_hf.models.groups import Group
from grail_hf.models.infer_layers import Subject, layers_at
from grail_hf.models.schema import Block, GroupSpec
from grail_hf.models.trace import TOLERANCE, Example, relative_error

# Cutting units must change the output by this much, relatively, for a comparison to mean anything.
EFFECT = 1e-4
WIDTHS_TRIED = 64
# What configs and models raise for values that they do not support.
UNBUILT = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


class Unfit(Exception):
    """Why a block cannot be pruned: a clause that follows "because"."""


def check_fit(subject: Subject, example: Example, block: Block) -> None:
    """Raise `Unfit` unless cutting units equals zeroing the consumer's columns that read them."""
    specs = [block.group(subject.config, example.layer, unit) for unit in ATTENTION_UNITS]
    specs = [spec for spec in specs if spec.num_units > spec.partitions]
    if not specs:
        raise Unfit("it has a single unit")
    for spec in specs:
        try:
            cut, zeroed = _cut_and_zeroed(example, spec, spec.num_units - spec.partitions)
            error = relative_error(example.output(cut), zeroed)
        except (RuntimeError, IndexError) as failure:
            raise Unfit("the layer does not run with one unit fewer") from failure
        if not error < TOLERANCE:
            raise Unfit("cutting a unit changes the outputs of the others")
        if not relative_error(zeroed, example.output()) > EFFECT:
            raise Unfit("cutting a unit changes the output too little for a comparison")


@torch.no_grad()
def _cut_and_zeroed(example: Example, spec: GroupSpec, width: int) -> tuple[nn.Module, Tensor]:
    """The layer with `width` units, and its output [1, T, D] with the others' columns zeroed."""
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


def first_representable(
    subject: Subject, example: Example, blocks: Sequence[Block]
) -> Block | None:
    """The first of the blocks whose config keys represent its widths; None where none does."""
    return next((block for block in blocks if _is_representable(subject, example, block)), None)


def _is_representable(subject: Subject, example: Example, block: Block) -> bool:
    """Whether a config of fewer units builds a model that computes what the cut one does."""
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
            built = skeleton_like(subject.model, config)
        except UNBUILT:
            continue
        expected = skeleton_like(subject.model, subject.model.config)
        for layer, of_layer in zip(layers_at(expected, subject.layers_path), specs, strict=True):
            for group in of_layer:
                _cut_(layer, group, _some_units(group, width))
        if _shapes(built) != _shapes(expected):
            return False
        cut, zeroed = _cut_and_zeroed(example, spec, width)
        fresh = layers_at(built, subject.layers_path)[example.index].eval()
        try:
            _fill_(fresh, cut)
            return relative_error(example.output(fresh), zeroed) < TOLERANCE
        except (RuntimeError, ValueError):
            return False
    return False


def _has(layer: nn.Module, block: Block) -> bool:
    return block.output in dict(layer.named_modules())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of parameters and buffers; a rotary embedding's show the size of the heads."""
    return {
        name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _fill_(layer: nn.Module, other: nn.Module) -> None:
    """Give the layer the parameters and buffers of another of the same shapes."""
    for module, twin in zip(layer.modules(), other.modules(), strict=True):
        module._parameters.update(twin._parameters)
        module._buffers.update(twin._buffers)
