"""Small files of a checkpoint, in a folder or on the hub, which are read before its weights."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grail_hf.checkpoints.journal import INDEX, WEIGHTS
from grail_hf.models.decoder import auto_class
from grail_hf.models.quantization import dequantizing, without_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel
REST = -1  # the part of a model that is in no decoder layer
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
_PROCESSOR = ["*processor_config.json", "chat_template*"]


def check_revision(source: str | Path, revision: str | None) -> None:
    """Raise ValueError where a revision is given for a folder, which has none."""
    if revision is not None and Path(source).is_dir():
        raise ValueError(
            f"revision={revision!r} goes with a name on the hub, and {source} is a folder"
        )


def meta_model(
    source: str | Path, revision: str | None = None, dequantize: bool = False
) -> PreTrainedModel:
    """The model of a source's config on the meta device; only the config is downloaded.

    Args:
        source: a folder, or a name on the hub.
        revision: of the repository on the hub.
        dequantize: give the model as it is when its weights are loaded as floats.

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
    """Whether a source's weights are in safetensors; nothing is downloaded."""
    from transformers.utils.hub import has_file

    return any(has_file(source, name, revision=revision) for name in (INDEX, WEIGHTS))


def small_files(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """A checkpoint's folder with everything but its weights, downloaded from the hub if need be.

    Returns:
        The folder, and the commit of its files; None for the commit of a local folder.

    Raises:
        FileNotFoundError: the source is neither a folder nor a name on the hub.
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


def fetch_weights(name: str, commit: str) -> None:
    """Download the index of a repository's weights, if it has one, and the files in the index."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        index = Path(hf_hub_download(name, INDEX, revision=commit))
        files = sorted(set(read_index(index).values()))
    except EntryNotFoundError:
        files = [WEIGHTS]
    snapshot_download(name, revision=commit, allow_patterns=files)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises OSError where the file at `path` is not an index."""
    try:
        files: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
        return dict(files.items())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(f"{path} is damaged ({error!r}): download it again") from error


def processor_folder(source: str | Path, revision: str | None) -> Path:
    """A folder with the files that turn a tokenizer into a processor, downloaded if need be.

    Where the hub cannot be reached, files that were downloaded earlier are used.
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
    """Copy a processor's files that the new checkpoint in `folder` lacks from `source`."""
    for pattern in _PROCESSOR:
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy(path, folder)


_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZERS)
