"""Configure: a params file fitted to this machine, with every change and its reason.

The file it starts from keeps its comments and its order. Only what the machine decides is touched (threads,
which precisions pay, how much memory may be taken); what decides quality is the user's.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.errors import ParameterError
from stages.machine import cpu_isa, cpu_model, gpus, installed, memory_bytes, num_cores
from stages.parameters import read_params

INT8_ISA = {"avx512_vnni", "avx_vnni", "amx_int8"}
MAX_TRAINING_THREADS = 8  # the reference model is small: more threads wait for one another
LARGE_CASE_CORES, LARGE_CASE_MIB = 8, 16 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the choices depend on."""

    cpu: str
    cores: int
    memory_mib: int
    isa: frozenset[str]
    gpu: str | None = None
    gpu_sm: float = 0.0
    gpu_memory_mib: int = 0
    tensorrt: bool = False

    @property
    def runs_on_gpu(self) -> bool:
        """Whether `auto` builds engines that run on a GPU here."""
        return self.gpu is not None and self.tensorrt


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One parameter: what it was, what it is now (the same when kept), and why."""

    name: str
    before: Any
    after: Any
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "before": self.before, "after": self.after, "why": self.why}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """The text of the new params file, the choices, and what to pass where no parameter decides."""

    text: str
    choices: tuple[Choice, ...]
    hints: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"choices": [choice.to_dict() for choice in self.choices], "hints": list(self.hints)}

    @property
    def report(self) -> str:
        """One line a choice, then the hints."""
        lines = []
        for choice in self.choices:
            change = f"{choice.after}" if choice.after == choice.before else f"{choice.before} → {choice.after}"
            lines.append(f"{choice.name}: {change}  ({choice.why})")
        return "\n".join([*lines, *self.hints])


def this_machine() -> Machine:
    """The machine this process runs on."""
    found = gpus()
    best = max(found.devices, key=lambda gpu: gpu.memory_mib, default=None)
    return Machine(
        cpu=cpu_model(),
        cores=num_cores(),
        memory_mib=memory_bytes()[0] >> 20,
        isa=frozenset(cpu_isa()),
        gpu=best.name if best else None,
        gpu_sm=float(best.sm) if best else 0.0,
        gpu_memory_mib=best.memory_mib if best else 0,
        tensorrt=any(installed(name) for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")),
    )


def fitted_params(base: Path, machine: Machine | None = None) -> Fitted:
    """The params file `base` fitted to `machine` (default: this one).

    Raises ParameterError when `base` is no params file.
    """
    machine = this_machine() if machine is None else machine
    read_params(base)
    text = base.read_text(encoding="utf-8")
    document = _yaml().load(text)
    choices = []
    for name, rule in RULES.items():
        section, _, key = name.partition(".")
        if key not in document.get(section, {}):
            continue
        before = _plain(document[section][key])
        after, why = rule(machine, before)
        choices.append(Choice(name=name, before=before, after=after, why=why))
        if after != before:
            document[section][key] = _flow(after)
    stream = io.StringIO()
    _yaml().dump(document, stream)
    return Fitted(text=stream.getvalue(), choices=tuple(choices), hints=_hints(machine))


def write_fitted_params(base: Path, target: Path, *, overwrite: bool = False) -> Fitted:
    """Write the fitted file at `target`; ParameterError when something stands there already, unless `overwrite`."""
    if target.exists() and not overwrite:
        raise ParameterError(f"{target}: stands already", fix="pass another file, or --force to overwrite it")
    fitted = fitted_params(base)
    try:
        target.write_text(fitted.text, encoding="utf-8")
    except OSError as error:
        raise ParameterError(f"{target}: cannot be written ({error.strerror})") from None
    return fitted


def _training_threads(machine: Machine, _: Any) -> tuple[Any, str]:
    return min(machine.cores, MAX_TRAINING_THREADS), f"{machine.cores} cores; the number changes the trained bytes"


def _backend(machine: Machine, before: Any) -> tuple[Any, str]:
    chosen = "TensorRT" if machine.runs_on_gpu else "ONNX Runtime"
    return before, f"kept: auto takes {chosen} here" if before == "auto" else "kept: asked for by name"


def _engines(machine: Machine, _: Any) -> tuple[Any, str]:
    if machine.runs_on_gpu:
        names = ["fp32", "fp16", *(["bf16"] if machine.gpu_sm >= 8.0 else []), "int8"]
        return names, f"{machine.gpu} (sm {machine.gpu_sm}) runs these in its tensor cores"
    if machine.isa & INT8_ISA:
        return ["fp32", "int8"], "int8 dot products are in the processor; fp16 and bf16 are slower than fp32 on it"
    return ["fp32"], "the processor has no int8 dot products, so no other precision is faster"


def _default_engine(machine: Machine, _: Any) -> tuple[Any, str]:
    if machine.runs_on_gpu:
        return "fp16", "the fastest float precision of the GPU"
    return "fp32", "exact; ask for int8 by name where its speed is wanted"


def _workspace(machine: Machine, before: Any) -> tuple[Any, str]:
    if machine.gpu is None:
        return before, "kept: there is no GPU here"
    return max(256, min(8192, machine.gpu_memory_mib // 8)), f"an eighth of {machine.gpu_memory_mib} MiB"


def _cases(machine: Machine, before: Any) -> tuple[Any, str]:
    if machine.cores >= LARGE_CASE_CORES and machine.memory_mib >= LARGE_CASE_MIB and "reference-512" not in before:
        return [*before, "reference-512"], f"{machine.cores} cores measure a long-history model in minutes"
    return before, f"kept: larger cases take long on {machine.cores} cores"


def _thread_modes(machine: Machine, before: Any) -> tuple[Any, str]:
    if machine.cores == 1:
        return ["one"], "there is one core"
    return before, f"kept: {machine.cores} cores"


def _kv_cache(machine: Machine, _: Any) -> tuple[Any, str]:
    return _kv_cache_mib(machine), f"a quarter of {machine.memory_mib} MiB, at most 8 GiB"


def _kv_cache_mib(machine: Machine) -> int:
    return max(256, min(8192, machine.memory_mib // 4) // 256 * 256)


Rule = Callable[[Machine, Any], tuple[Any, str]]
RULES: Mapping[str, Rule] = {
    "checkpoint.reference_threads": _training_threads,
    "build-engine.backend": _backend,
    "build-engine.workspace_mib": _workspace,
    "bundle.engines": _engines,
    "bundle.default_engine": _default_engine,
    "bundle.kv_cache_mib": _kv_cache,
    "benchmark.cases": _cases,
    "benchmark.threads": _thread_modes,
}


def _hints(machine: Machine) -> tuple[str, ...]:
    if machine.gpu is not None:
        return ("vLLM on this GPU: --gpu-memory-utilization 0.9 (or less beside TensorRT engines)",)
    return (f"vLLM on this processor: VLLM_CPU_KVCACHE_SPACE={max(1, _kv_cache_mib(machine) >> 10)} (GiB of KV cache)",)


def _yaml() -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        pass

    Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()  # round trip: comments, order and quotes stay
    yaml.Representer = Representer
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _flow(value: Any) -> Any:
    """A list is written in one line, [a, b]."""
    if not isinstance(value, list):
        return value
    from ruamel.yaml.comments import CommentedSeq

    sequence = CommentedSeq(value)
    sequence.fa.set_flow_style()
    return sequence
