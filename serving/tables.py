"""Recommendations of a whole table on Ray Data: Parquet in, Parquet out, as many processes as the cluster has room for.

A row in is a request: user_id, events (a list of structs item_id, timestamp, action?), query_timestamp?. A row out is
its answer: user_id, item_ids (text), scores, runtime, precision, fallback ("" or JSON). This module needs Ray.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from hstu.errors import CompilerError, InputError
from serving.bundle import open_bundle
from serving.cluster import connect
from serving.recommender import Recommender, RuntimeName, open_retriever
from serving.requests import request_from_json

_BATCH_ROWS = 256
ANSWERS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("runtime", pa.string()),
        ("precision", pa.string()),
        ("fallback", pa.string()),
    ]
)


class BatchRecommender:
    """Answers batches of rows in one process, with one runtime."""

    def __init__(self, bundle: str, k: int, runtime: RuntimeName, engine: str | None, threads: int | None) -> None:
        opened = open_bundle(Path(bundle), verify=False)
        self._recommender = Recommender(opened, open_retriever(opened, runtime, engine=engine, threads=threads))
        self._k = k

    def __call__(self, rows: pa.Table) -> pa.Table:
        requests = [
            request_from_json({name: value for name, value in row.items() if value is not None}, where="a row")
            for row in rows.to_pylist()
        ]
        answers = self._recommender.recommend([replace(r, user_id=str(r.user_id)) for r in requests], num_items=self._k)
        return pa.Table.from_pylist([_row(answer) for answer in answers], schema=ANSWERS)


def _row(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "user_id": answer["user_id"],
        "item_ids": [str(item["item_id"]) for item in answer["items"]],
        "scores": [item["score"] for item in answer["items"]],
        "runtime": answer["runtime"],
        "precision": answer["precision"],
        "fallback": json.dumps(answer["fallback"]) if "fallback" in answer else "",
    }


def recommend_table(
    bundle: Path,
    source: Path,
    target: Path,
    *,
    k: int,
    runtime: RuntimeName = "engine",
    engine: str | None = None,
    threads: int | None = None,
    processes: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    cluster: str | None = None,
) -> int:
    """How many rows of answers now stand in the folder `target`; InputError for rows that are no requests.

    The bundle, source and target are paths that every machine of the cluster sees.
    """
    if not source.exists():
        raise InputError(f"{source}: there is no such table", expected="a Parquet file, or a folder of them")
    connect(cluster, cpus=processes * cpus + 1)  # one to read and write with
    try:
        answers = ray.data.read_parquet(str(source.resolve())).map_batches(
            BatchRecommender,
            fn_constructor_args=(str(bundle.resolve()), k, runtime, engine, threads),
            batch_size=_BATCH_ROWS,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=processes),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        answers.write_parquet(str(target.resolve()))
        return int(ray.data.read_parquet(str(target.resolve())).count())
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> BaseException:
    """What a process of ours said was wrong, or the error itself."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, CompilerError):
            return found
        inner = getattr(found, "cause", None)
        found = inner if isinstance(inner, BaseException) else found.__cause__
    return error
