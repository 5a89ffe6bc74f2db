"""The CUTLASS libraries in the bench: each checked as Triton's kernels are, on the same problems, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from kernels import cutlass
from kernels.bench import cases, problems, tasks
from kernels.bench.machine import Machine
from kernels.bench.problems import Problem
from kernels.bench.tasks import Found, Result, Task
from kernels.errors import KernelError

STALL_S = 25.0  # a barrier that nobody comes to would hold up the rest
Run = Callable[[Problem], None]


def plan(machine: Machine, folder: Path, seconds: float) -> Iterator[Task]:
    """A check of every library, and the times of those for bf16: each stands or fails alone."""
    for name, source in cutlass.SOURCES.items():
        yield Task(("check", f"cutlass {name}"), partial(check, machine, folder, source), STALL_S)
    for name, source in cutlass.SOURCES.items():
        for case in cases.timings():
            if case.kernel in kernels_of(source):
                run = partial(measure, machine, folder, source, case, seconds)
                yield Task(("cutlass", f"{name}: {case.name}"), run, STALL_S)


def kernels_of(source: cutlass.Source) -> tuple[str, ...]:
    """The Triton kernels whose calls a library answers."""
    name = source.name.removesuffix("-g3")
    if source.function == "interaction":
        return (f"{name}-f27-d128", f"{name}-f27-d128-self")
    return (name,)


def runner(machine: Machine, folder: Path, source: cutlass.Source) -> Run:
    """What runs a problem with a library, on the current stream; KernelError where the library is not there."""
    library = cutlass.Loaded(source, folder, machine.facts()["sm"])

    def run(problem: Problem) -> None:
        launch, stream = problem.launches[0], torch.cuda.current_stream().cuda_stream
        if source.function == "hstu_attention":
            cutlass.run_attention(library, launch, machine.num_sms, stream)
        elif source.function == "interaction":
            cutlass.run_interaction(library, launch, machine.num_sms, stream)
        else:
            cutlass.run_uvqk(library, launch, 0, machine.num_sms, stream)

    return run


def check(machine: Machine, folder: Path, source: cutlass.Source, _: Found) -> Result:
    """The worst of the checks that the Triton kernels pass, and of those that this library alone needs."""
    run = runner(machine, folder, source)
    results = [tasks.check(machine, case.make, case.kernel, run=run) for case in cases.checks(list(kernels_of(source)))]
    if source.function == "hstu_attention":
        results.append(neighbours(machine, source, run))
    if source.function.startswith("uvqk_silu"):
        dtype, int8 = source.name.rpartition("-")[2], "int8" in source.name
        for m, n, k in ((1, 16, 64), (16384, 4096, 1024)):
            make = partial(_projection, dtype, m, n, k, int8)
            results.append(tasks.check(machine, make, dtype, run=run))
    return max(results, key=lambda result: result["error"]) | {
        "same_bits_twice": all(result["same_bits_twice"] for result in results),
        "ok": all(result["ok"] for result in results),
    }


def neighbours(machine: Machine, source: cutlass.Source, run: Run) -> Result:
    """The error of users beside one whose rows are NaN: tiles reach into the next user's rows."""
    (kernel,) = kernels_of(source)
    dtype, width = kernel.split("-")[1], int(kernel.rpartition("-d")[2])
    lengths, targets = [70, 40, 200, 50, 129], [0, 0, 150, 0, 30]
    problem = problems.attention(machine.device, dtype, lengths, 2, width, targets=targets, seed=3)
    truth, values = problem.truth(), problem.launches[0].values
    for name in ("q", "k", "v"):
        values[name][70:110] = values[name][310:360] = float("nan")
    run(problem)
    machine.wait()
    others = [*range(70), *range(110, 310), *range(360, 489)]
    error, tolerance = tasks.error_of(problem.out[others], truth[others]), tasks.tolerance_of(kernel)
    return {"error": error, "tolerance": tolerance, "same_bits_twice": True, "ok": error <= tolerance}


def _projection(dtype: str, m: int, n: int, k: int, int8: bool, device: torch.device, seed: int) -> Problem:
    return problems.uvqk_silu(device, dtype, m, n, k, int8=int8, seed=seed)


def measure(
    machine: Machine, folder: Path, source: cutlass.Source, case: cases.Case, seconds: float, found: Found
) -> Result:  # fmt: skip
    """The time of a library on one problem, after its check: a wrong kernel is not timed."""
    if not found.get(("check", f"cutlass {source.name}"), {}).get("ok"):
        raise KernelError(f"cutlass {source.name} did not pass its check: not timed")
    run, sets = runner(machine, folder, source), tasks.buffers(machine, case)
    run(sets[0])
    machine.wait()
    error = tasks.error_of(sets[0].out, sets[0].truth())
    if not error <= tasks.tolerance_of(source.name):
        raise KernelError(f"cutlass {source.name}: wrong at this size: not timed", got=error)
    timing = machine.time([partial(run, problem) for problem in sets], seconds)
    result = tasks.rates(sets[0], timing, case.floor, found) | {"error": error, "buffers": len(sets)}
    if case.target_us is not None:
        result |= {"target_us": case.target_us, "target_met": timing.us <= case.target_us}
    return result
