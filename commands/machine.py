"""What this machine is and how much it can do: facts, sizes, plans, and parameters fitted to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from commands.app import Settings, app, command


@command("doctor")
def doctor(
    settings: Settings,
    machine_facts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only write what engines depend on of this machine, as JSON."),
    ] = None,
) -> None:
    """Say what is installed, which device is here, and what each backend can do on it."""
    from stages.doctor import examine, render, write_machine_facts

    if machine_facts is not None:
        write_machine_facts(machine_facts)
        return
    facts = examine(artifacts=settings.artifacts)
    settings.show(facts, render(facts))


@command("compare-caches")
def compare_caches(
    settings: Settings,
    trace: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Traces to run (default: all).")] = None,
) -> None:
    """Compare the hot cache with LRU, LFU, W-TinyLFU, S3-FIFO, LHD and Belady; write cache.json (needs libcachesim)."""
    from stages.caching import compare

    scores = compare.run(settings.reports, trace or ())
    rows = [dataclasses.asdict(score) for score in scores]
    settings.show(rows, compare.text_table(rows))


@command("plan")
def plan(
    settings: Settings,
    qps: Annotated[float, typer.Option(min=0.001, help="Requests per second.")],
    p99_ms: Annotated[float, typer.Option(min=0.1, help="What 99 of 100 requests may take.")],
    case: Annotated[str, typer.Option(help="Of the benchmark.")] = "trained",
    engine: Annotated[str | None, typer.Option(metavar="'BACKEND PRECISION'", help="Default: the fastest.")] = None,
    cache_mib: Annotated[int, typer.Option(min=0, help="Of each replica.")] = 256,
) -> None:
    """Say how many replicas a load needs, from benchmark.json by simulation, checked against load.json."""
    from stages import plan as planning

    found = planning.make_plan(settings.reports, qps=qps, p99_ms=p99_ms, case=case, engine=engine, cache_mib=cache_mib)
    settings.show(planning.to_dict(found), planning.render(found))


@command("estimate")
def estimate(
    settings: Settings,
    path: Annotated[Path | None, typer.Argument(help="A checkpoint or bundle, instead of a shape.")] = None,
    embedding_dim: Annotated[int, typer.Option(help="D.")] = 1024,
    num_layers: Annotated[int, typer.Option()] = 12,
    num_heads: Annotated[int, typer.Option(help="H.")] = 16,
    num_items: Annotated[int, typer.Option()] = 50_000,
    max_history: Annotated[int, typer.Option(help="Events.")] = 2048,
    qk_dim: Annotated[int | None, typer.Option(help="Per head (default: D / H).")] = None,
    v_dim: Annotated[int | None, typer.Option(help="Per head (default: D / H).")] = None,
    num_actions: Annotated[int, typer.Option(help="Rows of the action table; 0 = none.")] = 0,
    num_gap_buckets: Annotated[int, typer.Option(help="Rows of the time-gap table; 0 = none.")] = 0,
    head_dim: Annotated[int, typer.Option(help="Hidden width of the task heads; 0 = none.")] = 0,
    precision: Annotated[str, typer.Option(metavar="fp32|fp16|bf16|int8")] = "fp32",
    device: Annotated[str, typer.Option(help="A GPU such as h200, or 'here'.")] = "here",
    batch: Annotated[int, typer.Option(help="Users at once.")] = 8,
    length: Annotated[int | None, typer.Option(help="Events per user (default: max_history).")] = None,
    candidates: Annotated[int, typer.Option(help="Candidates per user of the rank entry.")] = 128,
) -> None:
    """Count parameters, memory and operations by component, and say what fits on a device."""
    from stages import estimate as estimating

    config = (
        estimating.config_at(path)
        if path is not None
        else estimating.config_of(
            embedding_dim=embedding_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_items=num_items,
            max_history=max_history,
            qk_dim=qk_dim,
            v_dim=v_dim,
            num_actions=num_actions,
            num_gap_buckets=num_gap_buckets,
            head_dim=head_dim,
        )
    )
    found = estimating.estimate(
        config, precision=precision, device_name=device, batch=batch, length=length, candidates=candidates
    )
    settings.show(found, estimating.render(found))


@command("configure")
def configure(
    settings: Settings,
    output: Annotated[Path, typer.Option(help="The params file to write.")] = Path("params.local.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a params file fitted to this machine; use it with --params."""
    from stages.configure import write_fitted_params

    fitted = write_fitted_params(settings.params, output, overwrite=force)
    settings.show(fitted.to_dict() | {"path": str(output)}, f"{output}\n{fitted.report}")


@command("reference")
def reference(settings: Settings) -> None:
    """Print this reference in Markdown (docs/CLI.md)."""
    from stages.cli_reference import render_reference

    print(render_reference(typer.main.get_command(app)), end="")  # type: ignore[arg-type]


@command("generation")
def generation(
    settings: Settings,
    part: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Parts to measure (default: all).")] = None,
    again: Annotated[bool, typer.Option(help="Also the parts that are measured already.")] = False,
) -> None:
    """Measure vLLM's slates, cached users, beams and start beside ideal PyTorch loops; write generation.json."""
    from stages.generation import measure

    report = measure.run(settings.reports, part or (), again=again)
    settings.show(measure.rows(report), measure.text_table(report))
