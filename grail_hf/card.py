"""The model card of a compressed checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
CARD_FILE = "README.md"
TAGS = ("grail", "structured-pruning")
USAGE = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/or/name")
```"""
CAUSAL = "AutoModelForCausalLM"
NAMES_IN_CARD = 20
_LICENSE_KEYS = ("license", "license_name", "license_link")
_IN_CACHE = re.compile(r"/models--(?P<name>[^/]+)/snapshots/[^/]+$")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def public_name(name: str | None) -> str:
    """A hub name as it is, or as the hub's cache has it; of another path the folder's name."""
    if not name:
        return "model"
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    folder = Path(name).resolve()
    if cached := _IN_CACHE.search(folder.as_posix()):
        return cached["name"].replace("--", "/", 1)
    return folder.name or "model"


def license_of(name: str | None) -> dict[str, Any]:
    """What the card in a folder of this name says of the license, if there is one."""
    card = Path(name or "", CARD_FILE)
    if not name or not card.is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        said = metadata_load(card) or {}
    except (ValueError, YAMLError):  # a card that cannot be read says nothing
        return {}
    return {key: said[key] for key in _LICENSE_KEYS if key in said}


def is_tagged(card: Path) -> bool:
    """Whether a card's front matter has the tags that `compress` gives a model."""
    front, _, _ = card.read_text("utf-8").partition("\n---\n")
    return {f"- {tag}" for tag in TAGS} <= set(front.splitlines())
