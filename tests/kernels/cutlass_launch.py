"""Launches CUTLASS libraries against a runtime that only writes down what it is asked for; prints that as JSON.

Run as `python -m tests.kernels.cutlass_launch FOLDER NAME ..` with the fake runtime's folder in LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from kernels import cutlass
from kernels.errors import KernelError
from kernels.hstu_attention import op as attention
from kernels.interaction import op as interaction
from kernels.spec import Launch


def interaction_call(source: cutlass.Source) -> tuple[Launch, list[int], list[int]]:
    """A call, the bytes of the kernel's arguments, and their values."""
    x = torch.zeros((999, 28, 128), dtype=torch.bfloat16 if "bf16" in source.name else torch.float16)[:, :27]
    out = torch.zeros((999, 378), dtype=x.dtype)
    wanted = [x.data_ptr(), out.data_ptr(), 999, 27, 28 * 128, 378]
    return interaction.launch(x, out, with_self=True), [8, 8, 8, 4, 8, 8], wanted


def attention_call(source: cutlass.Source) -> tuple[Launch, list[int], list[int]]:
    """The same of attention, whose one argument holds tensor maps and then these values."""
    dtype = torch.bfloat16 if "bf16" in source.name else torch.float16
    width = int(source.name.split("-d")[1].partition("-")[0])
    uvqk = torch.zeros((900, 4 * 3 * width), dtype=dtype)
    _, v, q, k = (part.unflatten(1, (3, width)) for part in uvqk.chunk(4, 1))
    out, offsets, targets = torch.zeros_like(q.contiguous()), torch.tensor([0, 0, 400, 900]), torch.tensor([0, 400, 1])
    launch = attention.launch(q, k, v, out, offsets, targets, longest=500, max_length=512, bias=None)
    return launch, [832], [x.data_ptr() for x in (q, k, v, out, offsets, targets)]


def launched(fake: ctypes.CDLL, source: cutlass.Source, folder: Path) -> dict[str, Any]:
    """What the library asks of the runtime for one call, and what the call was."""
    library = cutlass.Loaded(source, folder, 90)
    is_interaction = source.function == "interaction"
    launch, sizes, wanted = (interaction_call if is_interaction else attention_call)(source)
    run = cutlass.run_interaction if is_interaction else cutlass.run_attention
    bytes_of = (ctypes.c_int * len(sizes))(*sizes)
    fake.fake_expect(0, bytes_of, len(sizes))
    run(library, launch, 100, 7)
    answer: dict[str, Any] = {"name": source.name, "wanted": wanted, "map": [], "argument": []}
    for line in fake.fake_record().decode().splitlines():
        key, _, rest = line.partition(" ")
        if key in ("map", "argument"):
            answer[key].append(rest)
        else:
            answer[key] = int(rest)
    answer["said_shared"] = library.shared_bytes()
    fake.fake_expect(1, bytes_of, len(sizes))
    try:
        run(library, launch, 100, 7)
    except KernelError as error:
        answer["error"] = str(error)
    return answer


if __name__ == "__main__":
    runtime = ctypes.CDLL("libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
    runtime.fake_record.restype = ctypes.c_char_p
    for one in sys.argv[2:]:
        print(json.dumps(launched(runtime, cutlass.SOURCES[one], Path(sys.argv[1]))), flush=True)
