"""The OpenVINO engine against eager PyTorch: every precision, every corner of the shapes, times in any unit."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import Type

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError, MissingBackendError
from hstu.signature import EntryName, entry_names
from hstu.tolerances import TOLERANCES
from kernels.cpu.library import LIBRARY, OPERATIONS
from serving.engine import Array, EngineSpec, check_feeds, open_engine, read_spec
from serving.engines import openvino_products
from serving.engines.openvino import OpenVinoEngine
from serving.engines.openvino_ops import KernelOp
from serving.engines.openvino_plain import PlainOpenVinoEngine
from serving.engines.openvino_products import takes
from serving.engines.torch import TorchEngine
from serving.self_check import check_independent, check_repeatable
from stages import onnx_files, surgery
from stages.entry_check import check_batches, random_feeds, worst_error
from stages.exporter import export_entry
from stages.precision.recipe import Recipe, lower_entry, write_models
from tests.models import TINY, TINY_RESEARCH, random_histories, random_model

WIDE_CONFIG = HSTUConfig(  # heads and widths that fill no vector, more positions than a block of keys
    num_items=700, embedding_dim=40, num_layers=3, num_heads=3, qk_dim=10, v_dim=12, max_history=150
)
CONFIGS = {"tiny": TINY, "research": TINY_RESEARCH, "wide": WIDE_CONFIG, "padded": TINY}
MODELS = ("tiny", "research", "wide")  # "padded" is "tiny" with padded rows, as "research" has them
PADDED = tuple(name for name in surgery.MODULES if name != "packing")
PRECISIONS = ("fp32", "bf16", "int8", "int8-all")

Folders = Callable[[str, str], Path]


def write_surgered(config: HSTUConfig, folder: Path, passes: tuple[str, ...] = tuple(surgery.MODULES)) -> None:
    """`folder` holds the surgered graphs of the random model of a config."""
    model, names = random_model(config), entry_names(config)
    plain = folder / "plain"
    plain.mkdir(parents=True)
    with onnx_files.open_weights(plain) as writer:
        for name in names:
            onnx_files.write_model(export_entry(model, name, opset=20, writer=writer), plain, name, writer)
    models = onnx_files.read_models(plain, names)
    for pass_name in passes:
        models = {name: surgery.apply_pass(pass_name, graph, config) for name, graph in models.items()}
    onnx_files.write_models(models, folder)
    (folder / "config.json").write_text(json.dumps(config.to_pretrained()))


def write_spec(folder: Path, config: HSTUConfig, precision: str) -> None:
    entries = {name: f"{name}.onnx" for name in entry_names(config)}
    spec = {"backend": "openvino", "precision": precision, "entries": entries, "executed": True}
    (folder / "engine.json").write_text(json.dumps(spec))


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory, library_file: Path) -> Folders:
    """The engine folder of a config at a precision ("int8-all": W_o in int8 as well), made once."""
    root = tmp_path_factory.mktemp("openvino")

    def make(name: str, precision: str) -> Path:
        config, source, folder = CONFIGS[name], root / name, root / f"{name}-{precision}"
        if not source.exists():
            write_surgered(config, source, PADDED if name in ("research", "padded") else tuple(surgery.MODULES))
        if not folder.exists():
            folder.mkdir()
            for file in (LIBRARY, OPERATIONS):
                shutil.copyfile(library_file.with_name(file), folder / file)
            shutil.copyfile(source / "config.json", folder / "config.json")
            recipe = Recipe(
                precision=precision[:4],
                around="bf16",
                float_keep_wide=("logits",),
                int8_keep_wide=("logits",) if precision == "int8-all" else ("output", "logits"),
                method="percentile",
                percentile=99.99,
            )
            histories = random_histories(config, num_users=24)
            lowered = {
                n: lower_entry(source, n, config, recipe, histories, emulated=False)[0] for n in entry_names(config)
            }
            write_models(lowered, folder)
            write_spec(folder, config, precision[:4])
        return folder

    return make


@pytest.fixture(scope="session")
def eager() -> Mapping[str, TorchEngine]:
    return {name: TorchEngine(random_model(config)) for name, config in CONFIGS.items()}


def batches(config: HSTUConfig, name: EntryName) -> list[dict[str, Array]]:
    run = partial(TorchEngine(random_model(config)).run, name)
    return list(check_batches(config, name, seed=5, run=run))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_eager(
    engine_folder: Folders, eager: Mapping[str, TorchEngine], model: str, precision: str
) -> None:
    engine = open_engine(engine_folder(model, precision), threads=1)
    config, limit = CONFIGS[model], TOLERANCES[precision[:4]].max_abs_error
    assert (engine.backend, engine.precision, engine.config) == ("openvino", precision[:4], config)
    for name in entry_names(config):
        for feeds in batches(config, name):
            check_feeds(config, name, feeds)
            expected = eager[model].run(name, feeds)
            if precision != "fp32":
                expected.pop("cache_rows", None)  # of any size
            assert worst_error(expected, engine.run(name, feeds)) <= limit
    engine.close()


@pytest.mark.parametrize("factor", [1000, 1_000_000])
def test_times_of_any_unit_are_exact(engine_folder: Folders, eager: Mapping[str, TorchEngine], factor: int) -> None:
    """Milliseconds and microseconds since 1970 fit no int32."""
    engine = open_engine(engine_folder("tiny", "fp32"), threads=1)
    for name in entry_names(TINY):
        for feeds in batches(TINY, name):
            feeds["timestamps"] *= factor
            feeds["query_time"] *= factor
            assert worst_error(eager["tiny"].run(name, feeds), engine.run(name, feeds)) <= 1e-6


def test_what_stands_after_the_end_of_a_history_does_not_matter(engine_folder: Folders) -> None:
    engine = open_engine(engine_folder("tiny", "fp32"), threads=1)
    for name in entry_names(TINY):
        feeds = batches(TINY, name)[1]
        expected = engine.run(name, feeds)
        outside = np.arange(feeds["item_ids"].shape[1]) >= feeds["lengths"][:, None]
        for poisoned, value in (("item_ids", TINY.num_items), ("actions", 1), ("timestamps", 2**50)):
            feeds[poisoned][outside] = value
        assert worst_error(expected, engine.run(name, feeds)) <= 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["tiny", "wide"])
def test_answers_depend_on_no_one_else_and_on_no_earlier_call(
    engine_folder: Folders, model: str, precision: str
) -> None:
    engine = open_engine(engine_folder(model, precision), threads=1)
    # Rounding to int8 can turn a difference in the last bit of a float into a step of the scale.
    limit = {"fp32": 1e-6, "bf16": 4e-3, "int8": 4e-3}[precision[:4]]
    for name in entry_names(CONFIGS[model]):
        for feeds in batches(CONFIGS[model], name):
            check_repeatable(engine, name, feeds)
            check_independent(engine, name, feeds, limit=limit)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operations_in_python_take_the_place_of_others_openvinos(
    engine_folder: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """The compiled ones go with one version; the answers are the same, and the log says what happened."""
    native = open_engine(engine_folder("tiny", precision), threads=1)
    folder = Path(shutil.copytree(engine_folder("tiny", precision), tmp_path / "engine"))
    (folder / OPERATIONS).write_bytes(b"\x7fELF for another OpenVINO")
    with caplog.at_level("WARNING"):
        other = open_engine(folder, threads=1)
    assert isinstance(native, OpenVinoEngine)
    assert isinstance(other, OpenVinoEngine)
    assert (native.operations.name, other.operations.name) == ("native", "python")
    assert "does not go with OpenVINO" in caplog.text
    for name in entry_names(TINY):
        for feeds in batches(TINY, name):
            answer, expected = other.run(name, feeds), native.run(name, feeds)
            assert all(np.array_equal(answer[output], expected[output]) for output in expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_without_padding_answer_as_padded_ones(engine_folder: Folders, precision: str) -> None:
    packed, padded = (open_engine(engine_folder(name, precision), threads=1) for name in ("tiny", "padded"))
    assert isinstance(packed, OpenVinoEngine)
    assert "packed_rows" in [port.any_name for port in packed.compiled["retrieve"].inputs]
    limit = {"fp32": 1e-6, "bf16": 4e-3, "int8": 4e-3}[precision[:4]]  # bits of rows are equal, not of products
    for name in entry_names(TINY):
        mixed = [random_feeds(TINY, name, lengths, seed=9) for lengths in ([1, 20, 2, 3], [5, 1], [20] * 3)]
        for feeds in [*batches(TINY, name), *mixed]:
            expected = padded.run(name, feeds)
            if precision != "fp32":
                expected.pop("cache_rows", None)  # of any size
            assert worst_error(expected, packed.run(name, feeds)) <= limit


def test_no_one_in_a_batch_has_events(engine_folder: Folders, eager: Mapping[str, TorchEngine]) -> None:
    engine = open_engine(engine_folder("tiny", "fp32"), threads=1)
    for name in ("retrieve", "rank"):
        for lengths in ([0], [0, 0, 0]):
            feeds = random_feeds(TINY, name, lengths) | {
                key: np.zeros((len(lengths), 4), dtype=np.int64) for key in ("item_ids", "timestamps", "actions")
            }
            assert worst_error(eager["tiny"].run(name, feeds), engine.run(name, feeds)) <= 1e-6


def test_two_threads_answer_as_one(engine_folder: Folders) -> None:
    folder = engine_folder("wide", "fp32")
    one, two = open_engine(folder, threads=1), open_engine(folder, threads=2)
    for feeds in batches(WIDE_CONFIG, "retrieve"):
        assert worst_error(one.run("retrieve", feeds), two.run("retrieve", feeds)) <= 1e-6


def test_requests_from_many_threads_do_not_mix(engine_folder: Folders) -> None:
    engine = open_engine(engine_folder("tiny", "fp32"), threads=2)
    feeds = [random_feeds(TINY, "retrieve", [1 + seed % 20, 3], seed=seed) for seed in range(8)]
    expected = [engine.run("retrieve", f) for f in feeds]
    errors: list[float] = []

    def ask(index: int) -> None:
        for _ in range(5):
            errors.append(worst_error(expected[index], engine.run("retrieve", feeds[index])))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(feeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) == 0.0


def test_the_kernels_are_in_the_graph(engine_folder: Folders) -> None:
    """Otherwise every other test would pass on OpenVINO's own operations."""
    engine = open_engine(engine_folder("wide", "int8-all"), threads=1)
    assert isinstance(engine, OpenVinoEngine)
    nodes = engine.compiled["retrieve"].get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].value for node in nodes]
    products = 2 * WIDE_CONFIG.num_layers + 1  # W_uvqk and W_o of all layers; the last W_uvqk is two
    assert kinds.count("Reference") == WIDE_CONFIG.num_layers + 1  # layers, or attention alone, and the item head
    assert not {"TopK", "Softmax"} & set(kinds)
    if takes(engine.library.isa, Type.i8):
        assert not {"FullyConnected", "MatMul", "MVN", "FakeQuantize"} & set(kinds)
    else:
        kept = [node for node in nodes if "i8" in node.get_rt_info()["primitiveType"].value and "FullyConn" in str(
            node.get_rt_info()["layerType"].value)]  # fmt: skip
        assert len(kept) == products


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvinos_own_products_take_the_place_of_ours(
    engine_folder: Folders, eager: Mapping[str, TorchEngine], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As on a CPU for which our kernel has no fast form."""
    monkeypatch.setattr(openvino_products, "takes", lambda isa, compute: False)
    engine = open_engine(engine_folder("wide", precision), threads=1)
    limit = TOLERANCES[precision[:4]].max_abs_error
    for name in entry_names(WIDE_CONFIG):
        for feeds in batches(WIDE_CONFIG, name):
            expected = eager["wide"].run(name, feeds)
            if precision != "fp32":
                expected.pop("cache_rows", None)  # of any size
            assert worst_error(expected, engine.run(name, feeds)) <= limit


def test_entries_share_what_is_packed(engine_folder: Folders) -> None:
    """Two thirds of the weights would otherwise be there once more."""
    engine = open_engine(engine_folder("wide", "fp32"), threads=1)
    assert isinstance(engine, OpenVinoEngine)
    if not takes(engine.library.isa, Type.f32):
        pytest.skip("products are OpenVINO's own here")
    before = len(engine.weights)
    engine.run("extend", batches(WIDE_CONFIG, "extend")[0])
    assert len(engine.weights) == before > 2 * WIDE_CONFIG.num_layers


def test_one_scale_a_row_is_better_than_one_for_all(engine_folder: Folders, eager: Mapping[str, TorchEngine]) -> None:
    """W_o in int8 costs little: the kernel gives each row its own scale."""
    errors = {}
    feeds = random_feeds(WIDE_CONFIG, "retrieve", [150, 80, 20, 5])
    expected = eager["wide"].run("retrieve", feeds)["user_embedding"]
    for precision in ("int8", "int8-all"):
        got = open_engine(engine_folder("wide", precision), threads=1).run("retrieve", feeds)["user_embedding"]
        errors[precision] = 1.0 - float((expected * got).sum(axis=1).min())
    assert errors["int8-all"] <= 2 * errors["int8"]
    assert errors["int8-all"] <= 0.005


def test_an_unknown_entry_and_a_closed_engine_are_refused(engine_folder: Folders) -> None:
    engine = open_engine(engine_folder("research", "fp32"), threads=1)
    with pytest.raises(InputError, match="no 'rank' entry"):
        engine.run("rank", {})
    engine.close()
    with pytest.raises(InputError, match="no 'retrieve' entry"):
        engine.run("retrieve", {})


@pytest.fixture
def copied(engine_folder: Folders, tmp_path: Path) -> Path:
    """An engine folder that a test may break."""
    return Path(shutil.copytree(engine_folder("research", "fp32"), tmp_path / "engine"))


def test_a_missing_kernel_is_said(copied: Path) -> None:
    (copied / LIBRARY).unlink()
    with pytest.raises(ArtifactError, match="kernel is missing"):
        open_engine(copied)


def test_a_kernel_of_another_machine_is_said(copied: Path) -> None:
    (copied / LIBRARY).write_bytes(b"\x7fELF of nothing")
    with pytest.raises(MissingBackendError, match="cannot be used here"):
        open_engine(copied)


def test_a_missing_entry_is_said(copied: Path) -> None:
    spec = read_spec(copied)
    with pytest.raises(ArtifactError, match="lacks entries"):
        OpenVinoEngine(copied, EngineSpec(backend="openvino", precision="fp32", entries={}, executed=spec.executed))


def test_a_broken_graph_is_said(copied: Path) -> None:
    (copied / "retrieve.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="cannot read it"):
        open_engine(copied)


def test_a_graph_that_computes_with_times_is_refused(copied: Path, tmp_path: Path) -> None:
    """OpenVINO would cut them to int32, and answer."""
    write_surgered(TINY_RESEARCH, tmp_path / "plain-attention", passes=("item_head", "fold_constants"))
    for file in ("retrieve.onnx", onnx_files.WEIGHTS):
        shutil.copyfile(tmp_path / "plain-attention" / file, copied / file)
    with pytest.raises(ArtifactError, match="compute with timestamps in int32"):
        open_engine(copied)


def test_fp16_graphs_are_refused(engine_folder: Folders, tmp_path: Path) -> None:
    source = engine_folder("research", "fp32").parent / "research"
    recipe = Recipe(
        precision="fp16", around="fp16", float_keep_wide=(), int8_keep_wide=(), method="max", percentile=100.0
    )
    histories = random_histories(TINY_RESEARCH, num_users=4)
    write_models(
        {"retrieve": lower_entry(source, "retrieve", TINY_RESEARCH, recipe, histories, emulated=False)[0]}, tmp_path
    )
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    for file in (LIBRARY, OPERATIONS):
        shutil.copyfile(engine_folder("research", "fp32") / file, tmp_path / file)
    write_spec(tmp_path, TINY_RESEARCH, "fp16")
    with pytest.raises(ArtifactError, match="attention in f16"):
        open_engine(tmp_path)


def test_openvino_alone_is_wrong_about_times() -> None:
    """Why times are features: the day this fails, they need not be."""
    seconds = openvino.opset13.parameter([-1], np.int64, "seconds")
    model = openvino.Model([openvino.opset13.divide(seconds, np.int64(1000))], [seconds])
    answer = openvino.Core().compile_model(model, "CPU")([np.array([1_700_000_000_000])])[0]
    assert answer[0] != 1_700_000_000


def test_the_plain_peer_answers_nearly_as_eager(engine_folder: Folders, eager: Mapping[str, TorchEngine]) -> None:
    """It is measured beside the engine. Its int32 is wrong at the edges of time; in bf16 so is its logarithm."""
    folder = engine_folder("research", "fp32").parent / "research" / "plain"
    (folder / "config.json").write_text(json.dumps(TINY_RESEARCH.to_pretrained()))
    for precision, limit in (("fp32", 0.02), ("bf16", 1.0)):
        plain = PlainOpenVinoEngine(folder, precision=precision, threads=1)
        feeds = random_feeds(TINY_RESEARCH, "retrieve", [20, 7, 1])
        assert worst_error(eager["research"].run("retrieve", feeds), plain.run("retrieve", feeds)) <= limit
        plain.close()
    with pytest.raises(ArtifactError, match="cannot read it"):
        PlainOpenVinoEngine(folder.parent)


@pytest.mark.parametrize("operations", ["native", "python"])
def test_answers_of_changing_shapes_leave_nothing_behind(
    engine_folder: Folders, tmp_path: Path, operations: str
) -> None:
    """OpenVINO clones an operation at every new shape, and one written in Python refers to itself."""
    folder = Path(shutil.copytree(engine_folder("tiny", "fp32"), tmp_path / "engine"))
    if operations == "python":
        (folder / OPERATIONS).unlink()
    engine = open_engine(folder, threads=1)
    counts = []
    for _ in range(3):
        for name in entry_names(TINY):
            for feeds in batches(TINY, name):
                engine.run(name, feeds)
        gc.collect()
        counts.append(sum(issubclass(type(found), KernelOp) for found in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
    engine.close()
