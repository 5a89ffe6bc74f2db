"""The table of entries: what `extend` adds to it, and the cache it defines."""

from __future__ import annotations

import pytest

from hstu.errors import InputError
from hstu.signature import CacheForm, cache_spec, dynamic_ranges, entry, entry_names
from tests.models import TINY, TINY_RESEARCH


def test_every_model_has_extend_and_only_one_with_heads_has_rank() -> None:
    assert entry_names(TINY) == ("retrieve", "rank", "extend")
    assert entry_names(TINY_RESEARCH) == ("retrieve", "extend")
    with pytest.raises(InputError, match="no 'rank' entry"):
        entry(TINY_RESEARCH, "rank")


def test_extend_takes_new_events_and_a_cache_and_gives_what_retrieve_gives_and_rows() -> None:
    retrieve, extend = entry(TINY, "retrieve"), entry(TINY, "extend")
    events = {spec.name: spec.shape for spec in retrieve.inputs}
    given = {spec.name: spec.shape for spec in extend.inputs}
    assert list(given)[: len(events)] == list(events)
    assert given["item_ids"] == given["actions"] == given["timestamps"] == ("B", "E")
    assert given["cache"] == ("B", 2, "P", 2 * (6 + 8))
    assert (given["cached_timestamps"], given["cached_lengths"]) == (("B", "P"), ("B",))
    assert extend.outputs[:-1] == retrieve.outputs
    assert (extend.outputs[-1].name, extend.outputs[-1].shape) == ("cache_rows", ("B", 2, "E", 28))
    letters = {size for spec in (*extend.inputs, *extend.outputs) for size in spec.shape if isinstance(size, str)}
    assert letters <= set(dynamic_ranges(TINY))


@pytest.mark.parametrize(("form", "row"), [("fp32", 4 * 28), ("bf16", 2 * 28), ("int8", 28 + 2 * 4)])
def test_bytes_of_a_user(form: CacheForm, row: int) -> None:
    spec = cache_spec(TINY)
    assert (spec.k_width, spec.v_width, spec.max_positions) == (12, 16, TINY.max_history - 1)
    assert spec.shape(7) == (2, 7, 28)
    assert spec.bytes_per_user(form, 7) == 2 * 7 * row
