"""What an engine of TensorRT was built with (`build.json` beside it), and how that differs from this machine.

Compared before anything is deserialised: a plan of another version or GPU ends in a vague error of the library, or in
a crash. Here each difference is named.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hstu.artifact import encode_json, sha256_file
from hstu.errors import ArtifactError, MissingBackendError

FILE = "build.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU and its software: `cuda` is what was compiled against, `driver_cuda` the newest that the driver runs."""

    name: str
    sm: str
    cuda: str
    driver_cuda: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryFacts:
    """One entry's engine file; `profiles` are (min, typical, max) shapes by input, in the engine's order."""

    file: str
    sha256: str
    bytes: int
    onnx: str
    profiles: tuple[Mapping[str, Any], ...]
    warnings: Mapping[str, int]
    memory: Mapping[str, int]
    layers: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildFacts:
    """`build.json`: which product and version built these engines, where, with what settings."""

    product: str
    module: str
    version: str
    executed: bool  # False: built, and never run on the machine that built it
    device: Device | None  # None: built without a GPU
    settings: Mapping[str, Any]
    entries: Mapping[str, EntryFacts]
    plugins: Mapping[str, str] = field(default_factory=dict)  # file of a plugin's kernel in the folder: SHA-256

    def write(self, folder: Path) -> None:
        """`build.json` is in the folder."""
        (folder / FILE).write_bytes(encode_json(asdict(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not as it was when the engine was built."""

    what: str
    built: str
    here: str

    def __str__(self) -> str:
        return f"{self.what}: built {self.built}, here {self.here}"


def read_facts(folder: Path) -> BuildFacts:
    """The facts of an engine folder; ArtifactError when they are not there or not whole."""
    try:
        values = json.loads((folder / FILE).read_text())
        values["device"] = None if values["device"] is None else Device(**values["device"])
        values["entries"] = {
            name: EntryFacts(**{**entry, "profiles": tuple(entry["profiles"])})
            for name, entry in values["entries"].items()
        }
        return BuildFacts(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{folder}: does not say what it was built with ({error})", fix="run build-engine again"
        ) from None


def current_device() -> Device | None:
    """The current CUDA device; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Device(
        name=torch.cuda.get_device_name(),
        sm=f"{major}.{minor}",
        cuda=str(torch.version.cuda),
        driver_cuda=_driver_cuda(),
    )


def _driver_cuda() -> str:
    """The newest CUDA that the driver runs, from the driver itself."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        raise MissingBackendError(f"the NVIDIA driver does not tell its version (CUDA error {status})")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def differences(facts: BuildFacts, folder: Path, *, version: str | None, device: Device | None) -> list[Difference]:
    """Everything that keeps the engines of `folder` from running here, exactly; none: they may be loaded.

    `version` is that of the product installed here (None: it is not), `device` the GPU here (None: there is none).
    """
    found = _file_differences(facts, folder)
    if version is None:
        found.append(Difference(what=facts.product, built=facts.version, here="not installed"))
    elif not _same_version(facts, version):
        found.append(Difference(what=f"{facts.product} version", built=facts.version, here=version))
    built = facts.device
    if device is None:
        found.append(Difference(what="GPU", built=built.name if built else "for any", here="none"))
    elif built is not None:
        level = facts.settings.get("hardware_compatibility", "none")
        if not (_numbers(device.sm) >= (8, 0) if level == "ampere_plus" else device.sm == built.sm):
            wanted = (
                f"for sm 8.0 and newer (on {built.name})" if level == "ampere_plus" else f"{built.sm} ({built.name})"
            )
            found.append(Difference(what="compute capability", built=wanted, here=f"{device.sm} ({device.name})"))
        if _numbers(device.driver_cuda)[0] < _numbers(built.cuda)[0]:
            here = f"a driver for CUDA {device.driver_cuda}"
            found.append(Difference(what="CUDA", built=f"with {built.cuda}", here=here))
    return found


def require_same(facts: BuildFacts, folder: Path, *, version: str | None, device: Device | None) -> None:
    """Nothing differs; MissingBackendError where the library or a GPU lacks, else ArtifactError, with all that does."""
    found = differences(facts, folder, version=version, device=device)
    if not found:
        return
    kind = MissingBackendError if version is None or device is None else ArtifactError
    raise kind(
        f"{folder}: these engines do not run here",
        got="; ".join(map(str, found)),
        expected="what they were built with",
        fix="rebuild them here from their ONNX files: python cli.py rebuild FOLDER --into NEW, or recommend --rebuild",
    )


def _file_differences(facts: BuildFacts, folder: Path) -> list[Difference]:
    found = []
    expected = {entry.file: (entry.sha256, entry.bytes) for entry in facts.entries.values()}
    for name, (digest, size) in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(Difference(what=name, built=f"{size} bytes", here="missing"))
        elif path.stat().st_size != size:
            found.append(Difference(what=name, built=f"{size} bytes", here=f"{path.stat().st_size} bytes"))
        elif sha256_file(path) != digest:
            found.append(Difference(what=name, built=f"SHA-256 {digest[:12]}…", here=f"{sha256_file(path)[:12]}…"))
    for name, digest in facts.plugins.items():
        here = sha256_file(folder / name) if (folder / name).is_file() else "missing"
        if here != digest:
            found.append(Difference(what=f"plugin {name}", built=f"SHA-256 {digest[:12]}…", here=here[:12]))
    return found


def _same_version(facts: BuildFacts, version: str) -> bool:
    """The same version, or with version compatibility a newer one of the same major."""
    if not facts.settings.get("version_compatible"):
        return facts.version == version
    built, here = _numbers(facts.version), _numbers(version)
    return built[0] == here[0] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
