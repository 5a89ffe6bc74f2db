"""From seconds to figures: percentiles, intervals, the least work and memory, shares and ratios."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu.model import history_from_feeds
from stages.measure.cases import find_case
from stages.measure.ceiling import answer_flops, least_memory_mib
from stages.measure.check import Check
from stages.measure.contestants import Contestant
from stages.measure.interleave import Found, Measurement
from stages.measure.requests import draw_request
from stages.measure.rows import result_rows
from stages.measure.statistics import latency_ms, median_with_interval
from tests.models import TINY, random_model
from tests.stages.measure.requests import cell


def test_percentiles_are_milliseconds() -> None:
    assert latency_ms([0.001 * n for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    rng = np.random.default_rng(0)
    few, many = (rng.normal(2.0, 0.2, size=count) for count in (9, 900))
    (few_median, few_interval), (_, many_interval) = median_with_interval(few), median_with_interval(many)
    assert few_interval[0] <= few_median <= few_interval[1]
    assert many_interval[0] < 2.0 < many_interval[1]
    assert many_interval[1] - many_interval[0] < 0.3 * (few_interval[1] - few_interval[0])


@pytest.mark.parametrize("entry", ["retrieve", "rank"])
def test_the_work_of_one_event_is_what_pytorch_counts(entry: str) -> None:
    model = random_model()
    drawn = draw_request(TINY, cell(entry=entry, batch=1, length=1), np.random.default_rng(0), candidates=7)
    feeds = {name: torch.as_tensor(value) for name, value in drawn.feeds.items()}
    with FlopCounterMode(display=False) as counter:
        if entry == "rank":
            model.rank(history_from_feeds(feeds), feeds["candidate_ids"])
        else:
            model.retrieve(history_from_feeds(feeds))
    qk, hv = TINY.num_heads * TINY.qk_dim, TINY.num_heads * TINY.v_dim
    counted = float(counter.get_total_flops())
    if entry == "rank":
        # eager projects the last layer's event whole, of which queries and gate are not read; a candidate's score
        # with itself, and attention to one event, are element-wise and not counted
        counted += -2 * TINY.embedding_dim * (qk + hv) + (TINY.num_layers - 1) * 2 * hv
        counted += 7 * TINY.num_layers * 2 * (qk + hv + hv)
    else:
        counted += TINY.num_layers * 2 * hv  # attention to one event is element-wise
    assert answer_flops(TINY, [1], entry=entry, candidates=7) == counted


def test_padding_is_no_work_and_the_attention_is_half() -> None:
    one, two = (answer_flops(TINY, lengths, entry="retrieve", candidates=1) for lengths in ([20], [20, 1]))
    assert one < two < 1.5 * one
    model = random_model()
    drawn = draw_request(TINY, cell(batch=1), np.random.default_rng(0), candidates=1)
    with FlopCounterMode(display=False) as counter:
        model.retrieve(history_from_feeds({name: torch.as_tensor(value) for name, value in drawn.feeds.items()}))
    assert 0.5 * counter.get_total_flops() < one < counter.get_total_flops()


def test_the_least_memory_is_the_weights_once_and_one_layer_of_activations() -> None:
    config = find_case("reference-512").config
    assert config is not None
    weights = 4 * (12 * 1024 * 5 * 1024 + 50_001 * 1024)
    activations = 4 * (512 * (2048 + 4096 + 1024) + 50_000)
    assert least_memory_mib(config, weights, batch=1, length=512) == pytest.approx((weights + activations) / 2**20)
    twice = least_memory_mib(config, weights, batch=2, length=512)
    assert twice == pytest.approx((weights + 2 * activations) / 2**20)


def found_with(seconds: Mapping[str, list[float]], gflops: Mapping[str, list[float]], flops: float) -> Found:
    """A cell on which each runtime took so long in each round."""
    folder = Path("nowhere")
    right = Check(correct=True, max_abs_error=0.0, top10_overlap=1.0)
    measurements = []
    for runtime, values in seconds.items():
        contestant = Contestant(
            runtime=runtime,
            backend="b",
            precision="fp32",
            folder=folder,
            checkpoint=folder,  # type: ignore[arg-type]
        )
        item = Measurement(contestant=contestant, check=right, seconds=values, medians=values, peak_mib=24.0)
        measurements.append(item)
    return Found(
        cell=cell(batch=1), measurements=measurements, flops=flops, gflops=dict(gflops), products={"fp32": "X 1x2x3"}
    )


def test_the_share_is_of_the_products_of_the_same_rounds_and_ratios_are_round_by_round() -> None:
    found = found_with(
        {"torch-eager": [2.0, 4.0, 2.0], "onnx-plain": [1.0, 2.0, 1.0], "engine": [0.5, 1.0, 0.5]},
        {"fp32": [20.0, 10.0, 20.0]},  # the machine was slow in the second round, for all alike
        flops=9e9,
    )
    baselines = {item.contestant: 50.0 for item in found.measurements}
    rows = result_rows(found, TINY, threads=1, weights_bytes=2**20, baselines_mib=baselines)
    engine = rows[2]
    assert (engine["ratio_to_eager"], engine["ratio_to_plain"]) == (4.0, 2.0)
    assert rows[1]["ratio_to_plain"] == 1.0
    assert engine["share_of_ceiling"] == pytest.approx(9 / 0.5 / 20)
    assert (engine["ceiling_gflops"], engine["ceiling_product"]) == (20.0, "X 1x2x3")
    least = least_memory_mib(TINY, 2**20, batch=1, length=20)
    assert engine["memory_ratio"] == pytest.approx(24.0 / least, rel=0.01)


def test_a_share_of_more_than_the_ceiling_is_left_out() -> None:
    found = found_with({"torch-eager": [2.0], "engine": [0.5]}, {"fp32": [17.9]}, flops=9e9)
    rows = result_rows(
        found,
        TINY,
        threads=2,
        weights_bytes=2**20,
        baselines_mib=dict.fromkeys([m.contestant for m in found.measurements], 0.0),
    )
    assert [row["share_of_ceiling"] for row in rows] == [pytest.approx(9 / 2 / 17.9, rel=0.01), None]
    assert rows[1]["ceiling_gflops"] == 17.9
