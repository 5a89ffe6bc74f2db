"""What a kernel says when it cannot be compiled, loaded or called: what, got, expected and how to fix it."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel cannot be compiled or loaded here, or a call makes no sense."""

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        parts = [what]
        for name, value in (("got:     ", got), ("expected:", expected), ("fix:     ", fix)):
            if value is not None:
                parts.append(f"  {name} {value}")
        super().__init__("\n".join(parts))
