"""The attention functions against eager PyTorch, called directly, in fp32 and in fp16."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from hstu.model import HSTUAttention
from serving.engines.onnxruntime import session_options
from stages.passes import functions
from stages.passes.lint import lint
from tests.models import TINY, tiny_config

HV, HQK = TINY.num_heads * TINY.v_dim, TINY.num_heads * TINY.qk_dim
INTEGERS = {"buckets", "lengths", "position", "cached_lengths"}
TOLERANCE = {TensorProto.FLOAT: 2e-6, TensorProto.FLOAT16: 1e-2}


def attention(seed: int = 0) -> HSTUAttention:
    torch.manual_seed(seed)
    module = HSTUAttention(TINY)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.5)
    return module.requires_grad_(False)


def model_of(name: str, formals: list[str], dtype: int = TensorProto.FLOAT, **attributes: int) -> onnx.ModelProto:
    """A model that only calls the function."""
    node = helper.make_node(
        name, formals, ["out"], name="call", domain="hstu", **functions.attributes(TINY), **attributes
    )
    inputs = [helper.make_tensor_value_info(f, TensorProto.INT64 if f in INTEGERS else dtype, None) for f in formals]
    graph = helper.make_graph([node], "call", inputs, [helper.make_tensor_value_info("out", dtype, None)])
    return helper.make_model(
        graph,
        functions=[functions.attention_function(name, TINY, 20)],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("hstu", 1)],
        ir_version=10,
    )


def run(name: str, feeds: dict[str, Any], dtype: int, **attributes: int) -> np.ndarray[Any, Any]:
    model = model_of(name, list(feeds), dtype, **attributes)
    assert lint(model) == []
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads=1))
    float_type = helper.tensor_dtype_to_np_dtype(dtype)
    arrays = {k: np.asarray(v if k in INTEGERS else v.numpy().astype(float_type)) for k, v in feeds.items()}
    got = session.run(None, arrays)[0]
    assert got.dtype == float_type
    return got.astype(np.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 17, TINY.max_history])
def test_history(length: int, dtype: int) -> None:
    module = attention()
    uvqk = torch.randn(3, length, TINY.uvqk_dim)
    buckets = torch.randint(0, 129, (3, length, length))
    lengths = torch.tensor([length, max(1, length // 2), 0])
    feeds = {"uvqk": uvqk, "buckets": buckets, "lengths": lengths}
    tables = {"position_bias": module.position_bias.data, "time_bias": module.time_bias.data}
    got = run(functions.HISTORY, feeds | tables, dtype)
    np.testing.assert_allclose(got, module(uvqk, buckets, lengths), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 17])
def test_queries_are_rows_of_the_history(length: int, dtype: int) -> None:
    module = attention(1)
    uvqk = torch.randn(2, length, TINY.uvqk_dim)
    buckets = torch.randint(0, 129, (2, length, length))
    lengths = torch.tensor([length, length])
    u, v, q, k = uvqk.split([HV, HV, HQK, HQK], dim=-1)
    rows = torch.tensor([[length - 1, 0], [length // 2, length - 1]])

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[b, rows[b]] for b in range(2)])

    feeds = {"uq": pick(torch.cat([u, q], -1)), "kv": torch.cat([k, v], -1), "buckets": pick(buckets), "position": rows}
    tables = {"position_bias": module.position_bias.data, "time_bias": module.time_bias.data}
    got = run(functions.QUERIES, feeds | tables, dtype)
    np.testing.assert_allclose(got, pick(module(uvqk, buckets, lengths)), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole", [True, False])
def test_candidates_read_v_and_k_where_the_offsets_say(whole: bool, dtype: int) -> None:
    module = attention(2)
    uvqk, candidates = torch.randn(3, 9, TINY.uvqk_dim), torch.randn(3, 4, TINY.uvqk_dim)
    buckets = torch.randint(0, 129, (3, 1, 9))
    lengths = torch.tensor([9, 4, 0])
    _, v, _, k = uvqk.split([HV, HV, HQK, HQK], dim=-1)
    history = uvqk if whole else torch.cat([k, v], -1)
    offsets = {"v_offset": HV, "k_offset": 2 * HV + HQK} if whole else {"v_offset": HQK, "k_offset": 0}
    feeds = {"history": history, "candidates": candidates, "buckets": buckets, "lengths": lengths}
    tables = {"position_bias": module.position_bias.data, "time_bias": module.time_bias.data}
    got = run(functions.CANDIDATES, feeds | tables, dtype, **offsets)
    position = lengths.unsqueeze(1)
    expected = module.candidates(uvqk, candidates, buckets, torch.zeros_like(position), position)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE[dtype])


def cached(dtype: int, *, past: int, new: int) -> tuple[HSTUAttention, dict[str, Any], torch.Tensor]:
    """A module, what stands before its layer 1 (NaN after the end of each cache), and what `extend` makes of it."""
    module = attention(3)
    first, lengths = torch.tensor([past, past // 2, 0]), torch.tensor([new, max(1, new // 2), 1])
    cache = torch.randn(3, 2, past, HQK + HV)
    cache[torch.arange(past).expand(3, -1)[:, None].expand(3, 2, -1) >= first.view(3, 1, 1)] = torch.nan
    feeds = {
        "uvqk": torch.randn(3, new, TINY.uvqk_dim),
        "cache": cache,
        "buckets": torch.randint(0, 129, (3, new, past + new)),
        "cached_lengths": first,
        "lengths": lengths,
    }
    expected = module.extend(feeds["uvqk"], cache[:, 1], feeds["buckets"], first, lengths)
    return module, feeds, expected


def tables_of(module: HSTUAttention) -> dict[str, torch.Tensor]:
    return {"position_bias": module.position_bias.data, "time_bias": module.time_bias.data}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("past", "new"), [(1, 1), (13, 1), (1, 19), (11, 9)])
def test_extend_reads_its_layer_up_to_the_end(past: int, new: int, dtype: int) -> None:
    module, feeds, expected = cached(dtype, past=past, new=new)
    got = run(functions.EXTEND, feeds | tables_of(module), dtype, layer=1)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("past", "new"), [(1, 1), (13, 1), (11, 9)])
def test_extend_queries_are_rows_of_extend(past: int, new: int, dtype: int) -> None:
    module, feeds, expected = cached(dtype, past=past, new=new)
    rows = torch.stack([feeds["lengths"] - 1, torch.zeros(3, dtype=torch.int64)], dim=1)
    u, v, q, k = feeds["uvqk"].split([HV, HV, HQK, HQK], dim=-1)

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[b, rows[b]] for b in range(3)])

    inputs = {"uq": pick(torch.cat([u, q], -1)), "kv": torch.cat([k, v], -1), "cache": feeds["cache"]}
    inputs |= {"buckets": pick(feeds["buckets"]), "cached_lengths": feeds["cached_lengths"], "position": rows}
    got = run(functions.EXTEND_QUERIES, inputs | tables_of(module), dtype, layer=1)
    np.testing.assert_allclose(got, pick(expected), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", functions.ATTRIBUTES)
def test_definition_depends_on_shape_alone(name: str) -> None:
    first = functions.attention_function(name, TINY, 20)
    assert first == functions.attention_function(name, tiny_config(num_items=5, num_layers=9), 20)
    assert first != functions.attention_function(name, tiny_config(v_dim=4), 20)
    assert list(first.attribute) == list(functions.ATTRIBUTES[name])
