"""Decoder layers that are read from a checkpoint on disk when they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from grail_hf.checkpoints.converter import Parts
from grail_hf.checkpoints.journal import Journal
from grail_hf.checkpoints.sources import REST
from grail_hf.config import AUTO
from grail_hf.runtime import processes
from grail_hf.runtime.layers import LayerPlacement
from grail_hf.runtime.placement import HiddenStates, Place


class CheckpointPlacement(LayerPlacement):
    """Decoder layers that are read from a checkpoint, and dropped without being written."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        super().__init__(parts.layers, device)
        self.parts = parts

    @contextmanager
    def rest_of_model(self) -> Iterator[None]:
        self.parts.load_(REST)
        try:
            yield
        finally:
            self.parts.drop_(REST)

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        self.parts.load_(index)
        if index + 1 < len(self.layers):
            self.parts.checkpoint.will_need(self.parts.keys[index + 1])
        try:
            self.layers[index].to(self.device)
            yield self.device
        finally:
            self.parts.drop_(index)


class Pace:
    """How often hidden states are written: `GrailConfig.checkpoint_every`.

    "auto" compares times and not sizes, so that it needs to know neither the disk nor the work. The
    first writing is due at once, since nothing tells yet how long it takes.

    Attributes:
        every: layers, or "auto".
    """

    rarity = 20  # "auto": the work between two writings takes so many times as long as one

    def __init__(self, every: int | str, clock: Callable[[], float] = time.monotonic) -> None:
        self.every = every
        self._clock = clock
        self._took = self._ended = 0.0

    def due(self, layers: int) -> bool:
        """Whether to write now, so many layers after the last writing or the start."""
        if self.every == AUTO:
            return self._clock() - self._ended >= self.rarity * self._took
        return layers >= int(self.every)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hidden states are written inside the context."""
        start = self._clock()
        yield
        self._ended = self._clock()
        self._took = self._ended - start


class WritingPlacement(CheckpointPlacement):
    """Decoder layers that are read from one checkpoint and written, once changed, to another.

    At the given pace hidden states are written too, and the journal, which then has everything that
    is needed to resume there.
    """

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        journal: Journal,
        place: Place,
        pace: Pace,
        notes: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(parts, device)
        self.journal = journal
        self.place = place
        self.pace = pace
        self.notes = notes
        self.first = journal.layers

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{len(self.layers) + 1:05d}.safetensors"

    def write_rest(self) -> None:
        """Write the weights outside the decoder layers, unless that is done."""
        name = self._name(1)
        if name not in self.journal.shards:
            with self.meter.phase("write"), self.rest_of_model():
                self.journal.add_shard(name, self.parts.state(REST))
            self.journal.notes = self.notes()  # widths that were measured are not measured again
            self.journal.write()

    def copy_layers(self) -> None:
        """Write the layers that are left as they are."""
        for index in range(self.first, len(self.layers)):
            with self.on_device(index):
                pass
            self.done(index, [])

    def start(self, batches: Sequence[HiddenStates]) -> None:
        if self.first:
            self.journal.read_hidden_states(batches, self.place)

    @contextmanager
    def on_device(self, index: int) -> Iterator[torch.device]:
        with super().on_device(index) as device:
            yield device
            with self.meter.phase("write"):
                self.journal.add_shard(self._name(index + 2), self.parts.state(index))

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        number, last = index + 1, index + 1 == len(self.layers)
        # The first process decides: the others' clocks may say otherwise.
        due = partial(self.pace.due, number - self.journal.layers)
        if not (last or processes.once(due, "the journal")):
            return
        with self.meter.phase("write"):
            if last:
                self.journal.hidden_states = {}
            else:
                with self.pace.writing():
                    self.journal.add_hidden_states(number, batches)
            self.journal.layers = number
            self.journal.notes = self.notes()
            self.journal.write()
            self.journal.sweep()
