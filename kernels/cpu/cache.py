"""Compiled kernels kept for the next build: by the content of everything that makes them, whole or not at all.

An entry is a folder named after that content, holding the files and `sums.json`, their SHA-256. It is written beside
its place and renamed, so two builds at once cannot see each other's halves; one whose sums do not fit is built anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

_LOG = logging.getLogger(__name__)
_SUMS = "sums.json"


def user_cache() -> Path:
    """Where this user's compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hstu-compiler" / "kernels"


def digest(parts: Mapping[str, bytes]) -> str:
    """A name for what is made of these parts: hexadecimal, another one when any part is another."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def files_of(cache: Path, key: str, make: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
    """The files that `make` makes, by name: those kept under `key`, or new ones, which are kept."""
    folder = cache / key
    kept = _read(folder)
    if kept is not None:
        return kept
    made = make()
    try:
        _write(folder, made)
    except OSError as error:  # a build is right without it, only slower the next time
        _LOG.warning("%s: the compiled kernels cannot be kept (%s)", cache, error)
    return made


def _read(folder: Path) -> Mapping[str, bytes] | None:
    """The files of an entry; None when there is none, or what is there is not what was written."""
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
        files = {name: (folder / name).read_bytes() for name in sums}
    except (OSError, ValueError, TypeError):
        return None
    whole = all(hashlib.sha256(content).hexdigest() == sums[name] for name, content in files.items())
    return files if whole and files else None


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """`folder` holds the files and their sums; if another build was first with a whole one, its."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as name:
        new = Path(name) / "new"
        new.mkdir()
        for file, content in files.items():
            (new / file).write_bytes(content)
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        (new / _SUMS).write_text(json.dumps(sums))
        if folder.exists() and _read(folder) is None:
            folder.rename(Path(name) / "broken")  # goes with the temporary folder
        if not folder.exists():
            new.rename(folder)
