"""Calibration hidden states, one decoder layer at a time.

A first, cheap pass over the embeddings replaces every decoder layer by a recorder, so that each
layer is later called with exactly the arguments that the full model would give it: its own mask
(full, sliding, padded), rotary embeddings and flags. Replaying the first layer's arguments on all
layers, as is usual, is wrong wherever layers differ. Then only one layer at a time needs the
accelerator: the hidden states in front of it are run through it and replaced by what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grail_hf.calibration.block import Block
from grail_hf.calibration.calls import record_calls
from grail_hf.models.capture import captured_outputs
from grail_hf.models.experts import group_in
from grail_hf.models.schema import GroupSpec
from grail_hf.runtime.devices import input_device
from grail_hf.runtime.layers import LayerPlacement
from grail_hf.runtime.placement import Place
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    placement: LayerPlacement,
    specs: Sequence[Sequence[GroupSpec]],
    batches: Sequence[dict[str, Tensor]],
    place: Place | None = None,
    target: str = "self",
    seed: int = 0,
    progress: bool = True,
    group_batches: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Block]:
    """Yield each decoder layer as a `Block` at work; what follows sees what it has become.

    Targets of the dense model ("dense", "residual") take a second set of hidden states, which runs
    through each layer before it is changed. Of several processes, each gets the hidden states of
    its own share of the batches, and the blocks' statistics are those of all.

    Args:
        model: any decoder-only transformers model.
        placement: where its decoder layers lie, and where they work.
        specs: of each layer, its groups in the order in which they run.
        batches: of `{input_ids [b, T], attention_mask [b, T] (optional)}`.
        place: where hidden states are kept; by default where the model takes its inputs.
        target: of the statistics, see `GrailConfig.target`.
        seed: gives each group a seed of its own.
        progress: show a bar on standard error.
        group_batches: batches that the caller will run for groups, in all layers together, for
            the bar's estimate; by default all of them once for each group.
        dtype: in which the micro-batches' moments are summed. In fp32 the order of the batches
            decides between units that are alike, and so does what processes share them.
    """
    layers = placement.layers
    names = {id(module): name for name, module in model.named_modules()}
    with placement.meter.phase("embed"), placement.rest_of_model():
        place = place or Place(input_device(model))
        micro_batches = record_calls(model, layers, batches, place)
    placement.start(micro_batches)
    left = range(placement.first, len(layers))
    if group_batches is None:
        group_batches = sum(len(specs[index]) for index in left) * len(micro_batches)
    passes = len(left) * (1 + (target != "self")) - 1
    with Bar(
        total=group_batches + passes * len(micro_batches),
        desc="Calibrating",
        unit="batch",
        shown=progress,
        parts=len(left),
    ) as bar:
        for index in left:
            layer, name = layers[index], names[id(layers[index])]
            groups = tuple(
                group_in(layer, spec, name, seed=(seed * 1_000_003 + index * 101 + number) % 2**63)
                for number, spec in enumerate(specs[index])
            )
            with placement.on_device(index) as device:
                block = Block(
                    *(index, name, layer, groups, device, place, target, micro_batches, bar),
                    *(dtype, placement.meter),
                )
                with placement.meter.phase("forward"):
                    following = _dense_pass(block) if target != "self" else []
                yield block
                if index + 1 < len(layers):
                    with placement.meter.phase("forward"):
                        block.advance()
                for batch, hidden in zip(micro_batches, following, strict=False):
                    batch.dense = hidden
            placement.done(index, micro_batches)


def _dense_pass(block: Block) -> list[Tensor]:
    """Run the unchanged layer on the dense hidden states; keep its consumers' outputs.

    Returns the hidden states behind the layer.
    """
    block.progress.set_postfix_str(f"{block.name} dense forward")
    following = []
    for batch in block.batches:
        hidden = batch.hidden if batch.dense is None else batch.dense
        with captured_outputs([group.consumer for group in block.groups]) as outputs:
            behind = batch.through(block.layer, block.index, hidden, block.device)
        batch.dense, batch.outputs = hidden, [block.place.keep(output) for output in outputs]
        following.append(block.place.keep(behind))
        block.progress.update()
    return following
