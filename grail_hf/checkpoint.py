"""Checkpoints on disk, read and written one decoder layer at a time; runs that can go on.

Neither the dense model nor the compressed one is ever whole in memory: the model is a skeleton on
the meta device, a layer's tensors are mapped from the safetensors files, changed, written as a file
of their own, and dropped. After each layer everything that the run needs to go on from there is on
disk, as safetensors and JSON.

How a checkpoint's tensors become a model's parameters, and the reverse, is known to transformers'
`core_model_loading` alone, which is not quite public: what is used of it is used here alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grail_hf import processes
from grail_hf.offload import HiddenStates, Homes, Place
from grail_hf.progress import Bar
from grail_hf.quantization import dequantizing, without_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_REST = -1  # the part of a model that is in no decoder layer
_CHUNK = 2**24
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
_PROCESSOR = ["*processor_config.json", "chat_template*"]
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
            _fetch_weights(str(source), commit)
        if (folder / INDEX).is_file():
            files = {name: folder / file for name, file in _read_index(folder / INDEX).items()}
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
                for part in tensor.split(_CHUNK):
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


def check_revision(source: str | Path, revision: str | None) -> None:
    """Raise ValueError for a revision of a folder, which has none."""
    if revision is not None and Path(source).is_dir():
        raise ValueError(
            f"revision={revision!r} goes with a name on the hub, and {source} is a folder"
        )


def auto_class(model_type: str) -> Any:
    """What loads the whole of a model of this type: `AutoModelForCausalLM`, as a rule.

    `AutoModelForImageTextToText` where that gives another class, around the text decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto as names

    whole = names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if whole in (None, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def meta_model(
    source: str | Path, revision: str | None = None, dequantize: bool = False
) -> PreTrainedModel:
    """The model of a source's config on the meta device: no file but the config is fetched.

    Args:
        source: a folder, or a name on the hub.
        revision: of the hub's repository.
        dequantize: the model as it will be when its weights are loaded as floats.

    Raises:
        ValueError: the weights are quantised and cannot be loaded as floats.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    if dequantize and dequantizing(config):
        config = without_quantization(config)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config.model_type).from_config(
            config, dtype=config.dtype or torch.float32
        )
    return model


def has_safetensors(source: str | Path, revision: str | None = None) -> bool:
    """Whether a source's weights are in safetensors; a hub is asked, and nothing is fetched."""
    from transformers.utils.hub import has_file

    return any(has_file(source, name, revision=revision) for name in (INDEX, WEIGHTS))


def small_files(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """A checkpoint's folder with everything but its weights; a hub's files are fetched.

    Returns:
        The folder, and the commit that its files are of; None for a folder of the user's own.

    Raises:
        FileNotFoundError: neither a folder nor a name on the hub.
    """
    if Path(source).is_dir():
        return Path(source), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=_SMALL, ignore_patterns=["*/*", INDEX]
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{source} is neither a folder nor a name on the hub") from error
    return Path(folder), Path(folder).name  # the hub's cache names a snapshot after its commit


def _fetch_weights(name: str, commit: str) -> None:
    """Fetch the index of a repository's weights, if there is one, and the files that it lists."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        index = Path(hf_hub_download(name, INDEX, revision=commit))
        files = sorted(set(_read_index(index).values()))
    except EntryNotFoundError:
        files = [WEIGHTS]
    snapshot_download(name, revision=commit, allow_patterns=files)


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises OSError where that is not what the file at `path` holds."""
    try:
        files: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
        return dict(files.items())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(f"{path} is damaged ({error!r}): get it again") from error


def processor_folder(source: str | Path, revision: str | None) -> Path:
    """Where the files lie that make a processor of a tokenizer; a hub's are fetched.

    Where the hub cannot be reached, that is what it gave earlier.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, str(source), revision=revision, allow_patterns=_PROCESSOR)
    try:
        return Path(fetch())
    except OSError:
        return Path(fetch(local_files_only=True))


def copy_processor(source: Path, folder: Path) -> None:
    """Copy those files that are not in `folder`, a new checkpoint's with its tokenizer."""
    for pattern in _PROCESSOR:
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy(path, folder)


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


class Parts:
    """A skeleton's decoder layers, and the rest of it, whose weights come from a checkpoint.

    Attributes:
        model: the skeleton.
        layers: its decoder layers.
        keys: part -> the names of its tensors in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, layers: nn.ModuleList):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.checkpoint = checkpoint
        self.model = model
        self.layers = layers
        names = {id(module): name for name, module in model.named_modules()}
        self._prefix = f"{names[id(layers)]}."
        self._mapping: Any = get_model_conversion_mapping(model)
        # Only renamings come before converters, whatever their order.
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self.keys: dict[int, list[str]] = {part: [] for part in (_REST, *range(len(layers)))}
        for key in checkpoint.files:
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                name = key
            if name in state:  # others are of parts that the model class does not have
                self.keys[self._part_of(name)].append(key)
        self._check()

    def _check(self) -> None:
        """Raise OSError where the checkpoint's tensors are not what the model needs, or too few."""
        files, spans = self.checkpoint.files, self.checkpoint.spans
        keys = [key for part in self.keys.values() for key in part]
        shapes = {key: spans[files[key]][key].shape for key in keys}
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        info = self._load_(empty, "meta")
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise OSError(f"{self.checkpoint.name} does not fit its config: {wrong[0]}")
        own = {name for name, _ in self.model.named_parameters()}
        missing = sorted(info.missing_keys & own - self.model.all_tied_weights_keys.keys())
        if missing:
            raise OSError(
                f"{self.checkpoint.name} has no weights for {missing[0]}: get it again, or mend "
                "its config"
            )

    def _part_of(self, name: str) -> int:
        """The part that a parameter of the model belongs to."""
        if not name.startswith(self._prefix):
            return _REST
        return int(name[len(self._prefix) :].partition(".")[0])

    def _own(self, part: int) -> Iterator[tuple[nn.Module, str]]:
        """(module, parameter's name in it) of a part's parameters."""
        for path, module in self.model.named_modules():
            for name in module._parameters:
                if self._part_of(f"{path}.{name}" if path else name) == part:
                    yield module, name

    def load_(self, part: int) -> None:
        """Give the part its weights, mapped from the files wherever they need no conversion."""
        self._load_(self.checkpoint.tensors(self.keys[part]), "cpu")
        if part == _REST:
            self.model.tie_weights(recompute_mapping=False)

    def _load_(self, tensors: dict[str, Tensor], device: str) -> Any:
        """Convert tensors of the checkpoint and give them to the model: transformers' report."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model, dtype = self.model, self.model.dtype
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        with _no_loading_bar():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        return info

    def drop_(self, part: int) -> None:
        """Take the part's weights away; shapes, buffers and settings stay."""
        empty: dict[int, nn.Parameter] = {}
        for module, name in self._own(part):
            parameter = module._parameters[name]
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = empty.setdefault(
                    id(parameter),
                    nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad),
                )

    def state(self, part: int) -> dict[str, Tensor]:
        """The part's tensors as they are now, under the names that a checkpoint has for them."""
        from transformers.core_model_loading import revert_weight_conversion

        model = self.model
        skipped = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save or ())
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if self._part_of(name) == part and name not in skipped and not tensor.is_meta
        }
        reverted = revert_weight_conversion(model, state)
        return {name: tensor.contiguous().cpu() for name, tensor in reverted.items()}


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """transformers shows no bar of its own inside the context."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class CheckpointHomes(Homes):
    """Decoder layers whose home is a checkpoint: nothing of them is kept, and nothing written."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        super().__init__(parts.layers, device)
        self.parts = parts

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        self.parts.load_(_REST)
        try:
            yield
        finally:
            self.parts.drop_(_REST)

    @contextmanager
    def at_work(self, index: int) -> Iterator[torch.device]:
        self.parts.load_(index)
        if index + 1 < len(self.layers):
            self.parts.checkpoint.will_need(self.parts.keys[index + 1])
        try:
            self.layers[index].to(self.device)
            yield self.device
        finally:
            self.parts.drop_(index)


