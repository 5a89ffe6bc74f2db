"""The kernels of `paged_hstu_attention` that are compiled, and their configs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.hstu_attention.variants import HEADS, LONGEST
from kernels.spec import BATCH, TOLERANCES, Argument, Config, Kernel, aligned, block

PAGE = (1, 65_536)


def name(function: str, dtype: str, head_dim: int, *, bias: bool = False) -> str:
    """The name of a kernel: function is decode, reduce, extend or write."""
    return "-".join(["paged_hstu_attention", function, dtype, f"d{head_dim}", *(["bias"] if bias else [])])


def variants(dtype: str, head_dim: int) -> Iterator[Kernel]:
    """Every kernel of a type and head size (qk and v alike)."""
    for bias in (False, True):
        yield _decode(dtype, head_dim, bias)
        yield _extend(dtype, head_dim, bias)
    yield _reduce(dtype, head_dim)
    yield _write(dtype, head_dim)


def _dims(head_dim: int) -> dict[str, int | bool]:
    return {"DQK": head_dim, "DV": head_dim, "BLOCK_DQK": block(head_dim), "BLOCK_DV": block(head_dim)}


def _kernel(function: str, dtype: str, head_dim: int, bias: bool = False, **given: Any) -> Kernel:
    return Kernel(
        op="paged_hstu_attention",
        name=name(function, dtype, head_dim, bias=bias),
        function=function,
        tolerance=TOLERANCES[dtype],
        dtype=dtype,
        head_dim=head_dim,
        **given,
    )


def _tables() -> list[Argument]:
    return [aligned(n, "*fp32") for n in ("position_bias", "time_bias", "bucket_edges")]


def _decode(dtype: str, head_dim: int, bias: bool) -> Kernel:
    rows = f"*{dtype}"
    tiles = ((64, 4, 3), (128, 8, 3), (64, 4, 4), (32, 4, 4), (128, 4, 2), (64, 2, 3), (32, 2, 4), (16, 2, 4))
    return _kernel(
        "decode", dtype, head_dim, bias,
        arguments=(
            aligned("q", rows), aligned("cache", rows), aligned("out", rows), aligned("workspace", "*fp32"),
            Argument("table", "*i32"), Argument("lengths", "*i32"), aligned("times", "*i64"),
            Argument("next_times", "*i64"), *_tables(), aligned("q_row", "i32"), aligned("out_row", "i32"),
            *(Argument(n, "i32") for n in ("table_row", "heads", "page_size", "splits", "max_length")),
            Argument("scale", "fp32"),
        ),
        constants=_dims(head_dim) | {"BIAS": bias, "FAST": dtype != "fp32"},
        grid=("splits", "heads", "requests"),
        configs=tuple(Config({"BLOCK_N": n, "STAGES": s}, w, s) for n, w, s in tiles),
        ranges={"splits": (1, 1024), "heads": HEADS, "requests": BATCH, "page_size": PAGE},
        tanh=dtype != "fp32",
    )  # fmt: skip


def _reduce(dtype: str, head_dim: int) -> Kernel:
    return _kernel(
        "reduce", dtype, head_dim,
        arguments=(
            aligned("workspace", "*fp32"), aligned("out", f"*{dtype}"), aligned("out_row", "i32"),
            Argument("heads", "i32"), Argument("splits", "i32"), Argument("scale", "fp32"),
        ),
        constants={"DV": head_dim, "BLOCK_DV": block(head_dim)},
        grid=("heads", "requests", "1"),
        configs=(Config({}, 1, 1),),
        ranges={"splits": (1, 1024), "heads": HEADS, "requests": BATCH},
    )  # fmt: skip


def _extend(dtype: str, head_dim: int, bias: bool) -> Kernel:
    rows, fast = f"*{dtype}", dtype != "fp32"
    tiles = ((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2),
             (64, 16, 4, 2)) if fast else ((32, 16, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1), (16, 16, 8, 1))  # fmt: skip
    return _kernel(
        "extend", dtype, head_dim, bias,
        arguments=(
            *(aligned(n, rows) for n in ("q", "k", "v", "cache", "out")),
            *(Argument(n, "*i32") for n in ("starts", "contexts", "num_targets", "table")),
            aligned("times", "*i64"), Argument("row_times", "*i64"), Argument("next_times", "*i64"), *_tables(),
            *(aligned(n, "i32") for n in ("q_row", "k_row", "v_row", "out_row")),
            *(Argument(n, "i32") for n in ("table_row", "heads", "page_size", "max_length")),
            Argument("scale", "fp32"),
        ),
        constants=_dims(head_dim) | {"BIAS": bias, "FAST": fast},
        grid=("cdiv(longest, BLOCK_M)", "heads", "requests"),
        configs=tuple(Config({"BLOCK_M": m, "BLOCK_N": n}, w, s) for m, n, w, s in tiles),
        ampere_configs=tuple(
            Config({"BLOCK_M": 64, "BLOCK_N": n}, 4, s) for n, s in ((32, 2), (16, 2)) if fast
        ),
        ranges={"longest": LONGEST, "heads": HEADS, "requests": BATCH, "page_size": PAGE},
        matrix=fast,
        tanh=fast,
    )  # fmt: skip


def _write(dtype: str, head_dim: int) -> Kernel:
    rows = f"*{dtype}"
    return _kernel(
        "write", dtype, head_dim,
        arguments=(
            *(aligned(n, rows) for n in ("k", "v", "cache")), Argument("slots", "*i64"), aligned("k_row", "i32"),
            aligned("v_row", "i32"), *(Argument(n, "i32") for n in ("num_rows", "heads", "page_size")),
        ),
        constants=_dims(head_dim),
        grid=("cdiv(num_rows, BLOCK_M)", "heads", "1"),
        configs=tuple(Config({"BLOCK_M": m}, w, 1) for m, w in ((32, 4), (16, 2), (64, 4))),
        ranges={"num_rows": (1, 1 << 30), "heads": HEADS, "page_size": PAGE},
    )  # fmt: skip
