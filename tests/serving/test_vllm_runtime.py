"""vLLM against eager PyTorch: embeddings, retrieval and slates, however the scheduler cuts the work up."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.checkpoints.meta_research import load_meta_research
from hstu.data.histories import Histories, histories_from_rows
from hstu.errors import ArtifactError, InputError
from hstu.model import HSTU, History, history_from_feeds
from serving.slate import Slate, greedy_slate, make_slates
from serving.vllm_plugin.runtime import VllmRuntime
from tests.models import TINY_RESEARCH, random_histories, random_model
from tests.serving.conftest import VLLM_CONFIG, float_prompts, write_model_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.timeout(300),
]

TIE = 1e-6
CONFIG = VLLM_CONFIG


@pytest.fixture(scope="module")
def model(vllm_model: HSTU) -> HSTU:
    return vllm_model


@pytest.fixture(scope="module")
def folder(vllm_folder: Path) -> Path:
    return vllm_folder


def _padded(histories: Histories, model: HSTU) -> History:
    feeds = histories.feeds(model.config)
    return history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


def _assert_embeddings(model: HSTU, histories: Histories, embeddings: np.ndarray, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        history = _padded(histories, model)
        expected = model.user_embedding(model.encode(history), history.lengths)
    np.testing.assert_allclose(embeddings, expected.numpy(), rtol=0, atol=tolerance)


def _assert_slates(model: HSTU, histories: Histories, ids: np.ndarray, scores: np.ndarray, **options: bool) -> None:
    """Token for token; where they part, the two items were tied."""
    expected, expected_scores = (
        t.numpy() for t in greedy_slate(model, _padded(histories, model), ids.shape[1], **options)
    )
    for row in range(len(ids)):
        differs = np.nonzero(ids[row] != expected[row])[0]
        upto = int(differs[0]) + 1 if len(differs) else ids.shape[1]
        np.testing.assert_allclose(scores[row, :upto], expected_scores[row, :upto], rtol=0, atol=TIE)
    assert np.mean(np.all(ids == expected, axis=1)) >= 0.98


def _later(histories: Histories, num_events: int, seed: int) -> Histories:
    """The same users `num_events` later, as they come back: their history, then new events and a new query time."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(len(histories)):
        events = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
        last = int(max(histories.timestamps[events][-1], histories.query_time[row]))
        new = last + np.cumsum(rng.integers(0, 100_000, size=num_events))
        rows.append(
            {
                "item_ids": np.append(histories.item_ids[events], rng.integers(1, CONFIG.num_items, size=num_events)),
                "actions": np.append(histories.actions[events], rng.integers(0, CONFIG.num_actions, size=num_events)),
                "timestamps": np.append(histories.timestamps[events], new),
                "query_time": [int(new[-1]) + 77],
            }
        )
    return histories_from_rows(rows)


def test_embeddings_equal_eager(runtime: VllmRuntime, model: HSTU) -> None:
    histories = random_histories(CONFIG, num_users=40, seed=1)
    _assert_embeddings(model, histories, runtime.embed(histories))
    _assert_embeddings(model, histories, runtime.embed(histories))  # from the prefix cache


def test_retrieval_equals_the_retrieve_entry(runtime: VllmRuntime, model: HSTU) -> None:
    histories = random_histories(CONFIG, num_users=10, seed=2)
    with torch.no_grad():
        embedding, ids, scores = (t.numpy() for t in model.retrieve(_padded(histories, model)))
    got_embedding, got_ids, got_scores = runtime.retrieve(histories, 100)
    np.testing.assert_allclose(got_embedding, embedding, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got_scores, scores, rtol=0, atol=TIE)
    assert np.mean(got_ids == ids) > 0.99
    np.testing.assert_array_equal(runtime.top_k(histories, 7)[0], got_ids[:, :7])


def test_another_query_time_is_another_answer(runtime: VllmRuntime, model: HSTU) -> None:
    """The cache may not serve an answer made for another moment, though every event is the same."""
    histories = random_histories(CONFIG, num_users=12, seed=3, lengths=[16, 32, 48, 64] * 3)
    for later in (0, 50_000, 90_000_000):
        now = replace(histories, query_time=histories.query_time + later)
        _assert_embeddings(model, now, runtime.embed(now))


