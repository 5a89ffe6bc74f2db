"""The call of pairwise interaction: tensors checked, arguments in place."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import dtype_name, matrix_rows, require_shape, require_type
from kernels.errors import KernelError
from kernels.interaction.variants import name, num_pairs
from kernels.spec import Launch


def launch(x: Tensor, out: Tensor, *, with_self: bool) -> Launch:
    """What to launch for out [B, P], the packed products of the features of x [B, F, D] (samples may stand apart)."""
    dtype = dtype_name("x", x)
    if x.dim() != 3 or x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        raise KernelError(
            "x: a sample's features are not contiguous", got=f"strides {x.stride()} of shape {tuple(x.shape)}",
            expected="[B, F, D] of strides (any, D, 1)", fix="pass x.contiguous()",
        )  # fmt: skip
    samples, features, width = x.shape
    if samples == 0 or features < (1 if with_self else 2):
        raise KernelError("nothing to interact", got=tuple(x.shape))
    require_type("out", out, x.dtype)
    require_shape("out", out, (samples, num_pairs(features, with_self)))
    values = {
        "x": x, "out": out, "num_samples": samples, "x_row": x.stride(0), "out_row": matrix_rows("out", out)
    }  # fmt: skip
    return Launch(name(dtype, features, width, with_self=with_self), values, {"num_samples": samples})
