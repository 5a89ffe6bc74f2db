"""What runs a launch: compiled kernels on a GPU, or Triton's interpreter; and how long it takes there."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from kernels.artifacts import CompiledKernels
from kernels.catalogue import catalogue
from kernels.errors import KernelError
from kernels.spec import Config, Kernel, Launch, configs_for

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one run: the median of many, and the 10th and 90th percentile."""

    us: float
    low_us: float
    high_us: float


class Machine(Protocol):
    """Where kernels run; `num_sms` is its number of multiprocessors."""

    device: torch.device
    num_sms: int

    def facts(self) -> dict[str, Any]: ...
    def kernels(self) -> list[str]: ...
    def configs(self, kernel: str) -> list[str]: ...
    def run(self, launch: Launch, config: str | None = None) -> None: ...
    def wait(self) -> None: ...
    def time(self, runs: Sequence[Run], seconds: float) -> Timing: ...


class Shelf:
    """The kernels of a folder that `build-kernels` wrote, for one SM; nothing runs, and no GPU is needed."""

    device, num_sms = torch.device("cpu"), 132

    def __init__(self, folder: Path, sm: int) -> None:
        self._compiled = CompiledKernels(folder, sm)
        self._names = sorted(path.stem for path in (folder / f"sm_{sm}").glob("*.json"))

    def facts(self) -> dict[str, Any]:
        """That this is no device."""
        return {"device": "none", "sm": self._compiled.sm, "driver": "none", "torch": torch.__version__}

    def kernels(self) -> list[str]:
        """The kernels that ship."""
        return [name for name in self._names if "@" not in name]

    def configs(self, kernel: str) -> list[str]:
        """Every config of a kernel that was compiled; the one that ships first."""
        others = [name.partition("@")[2] for name in self._names if name.startswith(f"{kernel}@")]
        return [self._compiled.kernel(kernel).description["config"], *others]

    def prepare(self, launch: Launch) -> None:
        """KernelError where the launch does not fit the kernel; tensor maps are left to a GPU's driver."""
        kernel = self._compiled.kernel(launch.kernel)
        if not kernel.description["tensor_maps"]:
            kernel.prepare(launch)

    def run(self, launch: Launch, config: str | None = None) -> None:
        """Never: there is no GPU."""
        raise KernelError("nothing runs without a GPU", got=f"{launch.kernel}, config {config}")

    def wait(self) -> None:
        """Nothing is ever queued."""

    def time(self, runs: Sequence[Run], seconds: float) -> Timing:
        """Never: there is no GPU."""
        raise KernelError("nothing is timed without a GPU", got=f"{len(runs)} runs, {seconds} s")


class GPU(Shelf):
    """The current CUDA device, with the kernels of a folder that `build-kernels` wrote."""

    def __init__(self, folder: Path) -> None:
        properties = torch.cuda.get_device_properties(0)
        super().__init__(folder, 10 * properties.major + properties.minor)
        self.device = torch.device("cuda")
        torch.zeros(1, device=self.device)  # makes the context that the driver calls below use
        self.num_sms = properties.multi_processor_count
        self._properties = properties

    def facts(self) -> dict[str, Any]:
        """Name, SM and versions: what a measurement depends on."""
        import triton

        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            answer = "unknown"
        return {
            "device": self._properties.name, "sm": self._compiled.sm, "num_sms": self.num_sms,
            "memory_gib": round(self._properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(self._properties, "L2_cache_size", 0) / 2**20, 1),
            "driver": answer.split(",")[0].strip(), "nvidia_smi": answer.strip(), "torch": torch.__version__,
            "cuda": str(torch.version.cuda), "triton": triton.__version__,
        }  # fmt: skip

    def run(self, launch: Launch, config: str | None = None) -> None:
        """Queue a launch on the current stream."""
        ships = self._compiled.kernel(launch.kernel)
        chosen = config is None or config == ships.description["config"]
        kernel = ships if chosen else self._compiled.kernel(f"{launch.kernel}@{config}")
        kernel.run(launch, torch.cuda.current_stream().cuda_stream)

    def wait(self) -> None:
        """Everything queued has run; raises what went wrong there."""
        torch.cuda.synchronize()

    def time(self, runs: Sequence[Run], seconds: float) -> Timing:
        """Of one run, with CUDA graph replays: `runs` do the same on different buffers, to be gone through in turn."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 8 // len(runs))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for run in runs:
                    run()
        per_replay = len(runs) * repeats
        times: list[float] = []
        graph.replay()
        torch.cuda.synchronize()
        end = time.monotonic() + seconds
        while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(stop) / per_replay)
        ordered = sorted(times)
        return Timing(median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10])


class Interpreter:
    """Triton's interpreter: right, slow, and without times. Wants TRITON_INTERPRET=1 when the process starts."""

    num_sms = 4

    def __init__(self, dtypes: Sequence[str], head_dims: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        self._kernels: dict[str, Kernel] = {kernel.name: kernel for kernel in catalogue(dtypes, head_dims)}

    def facts(self) -> dict[str, Any]:
        """That this is no device."""
        return {
            "device": "interpreter",
            "sm": 90,
            "driver": "none",
            "torch": torch.__version__,
            "triton": "interpreter",
        }

    def kernels(self) -> list[str]:
        """Every kernel."""
        return sorted(self._kernels)

    def configs(self, kernel: str) -> list[str]:
        """Every config."""
        return [config.label() for config in configs_for(self._kernels[kernel], 90)]

    def run(self, launch: Launch, config: str | None = None) -> None:
        """The launch is done, in small tiles (the interpreter's time goes with the number of operations)."""
        from kernels import jit

        kernel = self._kernels[launch.kernel]
        chosen: Config = next(c for c in configs_for(kernel, 90) if config in (None, c.label()))
        jit.run(kernel, chosen, launch, {"FAST": False} if "FAST" in kernel.constants else None)

    def wait(self) -> None:
        """Nothing is ever queued."""

    def time(self, runs: Sequence[Run], seconds: float) -> Timing:
        """Never: what the interpreter takes says nothing about a kernel."""
        raise KernelError("the interpreter cannot be timed", got=f"{len(runs)} runs, {seconds} s")
