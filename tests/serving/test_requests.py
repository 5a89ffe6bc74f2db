"""Requests: what is accepted, and the one message for everything that is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError
from serving.requests import encode_requests, read_requests, request_from_json
from tests.models import TINY, TINY_RESEARCH

EVENTS = [{"item_id": 3, "timestamp": 10}, {"item_id": 5, "timestamp": 10, "action": "like"}]


def _read(*values: object):
    return read_requests([json.dumps(value) for value in values], source="here")


def test_a_request_becomes_a_history_in_model_ids():
    vocabulary = Vocabulary(items=("9", "3", "5"), actions=("view", "like"))
    requests = _read({"user_id": "u", "events": EVENTS, "query_timestamp": 12})
    histories, cut = encode_requests(requests, TINY, vocabulary, max_events=20)
    assert histories.item_ids.tolist() == [2, 3]
    assert histories.actions.tolist() == [0, 2]
    assert histories.timestamps.tolist() == [10, 10]
    assert histories.query_time.tolist() == [12]
    assert cut == {}


def test_the_newest_events_are_kept_and_the_rest_counted():
    events = [{"item_id": i, "timestamp": i} for i in range(1, 31)]
    requests = _read({"user_id": 7, "events": events}, {"user_id": 8, "events": events[:2]})
    histories, cut = encode_requests(requests, TINY_RESEARCH, Vocabulary.raw(150), max_events=20)
    assert histories.lengths.tolist() == [20, 2]
    assert histories.item_ids[:20].tolist() == list(range(11, 31))
    assert cut == {"7": 10}
    assert np.array_equal(histories.query_time, [0, 0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not a request"),
        ({"events": EVENTS}, "user_id is missing"),
        ({"user_id": True, "events": EVENTS}, "user_id is missing"),
        ({"user_id": 1}, "events is missing"),
        ({"user_id": 1, "events": []}, "has no events"),
        ({"user_id": 1, "events": EVENTS, "query_time": 3}, "unknown key 'query_time'"),
        ({"user_id": 1, "events": [3]}, "not an event"),
        ({"user_id": 1, "events": [{"timestamp": 3}]}, "item_id is missing"),
        ({"user_id": 1, "events": [{"item_id": 3}]}, "timestamp is missing"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": "x"}]}, "timestamp is missing"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": -1}]}, "timestamp is missing"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": 2**63}]}, "timestamp is missing"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": 1.5}]}, "timestamp is missing"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": 1, "action": 4}]}, "action is no string"),
        ({"user_id": 1, "events": [{"item_id": 3, "timestamp": 1, "x": 4}]}, "unknown key 'x'"),
        ({"user_id": 1, "events": [*EVENTS, {"item_id": 1, "timestamp": 9}]}, "timestamps fall"),
        ({"user_id": 1, "events": EVENTS, "query_timestamp": None}, None),
        ({"user_id": 1, "events": EVENTS, "query_timestamp": "soon"}, "query_timestamp"),
    ],
)
def test_every_malformed_request_is_named(value, message):
    if message is None:
        assert request_from_json(value, where="here").query_timestamp is None
        return
    with pytest.raises(InputError, match=message) as caught:
        _read(value)
    assert "here, line 1" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("lines", [[], ["", "  \n"]])
def test_no_request_at_all_is_an_error(lines):
    with pytest.raises(InputError, match="no requests"):
        read_requests(lines, source="stdin")


def test_a_line_that_is_not_json_is_named_by_number():
    with pytest.raises(InputError, match="here, line 2: not JSON"):
        read_requests(['{"user_id": 1, "events": [{"item_id": 1, "timestamp": 1}]}', "{oops"], source="here")


@pytest.mark.parametrize("item", [0, 151, -3, "abc", "1.0", "", "٣"])
def test_unknown_items_are_refused(item):
    requests = _read({"user_id": "u", "events": [{"item_id": item, "timestamp": 1}]})
    with pytest.raises(InputError, match="unknown item"):
        encode_requests(requests, TINY_RESEARCH, Vocabulary.raw(150), max_events=20)


def test_unknown_actions_are_refused_where_the_model_has_actions():
    requests = _read({"user_id": "u", "events": [{"item_id": "a", "timestamp": 1, "action": "fly"}]})
    with pytest.raises(InputError, match="unknown action 'fly'"):
        encode_requests(requests, TINY, Vocabulary(items=("a",), actions=("view",)), max_events=20)
