"""Compiled kernels from a folder of `build-kernels`, launched without Triton."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels import driver
from kernels.errors import KernelError
from kernels.spec import Launch, check_sizes, compile_expression

_NUMBERS: Mapping[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class CompiledKernel:
    """One kernel of one SM: `description` as `kernels.aot` wrote it."""

    def __init__(self, path: Path) -> None:
        self.description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._cubin = path.with_suffix(".cubin")
        self._grid = [compile_expression(text) for text in self.description["grid"]]
        self._ranges = {name: (low, high) for name, (low, high) in self.description["ranges"].items()}
        self._function: driver.Function | None = None

    def prepare(self, launch: Launch) -> tuple[list[int], list[Any]]:
        """The grid and the arguments of a launch; KernelError where a size, an address or a number does not fit."""
        name = self.description["kernel"]
        check_sizes(name, self._ranges, launch.sizes)
        sizes = {**self.description["constants"], **launch.sizes}
        maps = iter(self.description["tensor_maps"])
        arguments: list[Any] = []
        for argument in self.description["arguments"]:
            value = launch.values[argument["name"]]
            if argument["type"].startswith("tensordesc"):
                arguments += _tensor_map(launch, argument["name"], value, next(maps))
                continue
            address = argument["type"].startswith("*")
            number = value.data_ptr() if address else value
            if argument["aligned"] and number % 16:
                what = "is at an address" if address else "is a number"
                raise KernelError(
                    f"{name}: {argument['name']} {what} that 16 does not divide",
                    got=number,
                    fix="use views that begin and step in multiples of 16 bytes and of 16 elements",
                )
            arguments.append(ctypes.c_void_p(number) if address else _NUMBERS[argument["type"]](number))
        arguments += [ctypes.c_void_p(0), ctypes.c_void_p(0)]  # Triton's two scratch areas, which are empty
        return [expression(sizes) for expression in self._grid], arguments

    def run(self, launch: Launch, stream: int) -> None:
        """The launch is queued on a stream of the current context."""
        grid, arguments = self.prepare(launch)
        if self._function is None:
            self._function = driver.Function(
                self._cubin.read_bytes(), self.description["entry"], self.description["shared_bytes"]
            )
        self._function.launch(grid, self.description["threads"], arguments, stream)


def _tensor_map(launch: Launch, name: str, value: Any, described: Mapping[str, Any]) -> list[Any]:
    rows, columns = launch.descriptors[name]
    row = launch.values[f"{name}_row"]
    made = driver.tensor_map(
        value.data_ptr(), kind=described["kind"], item_bytes=described["item_bytes"], shape=(rows, columns),
        strides=(row, 1), box=described["box"], swizzle=described["swizzle"],
    )  # fmt: skip
    return [made, ctypes.c_int32(rows), ctypes.c_int32(columns), ctypes.c_int64(row), ctypes.c_int64(1)]


class CompiledKernels:
    """The kernels below `folder` (artifacts/kernels, with one folder per SM) for one SM."""

    def __init__(self, folder: Path, sm: int | None = None) -> None:
        self.sm = driver.current_sm() if sm is None else sm
        self._folder = folder / f"sm_{self.sm}"
        if not self._folder.is_dir():
            raise KernelError(
                f"{folder}: no kernels for sm_{self.sm}",
                got=", ".join(sorted(path.name for path in folder.glob("sm_*"))) or "none at all",
                expected=f"sm_{self.sm}",
                fix=f"python cli.py build-kernels -S build-kernels.sms='[{self.sm}]'",
            )
        self._kernels: dict[str, CompiledKernel] = {}

    def kernel(self, name: str) -> CompiledKernel:
        """The kernel of that name; KernelError naming those that are there."""
        if name not in self._kernels:
            path = self._folder / f"{name}.json"
            if not path.is_file():
                op = name.partition("-")[0]
                raise KernelError(
                    f"{self._folder}: there is no kernel {name}",
                    expected=", ".join(sorted(p.stem for p in self._folder.glob(f"{op}-*.json"))) or f"no {op} at all",
                    fix="add its type and head size to build-kernels in params.yaml, and run build-kernels",
                )
            self._kernels[name] = CompiledKernel(path)
        return self._kernels[name]

    def run(self, launch: Launch, stream: int) -> None:
        """The launch is queued on a stream of the current context."""
        self.kernel(launch.kernel).run(launch, stream)
