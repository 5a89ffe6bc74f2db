"""What compiles and opens the shared libraries of CPU kernels: the same compiler, the same bytes."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import KernelError

_KERNELS = Path(__file__).parents[1]
AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
# Contraction is spelled out in the sources, so that every row is computed alike. GCC 12 warns of its own headers.
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-ident", "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-I", ".",
)  # fmt: skip
LINK = ("-Wl,--build-id=none", "-Wl,-O1", "-s")


def sources_of(*folders: str) -> dict[str, bytes]:
    """The C++ files of these folders of `kernels`, by their path in it."""
    return {
        f"{folder}/{path.name}": path.read_bytes()
        for folder in folders
        for path in sorted((_KERNELS / folder).iterdir())
        if path.suffix in (".h", ".cpp")
    }


def run(command: Sequence[str], cwd: Path) -> str:
    """What the command said; KernelError with the compiler's words when it is missing or refuses."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"there is no {command[0]} here: install a C++20 compiler (g++ 12 or newer)") from None
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def compiler_version(compiler: str = "g++") -> str:
    """The first line of `g++ --version`; KernelError when there is no such compiler."""
    return run([compiler, "--version"], Path.cwd()).splitlines()[0]


@contextmanager
def objects(
    sources: Mapping[str, bytes], units: Mapping[str, Sequence[str]], folder: str, compiler: str
) -> Iterator[Path]:
    """A temporary folder that holds UNIT.o of each `folder`/UNIT.cpp, compiled with FLAGS and the unit's own."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for path, content in sources.items():
            (work / path).parent.mkdir(exist_ok=True)
            (work / path).write_bytes(content)
        commands = [
            [compiler, *FLAGS, *flags, "-c", f"{folder}/{unit}.cpp", "-o", f"{unit}.o"] for unit, flags in units.items()
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: run(command, work), commands))
        yield work


class Isa:
    """The instruction set that a library uses, through its functions `{prefix}_isa` and `{prefix}_limit_isa`."""

    def __init__(self, functions: ctypes.CDLL, prefix: str, what: str) -> None:
        self._isa, self._limit = getattr(functions, f"{prefix}_isa"), getattr(functions, f"{prefix}_limit_isa")
        self._isa.restype = ctypes.c_char_p
        if not self.isa:
            raise KernelError(f"this CPU lacks AVX2 and FMA, which {what} need")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa().decode()  # type: ignore[no-any-return]

    def limit_isa(self, isa: str) -> None:
        """From now on, in the whole process, at most `isa` is used; KernelError when this CPU lacks it."""
        if not self._limit(isa.encode()):
            raise KernelError(f"this CPU has no {isa} (it has {self.isa})")
