"""Engines of NVIDIA's builders: built here, checked and built again where they are to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.app import Settings, command
from hstu.errors import GateError


@command("conformance", panel="TensorRT")
def conformance(
    settings: Settings,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Models to build (default: all).")] = None,
    precision: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Precisions (default: all four).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep rows of this version that are there.")] = False,
) -> None:
    """Build every graph with TensorRT-RTX, without a GPU; write conformance.json."""
    from stages import conformance as matrix

    rows = matrix.run_conformance(
        settings.workspace(),
        model or [matrix.TRAINED, *matrix.MODELS],
        precision or [*matrix.PRECISIONS],
        resume=resume,
    )
    settings.show([dataclasses.asdict(row) for row in rows], matrix.table_text(rows))


@command("gpu-check", panel="TensorRT")
def gpu_check(
    settings: Settings,
    bundle: Annotated[Path, typer.Option(help="The bundle whose golden answers count.")] = Path("artifacts/bundle"),
    backend: Annotated[
        Literal["tensorrt", "onnxruntime"], typer.Option(help="onnxruntime rehearses it without a GPU.")
    ] = "tensorrt",
    precision: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Precisions (default: all four).")] = None,
) -> None:
    """Build, run, compare and time every engine on this GPU; write reports/gpu/<gpu>.json."""
    from stages import gpu_check as checking

    report, path = checking.gpu_check(
        settings.workspace(), bundle, backend=backend, precisions=precision or checking.PRECISIONS
    )
    settings.show(dataclasses.asdict(report), checking.render(report, path))
    if not report.passed:
        raise GateError("a step of gpu-check failed", got=str(path), fix="each step says what it needs")


@command("preflight", panel="TensorRT")
def preflight(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A folder of TensorRT engines, such as engines/fp16 in a bundle.")],
) -> None:
    """Compare what engines were built with and this machine; exit 3 or 4 with every difference."""
    from serving.engine import read_spec
    from serving.engines.tensorrt import preflight as compare

    facts = compare(folder, read_spec(folder))
    settings.show(dataclasses.asdict(facts), f"{facts.product} {facts.version}: these engines run here")


@command("rebuild", panel="TensorRT")
def rebuild(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A folder of TensorRT engines.")],
    into: Annotated[Path, typer.Option(metavar="NEW", help="The folder to write; it must not be there.")],
) -> None:
    """Build engines again on this machine, from the ONNX files beside them."""
    from stages.rebuild import rebuild as build_again

    settings.show({"path": str(build_again(folder, into))}, str(into))
