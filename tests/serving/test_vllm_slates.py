"""Slates through vLLM against their definition: greedy, sampled and beam, constrained, in any company."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data.histories import Histories
from hstu.errors import InputError
from hstu.model import HSTU, History, history_from_feeds, l2_normalize
from serving.slate import Slate, Slates, make_slates
from serving.vllm_plugin.runtime import VllmRuntime
from tests.models import random_histories, random_model
from tests.serving.conftest import VLLM_CONFIG, float_prompts, write_model_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.timeout(900),
]
CONFIG = VLLM_CONFIG
SLATES = {
    "greedy": Slate(num_items=6, deny_items=(3, 4, 5), exclude_history=True),
    "greedy from few": Slate(num_items=4, allow_items=(7, 8, 9, 20, 21)),
    "greedy again and again": Slate(num_items=5, allow_repeats=True),
    "sampled": Slate(num_items=10, method="sample", seed=11),
    "sampled cold": Slate(num_items=6, method="sample", seed=12, temperature=0.05, exclude_history=True),
    "beams": Slate(num_items=5, method="beam", width=32),
    "beams without the history": Slate(num_items=4, method="beam", width=8, exclude_history=True, deny_items=(1, 2)),
    "beams of few": Slate(num_items=3, method="beam", width=16, allow_items=(5, 6, 7, 8, 9, 10), deny_items=(10,)),
    "beams that repeat": Slate(num_items=4, method="beam", width=8, allow_repeats=True, temperature=0.2),
}


def _padded(histories: Histories, model: HSTU) -> History:
    feeds = histories.feeds(model.config)
    return history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


def _assert_legal(slates: Slates, slate: Slate, histories: Histories) -> None:
    """Real, allowed items, none twice, none of the history where that was said; the best slate first."""
    for user in range(len(histories)):
        events = histories.item_ids[histories.offsets[user] : histories.offsets[user + 1]].tolist()
        gone = set(slate.deny_items) | (set(events) if slate.exclude_history else set())
        allowed = set(range(1, CONFIG.num_items + 1)) if slate.allow_items is None else set(slate.allow_items)
        found = [row for row in slates.item_ids[user].tolist() if row[0]]
        assert found
        assert len({tuple(row) for row in found}) == len(found)
        for row in found:
            assert set(row) <= allowed - gone
            assert slate.allow_repeats or len(set(row)) == len(row)
        if slates.log_probabilities is not None:
            assert bool((slates.log_probabilities[user].diff() <= 0).nan_to_num(1).all())
        assert bool(slates.scores[user, : len(found)].isfinite().all())


def _assert_equal(got: Slates, expected: Slates) -> None:
    """Token for token; beams may swap where their probabilities are equal but for rounding."""
    rows = (got.item_ids == expected.item_ids).all(2)
    assert float(rows.float().mean()) >= 0.97
    torch.testing.assert_close(got.scores[rows], expected.scores[rows], rtol=0, atol=1e-5)
    if expected.log_probabilities is not None:
        assert got.log_probabilities is not None
        torch.testing.assert_close(got.log_probabilities, expected.log_probabilities, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SLATES)
def test_slates_equal_their_definition(name: str, runtime: VllmRuntime, vllm_model: HSTU) -> None:
    slate, histories = SLATES[name], random_histories(CONFIG, num_users=6, seed=len(name))
    expected = make_slates(vllm_model, _padded(histories, vllm_model), slate)
    for _ in range(2):  # the second time from the prefix cache
        got = runtime.slates(histories, slate)
        _assert_legal(got, slate, histories)
        _assert_equal(got, expected)


def test_pytorch_searches_like_the_kernel(cramped: VllmRuntime, vllm_model: HSTU) -> None:
    histories = random_histories(CONFIG, num_users=4, seed=40)
    for name in ("beams", "sampled"):
        expected = make_slates(vllm_model, _padded(histories, vllm_model), SLATES[name])
        _assert_equal(cramped.slates(histories, SLATES[name]), expected)


def test_the_paged_ops_attend_like_the_kernel(tmp_path: Path) -> None:
    """The plan that GPU kernels get, through vLLM's whole step, on a CPU: slates by decoding, and embeddings.

    In a process of its own: beside engines of the other attention it leaves torch.export unable to export.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_attend_by_paged_ops, tmp_path).result()


