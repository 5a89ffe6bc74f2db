"""The doors over HTTP: plain JSON is checked and answered, and a bundle's settings start a server (slow)."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hstu.checkpoints.huggingface import save_pretrained
from hstu.data.histories import Histories
from hstu.model import HSTU, history_from_feeds
from serving.slate import Slate, Slates, greedy_slate, make_slates
from serving.vllm_plugin.server import SETTINGS, write_server_settings
from serving.vllm_plugin.tokenizer import write_tokenizer
from stages.generation.server import running_server
from tests.models import TINY, TINY_RESEARCH, random_histories, random_model
from tests.serving import hostile

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

GOOD: dict[str, Any] = {"items": [1, 2, 3], "timestamps": [5, 5, 9], "actions": [0, 1, 3], "query_time": 10, "k": 4}
BAD: dict[str, Any] = {
    "no object": [1],
    "nothing": None,
    "unknown key": GOOD | {"horizon": 3},
    "no items": {"timestamps": [1]},
    "items no list": GOOD | {"items": "123"},
    "empty": GOOD | {"items": [], "timestamps": [], "actions": []},
    "too long": {"items": [1] * 21, "timestamps": [1] * 21},
    "unknown item": GOOD | {"items": [1, 2, 151]},
    "padding": GOOD | {"items": [1, 2, 0]},
    "negative": GOOD | {"items": [1, 2, -1]},
    "huge": GOOD | {"items": [1, 2, 10**30]},
    "float": GOOD | {"items": [1, 2, 3.0]},
    "boolean": GOOD | {"items": [1, 2, True]},
    "unequal": GOOD | {"timestamps": [5, 9]},
    "falling": GOOD | {"timestamps": [5, 9, 8]},
    "time too large": GOOD | {"timestamps": [5, 6, 2**63]},
    "unknown action": GOOD | {"actions": [0, 1, 4]},
    "k zero": GOOD | {"k": 0},
    "k too large": GOOD | {"k": 101},
    "nothing left": GOOD | {"allow_items": [4, 5, 6]},
    "denied": GOOD | {"deny_items": list(range(1, 148))},
    "switch": GOOD | {"embedding": 1},
    "query time": GOOD | {"query_time": "now"},
    "slate no object": GOOD | {"slate": 3},
    "slate without items": GOOD | {"slate": {"method": "beam"}},
    "slate of strangers": GOOD | {"slate": {"num_items": 3, "depth": 1}},
    "slate too long": GOOD | {"slate": {"num_items": 11}},
    "slate of no kind": GOOD | {"slate": {"num_items": 3, "method": "best"}},
    "beams too wide": GOOD | {"slate": {"num_items": 3, "method": "beam", "width": 257}},
    "cold": GOOD | {"slate": {"num_items": 3, "method": "sample", "temperature": 0}},
    "hot": GOOD | {"slate": {"num_items": 3, "method": "sample", "temperature": 1e300}},
    "slate denied": GOOD | {"k": 1, "slate": {"num_items": 3}, "allow_items": [4, 5]},
    "slates k": GOOD | {"k": 2, "slate": {"num_items": 3}},
    "slate and embedding": GOOD | {"k": 1, "slate": {"num_items": 3}, "embedding": True},
}


@pytest.fixture(scope="module")
def model() -> HSTU:
    return random_model(TINY)


@pytest.fixture(scope="module")
def bundle(model: HSTU, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_pretrained(model, folder)
    write_tokenizer(folder, model.config)
    write_server_settings(folder)
    return folder


def _plain_json(config: Any = TINY) -> Any:
    from serving.vllm_plugin.plain_json import PlainJson

    return PlainJson(
        SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(shape=config)),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ),
        None,
    )


def _data(histories: Histories, row: int, **options: Any) -> dict[str, Any]:
    one = histories.select([row])
    events = {"items": one.item_ids.tolist(), "timestamps": one.timestamps.tolist(), "actions": one.actions.tolist()}
    return events | {"query_time": int(one.query_time[0])} | options


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_a_validation_error(name: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError):
        _plain_json().parse_data(BAD[name])


def test_good_json_becomes_records_and_parameters() -> None:
    from serving.vllm_plugin.records import decode_records

    processor = _plain_json()
    request = processor.parse_data(GOOD | {"exclude_history": True, "deny_items": [9]})
    events = decode_records(processor.pre_process(request)["prompt_embeds"])
    assert events.item_ids.tolist() == [1, 2, 3]
    assert events.next_times.tolist() == [5, 9, 10]
    params = processor.merge_pooling_params()
    assert params.task == "plugin"
    assert params.skip_reading_prefix_cache is False
    assert params.extra_kwargs == {"k": 4, "denied": [9, 1, 2, 3], "allowed": None, "embedding": False}
    research = _plain_json(TINY_RESEARCH).parse_data({"items": [7], "timestamps": [3]})
    assert decode_records(research.rows).next_times.tolist() == [0]


def test_answers_survive_packing() -> None:
    from serving.vllm_plugin.plain_json import decode_answer, encode_answer

    ids, scores, embedding = torch.tensor([2**31 - 1, 5]), torch.tensor([0.25, -0.125]), torch.tensor([1.0, 2.0, 3.0])
    assert decode_answer(encode_answer(ids, scores, None)) == {"item_ids": [2**31 - 1, 5], "scores": [0.25, -0.125]}
    assert decode_answer(encode_answer(ids, scores, embedding))["embedding"] == [1.0, 2.0, 3.0]


def test_slates_survive_packing() -> None:
    from serving.vllm_plugin.plain_json import decode_answer, encode_slates

    slates = Slates(
        item_ids=torch.tensor([[[2**31 - 1, 5], [7, 9], [0, 0]]]),
        scores=torch.tensor([[[0.5, 0.25], [0.125, -1.0], [0.0, 0.0]]]),
        log_probabilities=torch.tensor([[-1.5, -2.5, -torch.inf]]),
    )
    assert decode_answer(encode_slates(slates, 3))["slates"] == [
        {"item_ids": [2**31 - 1, 5], "scores": [0.5, 0.25], "log_probability": -1.5},
        {"item_ids": [7, 9], "scores": [0.125, -1.0], "log_probability": -2.5},
    ]
    greedy = replace(slates, log_probabilities=None)
    assert decode_answer(encode_slates(greedy, 1)) == {"slates": [{"item_ids": [2**31 - 1, 5], "scores": [0.5, 0.25]}]}


def test_hostile_json_is_a_request_or_a_validation_error() -> None:
    from vllm.exceptions import VLLMValidationError

    processor, rng, refused = _plain_json(), np.random.default_rng(0), 0
    for _ in range(3000):
        try:
            processor.pre_process(processor.parse_data(hostile.plain_json(rng, TINY)))
        except VLLMValidationError:
            refused += 1
    assert 1000 < refused < 2900


def test_plain_json_through_an_engine(bundle: Path, model: HSTU, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.vllm_plugin import io_processor
    from serving.vllm_plugin.runtime import VllmRuntime

    runtime = VllmRuntime(bundle, kv_cache_mib=64, io_processor_plugin="hstu")
    histories = random_histories(TINY, num_users=6, seed=1)
    expected_embedding, expected_ids, expected_scores = runtime_answers(model, histories)
    monkeypatch.setattr("vllm.plugins.io_processors.load_plugins_by_group", lambda group: {"hstu": io_processor})
    engine = runtime._engine("pooling")
    for row in range(len(histories)):
        data = _data(histories, row, k=10, embedding=True)
        answer = engine.encode({"data": data}, pooling_task="plugin", use_tqdm=False)[0].outputs
        assert answer["item_ids"] == expected_ids[row, :10].tolist()
        np.testing.assert_allclose(answer["scores"], expected_scores[row, :10], atol=1e-6)
        np.testing.assert_allclose(answer["embedding"], expected_embedding[row], atol=1e-5)
        data = _data(histories, row, k=10, exclude_history=True, deny_items=answer["item_ids"][:2])
        fewer = engine.encode({"data": data}, pooling_task="plugin", use_tqdm=False)[0].outputs
        gone = set(data["items"]) | set(answer["item_ids"][:2])
        slate = Slate(num_items=4, method="beam", width=8, exclude_history=True)
        asked = {"num_items": 4, "method": "beam", "width": 8}
        data = _data(histories, row, k=8, exclude_history=True, slate=asked)
        slates = engine.encode({"data": data}, pooling_task="plugin", use_tqdm=False)[0].outputs["slates"]
        feeds = histories.select([row]).feeds(TINY)
        one = history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})
        assert [found["item_ids"] for found in slates] == make_slates(model, one, slate).item_ids[0].tolist()
        assert fewer["item_ids"] == [item for item in expected_ids[row].tolist() if item not in gone][:10]
    runtime.close()


def runtime_answers(model: HSTU, histories: Histories) -> tuple[np.ndarray, ...]:
    feeds = {name: torch.from_numpy(value) for name, value in histories.feeds(model.config).items()}
    with torch.no_grad():
        embedding, ids, scores = model.retrieve(history_from_feeds(feeds))
    return embedding.numpy(), ids.numpy(), scores.numpy()


def test_settings_are_deterministic_and_exact(bundle: Path) -> None:
    before = {name: (bundle / name).read_bytes() for name in SETTINGS}
    write_server_settings(bundle)
    assert before == {name: (bundle / name).read_bytes() for name in SETTINGS}
    assert all(b"dtype: float32\n" in content for content in before.values())


def test_half_precision_is_refused_with_the_fix(bundle: Path) -> None:
    from serving.vllm_plugin.runtime import VllmRuntime

    runtime = VllmRuntime(bundle, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--dtype float32"):
        runtime.embed(random_histories(TINY, num_users=1))
    runtime.close()


def _send(url: str, body: bytes) -> tuple[int, Any]:
    """Status, and the answer's JSON or, of a stream, its text."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            streams = response.headers.get_content_type() == "text/event-stream"
            return response.status, response.read().decode() if streams else json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    return _send(url, json.dumps({"model": "hstu"} | body).encode())