JOURNAL, OWN = "journal.json", ".grail"


@dataclass
class Journal:
    """What a run has done, in its work folder: it can go on from the last layer written here.

    Of several processes each has the same journal, each writes the hidden states of its batches,
    and the first everything else.

    Attributes:
        folder: the work folder, in which the new checkpoint grows.
        identity: what the result depends on: name -> JSON.
        layers: decoder layers that are done.
        shards: file's name -> its sha256 and the tensors that it holds, with their bytes.
        hidden_states: file's name -> its sha256, of the generation in front of the next layer.
        notes: what else the run keeps: JSON.
    """

    folder: Path
    identity: dict[str, Any]
    layers: int = 0
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden_states: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> Path:
        """The subfolder of what is no part of the result."""
        return self.folder / OWN

    @classmethod
    def exists(cls, folder: Path) -> bool:
        return (folder / OWN / JOURNAL).is_file()

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """Raises OSError where there is none of this version's, naming the file."""
        path = folder / OWN / JOURNAL
        try:
            return cls(folder, **json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise OSError(
                f"{path} is damaged, or of another version ({error!r}): delete {folder} and start "
                "again"
            ) from error

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raise ValueError where the run was another one, naming what differs."""
        for name, new in identity.items():
            old = self.identity.get(name)
            if json.loads(json.dumps(new)) != old:
                raise ValueError(
                    f"the run in {self.folder} had {name}={old!r}, and now it is {new!r}: resume "
                    "with what it had, or delete that folder"
                )

    def check_files(self) -> None:
        """Raise OSError where a file is not what the run wrote, naming it."""
        recorded = {name: shard["sha256"] for name, shard in self.shards.items()}
        recorded |= {f"{OWN}/{name}": digest for name, digest in self.hidden_states.items()}
        for name, digest in recorded.items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != digest:
                raise OSError(
                    f"{path} is missing or not what the run wrote: delete {self.folder} and start "
                    "again"
                )

    def write(self) -> None:
        """Put it on disk, in place of what was there."""
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
        """Write the hidden states in front of a layer."""
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
        """Give the batches the hidden states that were written last."""
        from safetensors.torch import load_file

        (folder,) = {name.partition("/")[0] for name in self.hidden_states}
        for batch in batches:
            tensors = load_file(self.own / folder / f"{batch.number:05d}.safetensors")
            batch.hidden = place.keep(tensors["hidden"])
            batch.dense = place.keep(tensors["dense"]) if "dense" in tensors else None

    def sweep(self) -> None:
        """Delete generations of hidden states that the run on disk no longer goes by."""
        if not processes.is_first():
            return
        current = {name.partition("/")[0] for name in self.hidden_states}
        for folder in self.own.glob("hidden-states-*"):
            if folder.name not in current:
                shutil.rmtree(folder)

    @property
    def bytes_written(self) -> int:
        """Of the files that the run goes by."""
        files = [self.folder / name for name in self.shards]
        files += [self.own / name for name in self.hidden_states]
        return sum(path.stat().st_size for path in files)

    def write_index(self) -> None:
        """Write which file of the new checkpoint holds which tensor."""
        weights = {key: name for name, shard in self.shards.items() for key in shard["bytes"]}
        size = sum(sum(shard["bytes"].values()) for shard in self.shards.values())
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        with written_beside(self.folder / INDEX) as path:
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


class WritingHomes(CheckpointHomes):
    """Decoder layers that come from one checkpoint and go, as they then are, into another.

    After each, the journal has all that is needed to go on behind it.
    """

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        journal: Journal,
        place: Place,
        notes: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(parts, device)
        self.journal = journal
        self.place = place
        self.notes = notes
        self.first = journal.layers

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{len(self.layers) + 1:05d}.safetensors"

    def write_rest(self) -> None:
        """Write what is in no decoder layer, unless that is done."""
        name = self._name(1)
        if name not in self.journal.shards:
            with self.meter.phase("write"), self.surroundings():
                self.journal.add_shard(name, self.parts.state(_REST))
            self.journal.write()

    def start(self, batches: Sequence[HiddenStates]) -> None:
        if self.first:
            self.journal.read_hidden_states(batches, self.place)

    @contextmanager
    def at_work(self, index: int) -> Iterator[torch.device]:
        with super().at_work(index) as device:
            yield device
            with self.meter.phase("write"):
                self.journal.add_shard(self._name(index + 2), self.parts.state(index))

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        if index + 1 < len(self.layers):
            with self.meter.phase("write"):
                self.journal.add_hidden_states(index + 1, batches)
        else:
            self.journal.hidden_states = {}
        self.journal.layers = index + 1
        self.journal.notes = self.notes()
        self.journal.write()
        self.journal.sweep()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file beside, flush it to disk, and rename it. Returns its sha256.

    Raises:
        OSError: it cannot be written (a full disk); names the file. What was there stays.
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
    """A path to write to, which takes the place of `path` when all of it is on disk."""
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
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
