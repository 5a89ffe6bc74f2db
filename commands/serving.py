"""Answers from a bundle: on the command line, over HTTP, and under load."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.app import Settings, command
from hstu.errors import InputError, UsageError
from stages import compiling
from stages.contract import say


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
    from serving.settings import ServiceSettings

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
