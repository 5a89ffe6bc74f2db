"""The application that commands register with, and the options that all of them have."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.contract import Workspace
from stages.parameters import read_params

app = typer.Typer(
    name="cli.py",
    help="Compile HSTU recommenders: checkpoint → ONNX → surgery → engines → bundle → benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@dataclass(kw_only=True)
class Settings:
    """The global options, which may stand before or after the command."""

    params: Path = Path("params.yaml")
    artifacts: Path = Path("artifacts")
    reports: Path = Path("reports")
    set_values: list[str] = field(default_factory=list)
    json_output: bool = False

    def workspace(self) -> Workspace:
        return Workspace(
            artifacts=self.artifacts, reports=self.reports, values=read_params(self.params, self.set_values)
        )

    def show(self, value: Any, text: str | None = None) -> None:
        """Results, alone on stdout: JSON with --json, else `text` (or the JSON when there is no text)."""
        if self.json_output or text is None:
            print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        else:
            print(text)


PANEL = "Everywhere"
ParamsOption = Annotated[
    Path | None, typer.Option("--params", help="Parameters (default: params.yaml).", rich_help_panel=PANEL)
]
ArtifactsOption = Annotated[
    Path | None, typer.Option("--artifacts", help="Artifacts (default: artifacts).", rich_help_panel=PANEL)
]
ReportsOption = Annotated[
    Path | None, typer.Option("--reports", help="Reports (default: reports).", rich_help_panel=PANEL)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("-S", "--set", metavar="SECTION.KEY=VALUE", help="Override a parameter.", rich_help_panel=PANEL),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.", rich_help_panel=PANEL)]
_GLOBAL = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in (
        ("params_", None, ParamsOption),
        ("artifacts_", None, ArtifactsOption),
        ("reports_", None, ReportsOption),
        ("set_", None, SetOption),
        ("json_", False, JsonOption),
    )
]


def _merge(settings: Settings, given: dict[str, Any]) -> None:
    """Take the global options out of `given` and into `settings`; later ones win, -S accumulates."""
    for name in ("params", "artifacts", "reports"):
        value = given.pop(f"{name}_", None)
        if value is not None:
            setattr(settings, name, value)
    settings.set_values += given.pop("set_", None) or []
    settings.json_output |= given.pop("json_", False)


@app.callback()
def main_options(
    context: typer.Context,
    params_: ParamsOption = None,
    artifacts_: ArtifactsOption = None,
    reports_: ReportsOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Compile HSTU recommenders: checkpoint → ONNX → surgery → engines → bundle → benchmark."""
    context.obj = Settings()
    _merge(
        context.obj,
        {"params_": params_, "artifacts_": artifacts_, "reports_": reports_, "set_": set_, "json_": json_},
    )


def command(name: str, *, panel: str = "Use") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose first argument is the Settings; it gains the global options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def run(context: typer.Context, **given: Any) -> None:
            _merge(context.obj, given)
            function(context.obj, **given)

        first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        signature = inspect.Signature([first, *own, *_GLOBAL])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register
