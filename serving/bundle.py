"""A bundle: everything a recommender needs, opened and verified as one artifact.

config.json model.safetensors tokenizer…   a Hugging Face style folder: what vLLM and eager PyTorch load
vocabulary.json                            raw item and action names of the model ids
engines/<name>/                            compiled engines, one folder each (`serving.engine`)
onnx/                                      the plain export, for comparison
golden/                                    inputs and the eager fp32 answers to them
examples.jsonl                             requests of held-out users, to try it with
GPU.md gpu/                                what to run on a GPU machine, and golden inputs in polygraphy's form
model_repository/                          for NVIDIA's Triton Inference Server
lineage/                                   the manifests of everything this was made from
runtime/ requirements.txt                  a wheel of this package and a kernel, to serve it with vLLM anywhere
bundle.json                                engines, the default one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.artifact import Artifact, open_artifact
from hstu.config import HSTUConfig
from hstu.data.vocabulary import Vocabulary
from hstu.errors import ArtifactError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle."""

    artifact: Artifact
    config: HSTUConfig
    vocabulary: Vocabulary
    description: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines in the bundle, the default one first."""
        default = self.description["default_engine"]
        return (default, *(name for name in self.description["engines"] if name != default))

    def engine_folder(self, name: str | None) -> Path:
        """The folder of an engine by name (None: the default one); UsageError when there is no such engine."""
        name = self.engines[0] if name is None else name
        if name not in self.engines:
            raise UsageError(
                f"{self.path}: the bundle has no engine {name!r}",
                expected=", ".join(self.engines),
                fix="choose one of these, or build it and bundle again",
            )
        return self.path / "engines" / name


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """The bundle at `path`, every byte verified; ArtifactError when it is not whole."""
    artifact = open_artifact(path, stage="bundle", verify=verify)
    try:
        description = json.loads(artifact.file("bundle.json").read_text())
    except ValueError as error:
        raise ArtifactError(f"{path}/bundle.json: not valid JSON ({error})", fix="run the bundle stage again") from None
    return Bundle(
        artifact=artifact,
        config=HSTUConfig.from_pretrained(path),
        vocabulary=Vocabulary.load(artifact.file("vocabulary.json")),
        description=description,
    )
