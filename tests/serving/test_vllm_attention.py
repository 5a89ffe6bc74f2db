"""The paged attention backend alone: against plain loops, with poisoned pages, over mixed steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hstu.time_buckets import time_buckets

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning")

HEADS, QK, V, BLOCK, MAX_LENGTH = 2, 3, 5, 16, 80
STEPS = {
    "one row": [(0, 1)],
    "whole histories": [(0, 17), (0, 1), (0, 63), (0, 16), (0, 63)],
    "decodes": [(1, 1), (16, 1), (15, 1), (63, 1), (40, 1)],
    "mixed": [(0, 5), (20, 1), (16, 40), (0, 70), (33, 7), (79, 1), (0, 1), (31, 33)],
}


def _naive(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor, time_bias: Tensor, buckets: Tensor) -> Tensor:
    """[L, H, dv] of one history, all of it: a double loop over events."""
    out = torch.zeros(len(q), HEADS, V)
    for i in range(len(q)):
        for j in range(i + 1):
            bias = position_bias[j - i + MAX_LENGTH - 1] + time_bias[buckets[i, j]]
            weight = torch.nn.functional.silu((q[i] * k[j]).sum(-1) + bias) / MAX_LENGTH
            out[i] += weight.unsqueeze(-1) * v[j]
    return out


@pytest.mark.parametrize("attends", ["torch", "ops"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_plain_loops(name: str, attends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.vllm_plugin.attention import HSTUAttentionImpl, HSTUMetadataBuilder

    if attends == "ops":  # which take keys and values of one size
        monkeypatch.setitem(globals(), "QK", V)
    generator = torch.Generator().manual_seed(len(name))
    requests = STEPS[name]
    position_bias = torch.randn(2 * MAX_LENGTH - 1, generator=generator)
    time_bias = torch.randn(129, generator=generator)
    pages_each = -(-MAX_LENGTH // BLOCK)
    num_pages = 1 + len(requests) * pages_each
    table = 1 + torch.randperm(num_pages - 1, generator=generator).view(len(requests), pages_each).int()
    cache = torch.full((num_pages, HEADS, BLOCK, QK + V), torch.nan)
    times_by_slot = torch.zeros(num_pages * BLOCK, dtype=torch.int64)
    rows, expected, slot_mapping, next_times = [], [], [], []
    impl = HSTUAttentionImpl(
        HEADS,
        QK,
        1.0,
        HEADS,
        None,
        None,
        "auto",
        max_length=MAX_LENGTH,
        position_bias=position_bias,
        time_bias=time_bias,
    )
    for request, (context, new) in enumerate(requests):
        length = context + new
        q, k = (torch.randn(length, HEADS, QK, generator=generator) for _ in range(2))
        v = torch.randn(length, HEADS, V, generator=generator)
        times = torch.randint(0, 10**9, (length + 1,), generator=generator).sort().values
        buckets = time_buckets(times[1:].unsqueeze(1) - times[:-1])
        expected.append(_naive(q, k, v, position_bias, time_bias, buckets)[context:])
        position = torch.arange(length)
        slots = table[request].long()[position // BLOCK] * BLOCK + position % BLOCK
        times_by_slot[slots] = times[:-1]
        impl.do_kv_cache_update(None, k[:context], v[:context], cache, slots[:context])
        rows.append((q[context:], k[context:], v[context:]))
        slot_mapping.append(slots[context:])
        next_times.append(times[1 + context :])
    q, k, v = (torch.cat(parts) for parts in zip(*rows, strict=True))
    new = torch.tensor([n for _, n in requests])
    lengths = torch.tensor([c + n for c, n in requests], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(shape=SimpleNamespace(max_length=MAX_LENGTH, qk_dim=QK, v_dim=V))
        ),
        additional_config={"hstu_attention": attends},
        device_config=SimpleNamespace(device_type="cpu"),
    )
    spec = SimpleNamespace(num_kv_heads=HEADS, block_size=BLOCK)
    step = HSTUMetadataBuilder(spec, ["layer"], config, torch.device("cpu")).build(
        0,
        SimpleNamespace(
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=None,
            slot_mapping=torch.cat(slot_mapping),
            num_actual_tokens=len(q),
            block_table_tensor=table,
        ),
    )
    assert (step.ops is not None) == (attends == "ops")
    step.set_times(times_by_slot, torch.cat(next_times))
    impl.do_kv_cache_update(None, k, v, cache, torch.cat(slot_mapping))
    output = torch.full((len(q), HEADS, V), torch.nan)
    impl.forward(None, q, k, v, cache, step, output)
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_to_be_kept_touch_only_the_null_page() -> None:
    from serving.vllm_plugin.attention import HSTUAttentionImpl

    impl = HSTUAttentionImpl(
        HEADS,
        QK,
        1.0,
        HEADS,
        None,
        None,
        "auto",
        max_length=4,
        position_bias=torch.zeros(7),
        time_bias=torch.zeros(129),
    )
    cache = torch.zeros(3, HEADS, BLOCK, QK + V)
    impl.do_kv_cache_update(None, torch.ones(2, HEADS, QK), torch.ones(2, HEADS, V), cache, torch.tensor([-1, 40]))
    assert bool((cache[2, :, 8] == 1).all())
    assert float(cache[1:].sum()) == HEADS * (QK + V)


def test_groups_hold_every_request_once_with_little_padding() -> None:
    from serving.vllm_plugin.attention import GROUP_SCORES, PADDING, group_requests

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 80, (1,), generator=generator))
        lengths = torch.randint(1, 2000, (count,), generator=generator).tolist()
        cut = torch.rand(count, generator=generator).tolist()
        num_new = [n if c < 0.3 else 1 if c < 0.6 else max(1, int(c * n)) for n, c in zip(lengths, cut, strict=True)]
        groups = group_requests(num_new, lengths, 4)
        assert sorted(member for group in groups for member in group) == list(range(count))
        for group in groups:
            padded = len(group) * max(num_new[m] for m in group) * max(lengths[m] for m in group)
            assert len(group) == 1 or padded <= PADDING * sum(num_new[m] * lengths[m] for m in group)
            assert len(group) == 1 or padded * 4 <= GROUP_SCORES
            assert len({num_new[m] == lengths[m] for m in group}) == 1


def test_what_hstu_attention_is_not_is_refused() -> None:
    from serving.vllm_plugin.attention import HSTUAttentionImpl

    with pytest.raises(ValueError, match="causal, unscaled"):
        HSTUAttentionImpl(
            2, 8, 0.5, 2, None, None, "auto", max_length=4, position_bias=torch.zeros(7), time_bias=torch.zeros(129)
        )


def test_the_triton_kernels_on_the_builders_own_plan_equal_the_cpu_kernel() -> None:
    """In Triton's interpreter, which wants a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.triton_steps"], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"decodes", "mixed", "chunks"}
    assert max(found.values()) < 1e-5, found


def test_who_attends_is_said_or_refused() -> None:
    from serving.vllm_plugin.kernel import choose_attention

    def config(device: str, qk_dim: int = 8, **options: str) -> SimpleNamespace:
        shape = SimpleNamespace(qk_dim=qk_dim, v_dim=8)
        model = SimpleNamespace(model="/nowhere", hf_config=SimpleNamespace(shape=shape))
        return SimpleNamespace(
            additional_config=options, model_config=model, device_config=SimpleNamespace(device_type=device)
        )

    assert choose_attention(config("cpu")) == "torch"  # no kernel there, and the log says so
    assert choose_attention(config("cuda")) == "torch"
    assert choose_attention(config("cpu", hstu_attention="ops")) == "ops"
    for wrong in (
        config("cpu", hstu_attention="kernel"),
        config("cuda", hstu_attention="kernel"),
        config("cuda", hstu_attention="ops"),
        config("cuda", hstu_attention="ops", hstu_gpu_kernels="/nowhere"),
        config("cpu", qk_dim=4, hstu_attention="ops"),
        config("cpu", hstu_attention="flash"),
    ):
        with pytest.raises(ValueError, match="hstu_attention"):
            choose_attention(wrong)
