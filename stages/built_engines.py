"""The engines in a workspace, each with what built it and whether it was executed, as their manifests say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hstu.artifact import MANIFEST, open_artifact
from hstu.errors import ArtifactError


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """One engine artifact; `state` is "executed", "built, not executed" or why its manifest cannot be read."""

    name: str
    built_by: str
    state: str

    def __str__(self) -> str:
        return f"{self.name:<24}{self.built_by:<28}{self.state}"


def built_engines(artifacts: Path) -> list[BuiltEngine]:
    """Every engine artifact below the folder, by name."""
    found = []
    for path in sorted((artifacts / "build-engine").glob(f"*/{MANIFEST}")):
        try:
            facts = open_artifact(path.parent, stage="build-engine", verify=False).manifest.get("platform", {})
        except ArtifactError as error:
            found.append(BuiltEngine(name=path.parent.name, built_by="unknown", state=error.what))
            continue
        state = {True: "executed", False: "built, not executed"}.get(facts.get("executed"), "unknown")
        built_by = f"{facts.get('product', 'unknown')} {facts.get('version', '')}".strip()
        found.append(BuiltEngine(name=path.parent.name, built_by=built_by, state=state))
    return found
