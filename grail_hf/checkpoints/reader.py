"""Read a checkpoint in safetensors tensor by tensor, and name damaged files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grail_hf.checkpoints.journal import CHUNK, INDEX, WEIGHTS
from grail_hf.checkpoints.sources import check_revision, fetch_weights, read_index, small_files
from grail_hf.models.decoder import auto_class
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel
_DIGEST = 64  # hexadecimal digits of sha256


class Span(NamedTuple):
    """A tensor in a file: its first byte, the byte after its last, and its shape."""

    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and the file of each of its tensors.

    Attributes:
        name: as given by the caller: a folder, or a name on the hub.
        folder: with its files.
        files: tensor name -> file.
        spans: file -> tensor name -> position in the file.
    """

    name: str
    folder: Path
    files: dict[str, Path]
    spans: dict[Path, dict[str, Span]]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Checkpoint:
        """Find a checkpoint's weight files and the tensors in them, downloading them from the hub.

        Of a repository on the hub, only the weight files in its index are downloaded.

        Args:
            source: a folder, or a name on the hub.
            revision: of the repository on the hub: a branch, a tag or a commit.

        Raises:
            ValueError: a revision is given for a folder.
            OSError: there is no such checkpoint, it is not in safetensors, or a file is missing,
                truncated or damaged; names the file.
        """
        check_revision(source, revision)
        folder, commit = small_files(source, revision)
        if commit is not None:
            fetch_weights(str(source), commit)
        if (folder / INDEX).is_file():
            files = {name: folder / file for name, file in read_index(folder / INDEX).items()}
        elif (folder / WEIGHTS).is_file():
            files = {}
        else:
            raise FileNotFoundError(
                f"{source} has neither {WEIGHTS} nor {INDEX}: load the model, save it with "
                "save_pretrained, and use that folder"
            )
        paths = sorted(set(files.values())) or [folder / WEIGHTS]
        spans = {path: read_spans(path) for path in paths}
        files = files or dict.fromkeys(spans[paths[0]], paths[0])
        for name, path in files.items():
            if name not in spans[path]:
                raise OSError(f"{path} lacks {name}, which {INDEX} lists: download it again")
        return cls(str(source), folder, files, spans)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.spans)

    def verify(self, progress: bool = True) -> dict[str, str]:
        """Read every file once. Returns file name -> sha256.

        Raises:
            FloatingPointError: a tensor holds NaN or Inf; names it.
            OSError: the sha256 of a file in the hub's cache is not the one in its name.
        """
        digests = {}
        with Bar(
            total=self.num_bytes,
            desc="Checking the weights",
            unit="B",
            unit_scale=True,
            shown=progress,
        ) as bar:
            for path in self.spans:
                digests[path.name] = self._verify(path, bar)
        return digests

    def _verify(self, path: Path, bar: Bar) -> str:
        from safetensors import safe_open

        digest = hashlib.sha256()
        spans = sorted(self.spans[path].items(), key=lambda item: item[1])
        first = spans[0][1].start if spans else path.stat().st_size
        with path.open("rb") as file:
            digest.update(file.read(first))
        bar.update(first)
        with safe_open(path, framework="pt") as tensors:
            for name, _ in spans:
                tensor = tensors.get_tensor(name).flatten()
                for part in tensor.split(CHUNK):
                    readable = part.is_floating_point() and part.itemsize > 1
                    if readable and not torch.isfinite(part).all():
                        raise FloatingPointError(f"{name} in {path} holds NaN or Inf")
                    digest.update(part.view(torch.uint8).numpy().data)
                    bar.update(part.nbytes)
        found = digest.hexdigest()
        # The hub's cache names a large file after its sha256.
        named = path.resolve().name
        if len(named) == _DIGEST and set(named) <= set("0123456789abcdef") and named != found:
            raise OSError(
                f"{path} is damaged: its sha256 is {found}, not {named}; download it again"
            )
        return found

    def will_need(self, names: Iterable[str]) -> None:
        """Let the system read tensors ahead into its cache, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, own in by_file.items():
            with path.open("rb") as file:
                for name in own:
                    start, end, _ = self.spans[path][name]
                    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, mapped from their files."""
        from safetensors import safe_open

        found = {}
        with contextlib.ExitStack() as stack:
            opened = {}
            for name in names:
                path = self.files[name]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found[name] = opened[path].get_tensor(name)
        return found

    def skeleton(self) -> PreTrainedModel:
        """The model of the checkpoint's config, with buffers but without weights."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        config.name_or_path = self.name
        if config.dtype is None:
            config.dtype = self._dtype()
        auto = auto_class(config.model_type)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto.from_config(config, dtype=config.dtype)
        model.tie_weights()  # the context also replaces tied parameters by new ones
        return model

    def _dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor, as with `dtype="auto"` in transformers."""
        every = (self.tensors([name])[name].dtype for name in self.files)
        return next((dtype for dtype in every if dtype.is_floating_point), torch.float32)


def read_spans(path: Path) -> dict[str, Span]:
    """Tensor name -> position, in a safetensors file.

    Raises:
        OSError: the file is missing, truncated, or not in safetensors format; names it.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: download it again")
    with damage_named(str(path)):
        with safe_open(path, framework="pt"):  # checks lengths and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        spans[name] = Span(start, end, tuple(entry["shape"]))
    return spans


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Turn an error of safetensors, which names no file, into an OSError that names `what`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{what} is truncated or damaged ({error}): download it again") from error
