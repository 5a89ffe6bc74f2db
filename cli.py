"""One command per stage of the compiler, and the commands that use what they make. No logic lives here.

Exit codes: 0 ok · 1 a bug · 2 bad parameters, input or usage · 3 a missing device, library or version ·
4 a corrupt or mismatched artifact · 5 a gate failed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hstu.errors import CompilerError, GateError, InputError, UsageError
from stages import compiling
from stages.contract import Stage, Workspace, execute, say
from stages.parameters import read_comments, read_params
from stages.pipeline import PIPELINE

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


COMMENTS = read_comments(Path(__file__).parent / "params.yaml")


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


@contextmanager
def _lines(source: str) -> Iterator[typing.IO[str]]:
    if source == "-":
        yield sys.stdin
        return
    try:
        stream = Path(source).open(encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"{source}: cannot be read ({error.strerror})", fix="pass --input FILE.jsonl, or - for stdin"
        ) from None
    with stream:
        yield stream


@command("recommend")
def recommend(
    settings: Settings,
    input_: Annotated[str, typer.Option("--input", metavar="FILE.jsonl|-", help="Requests, one object a line.")],
    bundle: Annotated[Path, typer.Option(help="The bundle to answer from.")] = Path("artifacts/bundle"),
    k: Annotated[int, typer.Option("--k", "-k", help="Items per answer.")] = 10,
    runtime: Annotated[Literal["engine", "vllm", "torch"], typer.Option(help="What computes the answer.")] = "engine",
    precision: Annotated[str | None, typer.Option(help="Which engine of the bundle (default: the bundle's).")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Add each user's embedding.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (default: all cores).")] = None,
    slate: Annotated[
        Literal["greedy", "sample", "beam"] | None,
        typer.Option(help="Make a slate of k items, one after the other (runtimes vllm and torch)."),
    ] = None,
    width: Annotated[int, typer.Option(help="Beams of --slate beam.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of --slate sample and beam.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of --slate sample.")] = 0,
    exclude_history: Annotated[bool, typer.Option("--exclude-history", help="No item of the user's own.")] = False,
    rebuild: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Rebuild an engine of another GPU or version below DIR, once.")
    ] = None,
) -> None:
    """Answer requests: JSON lines in, JSON lines out, in the same order."""
    from serving.bundle import open_bundle
    from serving.recommender import Recommender, open_retriever
    from serving.requests import read_requests

    if exclude_history and slate is None:
        raise UsageError("--exclude-history belongs to --slate", fix="add --slate greedy")
    asked = None
    if slate is not None:
        from serving.slate import Slate

        asked = Slate(
            num_items=k, method=slate, width=width, temperature=temperature, seed=seed, exclude_history=exclude_history
        )
    with _lines(input_) as stream:
        requests = read_requests(stream, source="stdin" if input_ == "-" else input_)
    opened = open_bundle(bundle)
    rebuilt = None
    if rebuild is not None:
        from stages.rebuild import rebuilt_if_needed

        rebuilt = rebuilt_if_needed(opened.engine_folder(None), rebuild)
    recommender = Recommender(
        opened, open_retriever(opened, runtime, engine=precision, threads=threads, rebuilt=rebuilt)
    )
    with compiling.progress("users", total=len(requests)) as advance_to:
        answers = recommender.recommend(
            requests,
            num_items=k,
            embeddings=embeddings,
            slate=asked,
            on_cut=lambda cut: say(
                f"{len(cut)} histories were longer than {opened.config.max_history} events; the newest were kept"
            ),
            on_progress=advance_to,
        )
        lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    print("\n".join(lines))


@command("serve")
def serve(
    settings: Settings,
    bundle: Annotated[Path, typer.Option(help="The bundle to serve.")] = Path("artifacts/bundle"),
    host: Annotated[str, typer.Option(help="Anything but loopback asks for API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    precision: Annotated[str | None, typer.Option(help="Which engine of the bundle (default: the bundle's).")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Start the vLLM process, which generates slates.")] = False,
    ranker: Annotated[bool, typer.Option(help="Start the process that ranks.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="No fallback at any level.")] = False,
    api_keys: Annotated[Path | None, typer.Option(help="Keys, one a line (default: HSTU_API_KEYS).")] = None,
    state_form: Annotated[Literal["fp32", "bf16", "int8"], typer.Option(help="How users' states are kept.")] = "fp32",
    cache_mib: Annotated[int, typer.Option(min=1, help="Users' states and item embeddings, device and host.")] = 256,
    disk: Annotated[Path | None, typer.Option(help="A folder for states that memory has no room for.")] = None,
    disk_mib: Annotated[int, typer.Option(min=0)] = 1024,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told 429.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, max=64)] = 32,
    batch_wait_ms: Annotated[float, typer.Option(min=0.0, help="How long a request waits for company.")] = 2.0,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Of requests that name none.")] = 1000,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each runtime (default: all cores).")] = None,
) -> None:
    """Serve a bundle over HTTP: recommendations, scores, users, metrics; docs at /docs."""
    from serving.bundle import open_bundle
    from serving.server import read_keys, require_safe
    from serving.server import serve as serve_http
    from serving.service import ServiceSettings

    keys = read_keys(api_keys)
    require_safe(host, keys)
    serve_http(
        open_bundle(bundle),
        ServiceSettings(
            engine=precision,
            state_form=state_form,
            vllm=vllm,
            ranker=ranker,
            strict=strict,
            deadline_ms=deadline_ms,
            max_batch=max_batch,
            batch_wait_ms=batch_wait_ms,
            max_queue=max_queue,
            cache_mib=cache_mib,
            disk=disk,
            disk_mib=disk_mib if disk is not None else 0,
            threads=threads,
        ),
        host=host,
        port=port,
        keys=keys,
    )


@command("load")
def load(
    settings: Settings,
    bundle: Annotated[Path, typer.Option(help="The bundle to serve and load.")] = Path("artifacts/bundle"),
    part: Annotated[
        list[str] | None,
        typer.Option(help="steady, saturated, naive, hot, kill-ranker, kill-slates (default: all but the last)."),
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Users at once.")] = 128,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of the steady part.")] = 180.0,
    history: Annotated[int, typer.Option(min=1, help="Events of a user to begin with.")] = 20,
    strategy: Annotated[str, typer.Option(help="Of the requests (default: the service's policy).")] = "",
    serve_option: Annotated[list[str] | None, typer.Option(help="Passed on to `serve`.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also run what is in load.json already.")] = False,
    case: Annotated[
        Path | None, typer.Option(help="A compiled benchmark case (artifacts/.cases/NAME/ID) to make the bundle of.")
    ] = None,
) -> None:
    """Load a served bundle from this process; write load.json, part by part."""
    from stages.load.case_bundle import link_case_bundle
    from stages.load.run import LoadSettings, run

    if case is not None:
        link_case_bundle(case, bundle)
    found = run(
        bundle,
        settings.reports,
        part or [],
        LoadSettings(
            sessions=sessions,
            seconds=seconds,
            history=history,
            strategy=strategy,
            serve=tuple(serve_option or ()),
            again=again,
        ),
    )
    settings.show(found)


@command("benchmark", panel="Stages, in order")
def benchmark(
    settings: Settings,
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Cases to run (default: benchmark.cases).")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile the models of the cases, measure nothing.")
    ] = False,
) -> None:
    """Measure every runtime of the bundle beside eager PyTorch; write benchmark.json and report.html."""
    from stages.benchmark import compile_cases
    from stages.pipeline import stage

    if case:
        settings.set_values.append(f"benchmark.cases={json.dumps(case)}")
    if compile_only:
        workspace = settings.workspace()
        compile_cases(workspace, workspace.values["benchmark"]["cases"])
        return
    execute(stage("benchmark"), settings.workspace())
    path = settings.reports / "benchmark.json"
    settings.show(json.loads(path.read_text()), f"{path}\n{settings.reports / 'report.html'}")


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


KeyOption = Annotated[Path | None, typer.Option("--key", metavar="PUB.pem", help="Public key it must be signed with.")]
ElsewhereOption = Annotated[
    bool, typer.Option("--elsewhere", help="The bundle is for another machine: its engines need not run here.")
]
RootOption = Annotated[Path, typer.Option("--root", metavar="DIR", help="Where bundles are installed.")]


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


@command("verify")
def verify(
    settings: Settings,
    path: Annotated[Path, typer.Argument(help="An artifact, a bundle or a shipped bundle.")],
    run: Annotated[bool, typer.Option("--run", help="Replay the golden inputs too.")] = False,
    key: KeyOption = None,
    signature: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The bundle's signature (default: where install put it).")
    ] = None,
    elsewhere: ElsewhereOption = False,
) -> None:
    """Check every byte of an artifact; of a bundle its signature, lineage, fit to this machine and (--run) answers."""
    from stages.verify import render
    from stages.verify import verify as check

    result = check(path, run=run, key=key, signature=signature, elsewhere=elsewhere)
    settings.show(result, render(result))


@command("ship", panel="Ship")
def ship(
    settings: Settings,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The shipped bundle: an OCI image layout.")],
    bundle: Annotated[Path, typer.Option(metavar="DIR", help="The bundle to ship.")] = Path("artifacts/bundle"),
    sign: Annotated[Path | None, typer.Option(metavar="KEY.pem", help="Private key to sign it with.")] = None,
) -> None:
    """Pack a bundle into a folder that registries carry; the same bundle and key give the same bytes."""
    from stages.shipping import ship as shipping

    result = shipping.ship(bundle, output, key=sign)
    settings.show(result, shipping.render(result))


@command("install", panel="Ship")
def install(
    settings: Settings,
    shipped: Annotated[Path, typer.Argument(help="A shipped bundle.")],
    root: RootOption,
    key: KeyOption = None,
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Take it though it is not newer than what was installed.")
    ] = False,
    elsewhere: ElsewhereOption = False,
    max_gib: Annotated[float, typer.Option(min=0.0, help="Refuse a larger one, GiB.")] = 64.0,
) -> None:
    """Check a shipped bundle, unpack it below a root and switch ROOT/current to it, whole or not at all."""
    from stages.shipping import install as installing

    result = installing.install(
        shipped, root, key=key, allow_downgrade=allow_downgrade, elsewhere=elsewhere, max_gib=max_gib
    )
    settings.show(result, installing.render(result))


@command("rollback", panel="Ship")
def rollback(settings: Settings, root: RootOption, key: KeyOption = None) -> None:
    """Switch ROOT/current back to the version that served before."""
    from stages.shipping import install as installing

    result = installing.rollback(root, key=key)
    settings.show(result, installing.render(result))


@command("bundles", panel="Ship")
def bundles(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A root of install, or a folder of bundles.")] = Path("artifacts"),
) -> None:
    """List bundles, oldest version first, with the metrics of each."""
    from stages.bundle_list import list_bundles, render

    rows = list_bundles(folder)
    settings.show(rows, render(rows))


@command("diff", panel="Ship")
def diff(
    settings: Settings,
    a: Annotated[Path, typer.Argument(help="A bundle.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Say what changed from one bundle to another: parameters, weights, metrics, engines, tools."""
    from stages.bundle_diff import diff_bundles, render

    found = diff_bundles(a, b)
    settings.show(found, render(found))


@command("lineage")
def lineage(settings: Settings, path: Annotated[Path, typer.Argument(help="An artifact or a bundle.")]) -> None:
    """Show what an artifact was made from, up to its sources."""
    from stages.lineage import lineage as trace

    tree = trace(path, settings.artifacts)
    settings.show(tree.to_dict(), tree.text)


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


INTERRUPTED = 130  # 128 + SIGINT


def main() -> None:
    """Run the command line; errors of ours become one message and their exit code."""
    try:
        app()
    except CompilerError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what Typer makes of Ctrl-C
            sys.stderr.write("interrupted; nothing half-written was left\n")
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
