"""The kernels of `embedding_bag` that are compiled, and their configs."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.spec import TOLERANCES, Argument, Config, Kernel, aligned, block

WIDTHS = (128,)


def name(dtype: str, width: int) -> str:
    """The name of a kernel."""
    return f"embedding_bag-{dtype}-d{width}"


def variants(dtype: str) -> Iterator[Kernel]:
    """Every kernel of a type."""
    for width in WIDTHS:
        yield Kernel(
            op="embedding_bag",
            name=name(dtype, width),
            function="embedding_bag",
            arguments=(
                aligned("table", f"*{dtype}"), aligned("ids", "*i64"), aligned("offsets", "*i64"),
                aligned("out", f"*{dtype}"), Argument("num_bags", "i32"), aligned("table_row", "i32"),
                aligned("out_row", "i32"),
            ),
            constants={"D": width, "BLOCK_D": block(width)},
            grid=("cdiv(num_bags, BAGS)", "1", "1"),
            configs=tuple(Config({"BAGS": b, "STAGES": s}, w, s) for b, w, s in ((1, 1, 4), (4, 1, 4), (1, 2, 6))),
            ranges={"num_bags": (1, 2**31 - 1)},
            tolerance=TOLERANCES[dtype],
            dtype=dtype,
            head_dim=width,
        )  # fmt: skip
