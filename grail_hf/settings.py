"""`Settings`: frozen dataclasses whose fields are checked, described once, and written as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

import torch

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: `low` and above, and below `high`.

    Attributes:
        whole: integers alone.
        example: a number that an error message proposes.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    example: float | None = None

    def __contains__(self, value: object) -> bool:
        number = is_integer(value) if self.whole else _is_number(value)
        return number and self.low <= cast(float, value) < self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        if self.high == math.inf:
            return f"{kind} of at least {self.low}"
        return f"{kind} in [{self.low}, {self.high})"


FRACTION = Range(0, 1, example=0.3)
COUNT = Range(1, whole=True)


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    range: Range | None = None,
    table: str | None = None,
) -> Any:
    """A field of `GrailConfig`, with what its check and the command line need as metadata.

    A value passes if it is one of `choices`, lies in `range`, or is None where that is the default.

    Args:
        default: the field's default.
        help: one line for the command line; the class docstring has the details.
        choices: values other than numbers. Without these and a range, any value passes.
        range: the numbers.
        table: where the names of further choices are, as "package:name" of a dict. It is imported
            when somebody asks for them, so that this module imports nothing of the package.
    """
    metadata = {"help": help, "choices": choices, "range": range, "table": table}
    return dataclasses.field(default=default, metadata=metadata)


def same_as(settings: type[Settings], name: str, **changes: Any) -> Any:
    """A field that means what it means in another class, with perhaps another `default`."""
    (field,) = (one for one in dataclasses.fields(settings) if one.name == name)
    return dataclasses.field(metadata=field.metadata, **{"default": field.default, **changes})


def choices_of(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """What a setting may be besides numbers, with the names in its table."""
    table = field.metadata["table"]
    return (*field.metadata["choices"], *(pkgutil.resolve_name(table) if table else ()))


@dataclass(frozen=True)
class Settings:
    """Fields made by `setting`, which are checked when an object is made.

    A field called `device` may be given as a `torch.device`; it is kept as its name.

    Raises:
        ValueError: a value outside its range, naming value, range and remedy.
    """

    # Names from before a setting was renamed, which old files and programs hold.
    old_names: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if getattr(self, "device", None) is not None:
            object.__setattr__(self, "device", _device_name(self.device))  # type: ignore[attr-defined]

    def values(self) -> dict[str, Any]:
        """The settings by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return self.values()

    @classmethod
    def from_dict(cls: type[S], settings: dict[str, Any]) -> S:
        """The inverse of `to_dict`. A setting's old name is understood too.

        Raises ValueError on an unknown setting.
        """
        settings = cls._renamed(settings)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f"unknown setting {unknown[0]!r}: {cls.__name__} has {', '.join(known)}"
            )
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls: type[S], text: str) -> S:
        return cls.from_dict(json.loads(text))

    @classmethod
    def resolve(cls: type[S], given: S | dict[str, Any] | None, **overrides: Any) -> S:
        """One object from another (or its dict, or nothing) and keyword overrides."""
        settings = given.values() if isinstance(given, Settings) else given or {}
        return cls.from_dict(cls._renamed(settings) | cls._renamed(overrides))

    @classmethod
    def _renamed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {cls.old_names.get(name, name): value for name, value in settings.items()}


def _check(field: dataclasses.Field[Any], value: object) -> None:
    """Raise ValueError for a value that is neither one of a setting's choices nor in its range.

    Names in a table pass: the plan looks them up.
    """
    choices, numbers = field.metadata["choices"], field.metadata["range"]
    if field.metadata["table"] or not (choices or numbers):
        return
    if (value is None and field.default is None) or (numbers and value in numbers):
        return
    # True equals 1, which no setting means by it.
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices):
        return
    if numbers and numbers.example is not None:
        alternatives = "".join(f", or {choice!r}" for choice in choices)
        raise ValueError(
            f"{field.name}={value!r} is outside [{numbers.low}, {numbers.high}): it is a fraction, "
            f"for example {field.name}={numbers.example}{alternatives}"
        )
    *others, last = [*([str(numbers)] if numbers else []), *map(repr, choices)]
    listed = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"{field.name}={value!r} must be {listed}")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _device_name(device: object) -> str:
    """The device's name. This machine may lack it: a config can be made for another one."""
    try:
        return str(torch.device(device))  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device: give a name like 'cuda', 'cuda:1' or 'cpu'"
        ) from error
