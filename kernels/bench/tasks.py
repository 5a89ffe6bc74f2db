"""The bench as a list of tasks: ceilings, checks, times, CUTLASS, sweeps, rivals. Each stands or fails alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.bench import cases, problems
from kernels.bench.machine import Machine, Timing
from kernels.bench.problems import Problem
from kernels.checks import NAMES
from kernels.errors import KernelError
from kernels.spec import TOLERANCES

Result = dict[str, Any]
Found = Mapping[tuple[str, ...], Result]  # what earlier tasks found, by key
SECTIONS = ("ceiling", "check", "time", "cutlass", "sweep", "rival")
_BIGGER_THAN_L2 = 160 << 20  # bytes of buffers to go through in turn, so that none is still in the cache


@dataclass(frozen=True, slots=True)
class Task:
    """key is [section, name, ..]; `run` takes what earlier tasks found, by key, and gives its own result; who runs it
    waits stall_s for an answer (torch.compile's first is the slowest)."""

    key: tuple[str, ...]
    run: Callable[[Found], Result]
    stall_s: float = 90.0


def plan(machine: Machine, *, cutlass: Path | None, small: bool = False, seconds: float = 0.4) -> Iterator[Task]:
    """Every task, the most wanted first; `small` for a machine that cannot be timed: checks alone."""
    names = machine.kernels()
    checks = list(cases.checks(names, small=small))
    if not small:
        for name, ceiling in CEILINGS.items():
            yield Task(("ceiling", name), partial(_ceiling, machine, ceiling, seconds))
    for case in checks:
        yield Task(("check", case.kernel), partial(_check, machine, case), stall_s=600.0 if small else 90.0)
    if small:
        return
    timed = [case for case in cases.timings() if case.kernel in names]
    for case in timed:
        yield Task(("time", case.name), partial(measure, machine, case, seconds))
    if cutlass is not None:
        from kernels.bench import cutlass_tasks

        yield from cutlass_tasks.plan(machine, cutlass, seconds)
    by_kernel = {case.kernel: case for case in checks}
    swept: set[str] = set()
    for case in timed:
        if case.sweep and case.kernel not in swept:
            swept.add(case.kernel)
            for config in machine.configs(case.kernel):
                run = partial(sweep, machine, case, by_kernel[case.kernel], config, seconds / 2)
                yield Task(("sweep", case.kernel, config), run)
    for case in timed:
        if case.rivals:
            yield Task(("rival", case.name), partial(_rivals, machine, case, seconds))


def _ceiling(machine: Machine, ceiling: Callable[[Machine, float], Result], seconds: float, _: Found) -> Result:
    return ceiling(machine, seconds)


def _check(machine: Machine, case: cases.Case, _: Found) -> Result:
    return check(machine, case.make, case.kernel)


def error_of(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference, of the truth's largest value or of 1; infinite where poison is left."""
    truth = truth.to(torch.float64)
    difference = (out.to(torch.float64) - truth.view_as(out)).abs().max().item() if out.numel() else 0.0
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return difference / max(1.0, largest) if math.isfinite(difference) else math.inf


def tolerance_of(kernel: str) -> float:
    """What a kernel's error may be: that of its type."""
    return next(tolerance for dtype, tolerance in TOLERANCES.items() if dtype in kernel)


def launch(machine: Machine, problem: Problem, config: str | None = None) -> None:
    """Every launch of a problem is queued; a config holds for the first alone."""
    for place, one in enumerate(problem.launches):
        machine.run(one, config if place == 0 else None)


def _launch(machine: Machine, config: str | None, problem: Problem) -> None:
    launch(machine, problem, config)


def _poison(out: torch.Tensor) -> torch.Tensor:
    """A copy of what stood in an output before the kernel ran."""
    return out.clone()


def check(
    machine: Machine, make: cases.Make, kernel: str, config: str | None = None,
    run: Callable[[Problem], None] | None = None,
) -> Result:  # fmt: skip
    """Error against float64 on two draws, and whether the same input twice gave the same bits; of what `run` does with
    a problem, or else of the compiled kernel."""
    run = run or partial(_launch, machine, config)
    worst, same = 0.0, True
    for seed in (1, 2):
        problem = make(machine.device, seed)
        before = _poison(problem.out)
        run(problem)
        machine.wait()
        first = problem.out.clone()
        problem.out.copy_(before)
        run(problem)
        machine.wait()
        same &= bool(torch.equal(first, problem.out))
        worst = max(worst, error_of(problem.out, problem.truth()))
    tolerance = tolerance_of(kernel)
    return {"error": worst, "tolerance": tolerance, "same_bits_twice": same, "ok": same and worst <= tolerance}


def buffers(machine: Machine, case: cases.Case) -> list[Problem]:
    """The same problem on as many buffers as do not fit into the L2 cache together."""
    first = case.make(machine.device, 0)
    count = min(8, max(1, math.ceil(_BIGGER_THAN_L2 / max(1.0, first.bytes))))
    return [first, *(case.make(machine.device, seed) for seed in range(1, count))]


def rates(problem: Problem, timing: Timing, floor: str, found: Found) -> Result:
    """Times, TFLOP/s and TB/s, and the share of the ceiling measured in this run."""
    tflops, tbs = problem.flops / timing.us / 1e6, problem.bytes / timing.us / 1e6
    name, value = ("copy", tbs) if floor == "memory" else (f"matmul_{'int8' if floor == 'int8' else 'bf16'}", tflops)
    ceiling = found.get(("ceiling", name), {}).get("value")
    return {
        "us": timing.us, "us_p10": timing.low_us, "us_p90": timing.high_us, "tflops": tflops, "tb_s": tbs,
        "ceiling": name, "share_of_ceiling": value / ceiling if ceiling else None,
    }  # fmt: skip


def measure(machine: Machine, case: cases.Case, seconds: float, found: Found) -> Result:
    """The time of the config that ships, after its check: a wrong kernel is not timed."""
    if not found.get(("check", case.kernel), {}).get("ok"):
        raise KernelError(f"{case.kernel} did not pass its check: not timed")
    sets = buffers(machine, case)
    launch(machine, sets[0])
    machine.wait()
    error = error_of(sets[0].out, sets[0].truth())
    if not error <= tolerance_of(case.kernel):
        raise KernelError(f"{case.name}: wrong at this size: not timed", got=error, expected=tolerance_of(case.kernel))
    timing = machine.time([partial(launch, machine, p) for p in sets], seconds)
    result = rates(sets[0], timing, case.floor, found) | {"kernel": case.kernel, "error": error, "buffers": len(sets)}
    result["config"] = machine.configs(case.kernel)[0]
    if case.target_us is not None:
        result |= {"target_us": case.target_us, "target_met": timing.us <= case.target_us}
    return result


def sweep(
    machine: Machine, case: cases.Case, checked: cases.Case, config: str, seconds: float, found: Found
) -> Result:  # fmt: skip
    """The time of one config, after its own check."""
    verdict = check(machine, checked.make, case.kernel, config)
    if not verdict["ok"]:
        raise KernelError(f"{case.kernel}@{config} is wrong: not timed", got=verdict["error"])
    sets = buffers(machine, case)
    timing = machine.time([partial(launch, machine, p, config) for p in sets], seconds)
    return rates(sets[0], timing, case.floor, found)


def _rivals(machine: Machine, case: cases.Case, seconds: float, _: Found) -> Result:
    """Times of the other ways to do the same, or as many operations, by name; or why one has none."""
    problem = case.make(machine.device, 0)
    return {name: _rival(machine, problem, name, run, seconds) for name, run in problem.rivals.items()}


def _rival(
    machine: Machine, problem: Problem, name: str, run: Callable[[], object] | str, seconds: float
) -> Result:  # fmt: skip
    if isinstance(run, str):
        return {"absent": run}
    try:
        error = None
        if name in problem.same:
            answer = run()
            assert isinstance(answer, torch.Tensor)
            error = error_of(answer, problem.truth())
            if not error <= tolerance_of(NAMES[problem.out.dtype]):
                return {"failed": f"wrong, so not timed: error {error:.3g}"}
        us = machine.time([run], seconds).us
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as failure:
        clean()
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
    return {"us": us} | ({} if error is None else {"error": error})


def _copy(machine: Machine, seconds: float) -> Result:
    source = torch.randint(0, 2**31 - 1, (1 << 29,), device=machine.device, dtype=torch.int32)
    target = torch.empty_like(source)
    us = machine.time([lambda: target.copy_(source)], seconds).us
    return {"value": 2 * source.numel() * 4 / us / 1e6, "unit": "TB/s, read and written"}


def _matmul(dtype: torch.dtype, machine: Machine, seconds: float) -> Result:
    size = 8192
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), device=machine.device, dtype=dtype) for _ in range(2))
        us = machine.time([lambda: torch._int_mm(a, b.T)], seconds).us
    else:
        a, b = (torch.randn((size, size), device=machine.device).to(dtype) for _ in range(2))
        us = machine.time([lambda: a @ b.T], seconds).us
    return {"value": 2 * size**3 / us / 1e6, "unit": "TFLOP/s, 8192³ on random data, torch's library"}


CEILINGS: dict[str, Callable[[Machine, float], Result]] = {
    "copy": _copy,
    "matmul_bf16": lambda machine, seconds: _matmul(torch.bfloat16, machine, seconds),
    "matmul_int8": lambda machine, seconds: _matmul(torch.int8, machine, seconds),
}


def clean() -> None:
    """The memory of the task before is free again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["SECTIONS", "Task", "check", "clean", "error_of", "plan", "problems"]
