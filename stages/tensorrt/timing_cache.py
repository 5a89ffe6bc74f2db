"""The timing caches of a machine: one file per GPU, product and version, checked before it is used.

A cache holds which tactics were fastest, so a second build takes minutes less and, with the same cache, the same
tactics. It is of use to the GPU and the version that measured it alone, so these are its name.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hstu.artifact import encode_json, sha256_file
from hstu.errors import ArtifactError
from serving.engines.tensorrt_facts import Device


def cache_name(product: str, version: str, device: Device) -> str:
    """The file name of a GPU's cache, such as nvidia-h200-sm9.0-tensorrt-11.4.0.cache."""
    text = f"{device.name}-sm{device.sm}-{product}-{version}"
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()) + ".cache"


def take(folder: Path, name: str, target: Path) -> bool:
    """`target` is a copy of the cache of that name; False when there is none yet.

    Raises ArtifactError when it is not what was kept (cut off, or changed).
    """
    path, note = folder / name, folder / f"{name}.json"
    if not path.is_file():
        return False
    try:
        expected = json.loads(note.read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, f"its checksum cannot be read ({error})") from None
    target.write_bytes(path.read_bytes())
    if sha256_file(target) != expected:
        raise _damaged(path, f"{path.stat().st_size} bytes whose SHA-256 is not the one that was kept")
    return True


def keep(source: Path, folder: Path, name: str) -> None:
    """The cache of that name is a copy of `source`: whole, whenever the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.write_bytes(source.read_bytes())
    (folder / f"{name}.json").write_bytes(encode_json({"sha256": sha256_file(temporary)}))
    temporary.replace(folder / name)


def _damaged(path: Path, got: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: the timing cache is damaged", got=got, fix="delete it; the next build makes a new one"
    )
