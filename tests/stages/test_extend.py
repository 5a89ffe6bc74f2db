"""The compiled entry `extend`: the answers of a full recompute, on every shape, at every precision, for good."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hstu.artifact import Artifact, encode_json
from hstu.data.histories import Histories
from hstu.errors import GateError
from hstu.model import HSTU
from hstu.signature import cache_spec, entry_names
from serving.engine import Array, EngineSpec, check_feeds
from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.engines.torch import TorchEngine
from serving.self_check import check_independent, check_repeatable
from serving.user_state import Origin, StatefulEngine, extend, start
from stages import entry_check, onnx_files, quality, surgery
from stages.passes import functions
from stages.precision.recipe import Recipe, lower_entry, write_models
from stages.returning import part, returning_answers
from tests.models import TINY, random_histories, random_model, tiny_config, write_checkpoint
from tests.stages.conftest import export, operate

LAST = TINY.num_layers - 1


def open_folder(folder: Path, config: Any, precision: str = "fp32") -> OnnxRuntimeEngine:
    files = {name: f"{name}.onnx" for name in entry_names(config)}
    spec = EngineSpec(backend="onnxruntime", precision=precision, entries=files, executed=True)
    return OnnxRuntimeEngine(folder, spec, threads=1)


@pytest.fixture(scope="module")
def engine(surgered: Artifact) -> OnnxRuntimeEngine:
    return open_folder(surgered.path, TINY)


def lowered(surgered: Artifact, precision: str, folder: Path) -> OnnxRuntimeEngine:
    """An engine of that precision, as build-engine makes it for ONNX Runtime."""
    recipe = Recipe(
        precision=precision,
        around="fp32",
        float_keep_wide=("logits",),
        int8_keep_wide=("output", "logits"),
        method="percentile",
        percentile=99.99,
    )
    calibration = random_histories(TINY, num_users=8, seed=1)
    names = entry_names(TINY)
    models = {name: lower_entry(surgered.path, name, TINY, recipe, calibration, emulated=True)[0] for name in names}
    write_models(models, folder)
    (folder / "config.json").write_bytes(encode_json(TINY.to_pretrained()))
    return open_folder(folder, TINY, precision)


def cached_feeds(engine: Any, histories: Histories, cached: list[int]) -> dict[str, Array]:
    """Inputs of `extend` with caches that the engine itself made, NaN after the end of each."""
    feeds = entry_check.split_feeds(histories.feeds(engine.config), np.array(cached))
    shape = len(cached), *cache_spec(engine.config).shape(feeds["cached_timestamps"].shape[1])
    rows = entry_check.cache_from(histories.feeds(engine.config), shape, partial(engine.run, "extend"))
    after = np.arange(shape[2]) >= np.array(cached)[:, None]
    return feeds | {"cache": np.where(after[:, None, :, None], np.float32(np.nan), rows)}


@pytest.mark.parametrize(
    ("lengths", "cached"),
    [
        ([1], [0]),
        ([20], [19]),
        ([20], [0]),
        ([2, 20, 9, 1, 15], [0, 19, 3, 0, 14]),
        ([20, 20, 20], [1, 10, 0]),
        ([7, 8, 9, 10, 11, 12, 13, 14], [6, 0, 8, 1, 10, 11, 2, 13]),
    ],
)
def test_extend_equals_a_full_recompute(engine: Any, lengths: list[int], cached: list[int]) -> None:
    histories = random_histories(TINY, lengths=lengths, seed=len(lengths))
    feeds = cached_feeds(engine, histories, cached)
    check_feeds(TINY, "extend", feeds)
    got = engine.run("extend", feeds)
    for runtime in (engine, TorchEngine(random_model(), threads=1)):
        whole = runtime.run("retrieve", histories.feeds(TINY))
        assert entry_check.worst_error(whole, got) <= 1e-5
    eager = TorchEngine(random_model(), threads=1).run("extend", feeds)
    assert entry_check.worst_error(eager, got) <= 1e-5


def test_what_stands_after_an_end_does_not_matter(engine: Any) -> None:
    feeds = entry_check.random_feeds(TINY, "extend", [5, 20, 12], seed=4)
    got = engine.run("extend", feeds)
    after = np.arange(feeds["cache"].shape[2]) >= feeds["cached_lengths"][:, None]
    new = np.arange(feeds["item_ids"].shape[1]) >= feeds["lengths"][:, None]
    assert after.any()
    assert new.any()
    other = {name: values.copy() for name, values in feeds.items()}
    other["cache"] = np.where(after[:, None, :, None], np.float32(1e30), feeds["cache"])
    other["cached_timestamps"][after] = -(2**62)
    other["item_ids"][new], other["actions"][new], other["timestamps"][new] = 7, 3, 2**62
    again = engine.run("extend", other)
    for name, values in got.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    assert not got["cache_rows"].transpose(0, 2, 1, 3)[new].any()


def test_padding_and_company_change_nothing(engine: Any) -> None:
    feeds = entry_check.random_feeds(TINY, "extend", [5, 20, 12, 1], seed=5)
    assert check_independent(engine, "extend", feeds, limit=1e-6) <= 1e-6
    check_repeatable(engine, "extend", feeds)
    wide = {name: values for name, values in feeds.items() if name not in ("cache", "cached_timestamps")}
    wide["cache"] = np.pad(feeds["cache"], ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=np.nan)
    wide["cached_timestamps"] = np.pad(feeds["cached_timestamps"], ((0, 0), (0, 3)))
    assert entry_check.worst_error(engine.run("extend", feeds), engine.run("extend", wide)) <= 1e-6


def test_thirty_visits_do_not_drift(tmp_path: Path) -> None:
    config = tiny_config(max_history=40, tasks=(), head_dim=0)
    model = random_model(config, seed=2)
    exported = export(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "export-onnx")
    engine = open_folder(operate(exported, tmp_path / "surgery").path, config)
    stateful = StatefulEngine(engine=engine, origin=Origin(checkpoint="", engine="fp32", precision="fp32"))
    histories = random_histories(config, lengths=[46, 33, 46], seed=9)
    visits = [np.array([2 + visit, 1 + visit, 2 + visit + visit // 3]) for visit in range(31)]
    states, _ = start(stateful, part(histories, visits[0] * 0, visits[0]))
    for before, after in itertools.pairwise(visits):
        states, answers = extend(stateful, states, part(histories, before, after))
        newest = part(histories, after * 0, after).newest(config.max_history)
        whole = TorchEngine(model, threads=1).run("retrieve", newest.feeds(config))
        assert entry_check.worst_error(whole, answers) <= 1e-5
    assert [(state.recomputed, state.forgotten) for state in states] == [(0, 0), (0, 0), (1, 2)]


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 5e-3), ("bf16", 3e-2), ("int8", 1e-5)])
def test_every_precision_gives_its_own_answers(
    surgered: Artifact, tmp_path: Path, precision: str, limit: float
) -> None:
    engine = lowered(surgered, precision, tmp_path)
    histories = random_histories(TINY, lengths=[20, 4, 13, 1], seed=6)
    whole = engine.run("retrieve", histories.feeds(TINY))
    returning = returning_answers(engine, histories)
    assert np.abs(whole["user_embedding"] - returning["user_embedding"]).max() <= limit
    figures = quality.measure(engine, TorchEngine(random_model(), threads=1), histories)
    assert figures["max_abs_error"]["extend_to_retrieve"] <= limit
    assert figures["max_abs_error"]["extend_to_eager"] <= 0.1


def test_int8_takes_the_scales_of_retrieve(surgered: Artifact) -> None:
    recipe = Recipe(
        precision="int8",
        around="fp32",
        float_keep_wide=(),
        int8_keep_wide=("output", "logits"),
        method="max",
        percentile=100.0,
    )
    histories = random_histories(TINY, num_users=6)
    facts = {
        name: lower_entry(surgered.path, name, TINY, recipe, histories, emulated=True)[1]  # type: ignore[arg-type]
        for name in ("retrieve", "extend")
    }
    scales = {name: sorted(s["scale"] for s in found["scales"].values()) for name, found in facts.items()}
    assert scales["extend"] == scales["retrieve"]


def test_it_costs_no_weights(surgered: Artifact, tmp_path: Path) -> None:
    without = onnx_files.read_models(surgered.path, [name for name in entry_names(TINY) if name != "extend"])
    onnx_files.write_models(without, tmp_path)
    assert (tmp_path / onnx_files.WEIGHTS).stat().st_size == surgered.file(onnx_files.WEIGHTS).stat().st_size


def test_its_layers_call_two_functions(surgered: Artifact) -> None:
    model = onnx.load(surgered.file("extend.onnx"), load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == functions.DOMAIN]
    assert [(onnx_files.scope(n.name), n.op_type) for n in nodes] == [
        ("layers.0.extend_attention", functions.EXTEND),
        (f"layers.{LAST}.extend_attention", functions.EXTEND_QUERIES),
    ]
    for layer, node in enumerate(nodes):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["layer"] == layer
        assert node.input[-2] == f"layers.{layer}.attention.position_bias"
        assert {"cache", "cached_lengths"} <= set(node.input)  # whole, as the graph gets it
    left = [n for n in model.graph.node if n.op_type == "Gather" and "cache" in n.input]
    assert left == []


def test_another_layers_cache_is_not_taken_for_this_ones(exported: Artifact) -> None:
    import onnx_graphsurgeon as gs

    from stages.passes import attention_function

    graph = gs.import_onnx(onnx_files.read_models(exported.path, ["extend"])["extend"])
    first, second = (n for n in graph.nodes if n.op == "Gather" and n.inputs[0].name == "cache")
    first.inputs[1], second.inputs[1] = second.inputs[1], first.inputs[1]
    with pytest.raises(GateError, match="which is not one of its inputs"):
        attention_function.apply(graph, TINY)


def test_a_pass_that_reads_dead_rows_is_refused(
    exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.passes import function_bodies

    name = functions.EXTEND
    formals, body = function_bodies.BODIES[name]
    careless = body.replace("Where(alive_rows, cached, nothing)", "Identity(cached)")
    assert careless != body
    careless = (
        careless.replace("nothing = CastLike(nothing_wide, cached)", "")
        .replace("nothing_wide = Constant<value_float = 0.0>()", "")
        .replace("alive_rows = Unsqueeze(alive, last_axis)", "")
    )
    monkeypatch.setitem(function_bodies.BODIES, name, (formals, careless))
    with pytest.raises(GateError, match=r"(?s)pass attention_function.*'extend'.*max abs error inf"):
        operate(exported, tmp_path / "wrong", ("attention_function",))


def test_last_position_projects_the_last_event_alone(surgered: Artifact) -> None:
    model = ir.load(surgered.file("extend.onnx"))
    names = set(model.graph.initializers)
    weight = f"layers.{LAST}.uvqk.weight.transposed"
    assert {f"{weight}.uq", f"{weight}.kv"} <= names
    assert weight not in names


def test_the_gate_sees_an_engine_that_forgets(surgered: Artifact) -> None:
    class Forgetful:
        """Gives rows of zeros to keep."""

        backend, precision, config = "forgetful", "fp32", TINY

        def __init__(self, engine: OnnxRuntimeEngine) -> None:
            self.engine = engine

        def run(self, entry: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
            answers = self.engine.run(entry, feeds)
            return {name: values * (name != "cache_rows") for name, values in answers.items()}

        def close(self) -> None:
            self.engine.close()

    from hstu.tolerances import TOLERANCES

    engine = Forgetful(open_folder(surgered.path, TINY))
    reference = TorchEngine(random_model(), threads=1)
    figures = quality.measure(engine, reference, random_histories(TINY, lengths=[20, 15], seed=2))
    failures = quality.failures(figures, TOLERANCES["fp32"])
    assert [line.split()[4] for line in failures] == ["extend_to_eager", "extend_to_retrieve"]


def test_all_passes_may_be_left_out_alone(variant: tuple[HSTU, Artifact], tmp_path: Path) -> None:
    model, exported = variant
    artifact = operate(exported, tmp_path / "surgery", tuple(n for n in surgery.MODULES if n != "last_position"))
    histories = random_histories(model.config, lengths=[3, 20], seed=3)
    answers = returning_answers(open_folder(artifact.path, model.config), histories)
    whole = TorchEngine(model, threads=1).run("retrieve", histories.feeds(model.config))
    assert entry_check.worst_error(whole, answers) <= 1e-5
