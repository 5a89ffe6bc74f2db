"""Estimates held against the model itself, on the meta device: nothing is allocated, however large the config."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hstu.artifact import encode_json
from hstu.config import TASKS, HSTUConfig
from hstu.errors import InputError, UsageError
from hstu.model import HSTU, History
from stages.devices import GPUS, device
from stages.estimate import USABLE, config_at, config_of, estimate, render
from stages.footprint import activation_bytes, components, kv_cache, request_flops, weight_bytes
from tests.models import TINY, random_model


def meta_research(dim: int, layers: int, heads: int, per_head: int, positions: int, rows: int) -> HSTUConfig:
    return HSTUConfig(
        num_items=rows - 1,
        embedding_dim=dim,
        num_layers=layers,
        num_heads=heads,
        qk_dim=per_head,
        v_dim=per_head,
        max_history=positions - 11,
    )


LARGE = config_of(embedding_dim=1024, num_layers=12, num_heads=16, num_items=50_000)
CONFIGS = {
    "ml-1m": meta_research(50, 2, 1, 50, 211, 3953),
    "ml-1m-large": meta_research(50, 8, 2, 25, 211, 3953),
    "ml-20m": meta_research(256, 4, 4, 64, 211, 131263),
    "ml-20m-large": meta_research(256, 16, 8, 32, 211, 131263),
    "amzn-books": meta_research(64, 4, 4, 16, 61, 695763),
    "amzn-books-large": meta_research(64, 16, 8, 8, 61, 695763),
    "large": LARGE,
    "tiny": TINY,
    "odd": HSTUConfig(
        num_items=7, embedding_dim=5, num_layers=3, num_heads=3, qk_dim=2, v_dim=7, max_history=9, max_generated=0,
        num_gap_buckets=4, tasks=("engagement",), head_dim=11,
    ),
}  # fmt: skip
RANKERS = {
    "tiny": TINY,
    "odd": CONFIGS["odd"],
    "reference": config_of(
        embedding_dim=64, num_layers=2, num_heads=2, num_items=3000, max_history=50, num_actions=5, num_gap_buckets=64,
        head_dim=64,
    ),
}  # fmt: skip


def on_meta(config: HSTUConfig) -> HSTU:
    with torch.device("meta"):
        return HSTU(config).eval()


def history(batch: int, length: int) -> History:
    ids, rows = (torch.zeros(shape, dtype=torch.int64, device="meta") for shape in ((batch, length), (batch,)))
    return History(item_ids=ids, timestamps=ids, lengths=rows, query_time=rows, actions=ids)


def candidate_ids(batch: int, count: int) -> torch.Tensor:
    return torch.zeros((batch, count), dtype=torch.int64, device="meta")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive together, without those of the model."""

    def __init__(self, model: HSTU) -> None:
        super().__init__()
        self.alive = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    parts = components(config)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in on_meta(config).parameters())
    assert len({part.name for part in parts}) == len(parts)


