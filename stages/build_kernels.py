"""Stage build-kernels: the GPU kernels compiled ahead of time, one folder per SM; no GPU is needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hstu.artifact import Artifact, encode_json
from hstu.errors import GateError, MissingBackendError
from stages.contract import Outcome, Stage, say
from stages.parameters import require

OpName = Literal["hstu_attention", "paged_hstu_attention", "uvqk_silu", "interaction", "embedding_bag"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildKernelsParams:
    """What is compiled, and for which GPUs; see params.yaml."""

    sms: tuple[int, ...]
    ops: tuple[OpName, ...]
    dtypes: tuple[Literal["bf16", "fp16", "fp32"], ...]
    head_dims: tuple[int, ...]
    every_config: bool

    def __post_init__(self) -> None:
        known = (80, 89, 90, 100)
        require(bool(self.sms) and set(self.sms) <= set(known), "build-kernels.sms", got=self.sms, expected=known)
        for name in ("sms", "ops", "dtypes", "head_dims"):
            values = getattr(self, name)
            require(
                len(values) == len(set(values)) > 0,
                f"build-kernels.{name}: empty, or something twice",
                got=values,
                expected="each once",
            )
        sizes = all(1 <= size <= 256 for size in self.head_dims)
        require(sizes, "build-kernels.head_dims: out of range", got=self.head_dims, expected="1..256")


def run(params: BuildKernelsParams, _inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write `sm_XX/<kernel>.{cubin,ptx,json}`; with every_config also `<kernel>@<config>.{cubin,json}`.

    Raises GateError where no config of a kernel is sound, MissingBackendError where the compiler cannot be used.
    """
    from kernels.aot import check_environment
    from kernels.catalogue import catalogue
    from kernels.errors import KernelError
    from kernels.tuning import UNMEASURED, build, read_table

    try:
        check_environment()
    except KernelError as error:
        raise MissingBackendError(str(error)) from None
    kernels = catalogue(params.dtypes, params.head_dims, params.ops)
    work = [(kernel, sm) for sm in params.sms for kernel in kernels if sm >= kernel.lowest_sm]
    say(f"build-kernels: {len(work)} kernels for {', '.join(f'sm_{sm}' for sm in params.sms)}")
    processes = len(os.sched_getaffinity(0))
    metrics: Counter[str] = Counter()
    pruned, registers, unmeasured = 0, 0, 0
    try:
        for compiled, ships in build(work, processes=processes, every_config=params.every_config, table=read_table()):
            description = compiled.description
            name = description["kernel"] if ships else f"{description['kernel']}@{description['config']}"
            place = folder / f"sm_{description['sm']}"
            place.mkdir(exist_ok=True)
            (place / f"{name}.cubin").write_bytes(compiled.cubin)
            (place / f"{name}.json").write_bytes(encode_json(description))
            if ships:
                (place / f"{name}.ptx").write_bytes(compiled.ptx.encode())
                metrics[f"sm_{description['sm']}"] += 1
                pruned += len(description["pruned"])
                registers = max(registers, description["registers"])
                unmeasured += description["chosen"] == UNMEASURED
    except KernelError as error:
        raise GateError(str(error), fix="leave it out of build-kernels in the params file") from None
    say(f"build-kernels: {unmeasured} of {len(work)} kernels ship in a config that was never measured")
    return Outcome(
        metrics={
            **{f"kernels_{sm}": count for sm, count in metrics.items()},
            "configs_pruned": pruned,
            "kernels_unmeasured": unmeasured,
            "most_registers": registers,
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        }
    )


STAGE = Stage(
    name="build-kernels",
    summary="Compile the GPU kernels ahead of time, for each kind of GPU; needs none.",
    params=BuildKernelsParams,
    toolchain=("triton",),
    run=run,
)