def test_a_returning_user_pays_for_new_events_only(runtime: VllmRuntime, model: HSTU) -> None:
    histories = random_histories(CONFIG, num_users=6, seed=4, lengths=[70, 64, 40, 33, 49, 80])
    runtime.embed(histories)
    back = _later(histories, 5, seed=4)
    outputs = runtime._engine("pooling").encode(float_prompts(runtime, back), pooling_task="embed", use_tqdm=False)
    cached = [output.num_cached_tokens for output in outputs]
    # All whole pages but the one that held the old query time.
    assert cached == [(n - 1) // 16 * 16 for n in histories.lengths.tolist()]
    _assert_embeddings(model, back, torch.stack([output.outputs.data for output in outputs]).numpy())


@pytest.mark.parametrize("options", [{}, {"exclude_history": True}, {"no_repeats": False}])
def test_slates_equal_full_recompute(runtime: VllmRuntime, model: HSTU, options: dict[str, bool]) -> None:
    histories = random_histories(CONFIG, num_users=25, seed=5)
    ids, scores = runtime.greedy_slates(histories, 10, **options)
    _assert_slates(model, histories, ids, scores, **options)


def test_slates_of_returning_users(runtime: VllmRuntime, model: HSTU) -> None:
    """Cached pages hold generated items of the last visit beside events: they are not mistaken for history."""
    histories = random_histories(CONFIG, num_users=10, seed=6, lengths=[20, 22, 25, 27, 31, 32, 40, 45, 47, 60])
    runtime.greedy_slates(histories, 10)
    again = _later(histories, 3, seed=6)
    for returning in (histories, again):
        _assert_slates(model, returning, *runtime.greedy_slates(returning, 10))


def test_chunks_preemption_and_staggered_arrivals_change_nothing(cramped: VllmRuntime, model: HSTU) -> None:
    from vllm import SamplingParams

    histories = random_histories(CONFIG, num_users=50, seed=7)
    engine = cramped._engine("generate").llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    rng = np.random.default_rng(7)
    waiting = list(enumerate(float_prompts(cramped, histories)))
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=0, detokenize=False)
    slates: dict[int, Any] = {}
    with torch.compiler.set_stance("force_eager"):
        while waiting or engine.has_unfinished_requests():
            for _ in range(int(rng.integers(0, 4))):
                if waiting:
                    user, prompt = waiting.pop(0)
                    engine.add_request(str(user), prompt, params)
            for output in engine.step():
                if output.finished:
                    slates[int(output.request_id.split("-")[0])] = output.outputs[0]
    scheduler._preempt_request = preempt
    assert len(preempted) >= 5
    ids = np.array([slates[user].token_ids for user in range(50)])
    scores = np.array(
        [[step[i].logprob for i, step in zip(s.token_ids, s.logprobs, strict=True)] for _, s in sorted(slates.items())]
    )
    _assert_slates(model, histories, ids, scores)


def test_embeddings_in_chunks(cramped: VllmRuntime, model: HSTU) -> None:
    histories = random_histories(CONFIG, num_users=12, seed=8)
    _assert_embeddings(model, histories, cramped.embed(histories))


def test_deny_and_allow_lists_hold_for_their_request_alone(runtime: VllmRuntime, model: HSTU) -> None:
    from vllm import SamplingParams

    histories = random_histories(CONFIG, num_users=4, seed=9)
    free = runtime.greedy_slates(histories, 5)[0]
    denied = free[0, :3].tolist()
    extra = [{"deny_items": denied}, {"allow_items": [7, 8, 9, 10, 11, 100]}, {}, {"deny_items": [10**9, 3]}]
    params = [SamplingParams(temperature=0, max_tokens=5, detokenize=False, extra_args=args) for args in extra]
    outputs = runtime._engine("generate").generate(float_prompts(runtime, histories), params, use_tqdm=False)
    got = [list(output.outputs[0].token_ids) for output in outputs]
    assert not set(got[0]) & set(denied)
    assert set(got[1]) < {7, 8, 9, 10, 11, 100}
    assert len(set(got[1])) == 5
    assert got[2] == free[2].tolist()
    assert 3 not in got[3]


