"""Command-line options made from the fields of `GrailConfig`, and the config that they give."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from grail_hf.config import GrailConfig, choices_of

_FIELDS = {field.name: field for field in dataclasses.fields(GrailConfig)}
_HINTS = get_type_hints(GrailConfig)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `config` of a command by an option for each setting.

    The command is called with the `GrailConfig` that the options make. Raises ValueError for
    settings that it refuses.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += map(_parameter, _FIELDS) if parameter.name == "config" else [parameter]

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _FIELDS}
        command(config=config_of(options), **arguments)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options


def option(name: str) -> Any:
    """The option of a setting, to annotate a command's parameter with."""
    field = _FIELDS[name]
    names = [choice for choice in choices_of(field) if isinstance(choice, str)]
    listed = f" One of {', '.join(names)}." if len(names) > 1 else ""
    return typer.Option(help=field.metadata["help"] + listed)


def config_of(options: Mapping[str, Any]) -> GrailConfig:
    """The config of a command's options by name, None for one that was left out.

    Raises ValueError for settings that `GrailConfig` refuses.
    """
    return GrailConfig(
        **{
            name: _value(given, _numbers(_HINTS[name]))
            for name, given in options.items()
            if given is not None
        }
    )


def _parameter(name: str) -> inspect.Parameter:
    """A command's parameter for a setting; None stands for a default that cannot be typed."""
    field, kind = _FIELDS[name], _kind(name)
    default = field.default if isinstance(field.default, get_origin(kind) or kind) else None
    hint = kind if default is not None else kind | None
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[hint, option(name)],
    )


def _kind(name: str) -> Any:
    """The type that the command line reads for a setting.

    It is text where the setting may be text, and a list for a tuple. A pair of flags gives True and
    False, and neither of them any third choice.
    """
    hint = _HINTS[name]
    if True in _FIELDS[name].metadata["choices"]:
        return bool
    if get_origin(hint) is tuple:
        return list[str]
    return str if str in get_args(hint) or hint is str else _numbers(hint)[0]


def _numbers(hint: Any) -> list[type]:
    """The types of number that an annotation names."""
    if get_args(hint):
        return [kind for part in get_args(hint) for kind in _numbers(part)]
    return [hint] if hint in (int, float) else []


def _value(given: Any, numbers: list[type]) -> Any:
    """The setting that an option's value stands for: a number if it reads as one."""
    if isinstance(given, list):
        return tuple(_value(one, numbers) for one in given)
    for number in numbers:
        with suppress(ValueError):
            return number(given)
    return given
