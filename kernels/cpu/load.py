"""The prebuilt CPU kernels, opened with the structures that this code passes to them."""

from __future__ import annotations

import ctypes
from pathlib import Path

from kernels.cpu.library import Library
from kernels.hstu_attention.cpu import Call
from kernels.item_head.cpu import HeadCall
from kernels.projection.cpu import ProjectionCall


def load(path: Path) -> Library:
    """The library that `kernels.cpu.library.build` made; KernelError when it does not fit this machine or this code."""
    return Library(path, sum(ctypes.sizeof(call) for call in (Call, HeadCall, ProjectionCall)))
