"""A user between visits: the same answers as on the whole history, nothing shared by mistake, nothing foreign taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hstu.data.histories import Histories
from hstu.errors import ArtifactError, InputError
from hstu.signature import CacheForm, cache_spec
from serving import user_state
from serving.cache_rows import CacheRows
from serving.engines.torch import TorchEngine
from serving.user_state import Origin, StatefulEngine, UserState, extend, from_bytes, start, to_bytes
from stages.returning import part
from tests.models import TINY, TINY_RESEARCH, random_histories, random_model

ORIGIN = Origin(checkpoint="c" * 64, engine="torch", precision="fp32")
FORMS: tuple[CacheForm, ...] = ("fp32", "bf16", "int8")


@pytest.fixture(scope="module")
def stateful() -> StatefulEngine:
    return StatefulEngine(engine=TorchEngine(random_model(), threads=1), origin=ORIGIN)


def take(histories: Histories, first: list[int], last: list[int]) -> Histories:
    return part(histories, *(np.minimum(end, histories.lengths) for end in (first, last)))


def retrieve(stateful: StatefulEngine, histories: Histories) -> dict[str, Any]:
    return stateful.engine.run("retrieve", histories.feeds(stateful.engine.config))


def assert_same(answers: dict[str, Any], expected: dict[str, Any], limit: float = 1e-5) -> None:
    assert set(answers) == {"user_embedding", "top_item_ids", "top_scores"}
    for name in ("user_embedding", "top_scores"):
        assert np.abs(answers[name] - expected[name]).max() <= limit, name


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH], ids=["features", "research"])
@pytest.mark.parametrize("seen", [[1, 1, 1, 1], [19, 1, 4, 12], [20, 6, 5, 13]])
def test_the_second_visit_answers_as_retrieve_does(config: Any, seen: list[int]) -> None:
    stateful = StatefulEngine(engine=TorchEngine(random_model(config), threads=1), origin=ORIGIN)
    histories = random_histories(config, lengths=[20, 6, 5, 13], seed=2)
    states, first = start(stateful, take(histories, [0] * 4, seen))
    assert_same(first, retrieve(stateful, take(histories, [0] * 4, seen)))
    states, second = extend(stateful, states, take(histories, seen, [20] * 4))
    assert_same(second, retrieve(stateful, histories))
    assert [len(state.item_ids) for state in states] == [20, 6, 5, 13]
    assert [state.rows.length for state in states] == [19, 5, 4, 12]
    np.testing.assert_array_equal(states[3].item_ids, histories.item_ids[-13:])


def test_a_visit_without_new_events_is_answered_at_its_own_time(stateful: StatefulEngine) -> None:
    histories = random_histories(TINY, lengths=[9, 2], seed=4)
    states, _ = start(stateful, histories)
    later = replace(histories, query_time=histories.query_time + 100_000)
    none = part(later, later.lengths, later.lengths)
    _, answers = extend(stateful, states, none)
    assert_same(answers, retrieve(stateful, later))


def test_a_history_that_outgrows_the_model_is_computed_anew_and_counted(stateful: StatefulEngine) -> None:
    limit = TINY.max_history
    whole = random_histories(TINY, lengths=[limit + 4, 9], seed=5)
    seen, more = [limit - 2, 6], [limit + 3, 9]
    states, _ = start(stateful, take(whole, [0, 0], seen))
    states, answers = extend(stateful, states, take(whole, seen, more))
    assert_same(answers, retrieve(stateful, take(whole, [0, 0], more).newest(limit)))
    assert [(s.forgotten, s.recomputed, s.rows.length) for s in states] == [(3, 1, limit - 1), (0, 0, 8)]
    states, answers = extend(stateful, states, take(whole, more, [limit + 4, 9]))
    assert_same(answers, retrieve(stateful, whole.newest(limit)))
    assert [(s.forgotten, s.recomputed) for s in states] == [(4, 2), (0, 0)]


def test_a_first_visit_with_too_long_a_history_keeps_the_newest(stateful: StatefulEngine) -> None:
    histories = random_histories(TINY, lengths=[TINY.max_history + 7, 3])
    states, answers = start(stateful, histories)
    assert_same(answers, retrieve(stateful, histories.newest(TINY.max_history)))
    assert [(state.forgotten, state.recomputed) for state in states] == [(7, 0), (0, 0)]


@pytest.mark.parametrize("form", FORMS)
def test_a_state_may_be_extended_twice_in_different_ways(stateful: StatefulEngine, form: CacheForm) -> None:
    histories = random_histories(TINY, lengths=[4, 4], seed=1)
    others = random_histories(TINY, lengths=[9, 9], seed=8)
    later = replace(others, timestamps=others.timestamps + 10**8, query_time=others.query_time + 10**8)
    origin, _ = start(replace(stateful, form=form), histories)
    base, _ = extend(stateful, origin, part(later, later.lengths * 0, np.array([3, 3])))
    branches = [part(later, np.array([a, a]), np.array([b, b])) for a, b in ((3, 6), (6, 9))]
    alone = [extend(stateful, [from_bytes(to_bytes(s)) for s in base], branch)[1] for branch in branches]
    shared = [extend(stateful, base, branch) for branch in branches]
    for (states, answers), expected in zip(shared, alone, strict=True):
        assert_same(answers, expected, 0.0)
        again = extend(stateful, states, part(later, later.lengths, later.lengths))[1]
        fresh = extend(stateful, [from_bytes(to_bytes(s)) for s in states], part(later, later.lengths, later.lengths))
        assert_same(again, fresh[1], 0.0)


def test_narrow_forms_stay_near_and_cost_less(stateful: StatefulEngine) -> None:
    histories = random_histories(TINY, lengths=[20, 11, 15], seed=3)
    seen = [14, 6, 9]
    expected = retrieve(stateful, histories)["user_embedding"]
    for form, lowest in (("fp32", 0.9999999), ("bf16", 0.9999), ("int8", 0.999)):
        states, _ = start(replace(stateful, form=form), take(histories, [0] * 3, seen))  # type: ignore[arg-type]
        states, answers = extend(stateful, states, take(histories, seen, [20] * 3))
        assert ((answers["user_embedding"] * expected).sum(axis=1) >= lowest).all(), form
        spec = cache_spec(TINY)
        assert states[0].rows.nbytes == spec.bytes_per_user(form, 19)  # type: ignore[arg-type]
        assert len(states[0].rows.to_bytes()) == states[0].rows.nbytes
        assert states[0].nbytes == states[0].rows.nbytes + 3 * 8 * 20


@pytest.mark.parametrize("form", FORMS)
def test_bytes_carry_the_whole_state(stateful: StatefulEngine, form: CacheForm) -> None:
    histories = random_histories(TINY, lengths=[25, 1], seed=6)
    states, _ = start(replace(stateful, form=form), histories)
    for state in states:
        again = from_bytes(to_bytes(state))
        assert to_bytes(again) == to_bytes(state)
        assert (again.origin, again.forgotten, again.recomputed) == (ORIGIN, state.forgotten, 0)
        rows = [np.zeros(cache_spec(TINY).shape(max(1, state.rows.length)), np.float32) for _ in range(2)]
        state.rows.read(rows[0])
        again.rows.read(rows[1])
        np.testing.assert_array_equal(*rows)
    assert states[0].rows.length == 19


def test_a_changed_byte_is_found(stateful: StatefulEngine) -> None:
    data = to_bytes(start(stateful, random_histories(TINY, lengths=[2]))[0][0])
    rng = np.random.default_rng(0)
    for position in [0, 5, 19, len(data) - 1, *rng.integers(len(data), size=30).tolist()]:
        broken = bytearray(data)
        broken[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(ArtifactError, match="not a user's state"):
            from_bytes(bytes(broken))
    for cut in (b"", data[:10], data[:-1], data + b"x"):
        with pytest.raises(ArtifactError, match="not a user's state"):
            from_bytes(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 2**40}, "makes no sense"),
        ({"rows": 0}, "another size"),
        ({"events": -1}, "makes no sense"),
        ({"num_layers": 5}, "another size"),
        ({"num_layers": 2**50, "k_width": 2**50}, "another size"),
        ({"rows": 2**40, "events": 2**40 + 1, "max_positions": 2**41}, "makes no sense"),
        ({"form": "fp8"}, "makes no sense"),
        ({"events": "3"}, "makes no sense"),
        ({"k_width": None}, "makes no sense"),
    ],
)
def test_a_header_that_lies_is_refused(stateful: StatefulEngine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_bytes(_with_header(start(stateful, random_histories(TINY, lengths=[3]))[0][0], **change))


def _with_header(state: UserState, **change: Any) -> bytes:
    """Bytes of the state with some of the header changed, and the right SHA-256."""
    import hashlib
    import json

    data = to_bytes(state)[: -hashlib.sha256().digest_size]
    at = len(user_state._MAGIC)
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    header = json.dumps(json.loads(data[at + 4 : end]) | change).encode()
    body = data[:at] + len(header).to_bytes(4, "little") + header + data[end:]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_a_stored_cache_is_refused(stateful: StatefulEngine, form: CacheForm) -> None:
    states, _ = start(replace(stateful, form=form), random_histories(TINY, lengths=[6]))
    memory = states[0].rows._memory
    if form == "int8":
        memory.scales[1, 2, 0] = np.nan
    else:
        memory.values[1, 2, 3] = np.nan if form == "fp32" else 0x7FC0
    with pytest.raises(ArtifactError, match="not a number"):
        from_bytes(to_bytes(states[0]))


def test_nan_from_an_engine_is_not_kept() -> None:
    rows = np.zeros(cache_spec(TINY).shape(2), np.float32)
    rows[0, 1, 3] = np.inf
    with pytest.raises(ArtifactError, match="not numbers"):
        CacheRows(cache_spec(TINY), "fp32").append(rows)


@pytest.mark.parametrize(
    "other",
    [
        replace(ORIGIN, checkpoint="d" * 64),
        replace(ORIGIN, engine="int8-openvino"),
        replace(ORIGIN, precision="int8"),
    ],
)
def test_a_state_of_another_origin_is_refused(stateful: StatefulEngine, other: Origin) -> None:
    histories = random_histories(TINY, lengths=[6, 2])
    states, _ = start(stateful, histories)
    none = part(histories, histories.lengths, histories.lengths)
    with pytest.raises(ArtifactError, match="made by another model or engine") as caught:
        extend(replace(stateful, origin=other), states, none)
    assert caught.value.exit_code == 4


def test_a_state_of_another_shape_is_refused_whatever_it_is_stamped_with(stateful: StatefulEngine) -> None:
    histories = random_histories(TINY_RESEARCH, lengths=[6])
    research = StatefulEngine(engine=TorchEngine(random_model(TINY_RESEARCH), threads=1), origin=ORIGIN)
    states, _ = start(research, histories)
    with pytest.raises(ArtifactError, match="made by another model or engine"):
        extend(stateful, states, part(histories, histories.lengths, histories.lengths))


def test_events_that_make_no_sense_are_refused(stateful: StatefulEngine) -> None:
    histories = random_histories(TINY, lengths=[6, 2])
    states, _ = start(stateful, histories)
    early = part(histories, np.array([1, 0]), np.array([2, 1]))
    late = replace(early, timestamps=histories.timestamps[histories.offsets[1:] - 1] + 1)
    with pytest.raises(InputError, match=r"(?s)timestamps fall|older than cached"):
        extend(stateful, states, early)
    with pytest.raises(InputError, match="item_ids out of range"):
        extend(stateful, states, replace(late, item_ids=np.array([1, TINY.num_items + 1])))
    with pytest.raises(InputError, match="not of the same users"):
        extend(stateful, states[:1], late)
    with pytest.raises(InputError, match="without events"):
        start(stateful, part(histories, histories.lengths, histories.lengths))
    assert_same(extend(stateful, states, late)[1], extend(stateful, states, late)[1], 0.0)  # refusals left no trace