@pytest.mark.slow
def test_the_slate_server(bundle: Path, model: HSTU) -> None:
    from serving.vllm_plugin.records import records_from_histories

    histories = random_histories(TINY, num_users=5, seed=2)
    feeds = {name: torch.from_numpy(value) for name, value in histories.feeds(TINY).items()}
    expected, _ = greedy_slate(model, history_from_feeds(feeds), 5)
    with running_server(bundle, "vllm.yaml") as url:
        completions = f"{url}/v1/completions"
        greedy = {"max_tokens": 5, "temperature": 0}
        for rows, slate in zip(records_from_histories(histories, TINY), expected.tolist(), strict=True):
            buffer = io.BytesIO()
            torch.save(rows.float(), buffer)
            status, answer = _post(
                completions, greedy | {"prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}
            )
            assert status == 200
            assert answer["choices"][0]["text"].split() == [str(item) for item in slate]
        assert _post(completions, greedy | {"prompt": [3, 10, 150], "logprobs": 5})[0] == 200
        assert _post(completions, greedy | {"prompt": "3 10", "vllm_xargs": {"exclude_history": True}})[0] == 200
        for bad in (
            {"prompt": [151]},
            {"prompt": [0]},
            {"prompt": [-3]},
            {"prompt": []},
            {"prompt": [1] * 21},
            {"prompt": "a"},
            {"prompt": [1], "repetition_penalty": 1.5},
            {"prompt": [1], "use_beam_search": True, "n": 2},
            {"prompt": [1], "vllm_xargs": {"deny_items": ["x"]}},
            {"prompt_embeds": "AAAA"},
        ):
            status, answer = _post(completions, greedy | bad)
            assert (status, answer["error"]["code"]) == (400, 400), bad
        with urllib.request.urlopen(f"{url}/metrics") as response:
            assert b"vllm:prefix_cache_hits_total" in response.read()


@pytest.mark.slow
def test_the_retrieval_server(bundle: Path, model: HSTU) -> None:
    histories = random_histories(TINY, num_users=5, seed=3)
    _, expected_ids, _ = runtime_answers(model, histories)
    with running_server(bundle, "vllm-pooling.yaml") as url:
        for _ in range(2):
            for row in range(len(histories)):
                status, answer = _post(f"{url}/pooling", {"data": _data(histories, row, k=7)})
                assert status == 200
                assert answer["data"]["item_ids"] == expected_ids[row, :7].tolist()
        assert answer["data"]["num_cached_events"] == (histories.lengths[-1] - 1) // 16 * 16
        for name, bad in BAD.items():
            assert _post(f"{url}/pooling", {"data": bad})[0] == 400, name
        assert _post(f"{url}/v1/embeddings", {"input": [1, 2]})[0] == 200
        assert _post(f"{url}/v1/embeddings", {"input": [1, 200]})[0] == 400


def _assert_answered(url: str, door: str, bodies: list[dict[str, Any]]) -> None:
    """Every body, and what is no body or no door, gets 200 or a 4xx, whose text is JSON; both are frequent."""
    asked = [(door, json.dumps({"model": "hstu"} | body).encode()) for body in bodies]
    asked += [(other, body) for other in ("/v1/completions", "/pooling", "/v1/embeddings") for body in hostile.BODIES]
    asked += [(route, body) for route in hostile.ROUTES for body in (b"{}", b'{"prompt": [1]}', b'{"input": [1]}')]
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for status, _ in pool.map(lambda one: _send(url + one[0], one[1]), asked)]
    wrong = [
        (status, one) for status, one in zip(statuses, asked, strict=True) if not (status == 200 or 400 <= status < 500)
    ]
    assert not wrong, wrong[:3]
    assert min(statuses.count(200), len(statuses) - statuses.count(200)) > len(statuses) // 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_thousand_hostile_completions(bundle: Path) -> None:
    rng = np.random.default_rng(1)
    good = {"prompt": [3, 10, 150], "max_tokens": 5, "temperature": 0}
    with running_server(bundle, "vllm.yaml") as url:
        before = _post(f"{url}/v1/completions", good)[1]["choices"][0]["text"]
        _assert_answered(url, "/v1/completions", [hostile.completion(rng, TINY) for _ in range(5000)])
        assert _post(f"{url}/v1/completions", good)[1]["choices"][0]["text"] == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_thousand_hostile_histories(bundle: Path) -> None:
    rng = np.random.default_rng(2)
    with running_server(bundle, "vllm-pooling.yaml") as url:
        before = _post(f"{url}/pooling", {"data": GOOD})[1]["data"]["item_ids"]
        _assert_answered(url, "/pooling", [{"data": hostile.plain_json(rng, TINY)} for _ in range(5000)])
        assert _post(f"{url}/pooling", {"data": GOOD})[1]["data"]["item_ids"] == before
