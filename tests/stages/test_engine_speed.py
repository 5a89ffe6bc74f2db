"""An int8 engine that costs time as well as quality is not kept in silence."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hstu.artifact import Artifact
from hstu.config import HSTUConfig
from hstu.errors import GateError
from hstu.signature import EntryName
from serving.engine import Array
from stages.engine_speed import SpeedUp, measure_speed_up
from tests.models import TINY, random_histories
from tests.stages.test_build_engine import make, params


class Clock:
    """The time that `stages.engine_speed` sees; engines move it, so a busy machine changes no result."""

    def __init__(self) -> None:
        self.now, self.rng = 0.0, np.random.default_rng(0)

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("stages.engine_speed.time", made)
    return made


class Sleeper:
    """An engine that takes a given time for each answer, a few percent more or less, and at times much longer."""

    backend, precision = "sleep", "none"
    config: HSTUConfig = TINY

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.batches = clock, seconds, set[tuple[int, ...]]()

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert entry == "retrieve"
        self.batches.add(tuple(feeds["lengths"].tolist()))
        disturbed = 20.0 if self.clock.rng.random() < 0.02 else 1.0
        self.clock.now += self.seconds * disturbed * float(np.exp(self.clock.rng.normal(0.0, 0.05)))
        return {}

    def close(self) -> None: ...


def test_the_ratio_is_that_of_the_times_whatever_disturbs_a_round(clock: Clock) -> None:
    histories = random_histories(lengths=[3, 20, 1, 19, 2])
    fast, slow = Sleeper(clock, 0.001), Sleeper(clock, 0.003)
    up = measure_speed_up(fast, slow, histories, users=1)
    assert fast.batches == slow.batches == {(20,), (19,), (3,), (2,)}
    down = measure_speed_up(slow, fast, histories, users=3)
    assert up.low <= up.ratio <= up.high
    assert up.ratio == pytest.approx(3.0, rel=0.2)
    assert down.ratio == pytest.approx(1 / 3, rel=0.2)
    assert (up.is_slower, down.is_slower) == (False, True)
    assert {len(batch) for batch in slow.batches} == {1, 3}


def test_a_slow_engine_is_not_asked_forever(clock: Clock) -> None:
    engines = Sleeper(clock, 2.0), Sleeper(clock, 3.0)
    assert not measure_speed_up(*engines, random_histories(lengths=[5]), users=1).is_slower
    assert clock.now < 8 * 5 + 40 * 20


def test_slower_is_what_the_whole_interval_says() -> None:
    assert not SpeedUp(users=1, ratio=0.98, low=0.9, high=1.01).is_slower
    assert SpeedUp(users=1, ratio=0.98, low=0.97, high=0.99).is_slower


@pytest.mark.parametrize(("one", "many", "kept"), [(0.9, 0.9, False), (0.9, 1.1, True), (1.1, 0.9, True)])
def test_an_int8_engine_that_is_slower_in_both_is_refused(
    surgered: Artifact, checkpoint: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: float, many: float,
    kept: bool,
) -> None:  # fmt: skip
    asked: list[tuple[str, str, int]] = []

    def measured(engine: SimpleNamespace, wider: SimpleNamespace, histories: object, *, users: int) -> SpeedUp:
        ratio = one if users == 1 else many
        asked.append((engine.precision, type(wider).__name__, users))
        return SpeedUp(users=users, ratio=ratio, low=ratio - 0.01, high=ratio + 0.01)

    monkeypatch.setattr("stages.engine_build.measure_speed_up", measured)
    inputs = {"surgery": surgered, "checkpoint": checkpoint}
    if kept:
        make(tmp_path / "int8", params("int8", int8_force=False), inputs)
    else:
        with pytest.raises(GateError, match=r"(?s)slower than a fp32 engine.*0\.90x.*int8_force=true") as caught:
            make(tmp_path / "int8", params("int8", int8_force=False), inputs)
        assert caught.value.exit_code == 5
    assert [users for _, _, users in asked] == ([1] if one > 1 else [1, 32])


def test_engines_are_really_timed_unless_forced(
    surgered: Artifact, checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("stages.engine_speed.BUDGET_S", 0.2)
    inputs = {"surgery": surgered, "checkpoint": checkpoint}
    with contextlib.suppress(GateError):  # 16 columns cost more to quantise than to multiply, if it can be told
        make(tmp_path / "timed", params("int8", int8_force=False), inputs)
    assert "int8, beside fp32 on one thread: " in capsys.readouterr().err
    make(tmp_path / "forced", params("int8", int8_force=True), inputs)
    assert "not timed (build-engine.int8_force)" in capsys.readouterr().err
