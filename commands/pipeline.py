"""The main path: a command for every stage, all of them at once, and the gate at its end."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from commands.app import Settings, command
from hstu.errors import GateError
from stages import compiling
from stages.contract import Stage, execute
from stages.parameters import read_comments
from stages.pipeline import PIPELINE

COMMENTS = read_comments(Path(__file__).parents[1] / "params.yaml")


def _metavar(hint: Any) -> str:
    """What kind of value an option takes: the choices, or the type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        return "LIST"
    return "|".join("null" if one is type(None) else one.__name__.upper() for one in arguments or (hint,))


def _stage_command(stage: Stage) -> None:
    """The command of a stage: one option per parameter, which overrides the params file."""
    hints = typing.get_type_hints(stage.params)

    def run(settings: Settings, **given: str | None) -> None:
        overrides = [f"{stage.name}.{key}={value}" for key, value in given.items() if value is not None]
        settings.set_values += overrides
        artifact = execute(stage, settings.workspace())
        settings.show(
            {"stage": stage.name, "path": str(artifact.path), "id": artifact.id},
            f"{artifact.path}  {artifact.id[:12]}",
        )

    parameters = [inspect.Parameter("settings", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Settings)]
    for item in dataclasses.fields(stage.params):
        hint = hints[item.name]
        option = typer.Option(
            f"--{item.name.replace('_', '-')}",
            metavar=_metavar(hint),
            help=COMMENTS.get(f"{stage.name}.{item.name}"),
        )
        annotation = Annotated[str | None, option]
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = stage.summary
    run.__name__ = stage.name.replace("-", "_")
    command(stage.name, panel="Stages, in order")(run)


for _stage in PIPELINE:
    if _stage.name != "benchmark":
        _stage_command(_stage)


@command("compile")
def compile_(
    settings: Settings,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to run.")] = "benchmark",
    strict: Annotated[bool, typer.Option("--strict", help="A refused engine fails the run.")] = False,
) -> None:
    """Run all stages in this process, without DVC.

    An engine that fails its quality gate is refused and left out of the bundle, unless it is the default
    engine or --strict is given: then the run fails with exit code 5.
    """
    result = compiling.compile_bundle(settings.workspace(), until=until, strict=strict)
    lines = [f"{name}  {artifact.id[:12]}" for name, artifact in result.artifacts.items()]
    settings.show(
        {"artifacts": {name: artifact.id for name, artifact in result.artifacts.items()}, "refused": result.refused},
        "\n".join([*lines, *(f"refused {name}: {why}" for name, why in result.refused.items())]),
    )


@command("benchmark", panel="Stages, in order")
def benchmark(
    settings: Settings,
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Cases to run (default: benchmark.cases).")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile the models of the cases, measure nothing.")
    ] = False,
    mode: Annotated[
        Literal["single", "batch", "comprehensive"],
        typer.Option(help="One user at a time on one thread; batches on all cores; or all that the parameters say."),
    ] = "comprehensive",
) -> None:
    """Measure every runtime of the bundle beside eager PyTorch; write benchmark.json and report.html."""
    from stages.benchmark import MODES, compile_cases
    from stages.pipeline import stage

    settings.set_values = [*MODES[mode], *settings.set_values]  # what is set by hand comes last, and wins
    if case:
        settings.set_values.append(f"benchmark.cases={json.dumps(case)}")
    if compile_only:
        workspace = settings.workspace()
        compile_cases(workspace, workspace.values["benchmark"]["cases"])
        return
    execute(stage("benchmark"), settings.workspace())
    path = settings.reports / "benchmark.json"
    settings.show(json.loads(path.read_text()), f"{path}\n{settings.reports / 'report.html'}")


@command("ladder")
def ladder(
    settings: Settings,
    case: Annotated[str, typer.Option(help="Of the benchmark: whose model climbs.")] = "small",
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each cell, all runtimes together.")] = 6.0,
) -> None:
    """Measure every optimisation beside eager PyTorch in one run, vLLM and hot users too; write ladder.json."""
    from stages import ladder as climbing
    from stages.report import refresh
    from stages.report_ladder import render

    report = climbing.climb(settings.workspace(), case, seconds=seconds)
    refresh(settings.workspace())
    settings.show(report, render(report))


@command("gate")
def gate(
    settings: Settings,
    baseline: Annotated[
        Path | None, typer.Option(help="What to compare with (default: baseline.json in the reports).")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Make the current benchmark the baseline.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why the baseline changes (with --accept).")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Run the bundle side by side with this one instead.")
    ] = None,
) -> None:
    """Compare reports/benchmark.json with the baseline, or two bundles side by side; exit 5 on a regression."""
    from stages import gate as gating
    from stages.gate_bundles import gate_against

    workspace = settings.workspace()
    if against is not None:
        verdict = gate_against(workspace, against)
    else:
        verdict = gating.run_gate(workspace, baseline=baseline, accept=accept, reason=reason)
    settings.show(verdict.to_dict(), verdict.text)
    if not verdict.passed:
        raise GateError("this is worse than the baseline", fix="see the rows above")


@command("gate-trials")
def gate_trials(
    settings: Settings,
    bundle: Annotated[Path, typer.Option(help="The bundle that is run beside itself.")] = Path("artifacts/bundle"),
    trials: Annotated[int, typer.Option(min=1, help="Runs as it is, and as many made slower.")] = 50,
    slowdown: Annotated[float, typer.Option(min=0.0, help="Share of time that is burned besides.")] = 0.1,
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after these; called again, it goes on.")] = 60.0,
) -> None:
    """Count how often `gate --against` fails an equal bundle, and one made slower; write gate-trials.json."""
    from stages import gate_trials as proving
    from stages.report import refresh

    report = proving.run_trials(settings.workspace(), bundle, trials=trials, slowdown=slowdown, minutes=minutes)
    refresh(settings.workspace())
    settings.show(report["summary"], proving.render(report))
