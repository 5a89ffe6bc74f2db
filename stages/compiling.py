"""All stages in one process: a checkpoint goes in, a bundle and its benchmark come out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hstu.artifact import Artifact
from hstu.errors import GateError
from stages.bundle import BundleParams
from stages.contract import Stage, Workspace, execute, hold, say
from stages.parameters import load_params
from stages.pipeline import PIPELINE, stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """Artifacts by folder, and why each engine that was refused was."""

    artifacts: dict[str, Artifact]
    refused: dict[str, str]


def compile_bundle(workspace: Workspace, *, until: str = "benchmark", strict: bool = False) -> Compilation:
    """Run every stage up to `until`; refused engines are left out of the bundle, and said.

    Raises GateError when the bundle's default engine is refused, or any engine is and `strict`.
    """
    with hold(workspace.artifacts):
        return _compile(workspace, stage(until), strict=strict)


def _compile(workspace: Workspace, last: Stage, *, strict: bool) -> Compilation:
    bundle = load_params(BundleParams, workspace.values.get("bundle", {}), section="bundle")
    artifacts: dict[str, Artifact] = {}
    refused: dict[str, str] = {}
    backend = workspace.values.get("build-engine", {}).get("backend", "auto")
    names = {name: engine_name(name, backend) for name in bundle.engines}
    for current in PIPELINE:
        if current.name == "build-engine":
            for name in names.values():
                say(f"── build-engine {name}")
                try:
                    artifacts[f"build-engine/{name}"] = execute(current, workspace, overrides=engine_params(name))
                except GateError as error:
                    if strict or name == names[bundle.default_engine]:
                        raise
                    say(f"refused: {error}")
                    refused[name] = str(error)
        else:
            say(f"── {current.name}")
            kept = [name for name in names.values() if name not in refused]
            choice = {"engines": kept, "default_engine": names[bundle.default_engine]}
            overrides = choice if current.name == "bundle" else None
            artifacts[current.name] = execute(current, workspace, overrides=overrides)
        if current is last:
            break
    return Compilation(artifacts=artifacts, refused=refused)


def engine_name(name: str, backend: str) -> str:
    """The build-engine folder meant by a name of `bundle.engines`: a bare precision takes the backend of the params."""
    return name if "-" in name or backend == "auto" else f"{name}-{backend}"


def engine_params(name: str) -> dict[str, str]:
    """The build-engine parameters that make the engine of that name: "int8", or "int8-tensorrt-rtx"."""
    precision, _, backend = name.partition("-")
    return {"precision": precision, "backend": backend or "auto"}


@contextmanager
def progress(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown on a terminal for work of more than a moment; yields `advance_to(done)`."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
