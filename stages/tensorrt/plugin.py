"""Our attention kernel as TensorRT's plugin `hstu::HSTUPaddedAttention`: ahead of time, its PTX inside the plan.

Imported where engines are built, and nowhere else: a plan that holds the PTX needs neither this nor Python to run.
TensorRT reads the annotations of the two functions below as objects, so this module must not postpone them.
"""

# ruff: noqa: ARG001 - TensorRT passes every argument, by position
from typing import TYPE_CHECKING, Any

import tensorrt as trt
import tensorrt.plugin as trtp

from stages.passes.functions import DOMAIN
from stages.tensorrt.plugin_graph import PLUGIN

if TYPE_CHECKING:
    from collections.abc import Mapping

ID = f"{DOMAIN}::{PLUGIN}"
INPUTS = ("uvqk", "times", "next_times", "lengths", "position_bias", "time_bias", "bucket_edges")
NUMBERS = ("padded", "heads", "max_length")
_DTYPES = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}


def register(description: "Mapping[str, Any]", ptx: str) -> None:
    """Parsers and networks of this process know the plugin, computed by the kernel that `kernels.aot` described.

    Raises ValueError when its arguments do not stand in the order in which TensorRT passes them.
    """
    arguments = {argument["name"]: argument["type"] for argument in description["arguments"]}
    if list(arguments) != [*INPUTS, *NUMBERS, "out"] or any(arguments[name] != "i32" for name in NUMBERS):
        raise ValueError(f"{ID}: the kernel takes {arguments}, TensorRT passes {[*INPUTS, *NUMBERS, 'out']}")
    dtype = _DTYPES[arguments["out"].removeprefix("*")]
    constants = description["constants"]

    @trtp.register(ID)
    def describe(
        uvqk: trtp.TensorDesc,
        times: trtp.TensorDesc,
        next_times: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        position_bias: trtp.TensorDesc,
        time_bias: trtp.TensorDesc,
        bucket_edges: trtp.TensorDesc,
        num_heads: int,
        head_dim: int,
        max_length: int,
    ) -> trtp.TensorDesc:
        shape = trtp.ShapeExprs(3)
        shape[0], shape[1], shape[2] = _size(uvqk, 0), _size(uvqk, 1), num_heads * head_dim
        return trtp.from_shape_expr(shape, uvqk.dtype)

    @trtp.aot_impl(ID)
    def kernel(
        uvqk: trtp.TensorDesc,
        times: trtp.TensorDesc,
        next_times: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        position_bias: trtp.TensorDesc,
        time_bias: trtp.TensorDesc,
        bucket_edges: trtp.TensorDesc,
        num_heads: int,
        head_dim: int,
        max_length: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        if uvqk.dtype != dtype or head_dim != constants["DV"]:
            raise ValueError(
                f"{ID}: the kernel is for {dtype} and heads of {constants['DV']}, not {uvqk.dtype}, {head_dim}"
            )
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(_size(uvqk, 1), constants["BLOCK_M"])
        launch.grid_y = _size(uvqk, 0)
        launch.block_x = description["threads"]
        launch.shared_mem = description["shared_bytes"]
        numbers = trtp.SymIntExprs(len(NUMBERS))
        numbers[0], numbers[1], numbers[2] = _size(uvqk, 1), trtp.SymInt32(num_heads), trtp.SymInt32(max_length)
        return description["entry"], ptx, launch, numbers


def _size(tensor: trtp.TensorDesc, axis: int) -> trtp.ShapeExpr:
    """An axis of a tensor, as an expression of the network's shapes."""
    size: Any = tensor.shape_expr[axis]
    if not isinstance(size, trtp.ShapeExpr):
        raise TypeError(f"{ID}: the size of axis {axis} is {size}")
    return size
