"""What a GPU kernel is before it is compiled: its arguments, constants, grid, configs and the limits of its inputs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernels.errors import KernelError

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
# Largest error against float64, of the largest value of a row or of 1: one table for tests, artifacts and bench.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
SHARED_LIMIT: Mapping[int, int] = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may ask for


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument in the kernel's order. type is Triton's ("*bf16", "i32", "fp32", "tensordesc<bf16[{BLOCK_N}, 64]>",
    constants in braces); aligned: an address or a number that 16 divides."""

    name: str
    type: str
    aligned: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """What may vary without changing the answer: tile sizes, warps and stages."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int

    def label(self) -> str:
        """A short unique name: BLOCK_M128-BLOCK_N64-w4-s3."""
        return "-".join([*(f"{k}{v}" for k, v in self.constants.items()), f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A kernel to compile. `function` stands in kernels/<op>/triton.py; `grid` are expressions over constants and the
    sizes that a launch names; `ranges` (lowest, highest) hold for these sizes; `matrix`: a product large enough for the
    tensor cores of its SM is in it; `configs` in the order in which they are preferred until something is measured, and
    `ampere_configs` before them below sm_90, whose products keep more in registers; `shared_limit` in bytes, where
    whoever launches it may ask for less than the SM has."""

    op: str
    name: str
    function: str
    arguments: tuple[Argument, ...]
    constants: Mapping[str, float]
    grid: tuple[str, str, str]
    configs: tuple[Config, ...]
    ampere_configs: tuple[Config, ...] = ()
    ranges: Mapping[str, tuple[int, int]]
    tolerance: float
    dtype: str
    head_dim: int
    matrix: bool = False
    tanh: bool = False
    lowest_sm: int = 80
    shared_limit: int | None = None

    def __post_init__(self) -> None:
        for expression in self.grid:
            compile_expression(expression)


def configs_for(kernel: Kernel, sm: int) -> tuple[Config, ...]:
    """The configs to try on an SM, the preferred first."""
    first = kernel.ampere_configs if sm < 90 else ()
    return (*first, *(config for config in kernel.configs if config not in first))


INT32 = (0, 2**31 - 1)
BATCH = (1, 65_535)  # the last dimension of a grid


def aligned(name: str, kind: str) -> Argument:
    """An argument whose address, or whose value, is a multiple of 16."""
    return Argument(name, kind, aligned=True)


def block(size: int) -> int:
    """The smallest power of two, 16 at least, that holds `size` columns."""
    return max(16, 1 << (size - 1).bit_length())


_OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def compile_expression(text: str) -> Callable[[Mapping[str, float]], int]:
    """A function of sizes for an expression of names, whole numbers, + - * // and cdiv(a, b); nothing else is code."""

    def value(node: ast.expr, sizes: Mapping[str, float]) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in sizes:
                raise KernelError(f"grid {text!r}: {node.id} is not given", expected=", ".join(sorted(sizes)))
            return int(sizes[node.id])
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left, sizes), value(node.right, sizes))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cdiv":
            first, second = (value(argument, sizes) for argument in node.args)
            return -(-first // second)
        raise KernelError(f"grid {text!r}: not an expression of names, whole numbers, + - * // and cdiv")

    body = ast.parse(text, mode="eval").body
    _check_nodes(body, text)
    return lambda sizes: value(body, sizes)


def _check_nodes(node: ast.AST, text: str) -> None:
    allowed = (ast.Constant, ast.Name, ast.BinOp, ast.Call, ast.Load, *_OPERATIONS)
    for child in ast.walk(node):
        if not isinstance(child, allowed):
            raise KernelError(f"grid {text!r}: {type(child).__name__} does not belong there")


def check_sizes(name: str, ranges: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> None:
    """KernelError, naming the first size that is outside the range in which the kernel was checked."""
    for size, (lowest, highest) in ranges.items():
        if size not in sizes:
            raise KernelError(f"{name}: {size} is not given", expected=f"{lowest}..{highest}")
        if not lowest <= sizes[size] <= highest:
            raise KernelError(f"{name}: {size} is out of range", got=sizes[size], expected=f"{lowest}..{highest}")


@dataclass(frozen=True, slots=True)
class Launch:
    """A checked call: `values` by argument name (anything with data_ptr(), or a number), `sizes` for the grid."""

    kernel: str
    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    descriptors: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # rows and columns behind a tensor map
