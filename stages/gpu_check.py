"""gpu-check: everything about this bundle that only a GPU can show, step by step, into one report.

Each step that fails says why and the next one runs. What it finds is written after every step, so a crash of a
library or a driver loses nothing that came before.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.errors import CompilerError, GateError
from stages import machine
from stages.contract import Workspace, execute, say, write_report

if TYPE_CHECKING:
    from serving.engine import Engine

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WITH_PLUGIN = ("fp16",)  # what is built once more, its attention our kernel
ROUNDS, WARM_UP = 50, 10


@dataclass(kw_only=True)
class Step:
    """One thing that was tried: `error` is what went wrong, `found` what was measured."""

    name: str
    ok: bool = False
    seconds: float = 0.0
    error: str | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Report:
    """`reports/gpu/<gpu>.json`."""

    device: str
    backend: str
    facts: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(step.ok for step in self.steps)


def gpu_check(
    workspace: Workspace, bundle: Path, *, backend: str = "tensorrt", precisions: Sequence[str] = PRECISIONS
) -> tuple[Report, Path]:
    """Build, run, compare and time an engine of every precision; the report and where it stands.

    `backend` onnxruntime rehearses all of it on a machine without a GPU. Raises nothing of a step's own: a step that
    fails is in the report.
    """
    facts = machine.machine_facts()
    device = (
        facts["gpus"][0]["name"] if facts["gpus"] and backend == "tensorrt" else f"{backend} on {platform.machine()}"
    )
    path = workspace.reports / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    report = Report(device=device, backend=backend, facts=facts)

    def step(name: str, work: Callable[[], Mapping[str, Any]]) -> bool:
        say(f"gpu-check: {name}")
        one, began = Step(name=name), time.perf_counter()
        report.steps.append(one)
        write_report(path, asdict(report))  # a step that ends the process stands there, not ok and without an error
        try:
            one.found = work()
            one.ok = True
        except CompilerError as error:
            one.error = str(error)
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError, MemoryError) as error:
            # On first contact NVIDIA's libraries may raise anything of these; the rest shall run all the same.
            one.error = f"{type(error).__name__}: {error}"
        one.seconds = round(time.perf_counter() - began, 3)
        write_report(path, asdict(report))
        if one.error:
            say(f"gpu-check: {name} failed: {one.error}")
        return one.ok

    step("libraries", lambda: _libraries(backend))
    for precision, folder, overrides in _engines(workspace, backend, precisions):
        step(f"{precision}: build", lambda o=overrides: _build(workspace, o, backend))  # type: ignore[misc]
        step(f"{precision}: preflight", lambda f=folder: _preflight(f))  # type: ignore[misc]
        for entry in _entries(bundle):
            step(f"{precision} {entry}: golden answers", lambda f=folder, e=entry: _compare(f, bundle, e))  # type: ignore[misc]
            step(f"{precision} {entry}: same as ONNX Runtime", lambda f=folder, e=entry: _against_onnx(f, bundle, e))  # type: ignore[misc]
            step(f"{precision} {entry}: repeatable", lambda f=folder, e=entry: _repeatable(f, bundle, e))  # type: ignore[misc]
            step(f"{precision} {entry}: time", lambda f=folder, e=entry: _time(f, bundle, e))  # type: ignore[misc]
        step(f"{precision}: model repository", lambda f=folder: _repository(workspace, f))  # type: ignore[misc]
    return report, path


def _engines(
    workspace: Workspace, backend: str, precisions: Sequence[str]
) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """What to call each engine that is built, its folder, and the parameters that it is built with."""
    for precision in precisions:
        name = f"{precision}-{backend}"
        yield precision, workspace.artifacts / "build-engine" / name, {"precision": precision}
        if backend == "tensorrt" and precision in WITH_PLUGIN:
            overrides = {"precision": precision, "tensorrt_attention": "plugin"}
            yield f"{precision} with the plugin", workspace.artifacts / "build-engine" / f"{name}-plugin", overrides


def _repository(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """A repository for Triton Inference Server of the engine just built, anew."""
    from hstu.config import HSTUConfig
    from serving.engine import read_spec
    from stages.gpu_kit.model_repository import write_models

    kind = "onnx" if read_spec(folder).backend == "onnxruntime" else "tensorrt"
    target = workspace.artifacts / "model_repository" / folder.name
    shutil.rmtree(target, ignore_errors=True)
    write_models(HSTUConfig.from_pretrained(folder), kind, target, folder)
    return {"models": sorted(path.name for path in target.iterdir())}


def _libraries(backend: str) -> dict[str, Any]:
    from stages.engine_targets import TARGETS

    return {"product": TARGETS[backend].product, "version": TARGETS[backend].require()}


def _build(workspace: Workspace, overrides: Mapping[str, str], backend: str) -> dict[str, Any]:
    from stages.pipeline import stage

    began = time.perf_counter()
    artifact = execute(stage("build-engine"), workspace, overrides={**overrides, "backend": backend})
    return {"id": artifact.id, "seconds": round(time.perf_counter() - began, 3), **artifact.manifest["platform"]}


def _preflight(folder: Path) -> dict[str, Any]:
    from serving.engine import read_spec
    from serving.engines.tensorrt import MODULES, preflight

    spec = read_spec(folder)
    if spec.backend not in MODULES:
        return {"not tied to a machine": spec.backend}
    facts = preflight(folder, spec)
    return {"version": facts.version, "memory": {name: dict(entry.memory) for name, entry in facts.entries.items()}}


def _entries(bundle: Path) -> list[str]:
    from hstu.config import HSTUConfig
    from hstu.signature import entry_names

    return list(entry_names(HSTUConfig.from_pretrained(bundle)))


def _feeds(bundle: Path, entry: str, users: int | None = None) -> dict[str, Any]:
    import numpy as np

    from hstu.config import HSTUConfig
    from stages.gpu_kit.commands import golden_feeds

    golden = np.load(bundle / "golden" / "inputs.npz")
    feeds = golden_feeds(golden, HSTUConfig.from_pretrained(bundle), entry)  # type: ignore[arg-type]
    return {name: value[:users] for name, value in feeds.items()}


def _with_engine(folder: Path, work: Callable[[Engine], dict[str, Any]]) -> dict[str, Any]:
    from serving.engine import open_engine

    engine = open_engine(folder)
    try:
        return work(engine)
    finally:
        engine.close()


def _differences(precision: str, answers: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Greatest error of every float output, and the lowest cosine; GateError beyond the precision's tolerance."""
    import numpy as np

    from hstu.tolerances import TOLERANCES

    limit = TOLERANCES[precision]
    errors = {
        name: float(np.abs(answers[name] - values).max())
        for name, values in expected.items()
        if name != "cache_rows" and values.dtype == np.float32
    }
    found: dict[str, Any] = {"max_abs_error": errors}
    if "user_embedding" in expected:
        found["min_cosine"] = float((answers["user_embedding"] * expected["user_embedding"]).sum(axis=1).min())
    worst = max(errors.values())
    if not worst <= limit.max_abs_error or not found.get("min_cosine", 1.0) >= limit.min_cosine:
        raise GateError("answers differ", got=json.dumps(found), expected=f"{asdict(limit)}")
    return found