def _attend_by_paged_ops(folder: Path) -> None:
    model = random_model(replace(CONFIG, qk_dim=8))
    write_model_folder(folder / "even", model)
    runtime = VllmRuntime(
        folder / "even", kv_cache_mib=64, max_num_batched_tokens=64, additional_config={"hstu_attention": "ops"}
    )
    histories, slate = random_histories(CONFIG, num_users=12, seed=60), Slate(num_items=5, exclude_history=True)
    expected = make_slates(model, _padded(histories, model), slate)
    for _ in range(2):  # the second time from the prefix cache
        _assert_equal(runtime.slates(histories, slate), expected)
    runtime.close()


def test_fewer_beams_than_asked_for_when_there_are_no_more(runtime: VllmRuntime, vllm_model: HSTU) -> None:
    slate = Slate(num_items=2, method="beam", width=32, allow_items=(4, 5, 6))
    histories = random_histories(CONFIG, num_users=2, seed=41)
    got = runtime.slates(histories, slate)
    assert (got.item_ids[:, :, 0] > 0).sum(1).tolist() == [6, 6]
    assert got.log_probabilities is not None
    assert bool(got.log_probabilities[:, 6:].isneginf().all())
    _assert_equal(got, make_slates(vllm_model, _padded(histories, vllm_model), slate))


def test_the_same_seed_the_same_slate_and_another_another(runtime: VllmRuntime) -> None:
    histories = random_histories(CONFIG, num_users=5, seed=42)
    slate = Slate(num_items=10, method="sample", seed=1)
    first, again = runtime.slates(histories, slate), runtime.slates(histories, slate)
    assert torch.equal(first.item_ids, again.item_ids)
    alone = runtime.slates(histories.select([3]), replace(slate, seed=1 + 3))
    assert torch.equal(alone.item_ids[0], first.item_ids[3])
    assert not torch.equal(runtime.slates(histories, replace(slate, seed=99)).item_ids, first.item_ids)


def test_nothing_asked_no_slate(runtime: VllmRuntime) -> None:
    none = random_histories(CONFIG, lengths=[])
    assert runtime.slates(none, Slate(num_items=3, method="beam", width=7)).item_ids.shape == (0, 7, 3)


@pytest.mark.parametrize(
    ("slate", "why"),
    [
        (Slate(num_items=0), "slate this long"),
        (Slate(num_items=CONFIG.max_generated + 1), "slate this long"),
        (Slate(num_items=5, method="beam", width=257), "too wide"),
        (Slate(num_items=5, method="beam", width=0), "too wide"),
        (Slate(num_items=5, method="best"), "no such way"),  # type: ignore[arg-type]
        (Slate(num_items=5, method="sample", temperature=0.0), "temperature"),
        (Slate(num_items=5, method="sample", seed=-1), "seed"),
        (Slate(num_items=5, deny_items=(0,)), "unknown item"),
        (Slate(num_items=5, allow_items=(CONFIG.num_items + 1,)), "unknown item"),
        (Slate(num_items=5, allow_items=(1, 2, 3, 4)), "too few items"),
        (Slate(num_items=5, allow_items=(1, 2, 3, 4, 5), deny_items=(5,)), "too few items"),
    ],
)
def test_a_slate_that_makes_no_sense_is_refused(slate: Slate, why: str, runtime: VllmRuntime) -> None:
    with pytest.raises(InputError, match=why):
        runtime.slates(random_histories(CONFIG), slate)


def test_calls_from_many_threads_answer_as_one(runtime: VllmRuntime) -> None:
    users = [random_histories(CONFIG, num_users=4, seed=seed) for seed in range(50, 56)]
    expected = [(runtime.embed(h), runtime.slates(h, SLATES["greedy"]).item_ids) for h in users]
    got: dict[int, Any] = {}

    def ask(index: int) -> None:
        got[index] = (runtime.embed(users[index]), runtime.slates(users[index], SLATES["greedy"]).item_ids)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(users))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (embeddings, ids) in enumerate(expected):
        np.testing.assert_allclose(got[index][0], embeddings, rtol=0, atol=1e-6)
        assert torch.equal(got[index][1], ids)


def test_two_engines_share_the_tables(runtime: VllmRuntime) -> None:
    runtime.embed(random_histories(CONFIG, num_users=1))
    runtime.greedy_slates(random_histories(CONFIG, num_users=1), 1)
    models = [
        runtime._engine(kind).llm_engine.engine_core.engine_core.model_executor.driver_worker.get_model()  # type: ignore[arg-type]
        for kind in ("pooling", "generate")
    ]
    assert models[0] is not models[1]
    for table in ("item_embedding", "position_embedding", "action_embedding", "gap_embedding"):
        assert getattr(models[0], table).weight.data_ptr() == getattr(models[1], table).weight.data_ptr()


