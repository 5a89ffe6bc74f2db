"""The op registry: right on a CPU, traced by torch.compile and torch.export, and strict about its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.time_buckets import THRESHOLDS, time_buckets
from kernels import ops
from kernels.errors import KernelError
from kernels.hstu_attention import naive
from kernels.hstu_attention.op import bucket_edges
from kernels.interaction import naive as interaction_naive

LENGTHS, TARGETS, HEADS, WIDTH, MAX_LENGTH = [5, 0, 64, 65], [2, 0, 64, 0], 2, 8, 70


def arguments(seed: int = 0) -> dict[str, Any]:
    g, rows = torch.Generator().manual_seed(seed), sum(LENGTHS)
    u, v, q, k = (
        part.unflatten(1, (HEADS, WIDTH)) for part in torch.randn((rows, 4 * HEADS * WIDTH), generator=g).chunk(4, 1)
    )
    return {
        "u": u, "q": q, "k": k, "v": v, "offsets": torch.tensor([0, *np.cumsum(LENGTHS)]),
        "num_targets": torch.tensor(TARGETS), "longest": 65, "max_length": MAX_LENGTH,
        "position_bias": torch.randn(2 * MAX_LENGTH - 1, generator=g), "time_bias": torch.randn(129, generator=g),
        "bucket_edges": bucket_edges(THRESHOLDS), "times": torch.randint(0, 2**40, (rows,), generator=g),
        "next_times": torch.randint(0, 2**40, (rows,), generator=g),
    }  # fmt: skip


def truth(a: dict[str, Any]) -> Tensor:
    parts = []
    for user, (length, targets) in enumerate(zip(LENGTHS, TARGETS, strict=True)):
        rows = slice(int(a["offsets"][user]), int(a["offsets"][user + 1]))
        buckets = time_buckets(a["next_times"][rows, None] - a["times"][None, rows]).numpy()
        bias = naive.relative_bias(
            naive.positions(length, targets),
            buckets,
            a["position_bias"].double().numpy(),
            a["time_bias"].double().numpy(),
        )
        u, q, k, v = (a[n][rows].double().numpy() for n in "uqkv")
        o = naive.attend(q, k, v, bias, max_length=MAX_LENGTH, num_targets=targets)
        parts += [naive.gate(u[i].reshape(-1), o[i], 1e-6).reshape(o[i].shape) for i in range(length)]
    return torch.from_numpy(np.stack(parts))


def test_gated_attention_equals_the_truth() -> None:
    a = arguments()
    out = ops.gated_attention(**a)
    assert (out - truth(a)).abs().max() < 1e-5


def test_compile_and_export_go_through_every_op() -> None:
    class Model(torch.nn.Module):
        def forward(self, a: dict[str, Tensor], x: Tensor, weight: Tensor, cache: Tensor, slots: Tensor) -> Any:
            gated = torch.ops.hstu.gated_attention(
                a["u"], a["q"], a["k"], a["v"], a["offsets"], a["num_targets"], 65, MAX_LENGTH, a["position_bias"],
                a["time_bias"], a["bucket_edges"], a["times"], a["next_times"],
            )  # fmt: skip
            torch.ops.hstu.cache_write(a["k"], a["v"], cache, slots)
            table = torch.zeros((2, 5), dtype=torch.int32)
            lengths = torch.tensor([3, 9], dtype=torch.int32)
            decoded = torch.ops.hstu.paged_decode(a["q"][:2], cache, table, lengths, 9, MAX_LENGTH)
            projected = torch.ops.hstu.uvqk_silu(x, weight, torch.zeros(48))
            pairs = torch.ops.hstu.interaction(gated.unflatten(2, (1, WIDTH)).squeeze(2), True)
            pooled = torch.ops.hstu.embedding_bag(a["time_bias"].unsqueeze(1), slots.clamp(min=0), a["offsets"][:3])
            return gated * 2, decoded, projected, pairs, pooled

    a = {name: value for name, value in arguments().items() if isinstance(value, Tensor)}
    rest = (torch.randn((6, 32)).bfloat16(), torch.randn((48, 32)).bfloat16())
    slots = torch.arange(sum(LENGTHS)) - 1

    def fresh() -> Tensor:
        return torch.zeros((9, HEADS, 16, 2 * WIDTH))

    model, caches = Model(), [fresh(), fresh(), fresh()]
    eager = model(a, *rest, caches[0], slots)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(a, *rest, caches[1], slots)
    exported = torch.export.export(model, (a, *rest, fresh(), slots)).module()(a, *rest, caches[2], slots)
    for others in (compiled, exported):
        for mine, theirs in zip(eager, others, strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(caches[0], caches[2])
    assert caches[0].abs().sum() > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: (torch.ops.hstu.gated_attention, (), arguments()),
        lambda: (torch.ops.hstu.interaction, (torch.randn((3, 5, 8)), False), {}),
        lambda: (
            torch.ops.hstu.uvqk_silu,
            (torch.randn((3, 16)).half(), torch.randn((32, 16)).half(), torch.randn(32)),
            {},
        ),
        lambda: (
            torch.ops.hstu.embedding_bag,
            (torch.randn((9, 4)), torch.tensor([1, 2]), torch.tensor([0, 0, 2])),
            {},
        ),
    ],
)
def test_fake_and_real_agree(call: Any) -> None:
    op, positional, named = call()
    torch.library.opcheck(op.default, positional, named, test_utils=("test_schema", "test_faketensor"))


def test_interaction_equals_the_truth() -> None:
    x = torch.randn((4, 5, 6), generator=torch.Generator().manual_seed(1))
    for with_self in (False, True):
        wanted = interaction_naive.interaction(x.double().numpy(), with_self=with_self)
        assert np.abs(ops.interaction(x, with_self).numpy() - wanted).max() < 1e-5


def test_bad_calls_are_refused_on_a_cpu_too() -> None:
    a = arguments()
    with pytest.raises(KernelError, match="offsets do not rise"):
        ops.gated_attention(**a | {"offsets": torch.tensor([0, 9, 5, 64, 134])})
    with pytest.raises(KernelError, match="needs both tables"):
        ops.gated_attention(**a | {"time_bias": None})
    with pytest.raises(KernelError, match="wrong type"):
        ops.gated_attention(**a | {"k": a["k"].half()})


def test_a_folder_without_this_sm_is_refused_when_it_is_used(tmp_path: Path) -> None:
    from kernels.artifacts import CompiledKernels

    with pytest.raises(KernelError, match=r"no kernels for sm_90\n.*none at all"):
        CompiledKernels(tmp_path, sm=90)