def _compare(folder: Path, bundle: Path, entry: str) -> dict[str, Any]:
    """The engine's answers are the golden ones of eager PyTorch."""
    import numpy as np

    outputs = np.load(bundle / "golden" / "outputs.npz")
    source = "retrieve" if entry == "extend" else entry
    expected = {key.partition("/")[2]: outputs[key] for key in outputs if key.startswith(f"{source}/")}

    def work(engine: Engine) -> dict[str, Any]:
        answers = engine.run(entry, _feeds(bundle, entry))  # type: ignore[arg-type]
        return _differences(engine.precision, answers, expected)

    return _with_engine(folder, work)


def _against_onnx(folder: Path, bundle: Path, entry: str) -> dict[str, Any]:
    """The engine answers as ONNX Runtime does on the same ONNX file, on the processor."""
    from stages.entry_check import onnxruntime_entry

    def work(engine: Engine) -> dict[str, Any]:
        feeds = _feeds(bundle, entry)
        expected = onnxruntime_entry(folder / f"{entry}.onnx")(feeds)
        return _differences(engine.precision, engine.run(entry, feeds), expected)  # type: ignore[arg-type]

    return _with_engine(folder, work)


def _repeatable(folder: Path, bundle: Path, entry: str) -> dict[str, Any]:
    """The tenth answer is the first, bit for bit: past the request from which a CUDA graph answers."""
    from serving.self_check import check_repeatable

    def work(engine: Engine) -> dict[str, Any]:
        check_repeatable(engine, entry, _feeds(bundle, entry))  # type: ignore[arg-type]
        return {}

    return _with_engine(folder, work)


def _time(folder: Path, bundle: Path, entry: str) -> dict[str, Any]:
    """Milliseconds from host to host of one user and of all golden users, full length: p50 and p99."""
    import numpy as np

    def work(engine: Engine) -> dict[str, Any]:
        found = {}
        for users in (1, None):
            feeds = _feeds(bundle, entry, users)
            taken = []
            for _ in range(WARM_UP + ROUNDS):
                began = time.perf_counter()
                engine.run(entry, feeds)  # type: ignore[arg-type]
                taken.append(1000 * (time.perf_counter() - began))
            p50, p99 = np.percentile(taken[WARM_UP:], [50, 99])
            found[f"users_{len(feeds['lengths'])}"] = {"p50_ms": float(p50), "p99_ms": float(p99), "rounds": ROUNDS}
        return found

    return _with_engine(folder, work)


def render(report: Report, path: Path) -> str:
    """One line a step, and where the report stands."""
    lines = [
        f"{'ok' if s.ok else 'FAILED':<8}{s.name}{'' if s.ok else f': {str(s.error).splitlines()[0]}'}"
        for s in report.steps
    ]
    return "\n".join([*lines, str(path)])
