"""Steps planned by vLLM's metadata builder, attended by the Triton kernels and by the CPU kernel.

Run as `TRITON_INTERPRET=1 python -m tests.serving.triton_steps`: Triton reads the variable when a kernel is defined.
Prints the largest difference of each step as JSON.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hstu.config import HSTUConfig
from kernels import eager, jit
from kernels.paged_hstu_attention import op
from kernels.paged_hstu_attention.cpu import build
from kernels.spec import Config
from serving.vllm_plugin.attention import HSTUAttentionImpl, HSTUMetadataBuilder
from tests.kernels.paged_cases import kernel

HEADS, WIDTH, BLOCK, N = 2, 16, 16, 50
STEPS = {
    "decodes": [(17, 1), (1, 1), (40, 1)],
    "mixed": [(20, 1), (0, 33), (16, 5)],
    "chunks": [(16, 16), (32, 2)],
}
TILES = {"decode": {"BLOCK_N": 16, "STAGES": 1}, "extend": {"BLOCK_M": 16, "BLOCK_N": 16}, "write": {"BLOCK_M": 16}}


def _run(function: str, launch: Any) -> None:
    jit.run(
        kernel(function, "fp32", WIDTH, function != "write"), Config(TILES[function], 1, 1), launch, {"FAST": False}
    )


def _decode(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, max_length: int, bias: Any) -> Tensor:
    out = torch.empty_like(q)
    longest = int(lengths.max())
    (launch,) = op.decode(
        q, cache, out, table, lengths, longest=longest, max_length=max_length, bias=bias, splits=1
    )  # fmt: skip
    _run("decode", launch)
    return out


def _extend(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, targets: Tensor, table: Tensor,
    max_length: int, bias: Any,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(v)
    launch = op.extend(
        q, k, v, cache, out, starts, contexts, targets, table, longest=int(starts.diff().max()), max_length=max_length,
        bias=bias,
    )  # fmt: skip
    _run("extend", launch)
    return out


def _write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    _run("write", op.write(k, v, cache, slots))


def difference(folder: Path, requests: list[tuple[int, int]]) -> float:
    """Between the two on one step; the events before it were written by a step of their own."""
    g = torch.Generator().manual_seed(len(requests))
    shape = HSTUConfig(
        num_items=9, embedding_dim=8, num_layers=1, num_heads=HEADS, qk_dim=WIDTH, v_dim=WIDTH, max_history=N - 11
    )
    assert shape.max_length == N
    biases = {"position_bias": torch.randn(2 * N - 1, generator=g), "time_bias": torch.randn(129, generator=g)}
    each = -(-N // BLOCK)
    table = 1 + torch.randperm(len(requests) * each, generator=g).view(-1, each).int()
    slots_of = [table[r].long()[torch.arange(N) // BLOCK] * BLOCK + torch.arange(N) % BLOCK for r in range(len(table))]
    times = torch.randint(0, 10**9, (len(requests), N + 1), generator=g).sort(1).values
    by_slot = torch.zeros((1 + len(requests) * each) * BLOCK, dtype=torch.int64)
    for slots, row in zip(slots_of, times, strict=True):
        by_slot[slots] = row[:-1]
    uvqk = torch.randn(len(requests), N, 4 * HEADS * WIDTH, generator=g)
    outputs = {}
    for attends in ("kernel", "ops"):
        config = SimpleNamespace(
            model_config=SimpleNamespace(model=str(folder), hf_config=SimpleNamespace(shape=shape)),
            additional_config={"hstu_attention": attends},
            device_config=SimpleNamespace(device_type="cpu"),
        )
        spec = SimpleNamespace(num_kv_heads=HEADS, block_size=BLOCK)
        builder = HSTUMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
        pages = torch.full((1 + len(requests) * each, HEADS, BLOCK, 2 * WIDTH), torch.nan)
        impl = HSTUAttentionImpl(HEADS, WIDTH, 1.0, HEADS, None, None, "auto", max_length=N, **biases)
        layer = SimpleNamespace(config=shape, num_heads=HEADS, **biases)
        parts = ([(0, context) for context, _ in requests], requests)
        for part in parts:
            which = [r for r, (_, new) in enumerate(part) if new]
            if not which:
                continue
            spans = [(r, part[r][0], sum(part[r])) for r in which]
            rows = torch.cat([uvqk[r, a:b] for r, a, b in spans])
            slots = torch.cat([slots_of[r][a:b] for r, a, b in spans])
            new = torch.tensor([0, *(b - a for _, a, b in spans)])
            step = builder.build(
                0,
                SimpleNamespace(
                    query_start_loc_cpu=new.cumsum(0).int(), seq_lens=torch.tensor([b for *_, b in spans]).int(),
                    seq_lens_cpu_upper_bound=None, slot_mapping=slots, num_actual_tokens=len(rows),
                    block_table_tensor=table[which],
                ),
            )  # fmt: skip
            step.set_times(by_slot, torch.cat([times[r, a + 1 : b + 1] for r, a, b in spans]))
            if step.kernel is not None:
                outputs[attends] = step.kernel.attend(rows, pages, layer, gated=False)
                continue
            _, v, q, k = (x.unflatten(1, (HEADS, WIDTH)) for x in torch.nn.functional.silu(rows).chunk(4, 1))
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            _write(k, v, pages, slots)
            outputs[attends] = impl.forward(None, q, k, v, pages, step, torch.empty_like(v)).flatten(1)
    return float((outputs["kernel"] - outputs["ops"]).abs().max())


if __name__ == "__main__":
    eager.decode, eager.extend = _decode, _extend  # what the ops run on a CPU
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "runtime").mkdir()
        build(Path(name) / "runtime")
        print(json.dumps({step: difference(Path(name), requests) for step, requests in STEPS.items()}))
