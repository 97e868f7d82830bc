"""The model card of a compressed checkpoint: its metadata, and its parts in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grail_hf.config import AUTO, GrailConfig
from grail_hf.models.architectures import ARCHITECTURES

CARD_FILE = "README.md"
TAGS = ("grail", "structured-pruning")
CAUSAL = "AutoModelForCausalLM"
USAGE = f"""\
```python
from transformers import {CAUSAL}

model = {CAUSAL}.from_pretrained("path/or/name")
```"""
_MOST_NAMES = 20
_LICENSE_KEYS = ("license", "license_name", "license_link")
_IN_CACHE = re.compile(r"/models--(?P<name>[^/]+)/snapshots/[^/]+$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def public_name(name: str | None) -> str:
    """A model's name on the hub, also for a folder in the hub's cache; else its folder's name."""
    if not name:
        return "model"
    if _HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    folder = Path(name).resolve()
    if cached := _IN_CACHE.search(folder.as_posix()):
        return cached["name"].replace("--", "/", 1)
    return folder.name or "model"


def license_of(name: str | None) -> dict[str, Any]:
    """The license in the metadata of the card in a folder of this name, if there is one."""
    card = Path(name or "", CARD_FILE)
    if not name or not card.is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        metadata = metadata_load(card) or {}
    except (ValueError, YAMLError):  # a card that cannot be read has no license
        return {}
    return {key: metadata[key] for key in _LICENSE_KEYS if key in metadata}


def is_tagged(card: Path) -> bool:
    """Whether a card's metadata has the tags that `compress` gives a model."""
    front, _, _ = card.read_text("utf-8").partition("\n---\n")
    return {f"- {tag}" for tag in TAGS} <= set(front.splitlines())


def card_text(metadata: str, parts: Iterable[str]) -> str:
    """A card of YAML metadata and Markdown parts, of which empty ones are left out."""
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{metadata}\n---\n\n{body}\n"


def card_metadata(base_model: str, auto_class: str, license: Mapping[str, Any]) -> str:
    """The YAML metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_model if _HUB_NAME.fullmatch(base_model) else None,
        library_name="transformers",
        pipeline_tag="text-generation" if auto_class == CAUSAL else "image-text-to-text",
        tags=list(TAGS),
        **license,
    )
    return str(data.to_yaml())


def origin(base_model: str, version: str, config: GrailConfig, trained: bool = False) -> str:
    """How the model was made, in a sentence; `trained` tells that a recovery followed."""
    ridge = config.ridge
    damping = "damping chosen on held-out windows" if ridge == AUTO else f"damping {ridge:g}"
    repair = "without repair"
    if config.compensate:
        repair = (
            f"repaired by ridge regression ({damping}) as in "
            "[GRAIL](https://arxiv.org/abs/2602.23795)"
        )
    return (
        f"Made from {base_model} by grail_hf {version}: units chosen by "
        f"`{config.selector_name}`, {repair}. "
        + ("Then trained, without labels, as told below." if trained else "No training.")
    )


def loading(model_type: str, uniform: bool) -> str:
    """What loads the checkpoint; `uniform` tells that all layers have one width."""
    if uniform:
        return f"It is an ordinary `{model_type}` checkpoint:"
    return (
        f"It is a `{model_type}` checkpoint whose layers differ in width: it loads after "
        "`import grail_hf`, or without grail_hf by the code that is saved beside the weights:"
    )


def usage(auto_class: str, uniform: bool) -> str:
    """Python that loads the checkpoint."""
    code = USAGE.replace(CAUSAL, auto_class)
    return code if uniform else code.replace('name")', 'name", trust_remote_code=True)')


def serving(model_type: str, present: Mapping[str, bool]) -> str:
    """How to serve the model by vLLM where vLLM's own code does not compute it; else empty.

    Args:
        model_type: of the checkpoint.
        present: whether the checkpoint has what `Architecture.vllm_ignores` may name.
    """
    entry = ARCHITECTURES.get(model_type)
    if entry is None or not present.get(entry.vllm_ignores):
        return ""
    return (
        f"vLLM's own code for `{model_type}` ignores {entry.vllm_ignores}. Serve this model with "
        "`vllm serve --model-impl transformers`."
    )


def conversion(model_type: str, new_model_type: str) -> str:
    """Why the model was converted to another type."""
    return (
        f"The dense model is a `{model_type}`, whose stock config cannot represent the new number "
        f"of heads. `{new_model_type}` computes the same function and can represent it."
    )


def calibration_summary(summary: Mapping[str, Any]) -> str:
    """The calibration set, in a sentence; empty without one."""
    if not summary:
        return ""
    return (
        f"Calibration: {summary['source']}; {summary['samples']} samples, "
        f"{summary['tokens']:,} tokens, sha256 `{summary['fingerprint'][:16]}`."
    )


def scarce_summary(experts: Sequence[str]) -> str:
    """The experts that saw fewer calibration tokens than they keep channels; empty without any."""
    if not experts:
        return ""
    rest = len(experts) - _MOST_NAMES
    more = f" and {rest} more" if rest > 0 else ""
    return (
        "Experts that saw fewer calibration tokens than they keep channels, and are therefore "
        "repaired with more damping or not at all: "
        f"{', '.join(experts[:_MOST_NAMES])}{more}."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines])
