"""Command-line options made from the fields of `Settings`, and the settings that they give."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from grail_hf.config import GrailConfig
from grail_hf.settings import Settings, choices_of

S = TypeVar("S", bound=Settings)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `config` of a command by an option for each setting.

    The command is called with the settings that the options make, of the class that annotates the
    parameter. Raises ValueError for settings that it refuses.
    """
    signature = inspect.signature(command, eval_str=True)
    kind: type[Settings] = signature.parameters["config"].annotation
    names = [field.name for field in dataclasses.fields(kind)]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        own = parameter.name != "config"
        parameters += [parameter] if own else [_parameter(kind, name) for name in names]

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in names}
        command(config=config_of(kind, options), **arguments)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options


def option(name: str, kind: type[Settings] = GrailConfig) -> Any:
    """The option of a setting, to annotate a command's parameter with."""
    field = _field(kind, name)
    names = [choice for choice in choices_of(field) if isinstance(choice, str)]
    listed = f" One of {', '.join(names)}." if len(names) > 1 else ""
    return typer.Option(help=field.metadata["help"] + listed)


def config_of(kind: type[S], options: Mapping[str, Any]) -> S:
    """The settings of a command's options by name, None for one that was left out.

    Raises ValueError for settings that the class refuses.
    """
    hints = get_type_hints(kind)
    return kind(
        **{
            name: _value(given, _numbers(hints[name]))
            for name, given in options.items()
            if given is not None
        }
    )


def _field(kind: type[Settings], name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(kind) if field.name == name)


def _parameter(kind: type[Settings], name: str) -> inspect.Parameter:
    """A command's parameter for a setting; None stands for a default that cannot be typed."""
    field = _field(kind, name)
    typed = _typed(field, get_type_hints(kind)[name])
    default = field.default if isinstance(field.default, get_origin(typed) or typed) else None
    hint = typed if default is not None else typed | None
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[hint, option(name, kind)],
    )


def _typed(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The type that the command line reads for a setting.

    It is text where the setting may be text, and a list for a tuple. A pair of flags gives True and
    False, and neither of them any third choice.
    """
    if True in field.metadata["choices"]:
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
