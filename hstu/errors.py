"""The one error tree: what went wrong, what was got and expected, and how to fix it.

Every error a user can cause derives from :class:`CompilerError`; `cli.py` catches only that tree and
exits with its `exit_code`. Anything else is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations


class CompilerError(Exception):
    """Something the user can fix; the message is one line per part, the first says what happened."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        parts = [what]
        if got is not None:
            parts.append(f"  got:      {got}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if fix is not None:
            parts.append(f"  fix:      {fix}")
        super().__init__("\n".join(parts))


class UsageError(CompilerError):
    """Bad parameters, bad input data or bad usage."""

    exit_code = 2


class ParameterError(UsageError):
    """A parameter is unknown, missing, of the wrong type or out of range."""


class InputError(UsageError):
    """An input file or request holds what cannot be used."""


class MissingBackendError(CompilerError):
    """A device, library or version that was asked for is not here."""

    exit_code = 3


class ArtifactError(CompilerError):
    """An artifact is corrupt, incomplete, or not the one that was asked for."""

    exit_code = 4


class GateError(CompilerError):
    """A numeric, quality or performance gate did not pass."""

    exit_code = 5
