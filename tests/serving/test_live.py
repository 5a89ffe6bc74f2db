"""`serve` as it is: a process of its own, OpenVINO, the ranker and vLLM; asked by the example, and hurt under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.bundle import Bundle, open_bundle
from stages.load.run import LoadSettings, _killed
from stages.load.servers import Server, ours

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "artifacts" / "bundle"
WHOLE_AGAIN_S = 60.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BUNDLE / "manifest.json").is_file(), reason="no artifacts/bundle: run make run first"),
]


@pytest.fixture(scope="module")
def served() -> Bundle:
    return open_bundle(BUNDLE)


@pytest.fixture(scope="module")
def server(served: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ours(served.path, tmp_path_factory.mktemp("live") / "log", "--vllm", "--threads", "1") as running:
        yield running


def test_the_example_calls_every_route_and_nobody_has_to_stand_in(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    done = subprocess.run(
        [sys.executable, "examples/behaviour.py", "--url", url, "--requests", BUNDLE / "examples.jsonl"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for strategy in ("engine", "vllm", "torch"):
        assert re.search(rf"^{strategy} \['item.*'\] fallbacks \[\]$", done.stdout, re.MULTILINE), done.stdout
    assert "after that: 404" in done.stdout
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=10) as answer:
        routes = set(json.load(answer)["paths"])
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        asked = set(re.findall(r'hstu_http_requests_total\{route="([^"]+)"', answer.read().decode()))
    assert routes - asked <= {"/metrics"}  # counted when it has been answered


@pytest.mark.parametrize("role", ["ranker", "slates"])
def test_a_killed_process_costs_no_answer_and_comes_back(server: Server, served: Bundle, role: str) -> None:
    found = asyncio.run(_killed(server, served, LoadSettings(sessions=16), role, 12.0))
    print(role, json.dumps(found))
    assert found["killed"]
    assert found["failed"] == 0
    assert found["with_fallback"] > 0
    assert found["compared_alone"] > 0
    assert found["unlike_alone"] == 0
    assert found["whole_again_s"] is not None
    assert found["whole_again_s"] < WHOLE_AGAIN_S
