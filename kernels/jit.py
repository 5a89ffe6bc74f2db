"""Kernels run by Triton itself: compiled where there is a GPU, interpreted under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.spec import Config, Kernel, Launch, check_sizes, compile_expression


def run(kernel: Kernel, config: Config, launch: Launch, constants: Mapping[str, float] | None = None) -> None:
    """The launch is done (interpreted) or queued on the current stream; `constants` replace the kernel's own."""
    check_sizes(kernel.name, kernel.ranges, launch.sizes)
    function = getattr(importlib.import_module(f"kernels.{kernel.op}.triton"), kernel.function)
    constants = {**kernel.constants, **config.constants, **(constants or {})}
    grid = tuple(compile_expression(text)({**constants, **launch.sizes}) for text in kernel.grid)
    values = dict(launch.values)
    for argument in kernel.arguments:
        if argument.type.startswith("tensordesc"):
            box = argument.type.format(**constants).partition("[")[2].rstrip("]>").split(",")
            values[argument.name] = TensorDescriptor(
                values[argument.name], list(launch.descriptors[argument.name]), [values[f"{argument.name}_row"], 1],
                [int(size) for size in box],
            )  # fmt: skip
    arguments = {argument.name: values[argument.name] for argument in kernel.arguments}
    function[grid](**arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)
