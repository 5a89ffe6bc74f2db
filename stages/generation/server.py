"""A bundle's vLLM server as a process, from its command line to its first 200."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hstu.errors import GateError
from serving.vllm_plugin.server import serve_command

PATIENCE_S = 600.0  # a machine that does other things takes its time


@contextmanager
def running_server(folder: Path, settings: str) -> Iterator[str]:
    """The address of the server of `folder`, ready; it ends with the block. Its words are in `folder`/server.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, *arguments = serve_command(settings).split()
    log = folder / "server.log"
    with log.open("w") as words:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise GateError("the server is not ready", got=log.read_text()[-3000:])
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ready_seconds(folder: Path, settings: str) -> float:
    """From the command line to the first 200 of /health."""
    began = time.perf_counter()
    with running_server(folder, settings):
        return time.perf_counter() - began