def test_seeded_sampling_is_repeatable_and_never_repeats_an_item(runtime: VllmRuntime) -> None:
    from vllm import SamplingParams

    histories = random_histories(CONFIG, num_users=8, seed=10)
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=10, detokenize=False) for seed in range(8)]
    runs = [
        [
            list(o.outputs[0].token_ids)
            for o in runtime._engine("generate").generate(float_prompts(runtime, histories), params, use_tqdm=False)
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert all(len(set(slate)) == 10 and min(slate) >= 1 for slate in runs[0])


def test_a_prompt_of_item_ids_is_a_history_without_times(runtime: VllmRuntime, model: HSTU) -> None:
    from vllm import SamplingParams

    histories = random_histories(CONFIG, num_users=6, seed=11)
    bare = replace(
        histories,
        timestamps=np.zeros_like(histories.timestamps),
        actions=np.zeros_like(histories.actions),
        query_time=np.zeros_like(histories.query_time),
    )
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in np.split(bare.item_ids, bare.offsets[1:-1])]
    params = SamplingParams(temperature=0, max_tokens=6, detokenize=False)
    outputs = runtime._engine("generate").generate(prompts, params, use_tqdm=False)
    expected, _ = greedy_slate(model, _padded(bare, model), 6)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected.tolist()


def test_bad_requests_are_refused_and_the_engine_lives(runtime: VllmRuntime, model: HSTU) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    engine = runtime._engine("generate")
    greedy = SamplingParams(temperature=0, max_tokens=2)
    rows = float_prompts(runtime, random_histories(CONFIG, lengths=[4]))[0]["prompt_embeds"]
    wrong_rows = [
        rows[:, :-1],
        torch.full_like(rows, torch.nan),
        rows + 0.5,
        rows.flip(0),
        rows[:0],
        rows[0],
        rows.int(),
    ]
    for prompt in (
        *({"prompt_token_ids": ids} for ids in ([CONFIG.num_items + 1], [-1], [0], [2**40], [], [1] * 91)),
        *({"prompt_embeds": wrong} for wrong in wrong_rows),
        "3 nothing",
        "3 0",
        "3 151",
        "3 99999999999999999999999",
        "3 ٣",
    ):
        with pytest.raises((VLLMValidationError, ValueError)):
            engine.generate(prompt, greedy, use_tqdm=False)
    for wrong in (
        {"extra_args": {"deny_items": "3"}},
        {"extra_args": {"deny_items": [0]}},
        {"extra_args": {"allow_items": []}},
        {"extra_args": {"allow_repeats": "yes"}},
        {"extra_args": {"allow_items": [4]}},
        {"repetition_penalty": 1.2},
    ):
        with pytest.raises(VLLMValidationError):
            engine.generate({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=2, **wrong), use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="own beam search"):
        engine.beam_search([{"prompt_token_ids": [1, 2]}], BeamSearchParams(beam_width=2, max_tokens=3))
    with pytest.raises(InputError, match="slate this long"):
        runtime.greedy_slates(random_histories(CONFIG), 11)
    with pytest.raises(InputError, match="cannot be served"):
        runtime.embed(random_histories(CONFIG, lengths=[4, 0]))
    with pytest.raises(InputError, match="cannot be retrieved"):
        runtime.retrieve(random_histories(CONFIG), CONFIG.num_items + 1)
    histories = random_histories(CONFIG, num_users=3, seed=12)
    _assert_slates(model, histories, *runtime.greedy_slates(histories, 3))


def test_a_slate_ends_where_no_item_is_left(runtime: VllmRuntime) -> None:
    from vllm import SamplingParams

    everything = list(range(1, CONFIG.num_items + 1))
    args = [
        {"deny_items": everything[2:]},
        {"deny_items": everything},
        {"deny_items": everything[1:], "allow_repeats": True},
    ]
    params = [SamplingParams(temperature=0, max_tokens=4, logprobs=0, detokenize=False, extra_args=a) for a in args]
    prompts = float_prompts(runtime, random_histories(CONFIG, num_users=3, seed=15))
    with torch.compiler.set_stance("force_eager"):
        outputs = [o.outputs[0] for o in runtime._engine("generate").generate(prompts, params, use_tqdm=False)]
    assert sorted(outputs[0].token_ids[:2]) == [1, 2]
    assert outputs[0].token_ids[2:] == [0, 0]
    assert outputs[1].token_ids == [0, 0, 0, 0]
    assert outputs[2].token_ids == [1, 1, 1, 1]
    assert all(np.isfinite(step[i].logprob) for o in outputs for i, step in zip(o.token_ids, o.logprobs, strict=True))


def test_text_is_item_ids(runtime: VllmRuntime) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=5)
    by_text, by_ids = runtime._engine("generate").generate(
        ["3 10 150", {"prompt_token_ids": [3, 10, 150]}], params, use_tqdm=False
    )
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.outputs[0].text.split() == [str(i) for i in by_ids.outputs[0].token_ids]


