"""Whatever the OpenAPI document allows and does not, the service answers it without a 5xx."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.load.servers import ours

CASES = 2000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None,
        reason="no schemathesis: pip install --no-deps -r locks/tools.txt",
    ),
]


def test_no_request_is_answered_with_5xx(bundle, tmp_path: Path) -> None:
    with ours(bundle.path, tmp_path / "log", "--threads", "1", "--deadline-ms", "20000") as server:
        done = subprocess.run(
            [
                *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"),
                *(f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "not_a_server_error", "--seed", "1"),
                *("--phases", "coverage,fuzzing,stateful", "--max-examples", "300", "--request-timeout", "30"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=560,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-4000:]
    generated = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert generated is not None, done.stdout[-2000:]
    assert int(generated[1]) == int(generated[2]) >= CASES
