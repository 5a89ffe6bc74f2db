"""A benchmark case's model as a bundle that can be served: what a load test of a large model needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from hstu.artifact import encode_json, open_artifact, write_manifest
from serving.engine import read_spec
from stages.contract import say


def link_case_bundle(case_folder: Path, target: Path) -> Path:
    """A bundle of the case's checkpoint and engines (`artifacts/.cases/NAME/ID`), of hard links.

    ArtifactError when the case is not compiled (`python cli.py benchmark --case NAME` compiles it).
    """
    checkpoint = open_artifact(case_folder / "checkpoint", stage="checkpoint", verify=False)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        _link(checkpoint.path / name, target / name)
    engines = {}
    for folder in sorted((case_folder / "build-engine").iterdir()):
        spec = read_spec(folder)
        engines[folder.name] = {"backend": spec.backend, "executed": spec.executed}
        (target / "engines" / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            if path.name != "manifest.json":
                _link(path, target / "engines" / folder.name / path.name)
    order = ("int8", "bf16", "fp16", "fp32")
    default = next((name for name in order if name in engines), next(iter(engines)))
    (target / "bundle.json").write_bytes(encode_json({"default_engine": default, "engines": engines}))
    write_manifest(target, stage="bundle", params={}, inputs={"checkpoint": checkpoint.id}, toolchain={})
    say(f"load: {target} serves {', '.join(engines)} of {case_folder}")
    return target


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)
