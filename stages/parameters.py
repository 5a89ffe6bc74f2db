"""`params.yaml`: one section per stage, checked key by key against the stage's frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from hstu.errors import ParameterError

P = TypeVar("P")


def read_params(path: Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The sections of a params file, with `section.key=value` overrides applied (values are YAML).

    Raises ParameterError when the file cannot be read, or an override is malformed or names a section
    or key that the file does not have.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"{path}: cannot be read as parameters ({error})", fix="pass --params FILE, or write one with `configure`"
        ) from None
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise ParameterError(f"{path}: not a params file", expected="one mapping per stage name")
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            raise ParameterError(f"-S {override}: malformed", expected="section.key=value")
        if section not in values:
            raise ParameterError(f"-S {override}: unknown section {section!r}", **_suggestion(section, values))
        if name not in values[section]:
            raise ParameterError(f"-S {override}: unknown key {name!r}", **_suggestion(name, values[section]))
        try:
            values[section][name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"-S {override}: the value is not YAML ({error})") from None
    return values


def load_params(cls: type[P], values: Mapping[str, Any], *, section: str) -> P:
    """A checked instance of `cls`; ParameterError names every unknown or missing key and every wrong type."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ParameterError(f"{section}: unknown parameter {unknown[0]!r}", **_suggestion(unknown[0], known))
    missing = [name for name in known if name not in values]
    if missing:
        raise ParameterError(
            f"{section}: missing parameter {', '.join(missing)}",
            expected=f"every one of {', '.join(known)}",
            fix=f"add it to the section {section!r} of the params file",
        )
    return cls(**{name: _checked(values[name], hints[name], f"{section}.{name}") for name in known})


def require(condition: bool, what: str, *, got: object, expected: object) -> None:
    """ParameterError with `what` unless `condition`: the range checks of a params dataclass."""
    if not condition:
        raise ParameterError(what, got=got, expected=expected, fix="change it in the params file or with -S")


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _checked(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            fix = _suggestion(str(value), [str(a) for a in args])
            raise ParameterError(f"{name}: not one of its values", got=repr(value), **fix)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ParameterError(f"{name}: wrong type", got=repr(value), expected="a list")
        return tuple(_checked(item, args[0], f"{name}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ParameterError(f"{name}: wrong type", got=repr(value), expected=hint.__name__)
    if hint is float and value != value:
        raise ParameterError(f"{name}: not a number", got=repr(value), expected="a finite number")
    return value


def _suggestion(name: str, known: Any) -> dict[str, Any]:
    close = difflib.get_close_matches(name, list(known), n=1)
    suggestion: dict[str, Any] = {"expected": ", ".join(known)}
    if close:
        suggestion["fix"] = f"did you mean {close[0]!r}?"
    return suggestion
