"""The kernels of `uvqk_silu` that are compiled, and their configs."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.spec import INT32, TOLERANCES, Argument, Config, Kernel, aligned


def name(dtype: str, *, int8: bool = False) -> str:
    """The name of a kernel: dtype is that of the output, and without int8 of the inputs."""
    return f"uvqk_silu-{'int8-' if int8 else ''}{dtype}"


def variants(dtype: str) -> Iterator[Kernel]:
    """Every kernel with outputs of a type; fp32 has none: that product is cuBLAS's."""
    if dtype != "fp32":
        yield _kernel(dtype, int8=False)
        yield _kernel(dtype, int8=True)


def _kernel(dtype: str, *, int8: bool) -> Kernel:
    rows, deep = ("*i8", 128) if int8 else (f"*{dtype}", 64)
    tiles = ((128, 256, deep, 8, 3), (128, 128, deep, 8, 3), (128, 128, deep, 4, 3), (128, 128, deep, 8, 4),
             (128, 256, deep, 8, 4), (128, 128, deep // 2, 4, 4), (64, 128, deep // 2, 4, 4),
             (64, 64, deep // 2, 4, 3))  # fmt: skip
    return Kernel(
        op="uvqk_silu",
        name=name(dtype, int8=int8),
        function="uvqk_silu",
        arguments=(
            aligned("x", rows), aligned("weight", rows), *(aligned(n, "*fp32") for n in ("bias", "x_scale",
            "weight_scale")), aligned("out", f"*{dtype}"), Argument("num_rows", "i32"), aligned("num_columns", "i32"),
            *(aligned(n, "i32") for n in ("depth", "x_row", "weight_row", "out_row")),
        ),
        constants={"INT8": int8, "FAST": True},
        grid=("cdiv(num_rows, BLOCK_M) * cdiv(num_columns, BLOCK_N)", "1", "1"),
        configs=tuple(
            Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, w, s) for m, n, k, w, s in tiles
        ),
        ampere_configs=tuple(
            Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": deep // 2, "GROUP": 8}, w, s)
            for m, n, w, s in ((128, 128, 4, 4), (128, 128, 8, 3), (64, 64, 4, 3))
        ),
        ranges={"num_rows": (1, INT32[1]), "num_columns": (16, INT32[1]), "depth": (16, INT32[1])},
        tolerance=TOLERANCES[dtype],
        dtype=dtype,
        head_dim=0,
        matrix=True,
        tanh=True,
    )  # fmt: skip