def test_what_the_large_config_truly_counts() -> None:
    """d=1024, 12 layers, 16 heads, 50 000 items, UVQK width 4·d: 0.114 billion, most of it the item table and UVQK."""
    assert LARGE.uvqk_dim == 4 * LARGE.embedding_dim
    found = estimate(LARGE)
    assert found["parameters"]["total"] == 114_350_536
    assert found["parameters"]["billions"] == 0.1144
    shares = {part["name"]: part["share"] for part in found["parameters"]["components"]}
    assert shares["item table"] + shares["uvqk projections"] > 0.88
    assert "114,350,536 parameters (0.1144 billion)" in render(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_retrieve_are_those_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    model = on_meta(config)
    for length in (2, config.max_history):  # over one event PyTorch multiplies without a matrix product
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.retrieve(history(3, length))
        flops = request_flops(config, "retrieve", length)
        assert counter.get_total_flops() == 3 * flops["eager"]
        assert 0 < flops["needed"] <= flops["engine"] <= flops["eager"]


@pytest.mark.parametrize("name", RANKERS)
def test_flops_of_rank_are_those_of_the_model(name: str) -> None:
    config = RANKERS[name]
    model = on_meta(config)
    for length, count in ((2, 2), (config.max_history, 33)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.rank(history(2, length), candidate_ids(2, count))
        assert counter.get_total_flops() == 2 * request_flops(config, "rank", length, count)["eager"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("tiny", "odd")])
def test_eager_memory_of_retrieve_is_near_what_is_alive(name: str) -> None:
    config = CONFIGS[name]
    model = on_meta(config)
    for batch, length in ((1, config.max_history), (8, config.max_history), (64, config.max_history // 4)):
        peak = PeakBytes(model)
        with torch.inference_mode(), peak:
            model.retrieve(history(batch, length))
        told = activation_bytes(config, "retrieve", batch, length, 0, None)
        assert 0.9 < told / peak.peak < 1.2, (batch, length, told, peak.peak)


def test_eager_memory_of_rank_is_near_what_is_alive() -> None:
    config = RANKERS["reference"]
    model = on_meta(config)
    for batch, length, count in ((1, 50, 16), (1, 50, 1000), (8, 12, 128), (64, 50, 128)):
        peak = PeakBytes(model)
        with torch.inference_mode(), peak:
            model.rank(history(batch, length), candidate_ids(batch, count))
        told = activation_bytes(config, "rank", batch, length, count, None)
        assert 0.9 < told / peak.peak < 1.2, (batch, length, count, told, peak.peak)


def test_weights_by_precision() -> None:
    parts = {part.name: part for part in components(RANKERS["reference"])}
    matrix, table = parts["uvqk projections"], parts["item table"]
    assert weight_bytes(matrix, "fp32") == 4 * matrix.parameters
    assert weight_bytes(matrix, "bf16") == weight_bytes(matrix, "fp16") == 2 * matrix.parameters
    assert weight_bytes(matrix, "int8") == matrix.parameters + 4 * 2 * 256  # a float32 scale a column, 2 layers
    wide = parts["output projections"]  # build-engine.int8_keep_wide names it
    assert weight_bytes(wide, "int8") == 4 * wide.parameters
    assert weight_bytes(table, "int8") == weight_bytes(table, "fp32") == 4 * 3001 * 64


def test_kv_cache_is_what_the_pages_hold() -> None:
    cache = kv_cache(LARGE, "fp16", length=200, block_size=16, free_bytes=2**30)
    page = torch.empty((1, LARGE.num_heads, 16, LARGE.qk_dim + LARGE.v_dim), dtype=torch.float16, device="meta")
    times = torch.empty((2, 16), dtype=torch.int64, device="meta")
    assert cache["bytes_per_block"] == LARGE.num_layers * page.nbytes + times.nbytes
    assert cache["blocks_per_user"] == 14  # 200 events and 10 generated items
    assert cache["users"] == 2**30 // cache["bytes_per_block"] // 14
    assert kv_cache(LARGE, "fp16", length=200, block_size=16, free_bytes=-1)["users"] == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["here", *GPUS])
def test_the_largest_batch_is_the_largest(name: str, precision: str) -> None:
    config = RANKERS["reference"]
    found = estimate(config, precision=precision, device_name=name, candidates=500)
    assert json.loads(json.dumps(found)) == found
    usable = int(device(name).memory_bytes * USABLE) if name != "here" else found["device"]["usable_bytes"]
    for entry in ("retrieve", "rank"):
        largest = found["entries"][entry]["max_batch"]["memory"]
        totals = [
            estimate(config, precision=precision, device_name=name, candidates=500, batch=batch)["entries"][entry]
            for batch in (largest, largest + 1)
        ]
        assert totals[0]["engine_bytes"]["total"] <= usable < totals[1]["engine_bytes"]["total"]
        assert (totals[0]["fits"], totals[1]["fits"]) == (True, False)
        assert (totals[0]["lower_bound_ms"] is None) == (name == "here")


def test_what_does_not_fit_is_said() -> None:
    huge = replace(LARGE, num_items=20_000_000)
    found = estimate(huge, device_name="l4", precision="fp32")
    assert not found["fits"]
    assert found["entries"]["retrieve"]["max_batch"]["memory"] == 0
    assert found["kv_cache"]["users"] == 0
    assert "does not fit" in render(found)
    assert estimate(LARGE, device_name="l4")["fits"]


def test_lower_bounds_follow_from_the_datasheet() -> None:
    found = estimate(LARGE, device_name="a100-80", precision="fp16", batch=4)["entries"]["retrieve"]
    bound = found["lower_bound_ms"]
    assert bound["compute"] == pytest.approx(4 * found["flops_per_request"]["needed"] / 312e12 * 1e3)
    assert bound["memory"] == pytest.approx(2 * 114_350_536 / 2039e9 * 1e3)
    assert bound["batch"] == max(bound["compute"], bound["memory"])


def test_a_folder_gives_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(encode_json(TINY.to_pretrained()))
    assert config_at(tmp_path) == TINY
    assert estimate(config_at(tmp_path))["parameters"]["total"] == sum(p.numel() for p in random_model().parameters())
    with pytest.raises(InputError):
        config_at(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"precision": "fp8"}, "no precision 'fp8'"),
        ({"device_name": "h10"}, "no entry for the GPU 'h10'"),
        ({"batch": 0}, "batch out of range"),
        ({"length": 0}, "length out of range"),
        ({"length": 21}, "length out of range"),
        ({"candidates": 5000}, "candidates out of range"),
        ({"block_size": 0}, "block size out of range"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        estimate(TINY, **changes)


def test_flags_that_do_not_fit_together() -> None:
    with pytest.raises(UsageError, match="no multiple of the heads"):
        config_of(embedding_dim=50, num_layers=2, num_heads=3, num_items=10)
    config = config_of(embedding_dim=50, num_layers=2, num_heads=3, num_items=10, qk_dim=4, v_dim=6, head_dim=8)
    assert (config.uvqk_dim, config.tasks) == (60, TASKS)
    with pytest.raises(InputError, match="num_heads must be positive"):
        config_of(embedding_dim=50, num_layers=2, num_heads=0, num_items=10)


@pytest.mark.parametrize(
    ("precision", "weights_file"), [("fp32", 1_058_048), ("fp16", 535_040), ("bf16", 535_040), ("int8", 898_304)]
)
def test_engine_weights_are_near_those_that_were_built(precision: str, weights_file: int) -> None:
    """`weights.bin` of engines built from this shape by surgery and build-engine with the parameters of params.yaml."""
    config = replace(RANKERS["reference"], num_actions=0)
    assert estimate(config, precision=precision)["weights_bytes"][precision] == pytest.approx(weights_file, rel=0.02)
