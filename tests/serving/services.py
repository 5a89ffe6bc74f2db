"""A whole small bundle that ranks, and the service over it, in the test's own process."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from hstu.artifact import encode_json, write_manifest
from serving.api import build_app
from serving.bundle import Bundle, open_bundle
from serving.service import Service
from serving.settings import ServiceSettings
from stages import export_onnx
from stages.export_onnx import ExportOnnxParams
from tests.models import random_model, tiny_config, write_checkpoint

CONFIG = tiny_config(num_layers=1)


def write_bundle(folder: Path, *, seed: int = 0) -> Bundle:
    """A bundle of a tiny model, its weights drawn from `seed`, with one ONNX Runtime engine."""
    checkpoint = write_checkpoint(folder / "checkpoint", random_model(CONFIG, seed))
    graphs = folder / "graphs"
    graphs.mkdir()
    export_onnx.run(ExportOnnxParams(opset=20, check_seed=0), {"checkpoint": checkpoint}, graphs)
    bundle = folder / "bundle"
    engine = bundle / "engines" / "fp32"
    shutil.copytree(graphs, engine)
    entries = {name: f"{name}.onnx" for name in ("retrieve", "rank", "extend")}
    spec = {"backend": "onnxruntime", "precision": "fp32", "entries": entries, "executed": True}
    (engine / "engine.json").write_bytes(encode_json(spec))
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        shutil.copyfile(checkpoint.path / name, bundle / name)
    described = {"default_engine": "fp32", "engines": {"fp32": {"backend": "onnxruntime", "executed": True}}}
    (bundle / "bundle.json").write_text(json.dumps(described))
    write_manifest(bundle, stage="bundle", params={}, inputs={"checkpoint": checkpoint.id}, toolchain={})
    return open_bundle(bundle)


@asynccontextmanager
async def client(bundle: Bundle, *, settings: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Any]:
    """An HTTP client of the application, and its service as `client.service`."""
    app = build_app(bundle, ServiceSettings(**({"ranker": False, "threads": 1} | (settings or {}))), **options)
    fastapi: Any = app._app
    async with (
        fastapi.router.lifespan_context(fastapi),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=30.0) as http,
    ):
        http.service = fastapi.state.service  # type: ignore[attr-defined]
        yield http


def service_of(http: Any) -> Service:
    return http.service


def events(bundle: Bundle, *numbers: int, start: int = 1000) -> list[dict[str, Any]]:
    """Events on the bundle's items by model id, a minute apart."""
    return [
        {"item_id": bundle.vocabulary.item(number), "timestamp": start + 60 * index}
        for index, number in enumerate(numbers)
    ]
