"""The calls of the paged kernels: tensors checked, arguments in place, the work split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import (
    dtype_name,
    head_rows,
    matrix_rows,
    require_offsets,
    require_reach,
    require_shape,
    require_type,
    require_vector,
)
from kernels.errors import KernelError
from kernels.hstu_attention.op import EDGES
from kernels.paged_hstu_attention.variants import name
from kernels.spec import Launch

KEYS_PER_SPLIT = 256  # fewer are not worth a program of their own
PROGRAMS_PER_SM = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedBias:
    """Tables float32 [2N-1], [129], [129]; times int64 [pages · page_size] by slot; next_times int64, one per row;
    row_times int64 [T], of the new rows, for extend alone."""

    position_bias: Tensor
    time_bias: Tensor
    bucket_edges: Tensor
    times: Tensor
    next_times: Tensor
    row_times: Tensor | None = None


def num_splits(requests: int, heads: int, longest: int, num_sms: int) -> int:
    """Into how many parts a history is split so that the GPU is full; of shapes alone, so sums keep their order."""
    wanted = -(-num_sms * PROGRAMS_PER_SM // (requests * heads))
    return max(1, min(wanted, -(-longest // KEYS_PER_SPLIT), 1024))


def _check_cache(cache: Tensor, table: Tensor, dtype: torch.dtype, heads: int, width: int, requests: int) -> int:
    """Elements from one request's pages in `table` to the next's; KernelError when cache or table do not fit."""
    require_type("cache", cache, dtype)
    if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * width or not cache.is_contiguous():
        raise KernelError(
            "cache: not pages of keys and values", got=f"{tuple(cache.shape)}, strides {cache.stride()}",
            expected=f"contiguous [pages, {heads}, page_size, {2 * width}]",
        )  # fmt: skip
    require_type("table", table, torch.int32)
    row = matrix_rows("table", table)
    require_shape("table", table, (requests, table.shape[1]))
    return row


def _check_lengths(what: str, lengths: Tensor, requests: int, lowest: int, room: int) -> None:
    require_vector(what, lengths, torch.int32, requests)
    if int(lengths.min()) < lowest or int(lengths.max()) > room:
        raise KernelError(f"{what} are out of range", got=lengths.tolist()[:16], expected=f"{lowest}..{room}")


def _check_pages(cache: Tensor, table: Tensor, lengths: Tensor) -> None:
    """KernelError where a page that a request's events stand in is none of the cache's."""
    first = torch.arange(table.shape[1], device=table.device) * cache.shape[2]
    used = table[first[None, :] < lengths[:, None]]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= len(cache)):
        raise KernelError("table: there is no such page", got=used.tolist()[:16], expected=f"0..{len(cache) - 1}")


def _bias_values(
    bias: PagedBias | None, nothing: Tensor, cache: Tensor, rows: int, max_length: int
) -> dict[str, Tensor]:  # fmt: skip
    if bias is None:
        return dict.fromkeys(("times", "next_times", "position_bias", "time_bias", "bucket_edges"), nothing)
    for field, size in (("position_bias", 2 * max_length - 1), ("time_bias", EDGES), ("bucket_edges", EDGES)):
        require_vector(field, getattr(bias, field), torch.float32, size)
    for field, size in (("times", cache.shape[0] * cache.shape[2]), ("next_times", rows)):
        require_vector(field, getattr(bias, field), torch.int64, size)
    return {
        "times": bias.times, "next_times": bias.next_times, "position_bias": bias.position_bias,
        "time_bias": bias.time_bias, "bucket_edges": bias.bucket_edges,
    }  # fmt: skip


def decode(
    q: Tensor, cache: Tensor, out: Tensor, table: Tensor, lengths: Tensor, *, longest: int, max_length: int,
    bias: PagedBias | None, splits: int, workspace: Tensor | None = None, checked: bool = False,
) -> list[Launch]:  # fmt: skip
    """What to launch for out [R, H, dv]: each request's newest event q [R, H, dqk] over its lengths int32 [R] events.

    The event is in the pages already. With splits > 1 a workspace float32 [R, H, splits, dv] is needed, and a second
    launch adds its parts in order.
    """
    dtype = dtype_name("q", q)
    q_row, out_row = head_rows("q", q), head_rows("out", out)
    requests, heads, width = q.shape
    if requests == 0:
        raise KernelError("an empty batch: nothing to attend")
    require_type("out", out, q.dtype)
    require_shape("out", out, q.shape)
    table_row = _check_cache(cache, table, q.dtype, heads, width, requests)
    room = min(max_length, table.shape[1] * cache.shape[2])
    if longest > room:
        raise KernelError("histories are longer than the model's positions or the pages", got=longest, expected=room)
    if not checked:
        _check_lengths("lengths", lengths, requests, 1, longest)
        _check_pages(cache, table, lengths)
    if splits > 1:
        if workspace is None:
            raise KernelError("decode in several splits needs a workspace", got=f"{splits} splits")
        require_type("workspace", workspace, torch.float32)
        require_shape("workspace", workspace, (requests, heads, splits, width))
    values = {
        "q": q, "cache": cache, "out": out, "workspace": out if workspace is None else workspace, "table": table,
        "lengths": lengths, **_bias_values(bias, lengths, cache, requests, max_length), "q_row": q_row,
        "out_row": out_row, "table_row": table_row, "heads": heads, "page_size": cache.shape[2], "splits": splits,
        "max_length": max_length, "scale": 1.0 / max_length,
    }  # fmt: skip
    sizes = {"splits": splits, "heads": heads, "requests": requests, "page_size": cache.shape[2]}
    launches = [Launch(name("decode", dtype, width, bias=bias is not None), values, sizes)]
    if splits > 1:
        launches.append(Launch(name("reduce", dtype, width), values, sizes))
    return launches


def extend(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, out: Tensor, starts: Tensor, contexts: Tensor,
    num_targets: Tensor, table: Tensor, *, longest: int, max_length: int, bias: PagedBias | None,
    checked: bool = False,
) -> Launch:  # fmt: skip
    """What to launch for out [T, H, dv] of new rows q, k [T, H, dqk], v [T, H, dv] after their cached events.

    starts int32 [R+1], contexts and num_targets int32 [R], table int32 [R, pages]; `longest` new rows at most.
    """
    dtype = dtype_name("q", q)
    strides = {f"{n}_row": head_rows(n, x) for n, x in (("q", q), ("k", k), ("v", v), ("out", out))}
    rows, heads, width = q.shape
    for n, x in (("k", k), ("v", v), ("out", out)):
        require_type(n, x, q.dtype)
        require_shape(n, x, q.shape)
    require_reach(longest, strides)
    requests = len(starts) - 1
    if requests < 1 or rows == 0:
        raise KernelError("an empty batch: nothing to attend", got=f"{requests} requests, {rows} rows")
    require_vector("starts", starts, torch.int32, requests + 1)
    table_row = _check_cache(cache, table, q.dtype, heads, width, requests)
    if not checked:
        require_offsets(starts, rows, longest, max_length)
        room = min(max_length, table.shape[1] * cache.shape[2])
        _check_lengths("contexts", contexts, requests, 0, room)
        _check_pages(cache, table, contexts)
        _check_lengths("num_targets", num_targets, requests, 0, longest)
        if int((contexts + starts.diff() - num_targets).max()) > max_length or bool(
            (num_targets > starts.diff()).any()
        ):
            raise KernelError(
                "histories are longer than the model's positions, or a request has more targets than rows",
                expected=f"contexts + new rows - targets <= {max_length}",
            )
    values = {
        "q": q, "k": k, "v": v, "cache": cache, "out": out, "starts": starts, "contexts": contexts,
        "num_targets": num_targets, "table": table, **_bias_values(bias, starts, cache, rows, max_length),
        "row_times": starts, **strides, "table_row": table_row, "heads": heads, "page_size": cache.shape[2],
        "max_length": max_length, "scale": 1.0 / max_length,
    }  # fmt: skip
    if bias is not None:
        if bias.row_times is None:
            raise KernelError("extend with a bias needs the new rows' times", expected="row_times int64 [T]")
        require_vector("row_times", bias.row_times, torch.int64, rows)
        values["row_times"] = bias.row_times
    sizes = {"longest": longest, "heads": heads, "requests": requests, "page_size": cache.shape[2]}
    return Launch(name("extend", dtype, width, bias=bias is not None), values, sizes)


def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> Launch:
    """What to launch so that k and v [T, H, d] stand in the pages at their slots int64 [T]; negative ones are dropped.

    Slots beyond the cache are the caller's error: they are not read back to be checked.
    """
    dtype = dtype_name("k", k)
    rows, heads, width = k.shape
    k_row, v_row = head_rows("k", k), head_rows("v", v)
    require_type("v", v, k.dtype)
    require_shape("v", v, k.shape)
    require_vector("slots", slots, torch.int64, rows)
    if rows == 0:
        raise KernelError("an empty batch: nothing to write")
    _check_cache(cache, slots.new_zeros((1, 1), dtype=torch.int32), k.dtype, heads, width, 1)
    values = {
        "k": k, "v": v, "cache": cache, "slots": slots, "k_row": k_row, "v_row": v_row, "num_rows": rows,
        "heads": heads, "page_size": cache.shape[2],
    }  # fmt: skip
    return Launch(name("write", dtype, width), values, {n: values[n] for n in ("num_rows", "heads", "page_size")})
