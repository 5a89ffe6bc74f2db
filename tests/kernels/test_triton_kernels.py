"""Every Triton kernel, interpreted, against the naive truth in float64; bad calls are refused before any launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.time_buckets import THRESHOLDS
from kernels.embedding_bag import op as bag
from kernels.errors import KernelError
from kernels.hstu_attention import op as attention
from kernels.interaction import op as interaction
from kernels.paged_hstu_attention import op as paged
from kernels.spec import compile_expression
from kernels.uvqk_silu import op as uvqk

ROOT = Path(__file__).parents[2]
NUM_CASES = {
    "hstu_attention": 26, "time_bucket": 1, "paged_hstu_attention": 14, "uvqk_silu": 6, "interaction": 4,
    "embedding_bag": 2,
}  # fmt: skip


@pytest.mark.parametrize("op", NUM_CASES)
def test_the_interpreter_equals_the_truth(op: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreter", op],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == NUM_CASES[op]
    for case in cases:
        assert case["error"] <= case["tolerance"], case


def attention_call(**changes: Any) -> dict[str, Any]:
    rows = torch.zeros((10, 2, 16), dtype=torch.bfloat16)
    call: dict[str, Any] = {
        "q": rows, "k": rows, "v": rows, "out": torch.empty_like(rows), "offsets": torch.tensor([0, 4, 4, 10]),
        "num_targets": torch.tensor([1, 0, 6]), "longest": 6, "max_length": 8, "bias": None,
    }  # fmt: skip
    return call | changes


def bias_of(**changes: Any) -> attention.RelativeBias:
    tables = {
        "position_bias": torch.zeros(15), "time_bias": torch.zeros(129),
        "bucket_edges": attention.bucket_edges(THRESHOLDS), "times": torch.zeros(10, dtype=torch.int64),
        "next_times": torch.zeros(10, dtype=torch.int64),
    }  # fmt: skip
    return attention.RelativeBias(**tables | changes)


def test_a_good_attention_call_is_accepted() -> None:
    launch = attention.launch(**attention_call(bias=bias_of(), u=torch.zeros((10, 2, 16), dtype=torch.bfloat16)))
    assert launch.kernel == "hstu_attention-bf16-d16-bias-gated"
    assert launch.sizes == {"longest": 6, "heads": 2, "users": 3}


BAD_ATTENTION = {
    "float64": (
        lambda: {n: torch.zeros((10, 2, 16), dtype=torch.float64) for n in ("q", "k", "v", "out")},
        "not a type the kernels take",
    ),
    "mixed types": (lambda: {"k": torch.zeros((10, 2, 16))}, "k: wrong type"),
    "last dimension": (lambda: {"q": torch.zeros((10, 16, 2), dtype=torch.bfloat16).transpose(1, 2)}, "not contiguous"),
    "other shape": (lambda: {"v": torch.zeros((10, 2, 8), dtype=torch.bfloat16)}, "v: wrong shape"),
    "falling offsets": (lambda: {"offsets": torch.tensor([0, 6, 4, 10])}, "offsets do not rise"),
    "short offsets": (lambda: {"offsets": torch.tensor([0, 4, 4, 9])}, "offsets do not rise"),
    "int32 offsets": (lambda: {"offsets": torch.tensor([0, 4, 4, 10], dtype=torch.int32)}, "offsets: wrong type"),
    "too long": (lambda: {"longest": 9}, "longer than the model's positions"),
    "too far apart": (lambda: {"longest": 2**27, "max_length": 2**28}, "reach too far"),
    "longer than said": (lambda: {"longest": 5}, "more rows than `longest`"),
    "too many targets": (lambda: {"num_targets": torch.tensor([5, 0, 0])}, "more targets than rows"),
    "no users": (lambda: {"offsets": torch.tensor([0]), "num_targets": torch.tensor([], dtype=torch.int64)}, "empty"),
    "no rows": (
        lambda: {
            **{n: torch.zeros((0, 2, 16), dtype=torch.bfloat16) for n in ("q", "k", "v", "out")},
            "offsets": torch.tensor([0, 0, 0, 0]),
        },
        "empty batch",
    ),
    "bias table": (lambda: {"bias": bias_of(position_bias=torch.zeros(14))}, "position_bias: wrong shape"),
    "times": (lambda: {"bias": bias_of(times=torch.zeros(10))}, "times: wrong type"),
    "strided table": (
        lambda: {"bias": bias_of(position_bias=torch.zeros(30)[::2])},
        "position_bias: values do not lie side by side",
    ),
    "strided offsets": (lambda: {"offsets": torch.tensor([0, 9, 4, 9, 4, 9, 10])[::2]}, "offsets: values do not lie"),
}


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_a_bad_attention_call_is_refused(name: str) -> None:
    changes, message = BAD_ATTENTION[name]
    with pytest.raises(KernelError, match=message):
        attention.launch(**attention_call(**changes()))


def decode_call(**changes: Any) -> dict[str, Any]:
    q = torch.zeros((2, 2, 16), dtype=torch.float16)
    call: dict[str, Any] = {
        "q": q, "cache": torch.zeros((5, 2, 16, 32), dtype=torch.float16), "out": torch.empty_like(q),
        "table": torch.zeros((2, 2), dtype=torch.int32), "lengths": torch.tensor([20, 3], dtype=torch.int32),
        "longest": 20, "max_length": 64, "bias": None, "splits": 1,
    }  # fmt: skip
    return call | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": torch.zeros((5, 16, 2, 32), dtype=torch.float16)}, "not pages"),
        ({"cache": torch.zeros((5, 2, 32, 32), dtype=torch.float16)[:, :, ::2]}, "not pages"),
        ({"cache": torch.zeros((5, 2, 16, 32))}, "cache: wrong type"),
        ({"table": torch.zeros((2, 2), dtype=torch.int64)}, "table: wrong type"),
        ({"lengths": torch.tensor([0, 3], dtype=torch.int32)}, "lengths are out of range"),
        ({"lengths": torch.tensor([21, 3], dtype=torch.int32)}, "lengths are out of range"),
        ({"longest": 33}, "longer than the model's positions or the pages"),
        ({"splits": 4}, "needs a workspace"),
        ({"q": torch.zeros((0, 2, 16), dtype=torch.float16)}, "empty batch"),
        ({"table": torch.tensor([[0, 5], [0, 0]], dtype=torch.int32)}, "there is no such page"),
        ({"table": torch.tensor([[0, 1], [-1, 0]], dtype=torch.int32)}, "there is no such page"),
        ({"q": torch.zeros((2, 2, 32), dtype=torch.float16)[:, :, ::2]}, "q: the last dimension is not contiguous"),
        ({"q": torch.zeros((2, 2, 16), dtype=torch.float64)}, "not a type the kernels take"),
    ],
)
def test_a_bad_decode_is_refused(changes: dict[str, Any], message: str) -> None:
    paged.decode(**decode_call())
    with pytest.raises(KernelError, match=message):
        paged.decode(**decode_call(**changes))


def test_a_page_that_no_event_stands_in_may_be_anything() -> None:
    paged.decode(**decode_call(table=torch.tensor([[0, 1], [2, -7]], dtype=torch.int32)))


def extend_call(**changes: Any) -> dict[str, Any]:
    rows = torch.zeros((10, 2, 16), dtype=torch.float16)
    call: dict[str, Any] = {
        "q": rows, "k": rows, "v": rows, "cache": torch.zeros((5, 2, 16, 32), dtype=torch.float16),
        "out": torch.empty_like(rows), "starts": torch.tensor([0, 4, 10], dtype=torch.int32),
        "contexts": torch.tensor([0, 20], dtype=torch.int32), "num_targets": torch.tensor([4, 2], dtype=torch.int32),
        "table": torch.zeros((2, 2), dtype=torch.int32), "longest": 6, "max_length": 24, "bias": None,
    }  # fmt: skip
    return call | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": torch.tensor([0, 11, 10], dtype=torch.int32)}, "offsets do not rise"),
        ({"starts": torch.tensor([0, 4, 10])}, "starts: wrong type"),
        ({"longest": 5}, "more rows than `longest`"),
        ({"contexts": torch.tensor([0, 21], dtype=torch.int32)}, "longer than the model's positions"),
        ({"contexts": torch.tensor([0, 33], dtype=torch.int32)}, "contexts are out of range"),
        ({"num_targets": torch.tensor([5, 2], dtype=torch.int32)}, "more targets than rows"),
        ({"table": torch.full((2, 2), 5, dtype=torch.int32)}, "there is no such page"),
        ({"k": torch.zeros((10, 2, 16))}, "k: wrong type"),
        ({"starts": torch.tensor([0], dtype=torch.int32)}, "empty batch"),
    ],
)
def test_a_bad_extend_is_refused(changes: dict[str, Any], message: str) -> None:
    paged.extend(**extend_call())
    with pytest.raises(KernelError, match=message):
        paged.extend(**extend_call(**changes))


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([1, 2], [0, 2, 1], "offsets do not rise"),
        ([1, 2], [0, 3], "reach beyond the ids"),
        ([1, 9], [0, 2], "there is no such row"),
        ([-1, 2], [0, 2], "there is no such row"),
        ([1, 2], [0], "empty batch"),
    ],
)
def test_bad_bags_are_refused(ids: list[int], offsets: list[int], message: str) -> None:
    table = torch.zeros((9, 128))
    out = torch.zeros((len(offsets) - 1, 128))
    bag.launch(table, torch.tensor([1, 8]), torch.tensor([0, 0, 2]), torch.zeros((2, 128)))
    with pytest.raises(KernelError, match=message):
        bag.launch(table, torch.tensor(ids), torch.tensor(offsets), out)
    with pytest.raises(KernelError, match="offsets: wrong type"):
        bag.launch(table, torch.tensor(ids), torch.tensor(offsets, dtype=torch.int32), out)


def test_splits_depend_on_shapes_alone_and_fill_the_gpu() -> None:
    assert paged.num_splits(128, 8, 2048, 132) == 1
    assert paged.num_splits(1, 8, 4096, 132) == 16
    assert paged.num_splits(1, 1, 100, 132) == 1


def test_other_bad_calls_are_refused() -> None:
    x, out = torch.zeros((3, 27, 128), dtype=torch.bfloat16), torch.zeros((3, 351), dtype=torch.bfloat16)
    interaction.launch(x, out, with_self=False)
    with pytest.raises(KernelError, match="out: wrong shape"):
        interaction.launch(x, out, with_self=True)
    with pytest.raises(KernelError, match="not contiguous"):
        interaction.launch(x.transpose(1, 2).contiguous().transpose(1, 2), out, with_self=False)
    with pytest.raises(KernelError, match="nothing to interact"):
        interaction.launch(x[:0], out[:0], with_self=False)
    rows, weight = torch.zeros((4, 64), dtype=torch.bfloat16), torch.zeros((32, 64), dtype=torch.bfloat16)
    out, bias = torch.zeros((4, 32), dtype=torch.bfloat16), torch.zeros(32)
    uvqk.launch(rows, weight, bias, out)
    with pytest.raises(KernelError, match="x: wrong type"):
        uvqk.launch(rows, weight, bias, out, (torch.zeros(4), torch.zeros(32)))
    with pytest.raises(KernelError, match="empty batch"):
        uvqk.launch(rows[:0], weight, bias, out[:0])
    with pytest.raises(KernelError, match="x: rows are not contiguous"):
        uvqk.launch(torch.zeros((4, 128), dtype=torch.bfloat16)[:, ::2], weight, bias, out)
    with pytest.raises(KernelError, match="bias: values do not lie side by side"):
        uvqk.launch(rows, weight, torch.zeros(64)[::2], out)
    with pytest.raises(KernelError, match="no float32 kernel"):
        uvqk.launch(rows.float(), weight.float(), bias, out.float())
    k, cache = torch.zeros((3, 2, 16)), torch.zeros((5, 2, 16, 32))
    paged.write(k, k, cache, torch.arange(3))
    for bad, message in (
        ((k, k.half(), cache, torch.arange(3)), "v: wrong type"),
        ((k, k, cache, torch.arange(6)[::2]), "slots: values do not lie side by side"),
        ((k[:0], k[:0], cache, torch.arange(0)), "empty batch"),
    ):
        with pytest.raises(KernelError, match=message):
            paged.write(*bad)


@pytest.mark.parametrize("text", ["__import__('os')", "a.b", "cdiv(1)", "2 ** 9", "a if b else c", "[1]", "nothing"])
def test_a_grid_is_no_code(text: str) -> None:
    with pytest.raises((KernelError, ValueError)):
        compile_expression(text)({"a": 1, "b": 2, "c": 3})


def test_a_grid_is_arithmetic() -> None:
    assert compile_expression("cdiv(a + 1, 4) * b - a // 2")({"a": 7, "b": 3}) == 3
