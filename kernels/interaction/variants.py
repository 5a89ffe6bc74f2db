"""The kernels of `interaction` that are compiled, and their configs."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.spec import TOLERANCES, Argument, Config, Kernel, aligned, block

SHAPES = ((27, 128),)  # features, width: DLRM's on the Criteo data


def num_pairs(features: int, with_self: bool) -> int:
    """How many values one sample's packed triangle has."""
    return features * (features + (1 if with_self else -1)) // 2


def name(dtype: str, features: int, width: int, *, with_self: bool) -> str:
    """The name of a kernel."""
    return f"interaction-{dtype}-f{features}-d{width}{'-self' if with_self else ''}"


def variants(dtype: str) -> Iterator[Kernel]:
    """Every kernel of a type."""
    for features, width in SHAPES:
        for with_self in (False, True):
            yield kernel(dtype, features, width, with_self=with_self)


def kernel(dtype: str, features: int, width: int, *, with_self: bool) -> Kernel:
    """The kernel for x [B, features, width]."""
    pairs = num_pairs(features, with_self)
    tiles: tuple[tuple[int, int, int], ...] = (
        (8, 2, 3),
        (4, 1, 4),
        (8, 1, 4),
        (4, 2, 4),
        (16, 2, 3),
        (8, 4, 3),
        (1, 2, 1),
        (2, 4, 2),
    )
    if dtype == "fp32":  # exact products, on the ordinary units
        tiles = ((4, 8, 2), (1, 8, 1), (1, 16, 1))
    return Kernel(
        op="interaction",
        name=name(dtype, features, width, with_self=with_self),
        function="interaction",
        arguments=(
            aligned("x", f"*{dtype}"), aligned("out", f"*{dtype}"), Argument("num_samples", "i32"),
            aligned("x_row", "i32"), Argument("out_row", "i32"),
        ),
        constants={
            "F": features, "D": width, "BLOCK_F": block(features), "BLOCK_D": block(width), "PAIRS": pairs,
            "BLOCK_P": block(pairs), "SELF": with_self,
        },
        grid=("cdiv(num_samples, SAMPLES)", "1", "1"),
        configs=tuple(Config({"SAMPLES": n, "STAGES": s}, w, s) for n, w, s in tiles),
        ranges={"num_samples": (1, 2**31 - 1)},
        tolerance=TOLERANCES[dtype],
        dtype=dtype,
        head_dim=width,
    )  # fmt: skip
