"""Read a checkpoint in safetensors tensor by tensor, and name what is damaged."""

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
    """A tensor in a file: its first byte, the one behind its last, and its shape."""

    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and the file of each of its tensors.

    Attributes:
        name: what it was asked for by: a folder, or a name on the hub.
        folder: where it lies.
        files: tensor's name -> file.
        spans: file -> tensor's name -> where it lies in the file.
    """

    name: str
    folder: Path
    files: dict[str, Path]
    spans: dict[Path, dict[str, Span]]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Checkpoint:
        """Find a checkpoint's weights and what its files hold; a hub's are downloaded.

        Of a hub's repository only the weight files that its index lists are downloaded.

        Args:
            source: a folder, or a name on the hub.
            revision: of the hub's repository: a branch, a tag or a commit.

        Raises:
            ValueError: a revision of a folder.
            OSError: there is no such checkpoint, it is not in safetensors, or a file is missing,
                cut short or damaged; names the file.
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
                f"{source} has neither {WEIGHTS} nor {INDEX}: load the model, save it by "
                "save_pretrained, and take that folder"
            )
        paths = sorted(set(files.values())) or [folder / WEIGHTS]
        spans = {path: read_spans(path) for path in paths}
        files = files or dict.fromkeys(spans[paths[0]], paths[0])
        for name, path in files.items():
            if name not in spans[path]:
                raise OSError(f"{path} lacks {name}, which {INDEX} says it holds: get it again")
        return cls(str(source), folder, files, spans)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.spans)

    def verify(self, progress: bool = True) -> dict[str, str]:
        """Read every file once: file's name -> its sha256.

        Raises:
            FloatingPointError: a tensor holds NaN or Inf; names it.
            OSError: a file is not what its name in the hub's cache says it is.
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
            raise OSError(f"{path} is damaged: its sha256 is {found}, not {named}; get it again")
        return found

    def will_need(self, names: Iterable[str]) -> None:
        """Have the system read tensors ahead, into its own cache; nothing is waited for."""
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
        """The model of the checkpoint's config: no weights, but its buffers."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        config.name_or_path = self.name
        if config.dtype is None:
            config.dtype = self._dtype()
        auto = auto_class(config.model_type)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto.from_config(config, dtype=config.dtype)
        model.tie_weights()  # the context makes new parameters of tied ones, too
        return model

    def _dtype(self) -> torch.dtype:
        """Of the first floating-point tensor, as `dtype="auto"` means where a config has none."""
        every = (self.tensors([name])[name].dtype for name in self.files)
        return next((dtype for dtype in every if dtype.is_floating_point), torch.float32)


def read_spans(path: Path) -> dict[str, Span]:
    """Of a safetensors file, tensor's name -> where it lies.

    Raises:
        OSError: the file is missing, cut short, or no safetensors file; names it.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: get it again")
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
    """An error of safetensors, which names no file, is an OSError that says `what` was read."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{what} is cut short or damaged ({error}): get it again") from error
