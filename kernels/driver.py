"""CUDA's driver through ctypes: load a cubin, describe a tensor to the copy engine, launch. Nothing else is needed.

Source: CUDA Driver API, `cuModuleLoadData`, `cuTensorMapEncodeTiled`, `cuLaunchKernel`. The context is the one that
is current in the thread, PyTorch's or CuPy's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from kernels.errors import KernelError

_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
TENSOR_MAP_BYTES = 128


class TensorMap(ctypes.Structure):
    """CUtensorMap: opaque, aligned to 64 bytes where the driver reads it."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@cache
def library() -> ctypes.CDLL:
    """libcuda; KernelError where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(
            f"there is no CUDA driver here ({error})", fix="run GPU kernels on a machine with an NVIDIA GPU"
        ) from None
    _check(cuda, cuda.cuInit(0), "cuInit")
    return cuda


def _check(cuda: ctypes.CDLL, status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{what} failed: {(text.value or b'unknown').decode()} (CUDA error {status})")


def call(name: str, *arguments: object) -> None:
    """One driver call; KernelError in CUDA's own words when it fails."""
    cuda = library()
    _check(cuda, getattr(cuda, name)(*arguments), name)


def current_sm() -> int:
    """The SM of the current context's device, such as 90."""
    device, value = ctypes.c_int(), ctypes.c_int()
    call("cuCtxGetDevice", ctypes.byref(device))
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]


class Function:
    """The kernel `entry` of a cubin, in the current context."""

    def __init__(self, cubin: bytes, entry: str, shared_bytes: int) -> None:
        module, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(module), cubin)
        call("cuModuleGetFunction", ctypes.byref(self._handle), module, entry.encode())
        if shared_bytes > 48 * 1024:
            call("cuFuncSetAttribute", self._handle, _MAX_SHARED, ctypes.c_int(shared_bytes))
        self._shared = shared_bytes

    def launch(
        self, grid: Sequence[int], threads: int, arguments: Sequence[ctypes._SimpleCData[object] | TensorMap],
        stream: int,
    ) -> None:  # fmt: skip
        """The kernel is queued on `stream`; `arguments` in its own order."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        sizes = [ctypes.c_uint(size) for size in (*grid, threads, 1, 1, self._shared)]
        call("cuLaunchKernel", self._handle, *sizes, ctypes.c_void_p(stream), pointers, None)


def tensor_map(
    address: int, *, kind: int, item_bytes: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int],
    swizzle: int,
) -> TensorMap:  # fmt: skip
    """A tensor map of a matrix, innermost dimension last in `shape`, `strides` (elements) and `box`.

    kind is CUtensorMapDataType, swizzle CUtensorMapSwizzle; out of bounds reads as zero.
    """
    rank = len(shape)
    raw = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    place = (ctypes.addressof(raw) + 63) // 64 * 64
    call(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(place), ctypes.c_int(kind), ctypes.c_uint32(rank),
        ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * (rank - 1))(*(stride * item_bytes for stride in reversed(strides[:-1]))),
        (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank), ctypes.c_int(0),
        ctypes.c_int(swizzle), ctypes.c_int(2), ctypes.c_int(0),
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(place, TENSOR_MAP_BYTES))
