"""The folders that runs write into: one run at a time, and every artifact is replaced whole or not at all.

What a kill at any moment leaves beside a destination is one of three things, and `recover` knows each:
`.NAME.tmp-*` (garbage: a run's unfinished folder, or an artifact on its way out), `.NAME.previous` (the
earlier artifact, whole, set aside for the instant between two renames), or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hstu.artifact import MANIFEST, encode_json
from hstu.errors import CompilerError, UsageError

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ELSEWHERE = "pass --artifacts DIR and --reports DIR to work elsewhere"
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where artifacts and reports stand, and the parameter values of every section."""

    artifacts: Path
    reports: Path
    values: Mapping[str, Mapping[str, Any]]


def say(message: str) -> None:
    """A line for the person watching: progress and choices go to stderr, results alone to stdout."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def hold(artifacts: Path, *, fix: str = ELSEWHERE) -> Iterator[None]:
    """Until the block ends nobody else writes below `artifacts`; a run that holds it already may nest.

    Raises UsageError when another run holds it, or the folder cannot be written to. The lock is the
    kernel's (flock), so it ends with the process however that ends.
    """
    key = artifacts.resolve()
    if key in _held.get():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            artifacts.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context((artifacts / ".lock").open("a+"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n")
            stream.flush()
        except BlockingIOError:
            stream.seek(0)
            raise UsageError(
                f"{artifacts}: another run is at work here (process {stream.read().strip() or 'unknown'})",
                fix=f"wait for it to end, or {fix}",
            ) from None
        except OSError as error:
            raise UsageError(f"{artifacts}: cannot be written to ({error.strerror})", fix=fix) from None
        token = _held.set(_held.get() | {key})
        try:
            yield
        finally:
            _held.reset(token)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt, so that what it made is removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with _handlers((signal.SIGTERM, signal.SIGHUP), stop):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP wait until the block has ended: for the few renames that belong together."""
    arrived: list[int] = []
    with _handlers(_STOPPING, lambda signum, _: arrived.append(signum)):
        yield
    for signum in arrived[:1]:
        signal.raise_signal(signum)


class FullDisk:
    """A context that turns "no space left" into one UsageError, whichever library met it and however it said so.

    Native writers (torch, protobuf, ONNX Runtime) report a failed write as a RuntimeError of their own;
    when the disk under `folder` has no room left at that moment, that is what went wrong.
    """

    def __init__(self, what: str, folder: Path, *, fix: str = "pass --artifacts DIR on another disk") -> None:
        self.what, self.folder, self.fix = what, folder, fix

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, CompilerError):
            return
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        if _says_full(error) or free < 2**16:
            raise UsageError(
                f"{self.what}: the disk is full (or a quota or size limit is reached); nothing was kept of this run",
                got=f"{free // 2**20} MiB free below {self.folder}; {type(error).__name__}: {error}",
                fix=f"free some space, or {self.fix}, and run again",
            ) from error


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside `destination`, gone when the block ends unless it was renamed into place."""
    temporary = Path(tempfile.mkdtemp(prefix=_garbage_prefix(destination), dir=destination.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(destination: Path) -> None:
    """Put right what a killed run left beside `destination`; UsageError when something of the user's stands there.

    Unfinished folders go, an artifact that was set aside comes back. A folder without a manifest was not
    written by a stage, so it is not ours to replace.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    for leftover in destination.parent.glob(f"{_garbage_prefix(destination)}*"):
        _remove(leftover)
        if leftover.exists():
            say(f"warning: {leftover}: left by a killed run and cannot be removed")
    previous = _previous(destination)
    if previous.is_dir():
        if destination.is_dir():
            _discard(previous)
        else:
            previous.rename(destination)
    ours = destination.is_dir() and ((destination / MANIFEST).exists() or not any(destination.iterdir()))
    if os.path.lexists(destination) and not ours:
        raise UsageError(
            f"{destination}: something stands here that is no artifact, and it will not be overwritten",
            expected=f"nothing, or a folder with {MANIFEST}",
            fix="remove or move it, or pass --artifacts DIR to work elsewhere",
        )


def commit(temporary: Path, destination: Path, report: Path, metrics: object) -> None:
    """The finished folder stands at `destination` and `metrics` at `report`, on the disk, or nothing changed.

    Everything that can fail (encoding, a full disk) happens before the first rename. In between, a stale
    report is removed first: after a kill a report is missing, never one of another artifact.
    """
    temporary.chmod(0o755)  # mkdtemp's 0700 would keep a server of another user from reading it
    sync(temporary)
    staged = _staged_report(report, metrics)
    previous = _previous(destination)
    try:
        with uninterrupted():
            report.unlink(missing_ok=True)
            if destination.exists():
                destination.rename(previous)
            try:
                temporary.rename(destination)
            except OSError:
                if previous.exists():
                    previous.rename(destination)
                raise
            staged.replace(report)
            sync_folder(destination.parent)
    finally:
        staged.unlink(missing_ok=True)
    if previous.exists():
        _discard(previous)


def write_report(path: Path, values: object) -> None:
    """Write JSON at `path`, whole or not at all."""
    staged = _staged_report(path, values)
    try:
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _staged_report(path: Path, values: object) -> Path:
    data = encode_json(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is overwritten by the next run
    try:
        staged.write_bytes(data)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _garbage_prefix(destination: Path) -> str:
    return f".{destination.name}.tmp-"


def _previous(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.previous")


def _discard(folder: Path) -> None:
    """Remove an artifact that was set aside; it takes a garbage name first, so half of it is never restored."""
    name = folder.name.removesuffix(".previous")
    garbage = folder.with_name(f"{name}.tmp-{os.getpid()}-discarded")
    folder.rename(garbage)
    _remove(garbage)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _says_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, is the system's "no space left" (Rust libraries quote it as text)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def sync(folder: Path) -> None:
    """Every file and folder below is on the disk: a rename must not outrun the bytes when the power fails."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(path) / name)
        sync_folder(Path(path))


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _handlers(signals: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    """The handler stands for these signals; off the main thread, where Python delivers none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in signals:
        current = signal.getsignal(number)
        if current not in (signal.SIG_IGN, None):  # nohup and background jobs ignore some on purpose
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
