"""The call of a fused projection: tensors checked, arguments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import dtype_name, matrix_rows, require_shape, require_type, require_vector
from kernels.errors import KernelError
from kernels.spec import Launch
from kernels.uvqk_silu.variants import name


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, scales: tuple[Tensor, Tensor] | None = None
) -> Launch:  # fmt: skip
    """What to launch for out [M, N] = SiLU(x weightᵀ + bias): x [M, K], weight [N, K], bias float32 [N].

    With scales (float32 [M] and [N]) x and weight are int8. K must be a multiple of the largest tile, or of 32 where
    a config for it was compiled: the compiled kernel reads whole tiles of K.
    """
    dtype, int8 = dtype_name("out", out), scales is not None
    if dtype == "fp32":
        raise KernelError("uvqk_silu has no float32 kernel", expected="bf16 or fp16 outputs", fix="use torch's linear")
    rows = {f"{n}_row": matrix_rows(n, t) for n, t in (("x", x), ("weight", weight), ("out", out))}
    (num_rows, depth), num_columns = x.shape, len(weight)
    for n, t in (("x", x), ("weight", weight)):
        require_type(n, t, torch.int8 if int8 else out.dtype)
    require_shape("weight", weight, (num_columns, depth))
    require_shape("out", out, (num_rows, num_columns))
    require_vector("bias", bias, torch.float32, num_columns)
    x_scale, weight_scale = scales or (bias, bias)
    if int8:
        for n, t, size in (("x_scale", x_scale, num_rows), ("weight_scale", weight_scale, num_columns)):
            require_vector(n, t, torch.float32, size)
    if num_rows == 0:
        raise KernelError("an empty batch: nothing to project")
    values = {
        "x": x, "weight": weight, "bias": bias, "x_scale": x_scale, "weight_scale": weight_scale, "out": out,
        "num_rows": num_rows, "num_columns": num_columns, "depth": depth, **rows,
    }  # fmt: skip
    return Launch(name(dtype, int8=int8), values, {n: values[n] for n in ("num_rows", "num_columns", "depth")})
