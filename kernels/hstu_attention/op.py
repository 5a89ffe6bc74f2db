"""The call of a GPU attention kernel: tensors checked, arguments in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import (
    dtype_name,
    head_rows,
    require_offsets,
    require_reach,
    require_shape,
    require_type,
    require_vector,
)
from kernels.errors import KernelError
from kernels.hstu_attention.variants import EPSILON, name, padded
from kernels.spec import Launch

EDGES = 129


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBias:
    """position_bias float32 [2N-1], time_bias and bucket_edges float32 [129], times and next_times int64 [T]."""

    position_bias: Tensor
    time_bias: Tensor
    bucket_edges: Tensor
    times: Tensor
    next_times: Tensor


def bucket_edges(thresholds: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """float32 [129] for the kernels: the smallest time difference of buckets 1 to 128, then infinity.

    A bucket is a function of the difference as a float32, so comparing float32 numbers is exact.
    """
    edges = torch.tensor(thresholds, dtype=torch.int64).to(torch.float32)  # rounded once: not through float64
    return torch.cat([edges, edges.new_tensor([float("inf")])]).to(device)


def check_bias(bias: RelativeBias, max_length: int, rows: int) -> None:
    """KernelError unless tables and times fit a model of max_length positions and `rows` rows."""
    for field, size in (("position_bias", 2 * max_length - 1), ("time_bias", EDGES), ("bucket_edges", EDGES)):
        require_vector(field, getattr(bias, field), torch.float32, size)
    for field in ("times", "next_times"):
        require_vector(field, getattr(bias, field), torch.int64, rows)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, offsets: Tensor, num_targets: Tensor, *, longest: int,
    max_length: int, bias: RelativeBias | None, u: Tensor | None = None, epsilon: float = EPSILON, tma: bool = False,
    checked_offsets: bool = False,
) -> Launch:  # fmt: skip
    """What to launch for `out` [T, H, dv]: attention of q, k [T, H, dqk] and v [T, H, dv], or with u [T, H, dv] gated.

    offsets int64 [B+1], num_targets int64 [B]; rows may be views into the fused UVQK output. Raises KernelError for
    whatever the kernel would answer with nonsense.
    """
    dtype = dtype_name("q", q)
    rows, heads, width = q.shape if q.dim() == 3 else (0, 0, 0)
    strides = {f"{n}_row": head_rows(n, x) for n, x in (("q", q), ("k", k), ("v", v), ("out", out))}
    for n, x in (("k", k), ("v", v), ("out", out), *((("u", u),) if u is not None else ())):
        require_type(n, x, q.dtype)
        require_shape(n, x, (rows, heads, width))
    require_reach(longest, strides)
    users = len(offsets) - 1
    for n, x, size in (("offsets", offsets, users + 1), ("num_targets", num_targets, users)):
        require_vector(n, x, torch.int64, size)
    if users < 1 or rows == 0:
        raise KernelError("an empty batch: nothing to attend", got=f"{users} users, {rows} rows")
    if longest > max_length:
        raise KernelError("histories are longer than the model's positions", got=longest, expected=f"<= {max_length}")
    if not checked_offsets:
        require_offsets(offsets, rows, longest, max_length)
        if bool(((num_targets < 0) | (num_targets > offsets.diff())).any()):
            raise KernelError("a user has more targets than rows", got=num_targets.tolist()[:16])
    if bias is not None:
        check_bias(bias, max_length, rows)
    nothing = offsets  # without a bias these are not read
    values = {
        "q": q, "k": k, "v": v, "out": out, "offsets": offsets, "num_targets": num_targets,
        "times": bias.times if bias else nothing, "next_times": bias.next_times if bias else nothing,
        "position_bias": bias.position_bias if bias else nothing, "time_bias": bias.time_bias if bias else nothing,
        "bucket_edges": bias.bucket_edges if bias else nothing, **strides, "max_length": max_length,
        "scale": 1.0 / max_length,
    }  # fmt: skip
    if u is not None:
        values |= {"u": u, "u_row": head_rows("u", u), "epsilon": epsilon, "heads": heads}
    entry = "gated" if u is not None else "tma" if tma else "pointer"
    return Launch(
        name(dtype, width, bias=bias is not None, entry=entry),
        values,
        {"longest": longest, "heads": heads, "users": users},
        dict.fromkeys(("q", "k", "v"), (rows, heads * width)) if tma else {},
    )


def padded_launch(
    uvqk: Tensor, times: Tensor, next_times: Tensor, lengths: Tensor, position_bias: Tensor, time_bias: Tensor,
    bucket_edges: Tensor, out: Tensor, *, heads: int, max_length: int,
) -> Launch:  # fmt: skip
    """What to launch for `out` [B, L, H·dv], gated and zero behind the histories, of uvqk [B, L, H·(2·dv + 2·dqk)].

    uvqk after SiLU; times and next_times int64 [B, L], lengths int64 [B], tables as in RelativeBias; all contiguous.
    Raises KernelError.
    """
    dtype = dtype_name("uvqk", uvqk)
    users, rows, width = uvqk.shape if uvqk.dim() == 3 else (0, 0, 0)
    v_dim = out.shape[-1] // heads
    qk_dim = width // (2 * heads) - v_dim
    if users < 1 or rows < 1 or v_dim < 1 or qk_dim < 1 or width != 2 * heads * (v_dim + qk_dim):
        raise KernelError(
            "uvqk is not rows of heads", got=list(uvqk.shape), expected=f"u, v, q, k of {heads} heads each"
        )
    require_type("out", out, uvqk.dtype)
    require_shape("out", out, (users, rows, heads * v_dim))
    require_shape("uvqk", uvqk, (users, rows, width))
    for n, x in (("times", times), ("next_times", next_times), ("lengths", lengths)):
        require_type(n, x, torch.int64)
        require_shape(n, x, (users,) if x is lengths else (users, rows))
    require_reach(rows, {"uvqk_row": width})
    bias = RelativeBias(
        position_bias=position_bias, time_bias=time_bias, bucket_edges=bucket_edges, times=times.view(-1),
        next_times=next_times.view(-1),
    )  # fmt: skip
    check_bias(bias, max_length, users * rows)
    if rows > max_length:
        raise KernelError("histories are longer than the model's positions", got=rows, expected=f"<= {max_length}")
    values = {
        "uvqk": uvqk, "times": times, "next_times": next_times, "lengths": lengths, "position_bias": position_bias,
        "time_bias": time_bias, "bucket_edges": bucket_edges, "padded": rows, "heads": heads, "max_length": max_length,
        "out": out,
    }  # fmt: skip
    sizes = {"padded": rows, "heads": heads, "users": users}
    return Launch(padded(dtype, v_dim, qk_dim).name, values, sizes)
