"""The journal of a run from disk to disk: what is written, and where a stopped run resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grail_hf.runtime import processes
from grail_hf.runtime.placement import HiddenStates, Place

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 2**24
JOURNAL, OWN = "journal.json", ".grail"


@dataclass
class Journal:
    """What a run has done, in its work folder: the run can be resumed after the last layer in it.

    Several processes have the same journal. Each writes the hidden states of its own batches, and
    the first writes everything else.

    Attributes:
        folder: the work folder, in which the new checkpoint is written.
        identity: everything that the result depends on: name -> JSON.
        layers: number of decoder layers that are done.
        shards: file name -> its sha256, and its tensors with their bytes.
        hidden_states: file name -> its sha256, of the hidden states before the next layer.
        notes: other data of the run, as JSON.
    """

    folder: Path
    identity: dict[str, Any]
    layers: int = 0
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden_states: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> Path:
        """The subfolder for files that are not in the result."""
        return self.folder / OWN

    @classmethod
    def exists(cls, folder: Path) -> bool:
        return (folder / OWN / JOURNAL).is_file()

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """The journal in a work folder.

        Raises:
            OSError: it is damaged or of another version; names the file.
        """
        path = folder / OWN / JOURNAL
        try:
            return cls(folder, **json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise OSError(
                f"{path} is damaged, or of another version ({error!r}): delete {folder} and start "
                "again"
            ) from error

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raise ValueError where the run is a different one, naming what differs."""
        for name, new in identity.items():
            old = self.identity.get(name)
            if json.loads(json.dumps(new)) != old:
                raise ValueError(
                    f"the run in {self.folder} had {name}={old!r}, and now it is {new!r}: resume "
                    "with the old value, or delete that folder"
                )

    def check_files(self) -> None:
        """Raise OSError where a file is not as the run wrote it, naming the file."""
        recorded = {name: shard["sha256"] for name, shard in self.shards.items()}
        recorded |= {f"{OWN}/{name}": digest for name, digest in self.hidden_states.items()}
        for name, digest in recorded.items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != digest:
                raise OSError(
                    f"{path} is missing or not as the run wrote it: delete {self.folder} and start "
                    "again"
                )

    def write(self) -> None:
        """Write the journal to disk, in place of the previous one."""
        processes.once(self._write, "the journal")

    def _write(self) -> None:
        self.own.mkdir(parents=True, exist_ok=True)
        data = {
            "identity": self.identity,
            "layers": self.layers,
            "shards": self.shards,
            "hidden_states": self.hidden_states,
            "notes": self.notes,
        }
        with written_beside(self.own / JOURNAL) as path:
            path.write_text(json.dumps(data) + "\n", "utf-8")

    def add_shard(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file of the new checkpoint."""
        save = partial(save_tensors, tensors, self.folder / name, {"format": "pt"})
        digest = processes.once(save, name)
        sizes = {key: tensor.nbytes for key, tensor in sorted(tensors.items())}
        self.shards[name] = {"sha256": digest, "bytes": sizes}

    def add_hidden_states(self, layer: int, batches: Sequence[HiddenStates]) -> None:
        """Write the hidden states before a layer."""
        folder = self.own / f"hidden-states-{layer:05d}"
        folder.mkdir(exist_ok=True)
        written = []
        for batch in batches:
            path = folder / f"{batch.number:05d}.safetensors"
            tensors = {"hidden": batch.hidden, "dense": batch.dense}
            digest = save_tensors({k: t for k, t in tensors.items() if t is not None}, path)
            written.append((f"{folder.name}/{path.name}", digest))
        self.hidden_states = dict(processes.gather(written, folder.name))

    def read_hidden_states(self, batches: Sequence[HiddenStates], place: Place) -> None:
        """Load the hidden states that were written last into the batches."""
        from safetensors.torch import load_file

        (folder,) = {name.partition("/")[0] for name in self.hidden_states}
        for batch in batches:
            tensors = load_file(self.own / folder / f"{batch.number:05d}.safetensors")
            batch.hidden = place.keep(tensors["hidden"])
            batch.dense = place.keep(tensors["dense"]) if "dense" in tensors else None

    def sweep(self) -> None:
        """Delete hidden states that the journal on disk no longer refers to."""
        if not processes.is_first():
            return
        current = {name.partition("/")[0] for name in self.hidden_states}
        for folder in self.own.glob("hidden-states-*"):
            if folder.name not in current:
                shutil.rmtree(folder)

    @property
    def bytes_written(self) -> int:
        """Bytes of the files that the journal refers to."""
        files = [self.folder / name for name in self.shards]
        files += [self.own / name for name in self.hidden_states]
        return sum(path.stat().st_size for path in files)

    def write_index(self) -> None:
        """Write the index of the new checkpoint: tensor -> file."""
        weights = {key: name for name, shard in self.shards.items() for key in shard["bytes"]}
        size = sum(sum(shard["bytes"].values()) for shard in self.shards.values())
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        with written_beside(self.folder / INDEX) as path:
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file under another name, flush it, and rename it. Returns its sha256.

    Raises:
        OSError: it cannot be written (a full disk); names the file. An old file is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_beside(path) as beside:
        try:
            save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, beside, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot be written: {error}", str(path)) from error
        return file_digest(beside)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to; the file replaces `path` once all of it is on disk."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """A file's sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
