"""The service over HTTP, in this process: every route, what it refuses, and how it falls back."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from hstu.errors import InputError, UsageError
from serving.bundle import Bundle
from serving.engines.torch import open_torch_engine
from serving.server import read_keys, require_safe
from tests.serving.services import client, events, service_of


def eager(bundle: Bundle, given: list[dict], k: int) -> tuple[list[str], list[float]]:
    from serving.requests import encode_requests, request_from_json

    request = request_from_json({"user_id": "x", "events": given}, where="test")
    histories, _ = encode_requests([request], bundle.config, bundle.vocabulary, max_events=bundle.config.max_history)
    answers = open_torch_engine(bundle.path).run("retrieve", histories.feeds(bundle.config))
    ids = [bundle.vocabulary.item(int(item)) for item in answers["top_item_ids"][0][:k]]
    return ids, answers["top_scores"][0][:k].tolist()


def run(scenario, bundle: Bundle, **options) -> None:
    async def whole() -> None:
        async with client(bundle, **options) as http:
            await scenario(http)

    asyncio.run(whole())


def test_a_history_is_answered_as_eager_pytorch_answers_it(bundle):
    given = events(bundle, 3, 7, 7, 20)

    async def scenario(http):
        for strategy in ("engine", "torch"):
            answer = (await http.post("/v1/recommend", json={"events": given, "k": 5, "strategy": strategy})).json()
            ids, scores = eager(bundle, given, 5)
            assert [str(item["item_id"]) for item in answer["items"]] == ids
            assert np.allclose([item["score"] for item in answer["items"]], scores, atol=1e-5)
            assert answer["served"]["strategy"] == strategy
            assert answer["served"]["fallbacks"] == []
            assert answer["served"]["bundle"] == bundle.artifact.id
            assert answer["served"]["timing"]["total_ms"] > 0

    run(scenario, bundle)


def test_a_known_user_is_answered_from_the_state_and_new_events_count(bundle):
    async def scenario(http):
        given = events(bundle, 5, 9, 30, 31)
        assert (await http.post("/v1/users/u1/events", json={"events": given[:2]})).json()["num_events"] == 2
        states = []
        for known in (2, 2, 3, 4):
            if known > 2:
                await http.post("/v1/users/u1/events", json={"events": [given[known - 1]]})
            answer = (await http.post("/v1/recommend", json={"user_id": "u1", "strategy": "engine"})).json()
            states.append(answer["served"]["cache"])
            scores = eager(bundle, given[:known], 10)[1]
            assert np.allclose([item["score"] for item in answer["items"]], scores, atol=2e-5)
        assert states == ["miss", "hit", "hit", "hit"]
        text = (await http.get("/metrics")).text
        assert 'hstu_cache_requests_total{kind="user",result="device"} 4.0' in text  # one of the warm-up

    run(scenario, bundle)


def test_an_event_that_arrives_late_is_put_in_its_place(bundle):
    async def scenario(http):
        given = events(bundle, 5, 9, 30)
        await http.post("/v1/users/u1/events", json={"events": [given[0], given[2]]})
        await http.post("/v1/recommend", json={"user_id": "u1", "strategy": "engine"})
        await http.post("/v1/users/u1/events", json={"events": [given[1]]})
        answer = (await http.post("/v1/recommend", json={"user_id": "u1", "strategy": "engine"})).json()
        assert answer["served"]["cache"] == "miss"
        assert np.allclose([i["score"] for i in answer["items"]], eager(bundle, given, 10)[1], atol=1e-5)

    run(scenario, bundle)


def test_a_user_whose_history_outgrows_the_model_is_still_answered_right(bundle):
    async def scenario(http):
        limit = bundle.config.max_history
        given = events(bundle, *(1 + n % 100 for n in range(limit + 7)))
        for first in range(0, len(given), 3):
            await http.post("/v1/users/u1/events", json={"events": given[first : first + 3]})
            answer = (await http.post("/v1/recommend", json={"user_id": "u1", "strategy": "engine"})).json()
            newest = given[: first + 3][-limit:]
            assert np.allclose([i["score"] for i in answer["items"]], eager(bundle, newest, 10)[1], atol=2e-5)

    run(scenario, bundle)


def test_a_deleted_user_is_unknown(bundle):
    async def scenario(http):
        await http.post("/v1/users/u1/events", json={"events": events(bundle, 5)})
        await http.post("/v1/recommend", json={"user_id": "u1"})
        assert (await http.delete("/v1/users/u1")).json() == {"user_id": "u1", "deleted": True}
        assert (await http.delete("/v1/users/u1")).json()["deleted"] is False
        assert (await http.post("/v1/recommend", json={"user_id": "u1"})).status_code == 404
        assert sum(service_of(http).cache.bytes_used().values()) == 0

    run(scenario, bundle)


def test_scores_are_those_of_the_task_heads_and_similarity_is_the_cosine(bundle):
    given = events(bundle, 3, 7)

    async def scenario(http):
        asked = {"events": given, "candidates": ["12", 13], "similarity": True}
        answer = (await http.post("/v1/score", json=asked)).json()
        top = (await http.post("/v1/recommend", json={"events": given, "k": 100, "strategy": "engine"})).json()
        cosine = {str(item["item_id"]): item["score"] for item in top["items"]}
        for item in answer["items"]:
            assert set(item["tasks"]) == set(bundle.config.tasks)
            assert all(0 < value < 1 for value in item["tasks"].values())
            if str(item["item_id"]) in cosine:
                assert item["similarity"] == pytest.approx(cosine[str(item["item_id"])], abs=1e-5)

    run(scenario, bundle)


def test_filters_leave_out_what_they_say(bundle):
    given = events(bundle, 3, 7)

    async def scenario(http):
        async def ask(**filters):
            body = {"events": given, "k": 100, "strategy": "engine", "filters": filters}
            return [str(i["item_id"]) for i in (await http.post("/v1/recommend", json=body)).json()["items"]]

        everything = await ask()
        some = everything[:4]
        assert not set(await ask(exclude_items=some)) & set(some)
        assert await ask(only_items=some[::-1]) == some
        assert not set(await ask(exclude_seen=True)) & {"3", "7"}

    run(scenario, bundle)


def test_without_a_ranker_unified_is_unranked_and_says_so_and_strict_refuses(bundle):
    asked = {"events": events(bundle, 3, 7), "strategy": "unified"}

    async def open_about_it(http):
        answer = (await http.post("/v1/recommend", json=asked)).json()
        (fallback,) = answer["served"]["fallbacks"]
        assert (fallback["level"], fallback["wanted"], fallback["used"]) == ("ranking", "ranker", "unranked")
        assert answer["items"][0]["tasks"] is None
        assert service_of(http).runtimes.chain.counts["ranking", "ranker", "unranked"] == 1

    async def strict(http):
        answer = await http.post("/v1/recommend", json=asked)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1

    run(open_about_it, bundle)
    run(strict, bundle, settings={"strict": True})


def test_an_engine_that_breaks_is_answered_for_until_it_is_well(bundle, caplog):
    given = events(bundle, 3, 7, 9)

    async def scenario(http):
        service = service_of(http)
        lane = service.runtimes.lanes["fp32"]
        engine, run_entry = lane.stateful.engine, lane.stateful.engine.run
        lane.breaker._first_pause = lane.breaker._pause = 0.2

        def broken(*_):
            raise RuntimeError("device lost")

        engine.run = broken
        for _ in range(5):
            answer = (await http.post("/v1/recommend", json={"events": given, "strategy": "engine"})).json()
            assert [str(i["item_id"]) for i in answer["items"]] == eager(bundle, given, 10)[0]
            (fallback,) = answer["served"]["fallbacks"]
            assert (fallback["wanted"], fallback["used"]) == ("fp32", "torch")
            assert "device lost" in fallback["reason"]
        engine.run = run_entry
        await asyncio.sleep(0.5)
        answer = (await http.post("/v1/recommend", json={"events": given, "strategy": "engine"})).json()
        assert answer["served"]["fallbacks"] == []
        assert answer["served"]["runtime"] == "fp32"

    run(scenario, bundle)
    told = [
        record.message for record in caplog.records if record.name == "hstu.serve" and record.levelname == "WARNING"
    ]
    assert len(told) == 2  # down, and back


def test_a_full_queue_is_told_429_and_a_passed_deadline_408(bundle):
    asked = {"events": events(bundle, 3), "strategy": "engine"}

    async def scenario(http):
        service = service_of(http)
        run_entry = service.runtimes.lanes["fp32"].stateful.engine.run

        def slow(*arguments):
            time.sleep(0.2)
            return run_entry(*arguments)

        service.runtimes.lanes["fp32"].stateful.engine.run = slow
        answers = await asyncio.gather(*(http.post("/v1/recommend", json=asked) for _ in range(12)))
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
        late = await http.post("/v1/recommend", json={**asked, "deadline_ms": 20})
        assert late.status_code == 408
        assert service.runtimes.lanes["fp32"].breaker.state == "closed"

    run(scenario, bundle, settings={"max_queue": 4, "max_batch": 2, "deadline_ms": 5000})


def test_answers_in_company_equal_answers_alone(bundle):
    rng = np.random.default_rng(0)
    bodies = [
        {"events": events(bundle, *rng.integers(1, 150, size=n).tolist()), "k": 10, "strategy": "engine"}
        for n in rng.integers(1, 20, size=40).tolist()
    ]

    async def scenario(http):
        together = [a.json() for a in await asyncio.gather(*(http.post("/v1/recommend", json=b) for b in bodies))]
        assert max(service_of(http).runtimes.lanes["fp32"].batcher.stats.batches) > 1
        for body, answer in zip(bodies, together, strict=True):
            alone = (await http.post("/v1/recommend", json=body)).json()
            assert np.allclose([i["score"] for i in alone["items"]], [i["score"] for i in answer["items"]], atol=1e-5)

    run(scenario, bundle)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"events": [{"item_id": "999", "timestamp": 1}]}, 400, "unknown item"),
        ({"events": [{"item_id": "1", "timestamp": 2}, {"item_id": "1", "timestamp": 1}]}, 400, "timestamps fall"),
        ({"events": []}, 422, "events"),
        ({"events": [{"item_id": "1", "timestamp": 1, "color": "red"}]}, 422, "color"),
        ({"events": [{"item_id": "1", "timestamp": 1.5}]}, 422, "timestamp"),
        ({"user_id": "../../etc/passwd"}, 422, "user_id"),
        ({"user_id": "nobody"}, 404, "known"),
        ({}, 400, "neither"),
        ({"user_id": "u", "k": 0}, 422, "k"),
        ({"events": [{"item_id": "\ud800", "timestamp": 1}]}, 422, "item_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_never_a_server_error(bundle, body, status, says):
    import json

    async def scenario(http):
        sent = json.dumps(body).encode()
        answer = await http.post("/v1/recommend", content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert says in answer.json()["error"]

    run(scenario, bundle)


def test_a_batch_answers_each_request_with_its_own_status(bundle):
    async def scenario(http):
        body = {"requests": [{"events": events(bundle, 3), "k": 2}, {"user_id": "nobody"}]}
        answers = (await http.post("/v1/recommend/batch", json=body)).json()["answers"]
        assert [entry["status"] for entry in answers] == [200, 404]
        assert len(answers[0]["answer"]["items"]) == 2

    run(scenario, bundle)


def test_keys_sizes_and_probes(bundle):
    async def scenario(http):
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/ready")).json()["ready"] is True
        assert (await http.get("/v1/bundle")).status_code == 401
        assert (await http.get("/v1/bundle", headers={"authorization": "Bearer wrong"})).status_code == 401
        good = {"authorization": "Bearer a-long-enough-key"}
        assert (await http.get("/v1/bundle", headers=good)).json()["id"] == bundle.artifact.id
        assert (await http.post("/v1/recommend", content=b"x" * 3000, headers=good)).status_code == 413

        async def chunks():
            for _ in range(30):
                yield b"x" * 100

        assert (await http.post("/v1/recommend", content=chunks(), headers=good)).status_code == 413

    run(scenario, bundle, keys=["a-long-enough-key"], max_body_bytes=2000)


def test_logs_hold_no_history(bundle, caplog):
    caplog.set_level("DEBUG")

    async def scenario(http):
        await http.post("/v1/users/u1/events", json={"events": events(bundle, 149)})
        await http.post("/v1/recommend", json={"events": [{"item_id": "secret-item", "timestamp": 1}]})

    run(scenario, bundle)
    assert not any("secret-item" in r.getMessage() or "149" in r.getMessage() for r in caplog.records)


def test_without_keys_only_loopback_may_be_served(tmp_path, monkeypatch):
    monkeypatch.delenv("HSTU_API_KEYS", raising=False)
    require_safe("127.0.0.1", [])
    require_safe("::1", [])
    require_safe("localhost", [])
    with pytest.raises(UsageError, match="only this machine"):
        require_safe("0.0.0.0", read_keys(None))
    path = tmp_path / "keys"
    path.write_text("0123456789abcdef\n")
    require_safe("0.0.0.0", read_keys(path))
    path.write_text("short")
    with pytest.raises(InputError, match="too short"):
        read_keys(path)
