"""What a stage is, and the one way to run it.

`execute` is the only caller of a stage's `run`. It checks the parameters, opens the inputs (every hash
verified), gives `run` an empty temporary folder beside the destination, writes the manifest last and
renames: at any moment the destination holds a whole artifact or none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hstu.artifact import Artifact, open_artifact, write_manifest
from hstu.errors import CompilerError, MissingBackendError, ParameterError
from stages.parameters import load_params, suggestion
from stages.workspace import (
    FullDisk,
    Workspace,
    commit,
    hold,
    interruptible,
    new_folder,
    recover,
    say,
    write_report,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `run` tells besides the files it wrote.

    metrics go to `reports/`; platform goes into the manifest (what depends on hardware: backend, device,
    versions of drivers, whether the engine was executed or only built).
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    platform: Mapping[str, Any] | None = None


_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # one folder name, never a way out of the artifacts folder

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
        if self.variant is None:
            return self.name
        variant = self.variant(params)
        if not _VARIANT.fullmatch(variant):
            raise ParameterError(f"{self.name}: not the name of a variant", got=repr(variant), expected="a plain name")
        return f"{self.name}/{variant}"

    def inputs(self, params: Any) -> list[str]:
        """The folders this stage reads, below the artifacts folder."""
        folders: list[str] = []
        for need in self.needs:
            prefix, brace, rest = need.partition("{")
            values = getattr(params, rest.rstrip("}")) if brace else ("",)
            for value in values:
                if brace and not _VARIANT.fullmatch(value):
                    raise ParameterError(f"{self.name}: not the name of an artifact", got=repr(value))
                folders.append(prefix + value)
        return folders


def execute(stage: Stage, workspace: Workspace, *, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Run one stage and return its artifact; on any error the earlier artifact is still there, whole.

    The workspace is held from before the inputs are opened until the report is written, so no other run
    can change an input while it is read. Raises ParameterError, ArtifactError (an input is corrupt or
    missing), UsageError (another run is at work here, or the disk is full) and what the stage itself raises.
    """
    if stage.name not in workspace.values:
        raise ParameterError(
            f"params: there is no section {stage.name!r}", **suggestion(stage.name, workspace.values, "add the section")
        )
    section = {**workspace.values[stage.name], **(overrides or {})}
    params: Any = load_params(stage.params, section, section=stage.name)
    folder = stage.folder(params)
    destination = workspace.artifacts / folder
    report = workspace.reports / "metrics" / f"{folder.replace('/', '-')}.json"
    with interruptible(), hold(workspace.artifacts), FullDisk(stage.name, workspace.artifacts):
        recover(destination)
        inputs = {
            need: open_artifact(workspace.artifacts / need, stage=need.partition("/")[0])
            for need in stage.inputs(params)
        }
        toolchain = {name: installed_version(name) for name in stage.toolchain}
        with new_folder(destination) as temporary, FullDisk(stage.name, temporary):
            outcome = stage.run(params, inputs, temporary)
            artifact = write_manifest(
                temporary,
                stage=stage.name,
                params=recorded(params),
                inputs={need: artifact.id for need, artifact in inputs.items()},
                toolchain=toolchain,
                platform=outcome.platform,
            )
            commit(temporary, destination, report, outcome.metrics)
        artifact = dataclasses.replace(artifact, path=destination)
        if stage.publish is not None:
            stage.publish(artifact, workspace)
    return artifact


def recorded(params: Any) -> dict[str, Any]:
    """The parameters as the manifest names them; of a field with metadata {"path": True}, the file's name alone.

    Where a file lay on this machine must not change the artifact; what was in it does.
    """
    values = dataclasses.asdict(params)
    for field_ in dataclasses.fields(params):
        if field_.metadata.get("path") and values[field_.name] is not None:
            values[field_.name] = Path(values[field_.name]).name
    return values


def installed_version(distribution: str) -> str:
    """The version of an installed distribution; MissingBackendError when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise MissingBackendError(
            f"the package {distribution} is not installed", fix="make environment (see README.md)"
        ) from None


__all__ = [
    "CompilerError",
    "Outcome",
    "Stage",
    "Workspace",
    "execute",
    "hold",
    "installed_version",
    "say",
    "write_report",
]
