"""What is measured against what: the runtimes of one model, before any of them is opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hstu.config import HSTUConfig
from serving.engine import read_spec
from stages.measure.cases import BenchmarkEntry, Cell, ThreadMode

RuntimeName = Literal[
    "torch-eager",
    "torch-features",
    "torch-compile",
    "onnx-plain",
    "openvino-plain",
    "engine",
    "engine-padded",
    "vllm",
    "gemm",
]
PADDED: RuntimeName = "engine-padded"  # an engine that computes the padding too: what packing is measured against
EAGER: RuntimeName = "torch-eager"
PEERS = (
    "torch-eager",
    "torch-features",
    "torch-compile",
    "onnx-plain",
    "openvino-plain",
)  # not ours: their answers fail no gate
PLAIN: RuntimeName = "onnx-plain"
GEMM: RuntimeName = "gemm"  # no runtime of the model: the matrix products that every share is a share of


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Where the forms of one model stand: checkpoint folder, plain export, engines by name, bundle for vLLM."""

    checkpoint: Path
    onnx: Path
    engines: Mapping[str, Path]
    bundle: Path | None
    padded: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One runtime of one model, before it is opened. `folder` holds what it loads."""

    runtime: RuntimeName
    backend: str
    precision: str
    folder: Path
    checkpoint: Path

    def __str__(self) -> str:
        if self.runtime in ("engine", PADDED):
            return f"{self.runtime} {self.backend} {self.precision}"
        return self.runtime if self.precision == "fp32" else f"{self.runtime} {self.precision}"

    @property
    def optional(self) -> bool:
        """A peer that may be unable to run here (no compiler, no vLLM): said and left out, not an error."""
        return self.runtime in ("torch-compile", "vllm", "openvino-plain")

    @property
    def timed_though_wrong(self) -> bool:
        """OpenVINO keeps int64 in int32, so it misses time buckets of the plain export; it is a hurdle all the same."""
        return self.runtime == "openvino-plain"

    def entries(self, config: HSTUConfig) -> tuple[BenchmarkEntry, ...]:
        """The entries that this runtime is measured on."""
        compiled: tuple[BenchmarkEntry, ...] = ("retrieve", "rank") if config.tasks else ("retrieve",)
        if self.runtime == EAGER and self.precision == "fp32":
            return (*compiled, "extend", "generate")
        if self.runtime == "vllm":
            return ("generate",)
        if self.runtime in (PADDED, "torch-features"):
            return ("retrieve",)
        return (*compiled, "extend") if self.runtime in (PLAIN, "engine") else compiled


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiling:
    """Where torch.compile takes part. A compilation takes 20 s of one core and more, one for each entry, number of
    threads, and batch sizes 1 and above 1."""

    batches: Collection[int]
    threads: Collection[ThreadMode]


def takes_part(contestant: Contestant, config: HSTUConfig, cell: Cell, compiling: Compiling) -> bool:
    """Whether a runtime is measured on a cell: it has the entry, and torch.compile is worth its compilation."""
    if cell.entry not in contestant.entries(config):
        return False
    if contestant.runtime == PADDED:
        return cell.occupancy < 1.0
    worth = cell.entry == "retrieve" and cell.thread_mode in compiling.threads and cell.batch in compiling.batches
    return contestant.runtime != "torch-compile" or worth


def contestants(files: ModelFiles) -> list[Contestant]:
    """Every runtime that can be measured on a model, eager PyTorch first; engines that were only built are left out."""

    def one(runtime: RuntimeName, backend: str, folder: Path, precision: str = "fp32") -> Contestant:
        return Contestant(
            runtime=runtime, backend=backend, precision=precision, folder=folder, checkpoint=files.checkpoint
        )

    found = [
        one(EAGER, "torch", files.checkpoint),
        one(EAGER, "torch", files.checkpoint, "bf16"),
        one("torch-compile", "inductor", files.checkpoint),
        one(PLAIN, "onnxruntime", files.onnx),
        one("openvino-plain", "openvino", files.onnx),
        one("openvino-plain", "openvino", files.onnx, "bf16"),
    ]
    for folder in files.engines.values():
        spec = read_spec(folder)
        if spec.executed:
            found.append(one("engine", spec.backend, folder, spec.precision))
    for folder in files.padded.values():
        spec = read_spec(folder)
        found.append(one(PADDED, spec.backend, folder, spec.precision))
    if files.bundle is not None:
        found.append(one("vllm", "vllm", files.bundle))
    return found
