"""What a stage is, and the one way to run it.

`execute` is the only caller of a stage's `run`. It checks the parameters, opens the inputs (every hash
verified), gives `run` an empty temporary folder beside the destination, writes the manifest last and
renames: at any moment the destination holds a whole artifact or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from hstu.artifact import Artifact, encode_json, open_artifact, write_manifest
from hstu.errors import CompilerError, MissingBackendError, ParameterError, UsageError
from stages.parameters import load_params


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `run` tells besides the files it wrote.

    metrics go to `reports/`; platform goes into the manifest (what depends on hardware: backend, device,
    versions of drivers, whether the engine was executed or only built).
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    platform: Mapping[str, Any] | None = None


RunStage = Callable[[Any, Mapping[str, Artifact], Path], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A step of the pipeline. `name` = dvc.yaml stage = params.yaml section = CLI command = artifact folder.

    A stage with `variant` writes one artifact per value, at `<name>/<variant(params)>`. In `needs`,
    "build-engine/{engines}" stands for one input per value of the consumer's own parameter `engines`.
    `publish` is called with the finished artifact and writes what people read of it into `reports/`.
    """

    name: str
    summary: str
    params: type
    needs: tuple[str, ...] = ()
    toolchain: tuple[str, ...] = ()
    run: RunStage
    variant: Callable[[Any], str] | None = None
    publish: Callable[[Artifact, Workspace], None] | None = None

    def folder(self, params: Any) -> str:
        """Where this stage's artifact stands below the artifacts folder."""
        return self.name if self.variant is None else f"{self.name}/{self.variant(params)}"

    def inputs(self, params: Any) -> list[str]:
        """The folders this stage reads, below the artifacts folder."""
        folders: list[str] = []
        for need in self.needs:
            prefix, brace, rest = need.partition("{")
            values = getattr(params, rest.rstrip("}")) if brace else ("",)
            folders += [prefix + value for value in values]
        return folders


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where artifacts and reports stand, and the parameter values of every section."""

    artifacts: Path
    reports: Path
    values: Mapping[str, Mapping[str, Any]]


def execute(stage: Stage, workspace: Workspace, *, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Run one stage and return its artifact; on any error the earlier artifact is still there, whole.

    Raises ParameterError, ArtifactError (an input is corrupt or missing), UsageError (another run holds
    the destination, or the disk is full) and whatever the stage itself raises.
    """
    section = {**workspace.values.get(stage.name, {}), **(overrides or {})}
    if stage.name not in workspace.values:
        raise ParameterError(
            f"params: there is no section {stage.name!r}", expected=", ".join(workspace.values), fix="add the section"
        )
    params = load_params(stage.params, section, section=stage.name)
    folder = stage.folder(params)
    destination = workspace.artifacts / folder
    with _lock(workspace.artifacts, folder), _interruptible():
        _recover(destination)
        inputs = {
            need: open_artifact(workspace.artifacts / need, stage=need.partition("/")[0])
            for need in stage.inputs(params)
        }
        toolchain = {name: installed_version(name) for name in stage.toolchain}
        temporary = Path(tempfile.mkdtemp(prefix=f"{_temporary_prefix(destination)}", dir=destination.parent))
        try:
            outcome = stage.run(params, inputs, temporary)
            write_manifest(
                temporary,
                stage=stage.name,
                params=dataclasses.asdict(params),
                inputs={need: artifact.id for need, artifact in inputs.items()},
                toolchain=toolchain,
                platform=outcome.platform,
            )
            _replace(temporary, destination)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(
                    f"{stage.name}: the disk is full, nothing was kept of this run",
                    got=f"{shutil.disk_usage(destination.parent).free // 2**20} MiB free",
                    fix="free some space (or pass --artifacts DIR on another disk) and run again",
                ) from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        write_report(workspace.reports / "metrics" / f"{folder.replace('/', '-')}.json", outcome.metrics)
        if stage.publish is not None:
            stage.publish(open_artifact(destination, stage=stage.name, verify=False), workspace)
    return open_artifact(destination, stage=stage.name, verify=False)


def write_report(path: Path, values: object) -> None:
    """Write JSON at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(encode_json(values))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def installed_version(distribution: str) -> str:
    """The version of an installed distribution; MissingBackendError when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise MissingBackendError(
            f"the package {distribution} is not installed", fix="make environment (see README.md)"
        ) from None


def _temporary_prefix(destination: Path) -> str:
    return f".{destination.name}.tmp-"


def _recover(destination: Path) -> None:
    """Put right what a killed run left: temporary folders go, a set-aside artifact comes back."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    for leftover in destination.parent.glob(f"{_temporary_prefix(destination)}*"):
        shutil.rmtree(leftover)
    previous = destination.with_name(f".{destination.name}.previous")
    if previous.exists():
        if destination.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(destination)


def _replace(temporary: Path, destination: Path) -> None:
    """Rename the finished folder into place; the earlier artifact is set aside until that has happened."""
    temporary.chmod(0o755)
    previous = destination.with_name(f".{destination.name}.previous")
    if destination.exists():
        destination.rename(previous)
    temporary.rename(destination)
    shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def _lock(artifacts: Path, folder: str) -> Iterator[None]:
    """Hold the destination for this process; UsageError when another run holds it."""
    artifacts.mkdir(parents=True, exist_ok=True)
    path = artifacts / f".{folder.replace('/', '-')}.lock"
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{artifacts / folder}: another run is writing this artifact",
                fix="wait for it to end, or pass --artifacts DIR to work elsewhere",
            ) from None
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the stage as Ctrl-C does, so that the temporary folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def say(message: str) -> None:
    """A line for the person watching: progress and choices go to stderr, results alone to stdout."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


__all__ = ["CompilerError", "Outcome", "Stage", "Workspace", "execute", "installed_version", "say", "write_report"]
