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

    It is written together with hidden states. Layers that were done after that are repeated by a
    run that resumes, and their files replaced.

    Several processes have the same journal. Each writes the hidden states of its own batches, and
    the first writes everything else.

    Attributes:
        folder: the work folder, in which the new checkpoint is written.
        identity: everything that the result depends on: name -> JSON.
        layers: number of decoder layers after which the run can resume.
        shards: file name -> its sha256 (None until the journal is written), and its tensors with
            their bytes.
        hidden_states: file name -> its sha256, of the hidden states after those layers.
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
        """Write the journal to disk, in place of the previous one.

        The shards since the previous one are flushed and hashed first, so that a run which stops
        has not waited for a disk on their behalf.
        """
        for name, shard in self.shards.items():
            if shard["sha256"] is None:
                shard["sha256"] = processes.once(partial(flushed, self.folder / name), name)
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
            flush(path)

    def add_shard(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file of the new checkpoint; it counts once the journal is written."""
        save = partial(save_tensors, tensors, self.folder / name, {"format": "pt"})
        processes.once(save, name)
        sizes = {key: tensor.nbytes for key, tensor in sorted(tensors.items())}
        self.shards[name] = {"sha256": None, "bytes": sizes}

    def add_hidden_states(self, layer: int, batches: Sequence[HiddenStates]) -> None:
        """Write the hidden states before a layer; they count once the journal is written."""
        folder = self.own / f"hidden-states-{layer:05d}"
        folder.mkdir(exist_ok=True)
        written = []
        for batch in batches:
            path = folder / f"{batch.number:05d}.safetensors"
            tensors = {"hidden": batch.hidden, "dense": batch.dense}
            save_tensors({k: t for k, t in tensors.items() if t is not None}, path)
            written.append((f"{folder.name}/{path.name}", flushed(path)))
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
        """Delete hidden states and shards, whole or not, that the journal does not refer to."""
        if not processes.is_first():
            return
        current = {name.partition("/")[0] for name in self.hidden_states}
        for folder in self.own.glob("hidden-states-*"):
            if folder.name not in current:
                shutil.rmtree(folder)
        for path in (*self.folder.glob("model-*.safetensors"), *self.folder.glob(".*.tmp")):
            if path.name not in self.shards:
                path.unlink()

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
            flush(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file under another name, and rename it. It is not flushed to disk.

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


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to; the file replaces `path` after the context, if nothing is raised."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until all of a file is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flushed(path: Path) -> str:
    """A file's sha256, once all of it is on disk."""
    flush(path)
    return file_digest(path)


def file_digest(path: Path) -> str:
    """A file's sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
