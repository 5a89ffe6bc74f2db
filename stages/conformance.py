"""Conformance: which graphs NVIDIA's own parser and builder take, over models, entries and precisions.

TensorRT-RTX builds engines on a machine without a GPU. What it takes it has parsed, typed and compiled; what it
refuses is listed with its own words. Nothing is executed, and nothing here is called TensorRT.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hstu.config import TASKS, HSTUConfig
from hstu.errors import InputError, UsageError
from hstu.signature import EntryName, entry_names
from stages.contract import Workspace, say, write_report

if TYPE_CHECKING:
    from stages.tensorrt.builder import BuildSettings

FILE = "conformance.json"
PRECISIONS: Mapping[str, tuple[str, str]] = {  # name: precision of the recipe, type around int8
    "fp32": ("fp32", "fp32"),
    "fp16": ("fp16", "fp16"),
    "int8": ("int8", "fp32"),
    "int8+fp16": ("int8", "fp16"),
}
CALIBRATION_HISTORIES = 2  # weights are random: scales have to be legal, not good
TRAINED = "trained"
# The scores of 64 histories of 2048 events are larger than the default workspace; an engine's bytes depend on its size.
WORKSPACE_MIB: Mapping[str, int] = {"reference": 65_536}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One cell of the matrix; `reason` is NVIDIA's own, `engine_sha256` that of what was built."""

    model: str
    entry: str
    precision: str
    product: str
    version: str
    result: Literal["built", "rejected"]
    reason: str | None
    engine_sha256: str | None


def _meta(dim: int, layers: int, heads: int, head_dim: int, history: int, items: int) -> HSTUConfig:
    return HSTUConfig(
        embedding_dim=dim, num_layers=layers, num_heads=heads, qk_dim=head_dim, v_dim=head_dim,
        max_history=history, num_items=items,
    )  # fmt: skip


# Item tables are of their real size, weights are random. Meta's shapes: facebookresearch/generative-recommenders,
# configs/*/hstu-sampled-softmax-*.gin; histories of 200 or 50 events and the generated ones beside them.
MODELS: Mapping[str, HSTUConfig] = {
    "small": HSTUConfig(
        num_items=10_000, embedding_dim=256, num_layers=4, num_heads=4, qk_dim=64, v_dim=64, max_history=200,
        num_actions=5, num_gap_buckets=64, tasks=TASKS, head_dim=128,
    ),
    "ml-1m": _meta(50, 2, 1, 50, 200, 3_952),
    "ml-1m-large": _meta(50, 8, 2, 25, 200, 3_952),
    "ml-20m": _meta(256, 4, 4, 64, 200, 131_262),
    "ml-20m-large": _meta(256, 16, 8, 32, 200, 131_262),
    "amzn-books": _meta(64, 4, 4, 16, 50, 695_762),
    "amzn-books-large": _meta(64, 16, 8, 8, 50, 695_762),
    "reference": HSTUConfig(
        num_items=50_000, embedding_dim=1024, num_layers=12, num_heads=16, qk_dim=64, v_dim=64, max_history=2048,
        num_actions=5, num_gap_buckets=64, tasks=TASKS, head_dim=256,
    ),
}  # fmt: skip


def run_conformance(
    workspace: Workspace, models: Sequence[str], precisions: Sequence[str], *, resume: bool = False
) -> list[Row]:
    """Every row of `reports/conformance.json`, those of the models and precisions given built now.

    With `resume`, rows of the installed version that are there already are kept as they are. The file is written after
    every row. "trained" is the surgery artifact of this workspace. Raises UsageError on an unknown name.
    """
    from stages.tensorrt.builder import BuildSettings
    from stages.tensorrt.products import TENSORRT_RTX, require_product

    version = require_product(TENSORRT_RTX)
    for names, known in ((models, (TRAINED, *MODELS)), (precisions, tuple(PRECISIONS))):
        if unknown := sorted(set(names) - set(known)):
            raise UsageError(f"conformance: unknown {unknown[0]!r}", expected=", ".join(known))
    path = workspace.reports / FILE
    rows = {(row.model, row.entry, row.precision): row for row in read_rows(path)}
    for model in models:
        config = HSTUConfig.from_pretrained(workspace.artifacts / "surgery") if model == TRAINED else MODELS[model]
        cells: list[tuple[EntryName, str]] = [(e, p) for p in precisions for e in entry_names(config)]
        done = {cell for cell in cells if (row := rows.get((model, *cell))) and row.version == version}
        if resume and len(done) == len(cells):
            continue
        with tempfile.TemporaryDirectory(prefix="hstu-conformance-") as scratch:
            folder = workspace.artifacts / "surgery" if model == TRAINED else Path(scratch) / "surgery"
            if model != TRAINED:
                write_graphs(config, folder)
            for name, precision in cells:
                if resume and (name, precision) in done:
                    continue
                settings = BuildSettings(workspace_mib=WORKSPACE_MIB.get(model, BuildSettings().workspace_mib))
                row = build_row(model, config, folder, name, precision, version, settings)
                rows[model, name, precision] = row
                say(f"conformance: {model} {name} {precision}: {row.result} {row.reason or ''}")
                write_rows(path, list(rows.values()))
    return list(rows.values())


