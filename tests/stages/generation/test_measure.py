"""How fast vLLM generates: the loops it is measured beside are right, and the figures are kept and judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hstu.errors import UsageError
from hstu.model import History, history_from_feeds
from serving.slate import Slate, make_slates
from stages.generation import measure as generation
from stages.generation.ideal_loops import IdealLoop
from tests.models import TINY, random_histories, random_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


def _padded(users: int) -> History:
    feeds = random_histories(TINY, seed=3, lengths=[17] * users).feeds(TINY)
    return history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


def test_the_ideal_loops_make_the_slates_of_the_definition() -> None:
    model = random_model(TINY)
    loop, many, one = IdealLoop(model), _padded(5), _padded(1)
    assert torch.equal(loop.greedy(many, 6), make_slates(model, many, Slate(num_items=6)).item_ids[:, 0])
    beams, totals = loop.beams(one, 4, 8)
    expected = make_slates(model, one, Slate(num_items=4, method="beam", width=8))
    assert torch.equal(beams, expected.item_ids[0])
    assert expected.log_probabilities is not None
    torch.testing.assert_close(totals, expected.log_probabilities[0], rtol=0, atol=1e-4)


def test_a_ratio_is_judged_by_its_own_limit() -> None:
    start = {"LLM() after import, s": {"value": 4.0}, "server ready, s": {"value": 50.0}}
    report = {
        "parts": {"start": {"ratios": start}, "returning": {"ratios": {"cold / 96 of 100 cached": {"value": 4.5}}}}
    }
    rows = {row["ratio"]: (row["kept"], row["limit"]) for row in generation.rows(report)}
    assert rows == {
        "cold / 96 of 100 cached": (True, "≥ 4"),
        "LLM() after import, s": (True, "≤ 5"),
        "server ready, s": (False, "≤ 40"),
    }
    assert "server ready, s" in generation.text_table(report)
    assert generation.html_table(report).count("<tr>") == 1 + len(rows)
    assert generation.html_table(generation.read_report(Path("nowhere"))) == ""


def test_what_is_measured_for_these_sources_stays(tmp_path: Path) -> None:
    part = {"ratios": {"vllm / ideal loop": {"value": 0.5}}}
    found = {"schema": "generation/1", "sources": generation.sources_digest(), "parts": {"slates": part}}
    (tmp_path / generation.FILE).write_text(json.dumps(found))
    assert generation.run(tmp_path, ["slates"]) == found
    with pytest.raises(UsageError, match="no such part"):
        generation.run(tmp_path, ["everything"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_is_measured_and_none_is_lost(tmp_path: Path) -> None:
    """Looser than the aims, since a machine that does other things has fewer caches to offer."""
    report = generation.run(tmp_path, [part for part in generation.PARTS if part != "start"])
    for row in generation.rows(report):
        limit = float(row["limit"].split()[1])
        assert row["value"] > limit / 2 if row["limit"].startswith("≥") else row["value"] < limit * 1.5, row
