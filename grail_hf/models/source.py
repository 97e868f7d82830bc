"""An `Architecture` as Python source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from grail_hf.models.schema import Architecture

LINE = 100  # characters


def architecture_source(architecture: Architecture) -> str:
    """The entry as Python source for `grail_hf/models/architectures.py`, without defaults.

    Its `exports` and `gguf` are left out: they hold functions, and are not inferred.
    """
    return _source(replace(architecture, exports={}, gguf=()), indent=0)


def _source(value: Any, indent: int, used: int = 0) -> str:
    """Python source for the value, over several lines where it does not fit on one.

    Args:
        value: of an entry.
        indent: of the line that it is on.
        used: characters before it on its line.
    """
    inner = indent + 4
    if isinstance(value, Mapping):
        items = [f"{json.dumps(key)}: {_source(held, inner)}" for key, held in value.items()]
        return _bracketed("{", items, "}", indent, used)
    if isinstance(value, tuple):
        items = [_source(held, inner) for held in value]
        return _bracketed("(", items, ",)" if len(items) == 1 else ")", indent, used)
    if is_dataclass(value):
        items = []
        for field in fields(value):
            held = getattr(value, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if default is MISSING:
                items.append(_source(held, inner))
            elif held != default:
                name = f"{field.name}="
                items.append(name + _source(held, inner, len(name)))
        return _bracketed(f"{type(value).__name__}(", items, ")", indent, used)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _bracketed(opening: str, items: Sequence[str], closing: str, indent: int, used: int) -> str:
    line = f"{opening}{', '.join(items)}{closing}"
    if indent + used + len(line) < LINE and "\n" not in line:
        return line
    lines = "".join(f"{' ' * (indent + 4)}{item},\n" for item in items)
    return f"{opening}\n{lines}{' ' * indent}{closing[-1]}"