def build_row(
    model: str,
    config: HSTUConfig,
    folder: Path,
    name: EntryName,
    precision: str,
    version: str,
    settings: BuildSettings,
    keep: Callable[[Path], None] | None = None,
) -> Row:
    """One graph of a surgery folder lowered and built; `keep` is shown the folder with the model and the engine."""
    from hstu.artifact import sha256_file
    from hstu.checkpoints.histories import drawn_histories
    from stages.precision.recipe import Recipe, lower_entry, write_models
    from stages.tensorrt.builder import build
    from stages.tensorrt.products import TENSORRT_RTX, RejectedError

    kind, around = PRECISIONS[precision]
    recipe = Recipe(
        precision=kind,
        around=around,
        float_keep_wide=("hidden", "logits") if config.tasks else (),
        int8_keep_wide=("output", "hidden", "logits") if config.tasks else ("output",),
        method="max",
        percentile=100.0,
    )
    histories = drawn_histories(config, count=CALIBRATION_HISTORIES, seed=0)
    with tempfile.TemporaryDirectory(prefix="hstu-conformance-") as scratch:
        lowered, engine = Path(scratch), Path(scratch) / "engine.rtx"
        graph, _ = lower_entry(folder, name, config, recipe, histories, emulated=False)
        write_models({name: graph}, lowered)
        digest, reason = None, None
        try:
            build(TENSORRT_RTX, lowered / f"{name}.onnx", engine, config, name, settings)
            digest = sha256_file(engine)
        except RejectedError as error:
            reason = "; ".join(error.reasons)
        if keep is not None:
            keep(lowered)
    return Row(
        model=model,
        entry=name,
        precision=precision,
        product=TENSORRT_RTX.name,
        version=version,
        result="rejected" if digest is None else "built",
        reason=reason,
        engine_sha256=digest,
    )


def write_graphs(config: HSTUConfig, folder: Path) -> None:
    """`folder` holds what surgery makes of a model of random weights: every pass, without its numeric checks.

    Without `packing`, that is: it writes graphs of its own, which TensorRT's target does not take.
    """
    from hstu.artifact import encode_json
    from hstu.checkpoints.huggingface import load_pretrained
    from stages import onnx_files
    from stages.exporter import export_entry
    from stages.measure.case_models import write_random_model
    from stages.surgery import MODULES, apply_pass

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="hstu-conformance-") as scratch:
        write_random_model(config, Path(scratch))
        model = load_pretrained(Path(scratch))
    names = entry_names(config)
    (folder / "config.json").write_bytes(encode_json(config.to_pretrained()))
    with onnx_files.open_weights(folder) as writer:
        for name in names:
            onnx_files.write_model(export_entry(model, name, opset=20, writer=writer), folder, name, writer)
    del model
    for pass_name in (name for name in MODULES if name != "packing"):
        models = onnx_files.read_models(folder, names)
        models = {name: apply_pass(pass_name, models.pop(name), config) for name in names}
        onnx_files.write_models(models, folder)


def read_rows(path: Path) -> list[Row]:
    """The rows of a conformance file, none when there is no file; InputError when it is not one."""
    if not path.is_file():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a conformance report ({error})", fix="delete it and run conformance") from None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The file holds the rows, in the order of models, entries and precisions."""
    models, precisions = [TRAINED, *MODELS], list(PRECISIONS)
    entries = ["retrieve", "rank", "extend"]

    def place(row: Row) -> tuple[int, int, int]:
        return models.index(row.model), entries.index(row.entry), precisions.index(row.precision)

    write_report(path, [asdict(row) for row in sorted(rows, key=place)])


def table_text(rows: Sequence[Row]) -> str:
    """The matrix as text: one line a model and entry, one column a precision, then every refusal with its reason."""
    lines = [f"{'model':<18}{'entry':<10}" + "".join(f"{name:<12}" for name in PRECISIONS)]
    found = {(row.model, row.entry, row.precision): row for row in rows}
    for model, entry in dict.fromkeys((row.model, row.entry) for row in rows):
        cells = [found.get((model, entry, precision)) for precision in PRECISIONS]
        lines.append(f"{model:<18}{entry:<10}" + "".join(f"{row.result if row else '–':<12}" for row in cells))
    lines += [f"{r.model} {r.entry} {r.precision}: {r.reason}" for r in rows if r.result == "rejected"]
    versions = sorted({f"{row.product} {row.version}" for row in rows})
    return "\n".join([*lines, f"built, not executed, by {', '.join(versions)}"])