def test_nothing_asked_nothing_answered(runtime: VllmRuntime) -> None:
    none = random_histories(CONFIG, lengths=[])
    assert runtime.embed(none).shape == (0, CONFIG.embedding_dim)
    assert runtime.greedy_slates(none, 4)[0].shape == (0, 4)


def test_a_folder_that_is_not_a_model_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        VllmRuntime(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        VllmRuntime(tmp_path)


def test_bfloat16_keeps_times_and_ids_exact(folder: Path, model: HSTU) -> None:
    """Rounded layers, not rounded records: close to fp32, and the same whether cached or not."""
    runtime = VllmRuntime(folder, dtype="bfloat16", kv_cache_mib=64)
    histories = random_histories(CONFIG, num_users=20, seed=13)
    with torch.no_grad():
        history = _padded(histories, model)
        expected = model.user_embedding(model.encode(history), history.lengths).numpy()
    for _ in range(2):
        cosine = (runtime.embed(histories) * expected).sum(-1)
        assert cosine.min() > 0.995
    few = histories.select(range(4))
    for slate in (Slate(num_items=5, method="beam", width=16), Slate(num_items=5, exclude_history=True)):
        defined, got = make_slates(model, _padded(few, model), slate), runtime.slates(few, slate)
        again = runtime.slates(few, slate)
        assert torch.equal(got.item_ids, again.item_ids)
        assert all(len(set(row)) == 5 and min(row) >= 1 for row in got.item_ids.flatten(0, 1).tolist())
        torch.testing.assert_close(got.scores[:, 0, 0], defined.scores[:, 0, 0], rtol=0, atol=0.03)
    runtime.close()


def test_metas_own_answers(oracle: Path, tmp_path: Path) -> None:
    """The oracle through the pages: cold, asked again, and with the newest events appended to cached ones."""
    model = load_meta_research(oracle / "checkpoint.pt", num_heads=1, max_generated=10).model
    runtime = VllmRuntime(write_model_folder(tmp_path / "meta", model), kv_cache_mib=64)
    golden = np.load(oracle / "golden.npz")
    rows = [
        {"item_ids": ids[:n], "timestamps": times[:n], "query_time": [times[n]]}
        for ids, times, n in zip(golden["past_ids"], golden["timestamps"], golden["past_lengths"], strict=True)
    ]
    histories = histories_from_rows(rows)
    earlier = histories_from_rows(
        [{name: values[: max(1, len(values) - 5)] for name, values in row.items()} for row in rows]
    )
    for warm_up in (None, None, earlier):
        if warm_up is not None:
            runtime._engine("pooling").reset_prefix_cache()
            runtime.embed(warm_up)
        embeddings, ids, scores = runtime.retrieve(histories, 50)
        np.testing.assert_allclose(embeddings, golden["user_embeddings"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(scores, golden["top50_scores"], rtol=0, atol=TIE)
        assert np.mean(ids == golden["top50_item_ids"]) > 0.99
    runtime.close()


def test_the_research_model_without_actions_and_gaps(tmp_path: Path) -> None:
    model = random_model(TINY_RESEARCH)
    runtime = VllmRuntime(write_model_folder(tmp_path / "research", model), kv_cache_mib=64)
    histories = random_histories(TINY_RESEARCH, num_users=20, seed=14)
    _assert_slates(model, histories, *runtime.greedy_slates(histories, 10))
    runtime.close()


@pytest.mark.slow
def test_two_tensor_parallel_processes_equal_one(folder: Path, model: HSTU, tmp_path: Path) -> None:
    """Heads are split over two processes; the norm over all heads takes the sums of both."""
    histories = random_histories(CONFIG, num_users=20, seed=16)
    histories.save(tmp_path / "histories.npz")
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.serving.two_ranks", str(folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = np.load(tmp_path / "answers.npz")
    _assert_embeddings(model, histories, answers["embeddings"])
    _assert_slates(model, histories, answers["ids"], answers["scores"])