def test_the_head_block_by_block_equals_the_head_at_once() -> None:
    """Over several blocks, with forbidden columns, taken items and scores so close that most are nearly tied."""
    from serving.vllm_plugin.slate_search import HEAD_COLUMNS, best_items

    generator = torch.Generator().manual_seed(0)
    for num_items, beams, width in ((2 * HEAD_COLUMNS + 77, 16, 32), (300, 40, 256), (50, 1, 32), (4097, 3, 200)):
        table = torch.randn(num_items, 24, generator=generator)
        inverse = 1.0 / table.norm(dim=1)
        states = l2_normalize(torch.randn(beams, 24, generator=generator))
        masked = torch.where(torch.rand(num_items, generator=generator) < 0.3, -torch.inf, 0.0)
        taken = torch.stack([torch.randperm(num_items, generator=generator)[:4] for _ in range(beams)])
        totals = -torch.rand(beams, generator=generator)
        cosines = (states @ table.T * inverse + masked).scatter(1, taken, -torch.inf)
        expected, flat = ((cosines / 0.5).log_softmax(1) + totals.unsqueeze(1)).flatten().topk(width)
        real = expected.isfinite()
        best, parents, columns, scores = best_items(states, table, inverse, masked, taken, totals, 0.5, width, None)
        torch.testing.assert_close(best, expected[real], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores, cosines[parents, columns])
        same = (parents == flat[real] // num_items) & (columns == flat[real] % num_items)
        assert float(same.float().mean()) > 0.95


@pytest.mark.slow
def test_a_thousand_requests(runtime: VllmRuntime, cramped: VllmRuntime, vllm_model: HSTU) -> None:
    """Lengths 1..N, arrivals in any order, chunks, preemption, prefix hits, constraints: token for token."""
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    for engine_of, num_users in ((runtime, 350), (cramped, 250)):
        users = random_histories(CONFIG, num_users=num_users, seed=num_users)
        asked = []
        for _ in range(num_users):
            some = tuple(rng.choice(CONFIG.num_items, 40, replace=False) + 1)
            asked.append(
                Slate(
                    num_items=int(rng.integers(1, 11)),
                    exclude_history=bool(rng.random() < 0.3),
                    allow_repeats=bool(rng.random() < 0.2),
                    deny_items=tuple(map(int, some[:20])) if rng.random() < 0.3 else (),
                )
            )
        engine = engine_of._engine("generate").llm_engine
        prompts = float_prompts(engine_of, users)
        order = [int(user) for user in rng.permutation(num_users)]
        order += order[: num_users // 3]  # these come back: prefix hits
        found: dict[int, Any] = {}
        with torch.compiler.set_stance("force_eager"):
            while order or engine.has_unfinished_requests():
                for _ in range(int(rng.integers(0, 6))):
                    if order:
                        user = order.pop()
                        slate = asked[user]
                        extra = {"exclude_history": slate.exclude_history, "allow_repeats": slate.allow_repeats}
                        params = SamplingParams(
                            temperature=0, max_tokens=slate.num_items, logprobs=0, detokenize=False,
                            extra_args=extra | {"deny_items": list(slate.deny_items)},
                        )  # fmt: skip
                        engine.add_request(f"{user}-{len(order)}", prompts[user], params)
                for output in engine.step():
                    if output.finished:
                        found.setdefault(int(output.request_id.split("-")[0]), []).append(output.outputs[0])
        equal = 0
        for user, answers in found.items():
            one = users.select([user])
            expected = make_slates(vllm_model, _padded(one, vllm_model), asked[user])
            for answer in answers:
                ids, wanted = torch.tensor(list(answer.token_ids)), expected.item_ids[0, 0]
                scores = [step[i].logprob for i, step in zip(answer.token_ids, answer.logprobs, strict=True)]
                equal += int(torch.equal(ids, wanted))
                parted = (ids != wanted).nonzero().flatten().tolist()
                upto = parted[0] + 1 if parted else len(ids)  # where they part, the two items were tied
                np.testing.assert_allclose(scores[:upto], expected.scores[0, 0, :upto], rtol=0, atol=1e-5)
        assert len(found) == num_users
        assert equal >= 0.995 * sum(map(len, found.values())), equal
    for seed, name in enumerate(("beams", "sampled", "beams without the history")):
        histories = random_histories(CONFIG, num_users=30, seed=100 + seed)
        expected = make_slates(vllm_model, _padded(histories, vllm_model), SLATES[name])
        _assert_equal(runtime.slates(histories, SLATES[name]), expected)
