"""The kernels of `hstu_attention` that are compiled, and their configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kernels.spec import BATCH, TOLERANCES, Argument, Config, Kernel, aligned, block

LONGEST = (1, 1 << 20)  # rows of one user
HEADS = (1, 1024)
EPSILON = 1e-6  # of the LayerNorm, where it is compiled in


def name(dtype: str, head_dim: int, *, bias: bool, entry: str = "pointer") -> str:
    """The name of a kernel: entry is pointer, tma, gated or padded."""
    parts = ["hstu_attention", dtype, f"d{head_dim}", *(["bias"] if bias else [])]
    return "-".join([*parts, *([] if entry == "pointer" else [entry])])


def variants(dtype: str, head_dim: int) -> Iterator[Kernel]:
    """Every kernel of a type and head size (qk and v alike)."""
    for bias in (False, True):
        for entry in ("pointer", "gated", "tma"):
            if entry != "tma" or (dtype != "fp32" and head_dim in (64, 128)):
                yield _kernel(dtype, head_dim, bias, entry)
    if head_dim <= 64:  # heads of 128 have no sound config within 48 KiB of shared memory on sm_80
        yield padded(dtype, head_dim)


def padded(dtype: str, head_dim: int, qk_dim: int | None = None) -> Kernel:
    """The gated kernel over padded histories, for TensorRT: see `stages.tensorrt.plugin`.

    qk_dim, where queries and keys are not of head_dim columns as values are.
    """
    gated, qk = _kernel(dtype, head_dim, True, "gated"), qk_dim or head_dim
    label = name(dtype, head_dim, bias=True, entry="padded")
    return replace(
        gated,
        name=label if qk == head_dim else label.replace(f"-d{head_dim}-", f"-d{qk}x{head_dim}-"),
        function="padded_attention",
        arguments=(
            aligned("uvqk", f"*{dtype}"),
            *(Argument(n, "*i64") for n in ("times", "next_times", "lengths")),
            *(aligned(n, "*fp32") for n in ("position_bias", "time_bias", "bucket_edges")),
            *(Argument(n, "i32") for n in ("padded", "heads", "max_length")),
            aligned("out", f"*{dtype}"),
        ),
        constants={**gated.constants, "DQK": qk, "BLOCK_DQK": block(qk), "EPSILON": EPSILON},
        grid=("cdiv(padded, BLOCK_M)", "users", "1"),
        ranges={"padded": LONGEST, "heads": HEADS, "users": BATCH},
        shared_limit=48 * 1024,  # what a launch may ask for without asking the driver first
    )


def _kernel(dtype: str, head_dim: int, bias: bool, entry: str) -> Kernel:
    rows = f"*{dtype}"
    sides = {"q": "BLOCK_M", "k": "BLOCK_N", "v": "BLOCK_N"}
    boxes = {n: f"tensordesc<{dtype}[{{{side}}}, {head_dim}]>" for n, side in sides.items()}
    qkv = [Argument(n, boxes[n]) if entry == "tma" else aligned(n, rows) for n in "qkv"]
    strides = ["q_row", "k_row", "v_row", *(["u_row"] if entry == "gated" else []), "out_row"]
    arguments = (
        *qkv,
        *([aligned("u", rows)] if entry == "gated" else []),
        aligned("out", rows),
        *(aligned(n, "*i64") for n in ("offsets", "num_targets")),
        *(Argument(n, "*i64") for n in ("times", "next_times")),
        *(aligned(n, "*fp32") for n in ("position_bias", "time_bias", "bucket_edges")),
        *(aligned(n, "i32") for n in strides),
        Argument("max_length", "i32"),
        Argument("scale", "fp32"),
        *((Argument("epsilon", "fp32"), Argument("heads", "i32")) if entry == "gated" else ()),
    )
    fast = dtype != "fp32"
    users = "users"
    return Kernel(
        op="hstu_attention",
        name=name(dtype, head_dim, bias=bias, entry=entry),
        function={"pointer": "attention", "tma": "attention_tma", "gated": "gated_attention"}[entry],
        arguments=arguments,
        constants={
            "DQK": head_dim, "DV": head_dim, "BLOCK_DQK": block(head_dim), "BLOCK_DV": block(head_dim), "BIAS": bias,
            "FAST": fast,
        },
        grid=("cdiv(longest, BLOCK_M)", *((users, "1") if entry == "gated" else ("heads", users))),
        configs=tuple(_configs(fast, head_dim, bias, entry)),
        ampere_configs=tuple(_ampere_configs(fast, bias)),
        ranges={"longest": LONGEST, "heads": HEADS, "users": BATCH},
        tolerance=TOLERANCES[dtype],
        dtype=dtype,
        head_dim=head_dim,
        matrix=fast,
        tanh=fast,
        lowest_sm=90 if entry == "tma" else 80,
    )  # fmt: skip


def _configs(fast: bool, head_dim: int, bias: bool, entry: str) -> Iterator[Config]:
    if not fast:  # exact float32 products run on the ordinary units
        tiles = [(32, 16, 4, 2), (32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)]
    elif bias and head_dim >= 128:
        tiles = [(64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 3), (64, 16, 4, 2)]
    elif bias:
        tiles = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (64, 32, 4, 2),
                 (64, 64, 8, 2), (128, 128, 8, 2)]  # fmt: skip
    elif head_dim >= 128:
        tiles = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3),
                 (128, 128, 8, 2)]  # fmt: skip
    elif entry == "gated":
        tiles = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 128, 8, 2)]
    else:
        tiles = [(128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3),
                 (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 2)]  # fmt: skip
    yield from _tiled(tiles)


def _ampere_configs(fast: bool, bias: bool) -> Iterator[Config]:
    if fast:
        yield from _tiled(
            [(64, 32, 4, 2), (64, 16, 4, 2)] if bias else [(64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2)]
        )


def _tiled(tiles: list[tuple[int, int, int, int]]) -> Iterator[Config]:
    for rows, columns, warps, stages in tiles:
        yield Config({"BLOCK_M": rows, "BLOCK_N": columns}, warps, stages)
