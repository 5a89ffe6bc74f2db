"""What to type on a GPU machine: NVIDIA's own tools on every ONNX file of a bundle, with its shapes and inputs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from hstu.config import HSTUConfig
from hstu.signature import MAX_BATCH, EntryName, ProfileName, cache_spec, entry_names, profile_shapes
from hstu.tolerances import TOLERANCES
from serving.engine import Array, EngineSpec, read_spec

FILE = "GPU.md"
FOLDER = "gpu"  # inputs for polygraphy, one file per entry
PROFILES: tuple[ProfileName, ...] = ("single", "batch", "long")


def write_commands(bundle: Path) -> None:
    """`GPU.md` holds the commands for every engine folder of the bundle, `gpu/<entry>.json` the golden inputs."""
    config = HSTUConfig.from_pretrained(bundle)
    write_inputs(bundle, config)
    parts = [_INTRODUCTION]
    for folder in sorted(path for path in (bundle / "engines").iterdir() if path.is_dir()):
        spec = read_spec(folder)
        parts.append(f"## engines/{folder.name} ({spec.precision})\n")
        for name in entry_names(config):
            if (folder / f"{name}.onnx").is_file():
                parts += [f"### {name}\n", *(_block(command) for command in commands(config, folder, spec, name))]
    (bundle / FILE).write_text("\n".join(parts))


def commands(config: HSTUConfig, folder: Path, spec: EngineSpec, name: EntryName) -> list[list[str]]:
    """trtexec building and timing an entry's ONNX file, and polygraphy comparing TensorRT with ONNX Runtime on it."""
    model = f"engines/{folder.name}/{name}.onnx"
    trtexec = [
        "trtexec", f"--onnx={model}", f"--saveEngine={name}-{folder.name}.plan", *_trtexec_profiles(config, name),
        "--builderOptimizationLevel=3", "--memPoolSize=workspace:8192", "--noTF32", "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed", f"--exportLayerInfo={name}-{folder.name}.layers.json", "--useCudaGraph",
        f"--useProfile={PROFILES.index('batch')}", "$STRONGLY_TYPED",
    ]  # fmt: skip
    limit = TOLERANCES[spec.precision].max_abs_error
    polygraphy = [
        "polygraphy", "run", model, "--onnxrt", "--trt", "--strongly-typed",
        "--load-inputs", f"{FOLDER}/{name}.json", "--atol", f"{limit:g}", "--rtol", "0",
    ]  # fmt: skip
    for profile in PROFILES:
        for which, kind in enumerate(("min", "opt", "max")):
            shapes = profile_shapes(config, name, profile)
            polygraphy += [f"--trt-{kind}-shapes", *(f"{i}:{_list(s[which])}" for i, s in shapes.items())]
    golden = len(np.load(folder.parent.parent / "golden" / "inputs.npz")["retrieve/lengths"])
    polygraphy += ["--optimization-profile", str(PROFILES.index("long")) if 1 < golden <= MAX_BATCH else "0"]
    outputs = "task_scores" if name == "rank" else "user_embedding top_scores"
    return [trtexec, [*polygraphy, "--onnx-outputs", *outputs.split(), "--trt-outputs", *outputs.split()]]


def write_inputs(bundle: Path, config: HSTUConfig) -> None:
    """`gpu/<entry>.json` holds the golden inputs as polygraphy reads them; for `extend` every event is new."""
    from polygraphy.json import save_json

    (bundle / FOLDER).mkdir(exist_ok=True)
    golden = np.load(bundle / "golden" / "inputs.npz")
    for name in entry_names(config):
        save_json([golden_feeds(golden, config, name)], str(bundle / FOLDER / f"{name}.json"))


def golden_feeds(golden: Mapping[str, Array], config: HSTUConfig, name: EntryName) -> dict[str, Array]:
    """The golden inputs of an entry, at the model's full length, so that one optimisation profile holds them."""
    source = "retrieve" if name == "extend" else name
    feeds = {key.partition("/")[2]: golden[key] for key in golden if key.startswith(f"{source}/")}
    for key in ("item_ids", "actions", "timestamps"):
        if key in feeds:
            short = config.max_history - feeds[key].shape[1]
            feeds[key] = np.pad(feeds[key], ((0, 0), (0, short)))
    if name == "extend":
        users, spec = len(feeds["lengths"]), cache_spec(config)
        layers, positions, width = spec.shape(config.max_history)
        feeds |= {
            "cache": np.zeros((users, layers, positions, width), np.float32),
            "cached_timestamps": np.zeros((users, positions), np.int64),
            "cached_lengths": np.zeros(users, np.int64),
        }
    return feeds


def _trtexec_profiles(config: HSTUConfig, name: EntryName) -> list[str]:
    """All profiles of an engine as trtexec reads them: each `--profile=N` is followed by its three shapes at once.

    Source: NVIDIA/TensorRT, samples/common/sampleOptions.cpp, `getOptimizationProfiles` (10.13 to 11.1 alike).
    """
    words = []
    for number, profile in enumerate(PROFILES):
        shapes = profile_shapes(config, name, profile)
        words.append(f"--profile={number}")
        words += [
            f"--{kind}Shapes={_trtexec_shapes(shapes, which)}" for which, kind in enumerate(("min", "opt", "max"))
        ]
    return words


def _trtexec_shapes(shapes: Mapping[str, tuple[tuple[int, ...], ...]], which: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in shapes.items())


def _list(shape: Iterable[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _block(command: list[str]) -> str:
    words = [word if word.startswith("$") else shlex.quote(word) for word in command]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 110:
            lines.append(line)
            line = "   "
        line = f"{line} {word}" if line else word
    return "```sh\n" + " \\\n".join([*lines, line]) + "\n```\n"


_INTRODUCTION = """# On a machine with an NVIDIA GPU

Run from this folder. `python cli.py gpu-check --bundle .` (or `make gpu-check`) does all of it and writes what it found
to `reports/gpu/`; the commands below are NVIDIA's own tools on the same files, for when something needs a closer look.

Precision is in the graphs: no --fp16 and no --int8. TensorRT 10 must be told that, TensorRT 11 knows nothing else:

```sh
STRONGLY_TYPED=$(python -c 'import tensorrt as t; print("--stronglyTyped" if t.__version__.startswith("10.") else "")')
```

trtexec builds the same profiles as build-engine does (0: one or two users, 1: a batch, 2: long histories) and times
the one that `--useProfile` names, at its typical shapes. It fills inputs with random numbers, so its timings hold and
its answers mean nothing; polygraphy takes the golden inputs and compares TensorRT with ONNX Runtime on the same file.
Both build attention from the function's operators: the attention plugin is known to build-engine alone.
Engines of OpenVINO stand here for their ONNX files.
"""
