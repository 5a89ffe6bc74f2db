"""What the worker processes compute, in this one."""

from __future__ import annotations

import numpy as np
import pytest

from hstu.errors import InputError
from serving.engines.torch import open_torch_engine
from serving.frames import decode
from serving.worker import _ranked, rank


def asked(items: list[int], candidates: list[int]) -> dict[str, np.ndarray]:
    return {
        "item_ids": np.array(items, np.int64),
        "actions": np.zeros(len(items), np.int64),
        "timestamps": 100 * np.arange(len(items), dtype=np.int64),
        "query_time": np.array([0], np.int64),
        "candidate_ids": np.array(candidates, np.int64),
    }


def test_a_batch_of_any_lengths_is_ranked_as_each_alone(bundle):
    engine = open_torch_engine(bundle.path, threads=1)
    requests = [asked([3, 5, 9], [1, 2, 3, 4]), asked([7], [9]), asked([2, 4, 6, 8, 10], [30, 31])]
    for one, found in zip(requests, rank(engine, requests), strict=True):
        (alone,) = rank(engine, [one])
        assert found.shape == (len(one["candidate_ids"]), len(bundle.config.tasks))
        assert np.allclose(found, alone, atol=1e-6)


def test_one_that_is_wrong_spoils_nobody_elses_answer(bundle):
    engine = open_torch_engine(bundle.path, threads=1)
    requests = [asked([3, 5], [1]), asked([10**6], [1])]
    with pytest.raises(InputError):
        rank(engine, requests)
    answers = _ranked(engine, [({"id": number}, one) for number, one in enumerate(requests)])
    headers = [decode(a[12 : 12 + int.from_bytes(a[:4], "little")], b"\0" * 64)[0] for a in answers]
    assert [header["id"] for header in headers] == [0, 1]
    assert headers[1]["kind"] == "input"
