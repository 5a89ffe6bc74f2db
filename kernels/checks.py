"""What every GPU op asks of its tensors before it launches anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.errors import KernelError
from kernels.spec import DTYPES

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def dtype_name(name: str, x: Tensor) -> str:
    """bf16, fp16 or fp32; KernelError for any other type."""
    if x.dtype not in NAMES:
        raise KernelError(f"{name}: not a type the kernels take", got=x.dtype, expected=", ".join(DTYPES))
    return NAMES[x.dtype]


def require_type(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """KernelError unless x has the type."""
    if x.dtype != dtype:
        raise KernelError(f"{name}: wrong type", got=x.dtype, expected=dtype, fix=f"pass {name}.to({dtype})")


def require_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """KernelError unless x has the shape."""
    if tuple(x.shape) != tuple(shape):
        raise KernelError(f"{name}: wrong shape", got=tuple(x.shape), expected=tuple(shape))


def require_vector(name: str, x: Tensor, dtype: torch.dtype, size: int) -> None:
    """KernelError unless x is `size` values of the type, side by side."""
    require_type(name, x, dtype)
    require_shape(name, x, (size,))
    if size > 1 and x.stride(0) != 1:
        raise KernelError(
            f"{name}: values do not lie side by side", got=f"stride {x.stride(0)}", expected="stride 1",
            fix=f"pass {name}.contiguous()",
        )  # fmt: skip


def head_rows(name: str, x: Tensor) -> int:
    """Elements from one row of x [T, H, d] to the next; its heads must lie side by side, as in the UVQK output."""
    if x.dim() != 3:
        raise KernelError(f"{name}: wrong number of dimensions", got=tuple(x.shape), expected="[rows, heads, width]")
    _, heads, width = x.shape
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != width):
        raise KernelError(
            f"{name}: the last dimension is not contiguous, or heads do not lie side by side",
            got=f"strides {tuple(x.stride())} of shape {tuple(x.shape)}",
            expected=f"(any, {width}, 1)",
            fix=f"pass {name}.contiguous()",
        )
    return int(x.stride(0))


def require_reach(longest: int, strides: Mapping[str, int]) -> None:
    """KernelError where a user's last row lies 2³¹ elements or more behind the first: kernels count in int32 there."""
    for name, stride in strides.items():
        if longest * stride >= 2**31:
            raise KernelError(
                f"{name}: a user's rows reach too far", got=f"{longest} rows, {stride} elements apart",
                expected="less than 2³¹ elements in all", fix="shorter histories, or rows that lie closer together",
            )  # fmt: skip


def matrix_rows(name: str, x: Tensor) -> int:
    """Elements from one row of a matrix to the next; KernelError unless its rows are contiguous."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise KernelError(
            f"{name}: rows are not contiguous", got=f"strides {tuple(x.stride())} of shape {tuple(x.shape)}",
            expected="a matrix of strides (any, 1)", fix=f"pass {name}.contiguous()",
        )  # fmt: skip
    return int(x.stride(0))


def require_offsets(offsets: Tensor, rows: int, longest: int, limit: int) -> None:
    """KernelError unless offsets rise from 0 to `rows` with no step above `longest`, nor `longest` above `limit`.

    Reads the offsets: on a GPU that waits for the device, so callers with trusted offsets check `longest` alone.
    """
    steps = offsets.diff()
    if len(offsets) < 2:
        raise KernelError("an empty batch: nothing to attend", got=f"{len(offsets)} offsets", expected="2 at least")
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((steps < 0).any()):
        raise KernelError("offsets do not rise from 0 to the number of rows", got=offsets.tolist()[:16], expected=rows)
    if int(steps.max()) > longest:
        raise KernelError("a user has more rows than `longest`", got=int(steps.max()), expected=f"at most {longest}")
    if longest > limit:
        raise KernelError(
            "histories are longer than the model's positions", got=longest, expected=f"at most {limit}",
            fix="cut histories to the newest events",
        )  # fmt: skip
