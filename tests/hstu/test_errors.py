"""The error tree: exit codes, and messages that say what, got, expected and how to fix it."""

from __future__ import annotations

import pytest

from hstu import errors
from hstu.errors import CompilerError

EXIT_CODES = {
    "UsageError": 2,
    "ParameterError": 2,
    "InputError": 2,
    "MissingBackendError": 3,
    "ArtifactError": 4,
    "GateError": 5,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_exit_code(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, CompilerError)
    assert kind("it").exit_code == code


def test_every_error_is_listed_here() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CompilerError)]
    assert {kind.__name__ for kind in kinds} == {*EXIT_CODES, "CompilerError"}


def test_message_has_one_line_per_part() -> None:
    error = errors.UsageError("what happened", got=0, expected=False, fix="do this")
    assert str(error).splitlines() == [
        "what happened",
        "  got:      0",
        "  expected: False",
        "  fix:      do this",
    ]


def test_parts_not_given_are_left_out() -> None:
    assert str(errors.InputError("what happened")) == "what happened"
    assert str(errors.InputError("what happened", fix="do this")).splitlines() == [
        "what happened",
        "  fix:      do this",
    ]
