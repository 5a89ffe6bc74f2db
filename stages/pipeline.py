"""The pipeline: every stage, in the order in which a checkpoint becomes a measured bundle."""

from __future__ import annotations

from hstu.errors import UsageError
from stages import benchmark, build_engine, build_kernels, bundle, checkpoint, export_onnx, prepare_data, surgery
from stages.contract import Stage

PIPELINE: tuple[Stage, ...] = (
    prepare_data.STAGE,
    checkpoint.STAGE,
    export_onnx.STAGE,
    surgery.STAGE,
    build_engine.STAGE,
    bundle.STAGE,
    benchmark.STAGE,
    build_kernels.STAGE,  # beside the others: it needs none of them, and none needs it
)


def stage(name: str) -> Stage:
    """The stage of that name; UsageError naming the known ones when there is none."""
    for candidate in PIPELINE:
        if candidate.name == name:
            return candidate
    raise UsageError(f"there is no stage {name!r}", expected=", ".join(s.name for s in PIPELINE))
