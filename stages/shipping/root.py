"""A root: the folder that bundles are installed in, the one that serves, and what may come next.

versions/<version>-<id>/        bundles, whole
versions/<version>-<id>.sig     their signatures
current                         a link to the one that serves; replaced by a rename
installed.json                  the newest version ever accepted, and the order in which versions served

The monotone element is the bundle's semantic version: a root takes no bundle older than the newest that it accepted,
nor another one under the same version, so that nobody can bring an old bundle back by sending it again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hstu.artifact import encode_json
from hstu.errors import ArtifactError, UsageError
from stages.versions import version_key
from stages.workspace import sync_folder

SCHEMA = 1
STATE = "installed.json"
VERSIONS = "versions"
CURRENT = "current"


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """What a root's `installed.json` says: newest accepted (None: nothing yet), and what served, the last one now."""

    newest_version: str | None = None
    newest_id: str | None = None
    key: str | None = None  # fingerprint of the key that the newest was checked with
    history: tuple[str, ...] = ()


def folder_name(version: str, identity: str) -> str:
    """Where a bundle stands below `versions/`."""
    return f"{version}-{identity[:12]}"


def read_root(root: Path) -> Root:
    """The state of the root, empty for a new one; ArtifactError when it is not whole."""
    path = root / STATE
    fix = f"put {STATE} back from a backup, or install into a new root"
    if not path.exists():
        if (root / VERSIONS).is_dir() and any((root / VERSIONS).iterdir()):
            raise ArtifactError(f"{path}: missing, so it is not known what may be installed", fix=fix)
        return Root()
    try:
        values = json.loads(path.read_bytes())
        schema = values.pop("schema")
        state = Root(**{**values, "history": tuple(values["history"])})
        right = schema == SCHEMA and (state.newest_version is None or version_key(state.newest_version) is not None)
        right &= all(isinstance(name, str) and name == Path(name).name for name in state.history)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: not the state of a root ({error!r})", fix=fix) from None
    if not right:
        raise ArtifactError(f"{path}: not the state of a root", got=values, fix=fix)
    return state


def write_root(root: Path, state: Root) -> None:
    """`installed.json` says `state`, on the disk."""
    staged = root / f".{STATE}.tmp"
    values: dict[str, Any] = {"schema": SCHEMA, **asdict(state)}
    staged.write_bytes(encode_json(values))
    sync_folder(staged)
    staged.replace(root / STATE)
    sync_folder(root)


def current(root: Path) -> str | None:
    """The name of the version that serves; None when none does. UsageError when `current` is not our link."""
    link = root / CURRENT
    if not os.path.lexists(link):
        return None
    target = link.readlink() if link.is_symlink() else None
    if target is None or target.parent != Path(VERSIONS):
        raise UsageError(f"{link}: not a link of ours", expected=f"a link to {VERSIONS}/…", fix="move it away")
    return target.name


def switch(root: Path, name: str) -> None:
    """`current` leads to the version `name`: whoever opens it finds the old one or the new one, never neither."""
    staged = root / f".{CURRENT}.tmp"
    staged.unlink(missing_ok=True)
    staged.symlink_to(f"{VERSIONS}/{name}")
    staged.replace(root / CURRENT)
    sync_folder(root)


def check_monotone(state: Root, version: str, identity: str, *, source: str) -> None:
    """ArtifactError unless the bundle is newer than everything the root accepted, or is the newest itself."""
    if state.newest_version is None or identity == state.newest_id:
        return
    given, newest = version_key(version), version_key(state.newest_version)
    assert given is not None
    assert newest is not None
    if given <= newest:
        same = given == newest
        raise ArtifactError(
            f"{source}: " + ("another bundle has this version" if same else "older than what was installed here"),
            got=f"{version} {identity[:12]}",
            expected=f"a version above {state.newest_version} ({str(state.newest_id)[:12]})",
            fix="ship it under a higher bundle.version; to serve the version before, rollback; "
            "to accept this one all the same, --allow-downgrade",
        )


def settled(state: Root, serving: str | None) -> Root:
    """The state with a history that ends with what really serves: the link is the truth when a kill parted the two."""
    history = list(state.history)
    while history and history[-1] != serving:
        history.pop()
    return replace(state, history=tuple(history))
