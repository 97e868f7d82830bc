"""Calibration hidden states, one decoder layer at a time.

A first, cheap pass over the embeddings replaces every decoder layer by a recorder, so that each
layer is later called with exactly the arguments that the full model would give it: its own mask
(full, sliding, padded), rotary embeddings and flags. Replaying the first layer's arguments on all
layers, as is usual, is wrong wherever layers differ. Then only one layer at a time needs the
accelerator: the hidden states before it are run through it and replaced by its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grail_hf.calibration.block import Block
from grail_hf.calibration.calls import MicroBatch, record_calls
from grail_hf.calibration.passes import remembered_bytes
from grail_hf.models.capture import captured_outputs
from grail_hf.models.experts import group_in
from grail_hf.models.groups import Group
from grail_hf.models.schema import GroupSpec
from grail_hf.runtime import processes
from grail_hf.runtime.devices import input_device
from grail_hf.runtime.layers import LayerPlacement
from grail_hf.runtime.placement import Place, choose_near
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stream:
    """The calibration tokens' way through a model, one decoder layer at a time.

    Targets of the dense model ("dense", "residual") take a second set of hidden states, which runs
    through each layer before it is changed. Of several processes, each gets the hidden states of
    its own share of the batches, and the blocks' statistics are those of all.

    Attributes:
        model: any decoder-only transformers model.
        placement: where its decoder layers are, and where they run.
        specs: of each layer, its groups in the order in which they run.
        batches: of `{input_ids [b, T], attention_mask [b, T] (optional)}`.
        place: where hidden states are kept; by default where the model takes its inputs.
        target: of the statistics, see `GrailConfig.target`.
        seed: gives each group a seed of its own.
        progress: show a bar on standard error.
        group_batches: batches that will be run for groups, in all layers together, for the bar's
            estimate; by default all of them once for each group.
        dtype: in which the micro-batches' moments are summed. In fp32 the order of the batches
            decides between units that are alike, and so does what processes share them.
    """

    model: PreTrainedModel
    placement: LayerPlacement
    specs: Sequence[Sequence[GroupSpec]]
    batches: Sequence[dict[str, Tensor]]
    place: Place | None = None
    target: str = "self"
    seed: int = 0
    progress: bool = True
    group_batches: int | None = None
    dtype: torch.dtype = torch.float64

    @torch.no_grad()
    def blocks(self) -> Iterator[Block]:
        """Yield each decoder layer on its device; what follows sees what it has become."""
        placement, meter = self.placement, self.placement.meter
        with meter.phase("embed"), placement.rest_of_model():
            place = self.place or Place(input_device(self.model))
            batches = record_calls(self.model, placement.layers, self.batches, place)
        placement.start(batches)
        names = {id(module): name for name, module in self.model.named_modules()}
        with self._bar(len(batches)) as bar:
            for index in range(placement.first, len(placement.layers)):
                with placement.on_device(index) as device:
                    layer, name = placement.layers[index], names[id(placement.layers[index])]
                    groups = self._groups(index, layer, name)
                    near = self._near(place, device, groups, batches)
                    if near is not None and near != place:
                        for batch in batches:
                            batch.brought_(near)
                    block = Block(
                        index=index,
                        name=name,
                        layer=layer,
                        groups=groups,
                        device=device,
                        place=place,
                        near=near,
                        target=self.target,
                        batches=batches,
                        progress=bar,
                        dtype=self.dtype,
                        meter=meter,
                    )
                    following: list[Tensor] = []
                    if self.target != "self":
                        with meter.phase("forward"):
                            following = _dense_pass(block)
                    with meter.phase("solve"):  # but for what is another phase's
                        yield block
                    if index + 1 < len(placement.layers):
                        with meter.phase("forward"):
                            block.advance()
                    for batch, hidden in zip(batches, following, strict=False):
                        batch.dense = hidden
                placement.done(index, batches)

    def _bar(self, batches: int) -> Bar:
        left = range(self.placement.first, len(self.placement.layers))
        group_batches = self.group_batches
        if group_batches is None:
            group_batches = sum(len(self.specs[index]) for index in left) * batches
        passes = len(left) * (1 + (self.target != "self")) - 1
        return Bar(
            total=group_batches + passes * batches,
            desc="Calibrating",
            unit="batch",
            shown=self.progress,
            parts=len(left),
        )

    def _groups(self, index: int, layer: nn.Module, name: str) -> tuple[Group, ...]:
        seed = self.seed * 1_000_003
        return tuple(
            group_in(layer, spec, name, seed=(seed + index * 101 + number) % 2**63)
            for number, spec in enumerate(self.specs[index])
        )

    def _near(
        self,
        place: Place,
        device: torch.device,
        groups: Sequence[Group],
        batches: Sequence[MicroBatch],
    ) -> Place | None:
        """Where to keep what is needed again within a layer; None without room for it.

        Hidden states that are kept elsewhere, and the dense model's outputs, come there too.
        """
        if not batches:
            return place
        hidden, targeted = batches[0].hidden, self.target != "self"
        stream, item = hidden.shape[-1], hidden.element_size()
        each = remembered_bytes(groups, stream, item, targeted)
        each += item * stream * (1 + targeted * (1 + len(groups)))
        tokens = sum(batch.hidden.numel() for batch in batches) // stream
        # Processes on CPUs may share the memory.
        sharing = processes.count() if device.type == "cpu" else 1
        return choose_near(place, device, tokens * each * sharing)


def _dense_pass(block: Block) -> list[Tensor]:
    """Run the unchanged layer on the dense hidden states; keep its consumers' outputs.

    Returns the hidden states after the layer.
    """
    block.progress.set_postfix_str(f"{block.name} dense forward")
    following, near = [], block.near or block.place
    for batch in block.batches:
        hidden = batch.hidden if batch.dense is None else batch.dense
        with captured_outputs([group.consumer for group in block.groups]) as outputs:
            after = batch.through(block.layer, block.index, hidden, block.device)
        batch.dense, batch.outputs = hidden, [near.keep(output) for output in outputs]
        following.append(block.place.keep(after))
        block.progress.update()
    return following
