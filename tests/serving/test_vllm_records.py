"""Records carry every event through a row of floats unchanged, at every serving precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hstu.errors import InputError
from serving.vllm_plugin.records import (
    RECORD_WIDTH,
    decode_records,
    encode_items,
    encode_records,
    records_from_histories,
)
from serving.vllm_plugin.tokenizer import TOKENIZER_FILES, write_tokenizer
from tests.models import TINY, random_histories, tiny_config

EXTREMES = [0, 1, -1, 255, 256, 2**31, 2**53 + 1, 2**62 + 12345, 2**63 - 1, -(2**63), 1_600_000_000_123]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_field_survives(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    times = np.concatenate([EXTREMES, rng.integers(-(2**63), 2**63 - 1, size=200)]).astype(np.int64)
    items = rng.integers(0, 2**31, size=len(times))
    actions = rng.integers(0, 2**16, size=len(times))
    rows = encode_records(items, actions, times, times[::-1].copy()).to(dtype)
    events = decode_records(rows)
    assert events.item_ids.tolist() == items.tolist()
    assert events.actions.tolist() == actions.tolist()
    assert events.times.tolist() == times.tolist()
    assert events.next_times.tolist() == times[::-1].tolist()
    assert bool(events.has_times.all())


def test_a_bare_item_is_told_from_an_event() -> None:
    events = decode_records(encode_items(torch.tensor([0, 5, 70_000, 2**31 - 1]), dtype=torch.bfloat16))
    assert events.item_ids.tolist() == [0, 5, 70_000, 2**31 - 1]
    assert not bool(events.has_times.any())


def test_hostile_rows_decode_to_numbers_of_the_field() -> None:
    rows = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [-5.0], [1e30], [3.4]]).expand(
        -1, RECORD_WIDTH
    )
    events = decode_records(rows)
    assert int(events.item_ids.min()) >= 0
    assert int(events.item_ids.max()) < 2**32
    assert int(events.actions.max()) < 2**16


def test_the_last_event_carries_the_query_time() -> None:
    histories = random_histories(num_users=4, seed=5)
    for row, prompt in enumerate(records_from_histories(histories, TINY)):
        events = decode_records(prompt)
        times = histories.timestamps[histories.offsets[row] : histories.offsets[row + 1]]
        assert events.times.tolist() == times.tolist()
        assert events.next_times.tolist() == [*times[1:].tolist(), int(histories.query_time[row])]
    absent = tiny_config(absent_query_time="last_event")
    prompt = records_from_histories(random_histories(num_users=3, seed=5), absent)[2]  # the third has no query time
    events = decode_records(prompt)
    assert events.next_times[-1] == events.times[-1]


@pytest.mark.parametrize("length", [0, TINY.max_history + 1])
def test_histories_out_of_range_are_refused(length: int) -> None:
    with pytest.raises(InputError, match="history 1 cannot be served"):
        records_from_histories(random_histories(lengths=[3, length]), TINY)


def test_the_tokenizer_reads_and_writes_item_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TINY)
    first = [(tmp_path / name).read_bytes() for name in TOKENIZER_FILES]
    write_tokenizer(tmp_path, TINY)
    assert first == [(tmp_path / name).read_bytes() for name in TOKENIZER_FILES]
    assert len(json.loads(first[0])["model"]["vocab"]) == TINY.num_items + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [1, 10, 100, 150, 0]
    assert tokenizer("1 10 100 150 0")["input_ids"] == ids
    assert tokenizer.decode(ids) == "1 10 100 150 0"
    assert not tokenizer.all_special_ids
    assert len(tokenizer) == TINY.num_items + 1
