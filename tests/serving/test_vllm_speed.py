"""How fast vLLM serves, beside the loops a PyTorch user would write: interleaved rounds of one run, medians of ratios.

    OMP_NUM_THREADS=1 .venv/bin/pytest -m slow -s tests/serving/test_vllm_speed.py

prints a line for each figure. What is asserted is looser than the figures in docs/PERFORMANCE.md: it says that no path
has been lost, not how fast it is, since a machine that does other things has fewer caches to offer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.model import HSTU, History, history_from_feeds
from kernels.paged_hstu_attention.cpu import build
from serving.slate import Slate, greedy_slate
from serving.vllm_plugin.runtime import VllmRuntime
from tests.models import random_histories, random_model
from tests.serving.conftest import write_model_folder
from tests.serving.ideal_loops import IdealLoop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.timeout(900),
]
SHAPE = {"embedding_dim": 128, "num_layers": 4, "num_heads": 4, "qk_dim": 32, "v_dim": 32, "max_history": 100}


class Bench:
    """A model of d=128 and 4 layers behind vLLM and behind the ideal loops, on one thread."""

    def __init__(self, folder: Path, num_items: int) -> None:
        self.config = HSTUConfig(num_items=num_items, **SHAPE)  # type: ignore[arg-type]
        self.model: HSTU = random_model(self.config)
        write_model_folder(folder, self.model)
        (folder / "runtime").mkdir()
        build(folder / "runtime")
        self.runtime = VllmRuntime(folder, max_logprobs=256, additional_config={"hstu_attention": "kernel"})
        self.runtime.embed(self.histories(0, 1))
        torch.set_num_threads(1)
        self.ideal, self.unbiased = IdealLoop(self.model), IdealLoop(self.model, biases=False)
        self._seed = 1000

    def histories(self, seed: int, users: int, length: int = 100) -> Histories:
        return random_histories(self.config, seed=seed, lengths=[length] * users)

    def fresh(self, users: int) -> tuple[Histories, History]:
        """Users never seen before, so that nothing of them is cached, and the same padded."""
        self._seed += 1
        histories = self.histories(self._seed, users)
        feeds = histories.feeds(self.config)
        return histories, history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("speed"), 1000)
    yield bench
    bench.runtime.close()


def _ms(call: Callable[[], Any]) -> float:
    """CPU time of this process, in which one thread computes: the time on an idle machine, and fair on a busy one."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def _say(name: str, first: list[float], second: list[float]) -> float:
    """The median over rounds of first / second, printed with both medians."""
    ratio = float(np.median(np.array(first) / np.array(second)))
    print(f"\n{name}: {np.median(first):.1f} ms against {np.median(second):.1f} ms, ratio {ratio:.3f}", flush=True)
    return ratio


def test_slates_of_64_users(bench: Bench) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("vllm", "ideal", "ideal without biases", "recompute")}
    for round_ in range(13):
        histories, padded = bench.fresh(64)
        found = [_ms(lambda h=histories: bench.runtime.greedy_slates(h, 10))]  # type: ignore[misc]
        found.append(_ms(lambda p=padded: bench.ideal.greedy(p, 10)))  # type: ignore[misc]
        found.append(_ms(lambda p=padded: bench.unbiased.greedy(p, 10)))  # type: ignore[misc]
        found.append(_ms(lambda p=padded: greedy_slate(bench.model, p, 10)) if round_ in (1, 4, 7) else 0.0)  # type: ignore[misc]
        if round_:
            for name, value in zip(times, found, strict=True):
                times[name].append(value)
    histories, padded = bench.fresh(64)
    assert np.mean(bench.runtime.greedy_slates(histories, 10)[0] == bench.ideal.greedy(padded, 10).numpy()) > 0.99
    ideal = _say("64 users, 100 → 10 items: vLLM against the ideal loop", times["vllm"], times["ideal"])
    assert ideal < 1.3
    assert _say("  and against the ideal loop without biases", times["vllm"], times["ideal without biases"]) < 1.5
    measured = [index for index, value in enumerate(times["recompute"]) if value]
    full, vllm = ([times[name][index] for index in measured] for name in ("recompute", "vllm"))
    assert _say("  full recompute against vLLM", full, vllm) > 5


def test_a_returning_user(bench: Bench) -> None:
    cold, warm = [], []
    for _ in range(9):
        histories, _ = bench.fresh(64)
        earlier = histories.select(range(64))
        cold.append(_ms(lambda h=earlier: bench.runtime.greedy_slates(h, 1)))  # type: ignore[misc]
        warm.append(_ms(lambda h=earlier: bench.runtime.greedy_slates(h, 1)))  # type: ignore[misc]
    assert _say("64 users, 100 → 1 item: cold against 96 of 100 cached", cold[1:], warm[1:]) > 2.5


@pytest.mark.parametrize(("width", "num_items"), [(32, 10), (128, 10), (256, 10)])
def test_beams(bench: Bench, width: int, num_items: int) -> None:
    _beams(bench, width, num_items, rounds=15)


def test_beams_over_fifty_thousand_items(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "large", 50_000)
    for width in (32, 128, 256):
        _beams(bench, width, 10, rounds=5)
    bench.runtime.close()


def _beams(bench: Bench, width: int, num_items: int, *, rounds: int) -> None:
    slate = Slate(num_items=num_items, method="beam", width=width)
    ours, ideal = [], []
    for _ in range(rounds):
        histories, padded = bench.fresh(1)
        ours.append(_ms(lambda h=histories: bench.runtime.slates(h, slate)))  # type: ignore[misc]
        ideal.append(_ms(lambda p=padded: bench.ideal.beams(p, num_items, width)))  # type: ignore[misc]
    ids, totals = bench.ideal.beams(padded, num_items, width)
    got = bench.runtime.slates(histories, slate)
    assert got.log_probabilities is not None
    torch.testing.assert_close(got.log_probabilities[0], totals, rtol=0, atol=1e-4)
    assert float((got.item_ids[0] == ids).all(1).float().mean()) > 0.9
    name = f"{width} beams × {num_items}, {bench.config.num_items} items: search against the ideal beam loop"
    assert _say(name, ours[1:], ideal[1:]) < 1.5


def test_beams_against_vllms_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM.beam_search`, which is refused otherwise, takes ids without times: the same work, another answer."""
    from vllm.sampling_params import BeamSearchParams

    monkeypatch.setattr("serving.vllm_plugin.constraints.is_a_beams_step", lambda params: False)
    slate = Slate(num_items=10, method="beam", width=128)
    engine = bench.runtime._engine("generate")
    ours, theirs = [], []
    for _ in range(2):
        histories, _ = bench.fresh(1)
        ours.append(_ms(lambda h=histories: bench.runtime.slates(h, slate)))  # type: ignore[misc]
        prompt = [{"prompt_token_ids": histories.item_ids.tolist()}]
        with torch.compiler.set_stance("force_eager"):
            theirs.append(
                _ms(lambda p=prompt: engine.beam_search(p, BeamSearchParams(beam_width=128, max_tokens=10)))  # type: ignore[misc]
            )
    assert _say("128 beams × 10: LLM.beam_search against our search", theirs[1:], ours[1:]) > 15
