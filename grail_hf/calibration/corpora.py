"""Text: files, lists of strings, corpora by name, and whatever `datasets` loads."""

from __future__ import annotations

import difflib
import errno
import gzip
import lzma
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    pass
Split: TypeAlias = Literal["train", "test"]
TextSource: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}")
# A split may be sliced, as in train[:1000], and then holds a colon of its own.
_REFERENCE = re.compile(r"(?P<name>[^:]+)(:(?P<split>(\[[^\]]*\]|[^:\[])*))?(:(?P<column>[^:]*))?")


@dataclass(frozen=True)
class Corpus:
    """A dataset, and how its documents become one text.

    `files` maps a split to the only file of the repository to read for it. `by_document` draws each
    calibration window from one document longer than the window, instead of from the joined text.
    `test_documents` and `test_windows` bound what evaluation reads.
    """

    dataset: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    train: str = "train"
    test: str = "test"
    column: str = "text"
    joiner: str = "\n\n"
    by_document: bool = False
    test_documents: int | None = None
    test_windows: int | None = None


@dataclass(frozen=True)
class Text:
    documents: Sequence[str]
    label: str
    joiner: str = "\n\n"
    by_document: bool = False
    max_windows: int | None = None


def read_text(source: TextSource, split: Split) -> Text:
    """Find the text that `source` means. A name in `CORPORA` goes before a file of that name."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if isinstance(source, str) and _is_text(source):
            raise FileNotFoundError(_not_found(source))
        if isinstance(source, str) or _is_dir(path):
            name = os.fspath(source)
            corpus = CORPORA.get(name) or _dataset_reference(name)
            if corpus is not None:
                return _load(name, corpus, split)
        return Text([_read_file(path)], path.name)
    items = list(source)
    if any(isinstance(item, os.PathLike) or is_file(item) for item in items):
        paths = [Path(item) for item in items]
        return Text([_read_file(path) for path in paths], ", ".join(path.name for path in paths))
    return Text([str(item) for item in items], f"given texts ({len(items)})")


def is_file(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text is often too long to be a file's name
        return False


def _is_dir(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def _is_text(source: str) -> bool:
    """Whether a string is no file, and holds line breaks or is too long for the name of one."""
    try:
        Path(source).stat()
    except OSError as error:
        return "\n" in source or error.errno == errno.ENAMETOOLONG
    except ValueError:  # it holds a null character
        return True
    return False


def _read_file(path: Path) -> str:
    if not is_file(path):
        raise FileNotFoundError(_not_found(os.fspath(path)))
    if path.suffix == ".jsonl":
        raise ValueError(
            f"{path} is a table, not a text: name its folder as a dataset, "
            f"'{path.parent}:train:text'; conversations are for calibration, without texts"
        )
    return read_decoded(path)


def read_decoded(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    return text


def _not_found(name: str) -> str:
    if _is_text(name):
        shown = name if len(name) <= 30 else name[:30] + "..."
        return (
            f"{shown!r} is a text of {len(name):,} characters, not a file or the name of a corpus: "
            "a text of your own goes in a list: [text]"
        )
    shown = name if len(name) <= 80 else name[:77] + "..."
    nearest = difflib.get_close_matches(name.lower(), CORPORA, n=1)
    return (
        f"{shown!r} is neither a file that exists nor a named corpus ({', '.join(CORPORA)})"
        + (f"; did you mean {nearest[0]!r}? " if nearest else ". ")
        + "Another dataset is written 'name/config:split:column', a text of your own "
        "goes in a list: [text]"
    )


def _dataset_reference(source: str) -> Corpus | None:
    """Read `name:split:column`; None where `source` can only mean a file.

    Without a colon, a name must be a folder, or have a slash and no suffix: `data/notes.txt` is a
    file that is missing, and asking the hub for it would hide that.
    """
    match = _REFERENCE.fullmatch(source)
    if is_file(source) or match is None:
        return None
    name = match["name"]
    is_folder = _is_dir(name)
    on_hub = _HUB_NAME.fullmatch(name) and (
        ":" in source or ("/" in name and not Path(name).suffix)
    )
    if not (is_folder or on_hub):
        return None
    dataset, config = name, None
    if not is_folder and name.count("/") == 2:
        dataset, config = name.rsplit("/", 1)
    return Corpus(
        dataset,
        config,
        train=match["split"] or "train",
        test=match["split"] or "test",
        column=match["column"] or "text",
    )


def _load(name: str, corpus: Corpus, split: Split) -> Text:
    """Load one split of a corpus through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    split_name = corpus.train if split == "train" else corpus.test
    is_folder = _is_dir(corpus.dataset)
    attempts = [(corpus.dataset, corpus.config)]
    if corpus.config is None and "/" in corpus.dataset and not is_folder:
        owner, dataset = corpus.dataset.split("/")
        attempts.append((owner, dataset))  # 'a/b' may also be the dataset a with its config b
    options: dict[str, Any] = {"revision": corpus.revision, "split": split_name}
    if corpus.files is not None:
        # datasets 4.0 holds the one file against the sizes its card gives for all, and refuses.
        options |= {
            "data_files": {split_name: corpus.files[split_name]},
            "verification_mode": "no_checks",
        }
    failures: list[OSError] = []
    for dataset, config in attempts:
        try:
            table = load_dataset(dataset, config, **options)
            break
        except (DatasetNotFoundError, ConnectionError) as error:
            failures.append(error)
    else:
        raise FileNotFoundError(f"{failures[0]}. {_not_found(name)}") from failures[0]

    kind = getattr(table.features.get(corpus.column), "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{name!r} has no column of text {corpus.column!r}, only {table.column_names}: "
            "write 'name:split:column'"
        )
    documents: Sequence[str] = table[corpus.column]
    if split == "test" and corpus.test_documents is not None:
        documents = documents[: corpus.test_documents]
    parts = [Path(dataset).name if is_folder else dataset, config, split_name]
    return Text(
        documents,
        label=", ".join(part for part in parts if part),
        joiner=corpus.joiner,
        by_document=corpus.by_document and split == "train",
        max_windows=corpus.test_windows,
    )


# A corpus that the literature reads in its own way is added here; any other needs no entry.
CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        # Its main branch is a loading script, which `datasets` no longer runs.
        revision="refs/convert/parquet",
        column="sentence",
        joiner=" ",
    ),
    "c4": Corpus(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        test="validation",
        joiner=" ",
        by_document=True,
        test_documents=1100,
        test_windows=256,
    ),
}
