"""An int8 engine that costs time as well as quality is not kept in silence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from hstu.artifact import Artifact
from hstu.config import HSTUConfig
from hstu.errors import GateError
from hstu.signature import EntryName
from serving.engine import Array
from stages.engine_speed import SpeedUp, measure_speed_up
from tests.models import TINY, random_histories
from tests.stages.test_build_engine import make, params


class Sleeper:
    """An engine that takes a given time for each answer, and now and then much longer, as on a busy machine."""

    backend, precision = "sleep", "none"
    config: HSTUConfig = TINY

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls, self.lengths = seconds, 0, set[int]()

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert entry == "retrieve"
        self.calls += 1
        self.lengths.add(int(feeds["lengths"][0]))
        time.sleep(self.seconds * (20 if self.calls % 37 == 0 else 1))
        return {}

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.engine_speed.BUDGET_S", 0.4)


def test_the_ratio_is_that_of_the_times_whatever_disturbs_a_round() -> None:
    histories = random_histories(lengths=[3, 20, 1, 19, 2])
    fast, slow = Sleeper(0.0005), Sleeper(0.0015)
    up = measure_speed_up(fast, slow, histories, users=1)
    down = measure_speed_up(slow, fast, histories, users=3)
    assert 1.5 < up.low <= up.ratio <= up.high < 4.0
    assert down.high < 0.7
    assert (up.is_slower, down.is_slower) == (False, True)
    assert fast.lengths == slow.lengths <= {1, 2, 3, 19, 20}


def test_equal_engines_are_not_called_slower_for_noise() -> None:
    histories = random_histories(lengths=[5])
    assert not measure_speed_up(Sleeper(0.0005), Sleeper(0.0005), histories, users=2).high < 0.97
    assert not SpeedUp(users=1, ratio=0.98, low=0.9, high=1.01).is_slower
    assert SpeedUp(users=1, ratio=0.98, low=0.97, high=0.99).is_slower


def test_an_int8_engine_that_is_slower_is_refused_unless_forced(
    surgered: Artifact, checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On ONNX Runtime quantising 16 columns costs more than multiplying them."""
    inputs = {"surgery": surgered, "checkpoint": checkpoint}
    with pytest.raises(GateError, match=r"slower than a fp32 engine") as caught:
        make(tmp_path / "refused", params("int8", int8_force=False), inputs)
    assert caught.value.exit_code == 5
    assert "int8_force=true" in str(caught.value)
    make(tmp_path / "forced", params("int8", int8_force=True), inputs)
    assert "not timed (build-engine.int8_force)" in capsys.readouterr().err
