"""Servers under load, each in a process of its own: ours, and what one writes in an afternoon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from hstu.errors import MissingBackendError

_STARTS_WITHIN_S = 180.0
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    def tree(self) -> list[psutil.Process]:
        """The server and its workers."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def resident_mib(self) -> float:
        """Of all its processes."""
        total = 0
        for process in self.tree():
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # a worker that is being replaced
                continue
        return total / 2**20

    def kill_worker(self, role: str) -> bool:
        """kill -9 of a worker process and all below it; whether it was there."""
        for process in self.tree():
            try:
                if "serving.worker" in process.cmdline() and role in process.cmdline():
                    for one in [*process.children(recursive=True), process]:
                        one.send_signal(signal.SIGKILL)
                    return True
            except psutil.NoSuchProcess:
                continue
        return False


@contextmanager
def ours(bundle: Path, log: Path, *options: str) -> Iterator[Server]:
    """`cli.py serve` of the bundle, ready; it has ended afterwards."""
    with _running([str(_ROOT / "cli.py"), "serve", "--bundle", str(bundle), *options], log) as server:
        yield server


@contextmanager
def naive(bundle: Path, log: Path) -> Iterator[Server]:
    """`stages.load.naive` on the bundle's weights, ready."""
    with _running(["-m", "stages.load.naive", str(bundle)], log, port_flag="") as server:
        yield server


@contextmanager
def _running(arguments: Sequence[str], log: Path, *, port_flag: str = "--port") -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, *arguments, *([port_flag] if port_flag else []), str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    server = Server(port=port, process=process)
    try:
        _wait_until_ready(server, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server, log: Path) -> None:
    until = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < until and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/ready", timeout=2) as answer:
                if json.load(answer)["ready"]:
                    return
        except OSError:
            time.sleep(0.2)
    raise MissingBackendError(
        "the server did not start", got=log.read_text(errors="replace")[-400:].strip(), fix=f"see {log}"
    )
