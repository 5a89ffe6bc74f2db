"""`params.yaml`: one section per stage, checked key by key against the stage's frozen dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from hstu.errors import ParameterError

P = TypeVar("P")


def read_params(path: Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The sections of a params file, with `section.key=value` overrides applied (values are YAML).

    Raises ParameterError when the file cannot be read, names something twice, or an override is malformed
    or names a section or key that the file does not have.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"{path}: cannot be read as parameters ({error})", fix="pass --params FILE, or write one with `configure`"
        ) from None
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: not a params file", got=_short(values), expected="one mapping per stage name")
    for section, content in values.items():
        if not isinstance(section, str) or not isinstance(content, dict):
            raise ParameterError(
                f"{path}: the section {section!r} is not a mapping", got=_short(content), expected="key: value lines"
            )
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ParameterError(f"-S {override}: malformed", expected="section.key=value")
        if section not in values:
            raise ParameterError(f"-S {override}: unknown section {section!r}", **suggestion(section, values))
        if name not in values[section]:
            raise ParameterError(f"-S {override}: unknown parameter {name!r}", **suggestion(name, values[section]))
        try:
            values[section][name] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"-S {override}: the value is not YAML ({error})", fix="put it in quotes") from None
    return values


def read_comments(path: Path) -> dict[str, str]:
    """What `path` says of each key after it, as "section.key" → text; empty when the file is not there."""
    comments: dict[str, str] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        found = re.match(r"(?P<indent> *)(?P<key>[A-Za-z0-9_-]+):(?P<value>[^#]*)(# (?P<comment>.*))?$", line)
        if found is None:
            continue
        if not found["indent"]:
            section = found["key"]
        elif found["comment"]:
            comments[f"{section}.{found['key']}"] = found["comment"].strip()
    return comments


def load_params(cls: type[P], values: Mapping[str, Any], *, section: str) -> P:
    """A checked instance of `cls`; ParameterError names every unknown or missing key, or the first wrong type."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        raise ParameterError(f"{section}: unknown parameter {names}", **suggestion(str(unknown[0]), known))
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


def suggestion(name: str, known: Iterable[object], fix: str | None = None) -> dict[str, Any]:
    """The `expected` and `fix` of an error about an unknown `name`: the known ones, and the one probably meant."""
    names = [str(item) for item in known]
    close = difflib.get_close_matches(name, names, n=1)
    return {"expected": ", ".join(names), "fix": f"did you mean {close[0]!r}?" if close else fix}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, where 1e-3 is a number (YAML 1.2, as DVC reads it) and no key may stand twice."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, args, name)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise ParameterError(f"{name}: not one of its values", got=_short(value), **suggestion(str(value), args))
        return value
    if origin is tuple:
        return _tuple(value, args, name)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ParameterError(f"{name}: wrong type", got=_short(value), expected="a mapping")
        return {_checked(k, args[0], f"key of {name}"): _checked(v, args[1], f"{name}.{k}") for k, v in value.items()}
    if hint not in (bool, int, float, str):
        raise TypeError(f"{name}: a parameter cannot be of type {hint}")
    if hint is float:
        return _finite(value, name)
    if type(value) is not hint:
        fix = "put it in quotes" if hint is str and value is not None else None
        raise ParameterError(f"{name}: wrong type", got=_short(value), expected=_name(hint), fix=fix)
    return value


def _one_of(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in hints:
        return None
    choices = [hint for hint in hints if hint is not type(None)]
    if len(choices) == 1:
        return _checked(value, choices[0], name)
    for hint in choices:
        with contextlib.suppress(ParameterError):
            return _checked(value, hint, name)
    expected = " or ".join(_name(hint) for hint in hints)
    raise ParameterError(f"{name}: wrong type", got=_short(value), expected=expected)


def _tuple(value: Any, args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ParameterError(f"{name}: wrong type", got=_short(value), expected="a list", fix=f"write [{value}]")
    hints = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(hints) != len(value):
        raise ParameterError(f"{name}: wrong length", got=_short(value), expected=f"{len(hints)} values")
    return tuple(_checked(item, hint, f"{name}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParameterError(f"{name}: wrong type", got=_short(value), expected="a number")
    if (isinstance(value, int) and abs(value) >= 2**1023) or not math.isfinite(value):
        raise ParameterError(f"{name}: not a finite number", got=_short(value), expected="a finite number")
    return float(value)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    return (
        "nothing (null)"
        if hint is type(None)
        else {int: "a whole number", float: "a number"}.get(hint, getattr(hint, "__name__", str(hint)))
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
