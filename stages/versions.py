"""Semantic versions of bundles: MAJOR.MINOR.PATCH, ordered number by number."""

from __future__ import annotations

import re

_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")


def version_key(text: object) -> tuple[int, int, int] | None:
    """The numbers of a semantic version, to compare by; None when `text` is not one."""
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2]), int(match[3])) if match else None
