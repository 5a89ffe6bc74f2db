"""Answers from a bundle: on the command line, over HTTP, and under load."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
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
    mode: Annotated[
        Literal["single", "batch", "comprehensive"],
        typer.Option(help="One user with the time it took, all users, or every runtime and strategy side by side."),
    ] = "batch",
    user: Annotated[str | None, typer.Option(help="Which user of --mode single (default: the first).")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Parquet to Parquet on Ray Data (locks/cluster.txt).")] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of Parquet files (--ray).")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Of --ray.")] = 1,
    cluster: Annotated[str | None, typer.Option(metavar="ADDRESS|auto", help="A Ray cluster (default: here).")] = None,
) -> None:
    """Answer requests: JSON lines in, JSON lines out, in the same order."""
    from serving.bundle import open_bundle
    from serving.recommender import Recommender, open_retriever
    from serving.requests import read_requests

    if ray:
        if output is None:
            raise UsageError("--ray writes a folder of Parquet files", fix="pass --output DIR")
        from serving.server import require_ray

        require_ray()
        import serving.cluster  # noqa: F401  sets how Ray authenticates, which Ray reads when it is imported
        from serving.tables import recommend_table

        rows = recommend_table(
            bundle, Path(input_), output, k=k, runtime=runtime, engine=precision, threads=threads,
            processes=processes, cluster=cluster,
        )  # fmt: skip
        settings.show({"output": str(output), "rows": rows}, f"{output}  {rows} answers")
        return
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
    if mode == "comprehensive":
        from serving.side_by_side import side_by_side, text_table

        compared = []
        for row in side_by_side(opened, requests, k=k, threads=threads):
            say(f"{row.strategy} by {row.runtime}: {row.not_run or 'done'}")
            compared.append(row)
        settings.show([dataclasses.asdict(row) for row in compared], text_table(compared))
        return
    if mode == "single":
        requests = [request for request in requests if user in (None, str(request.user_id))][:1]
        if not requests:
            raise InputError(f"{input_}: no request of user {user!r}", fix="name a user_id of the file")
    rebuilt = None
    if rebuild is not None:
        from stages.rebuild import rebuilt_if_needed

        rebuilt = rebuilt_if_needed(opened.engine_folder(None), rebuild)
    recommender = Recommender(
        opened, open_retriever(opened, runtime, engine=precision, threads=threads, rebuilt=rebuilt)
    )
    if mode == "single":  # once before, so that the time is that of an answer and not of the first
        list(recommender.recommend(requests, num_items=k, embeddings=embeddings, slate=asked))
    began = time.perf_counter()
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
        found = list(answers)
    if mode == "single":
        found[0]["ms"] = round((time.perf_counter() - began) * 1e3, 3)
    lines = [json.dumps(answer, ensure_ascii=False) for answer in found]
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
    vllm_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of vllm.LLM, such as tensor_parallel_size=2 (with --vllm)."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="More than one run on Ray Serve (locks/cluster.txt).")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|auto", help="Deploy on this Ray cluster, or roll it over to this bundle, and end."
        ),
    ] = None,
    replica_cpus: Annotated[float, typer.Option(min=0.0, help="Cores that Ray counts for a replica.")] = 1.0,
    replica_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs that Ray gives a replica.")] = 0.0,
) -> None:
    """Serve a bundle over HTTP: recommendations, scores, users, metrics; docs at /docs."""
    from serving.bundle import open_bundle
    from serving.server import read_keys, require_ray, require_safe
    from serving.server import serve as serve_http
    from serving.settings import ServiceSettings, vllm_options

    keys = read_keys(api_keys)
    require_safe(host, keys)
    opened = open_bundle(bundle)
    service = ServiceSettings(
        engine=precision,
        state_form=state_form,
        vllm=vllm,
        vllm_options=vllm_options(vllm_option or ()),
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
    )
    if replicas == 1 and cluster is None:
        serve_http(opened, service, host=host, port=port, keys=keys)
        return
    require_ray()
    from serving.cluster import Deployment, serve_replicas

    how = Deployment(replicas=replicas, cpus=replica_cpus, gpus=replica_gpus, cluster=cluster)
    serve_replicas(opened, service, how, host=host, port=port, keys=keys)


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
