"""The CUTLASS libraries in the bench: checked, then timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernels.bench import problems
from kernels.bench.machine import Machine
from kernels.cutlass import UVQK, Projection, library_name
from kernels.errors import KernelError

if TYPE_CHECKING:
    from kernels.bench.tasks import Task


def plan(machine: Machine, folder: Path, seconds: float) -> Iterator[Task]:
    """One task per library: checked on odd sizes, then timed at M16384 N4096 K1024."""
    from kernels.bench.tasks import Task

    for name in UVQK:
        yield Task(("cutlass", f"uvqk_silu {name}"), partial(uvqk, machine, folder, name, seconds))


def uvqk(
    machine: Machine, folder: Path, name: str, seconds: float, found: Mapping[tuple[str, ...], dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """Error and time of the projection of one type."""
    from kernels.bench.tasks import error_of, rates, tolerance_of

    path = folder / library_name(UVQK[name])
    if not path.is_file():
        raise KernelError(
            f"{path.name} is not in {folder}", fix="build it with python -m kernels.cutlass_build and carry it"
        )
    projection = Projection(UVQK[name], path)
    dtype = name.removeprefix("int8-")

    def run(problem: problems.Problem) -> None:
        values = problem.launches[0].values
        addresses = [values[n].data_ptr() for n in ("x", "weight", "bias", "x_scale", "weight_scale", "out")]
        sizes = [values[n] for n in ("num_rows", "num_columns", "depth")]
        rows = [values[n] for n in ("x_row", "weight_row", "out_row")]
        projection.run(
            tuple(addresses), tuple(sizes), tuple(rows), 0, machine.num_sms, torch.cuda.current_stream().cuda_stream
        )  # type: ignore[arg-type]

    worst = 0.0
    for m, n, k in ((1, 16, 64), (1000, 528, 256), (16384, 4096, 1024)):
        problem = problems.uvqk_silu(machine.device, dtype, m, n, k, int8="int8" in name, seed=m)
        run(problem)
        machine.wait()
        worst = max(worst, error_of(problem.out, problem.truth()))
    if not worst <= tolerance_of(dtype):
        raise KernelError(f"CUTLASS uvqk_silu {name} is wrong: not timed", got=worst)
    sets = [problems.uvqk_silu(machine.device, dtype, 16384, 4096, 1024, int8="int8" in name, seed=s) for s in range(2)]
    timing = machine.time([partial(run, p) for p in sets], seconds)
    return rates(sets[0], timing, "int8" if "int8" in name else "matrix", found) | {"error": worst}
