"""The checkpoint stage: three sources, one form; what it says, writes and refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.artifact import Artifact, open_artifact, write_manifest
from hstu.checkpoints.huggingface import load_pretrained
from hstu.config import TASKS
from hstu.data.histories import Histories
from hstu.data.vocabulary import Vocabulary
from hstu.errors import ArtifactError, CompilerError, InputError, ParameterError
from serving.engine import check_feeds
from stages.checkpoint import STAGE
from stages.contract import Workspace, execute
from tests.meta_research import SMALL, meta_weights, write_meta_checkpoint
from tests.models import random_histories, tiny_config, write_checkpoint

FILES = {
    "config.json", "model.safetensors", "vocabulary.json", "calibration.npz", "evaluation.npz", "checkpoint.json",
}  # fmt: skip
SECTION: dict[str, Any] = {
    "source": "reference",
    "path": None,
    "num_heads": None,
    "max_generated": 10,
    "event_log": "auto",
    "calibration_histories": 4,
    "evaluation_histories": 12,
    "seed": 0,
    "reference_embedding_dim": 16,
    "reference_num_layers": 1,
    "reference_num_heads": 2,
    "reference_qk_dim": 8,
    "reference_v_dim": 8,
    "reference_max_history": 15,
    "reference_gap_buckets": 32,
    "reference_head_dim": 8,
    "reference_epochs": 1,
    "reference_batch_size": 32,
    "reference_learning_rate": 0.01,
    "reference_dropout": 0.1,
    "reference_temperature": 0.1,
    "reference_negatives": 50,
    "reference_threads": 1,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifacts folder with a prepare-data artifact of 100 items whose names are no numbers."""
    folder = tmp_path_factory.mktemp("artifacts")
    return write_prepared(folder, tuple(f"item-{index:03d}" for index in range(100)))


def write_prepared(artifacts: Path, items: tuple[str, ...], *, known: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A prepare-data artifact below `artifacts`: random histories of up to 25 events, these items, known outcomes."""
    folder = artifacts / "prepare-data"
    folder.mkdir(parents=True)
    Vocabulary(items=items, actions=("view", "click", "like", "purchase")).save(folder / "vocabulary.json")
    shape = tiny_config(num_items=len(items), num_actions=5, max_history=25)
    train = random_histories(shape, num_users=50, seed=1)
    train.save(folder / "train.npz")
    outcomes = np.random.default_rng(2).integers(-1, 2, (len(train.item_ids), 3)).astype(np.int8)
    outcomes[:, [task for task in range(3) if task not in known]] = -1
    np.save(folder / "train_outcomes.npy", outcomes)
    random_histories(shape, num_users=30, seed=3).save(folder / "evaluation.npz")
    random_histories(shape, num_users=8, seed=4).save(folder / "calibration.npz")
    write_manifest(folder, stage="prepare-data", params={}, inputs={}, toolchain={})
    return artifacts


@pytest.fixture
def integers(tmp_path: Path) -> Path:
    """An artifacts folder whose prepared log has the items 1..60 by their numbers, in another order."""
    return write_prepared(tmp_path / "integers", tuple(str(1 + 7 * index % 60) for index in range(60)))


def run(artifacts: Path, **changes: Any) -> Artifact:
    reports = artifacts.parent / "reports"
    values = {"checkpoint": SECTION | changes}
    return execute(STAGE, Workspace(artifacts=artifacts, reports=reports, values=values))


def meta(path: Path, **changes: Any) -> dict[str, Any]:
    return {"source": "meta", "path": str(path), "num_heads": 2} | changes


def metrics(artifacts: Path) -> dict[str, Any]:
    return json.loads((artifacts.parent / "reports" / "metrics" / "checkpoint.json").read_text())  # type: ignore[no-any-return]


def content(artifact: Artifact) -> dict[str, bytes]:
    return {name: (artifact.path / name).read_bytes() for name in FILES}


def copy_of(prepared: Path, tmp_path: Path) -> Path:
    """An artifacts folder of one's own, with the prepared log in it."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "prepare-data").mkdir()
    for file in (prepared / "prepare-data").iterdir():
        (folder / "prepare-data" / file.name).write_bytes(file.read_bytes())
    return folder


def check_histories(artifact: Artifact, name: str) -> Histories:
    """The histories of an artifact; they fit its model."""
    config = load_pretrained(artifact.path).config
    histories = Histories.load(artifact.file(name))
    assert histories.lengths.max() <= config.max_history
    assert histories.lengths.min() >= 1
    assert histories.target_outcomes.shape == (len(histories), len(config.tasks))
    check_feeds(config, "retrieve", histories.feeds(config))
    return histories


def test_the_reference_is_trained_on_the_prepared_log(prepared: Path, tmp_path: Path, capfd: Any) -> None:
    artifact = run(copy_of(prepared, tmp_path))
    assert set(artifact.manifest["files"]) == FILES
    model = load_pretrained(artifact.path)
    assert model.config.tasks == ("engagement", "retention", "monetisation")
    assert (model.config.num_items, model.config.num_actions) == (len(build_names(prepared)), 5)
    assert model.config.absent_query_time == "last_event"
    assert Vocabulary.load(artifact.file("vocabulary.json")) == Vocabulary.load(
        prepared / "prepare-data" / "vocabulary.json"
    )
    calibration, evaluation = (check_histories(artifact, f"{name}.npz") for name in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (4, 12)
    assert (evaluation.target_item > 0).all()
    assert set(metrics(tmp_path / "artifacts")) >= {
        "hr_at_10", "ndcg_at_10", "markov_hr_at_10", "markov_ndcg_at_10", "popularity_hr_at_10",
        "popularity_ndcg_at_10", "repeats_hr_at_10", "repeats_ndcg_at_10", "auc_engagement", "auc_retention",
        "auc_monetisation", "num_parameters",
    }  # fmt: skip
    details = json.loads(artifact.file("checkpoint.json").read_text())
    assert (details["source"], details["histories"]) == ("reference", "prepared")
    assert details["metrics"] == metrics(tmp_path / "artifacts")
    said = capfd.readouterr().err
    assert "kept the newest 15 events of" in said
    assert "markov" in said


@pytest.mark.parametrize("known", [(), (0, 2)])
def test_only_outcomes_that_the_log_tells_get_a_head(known: tuple[int, ...], tmp_path: Path, capfd: Any) -> None:
    artifact = run(write_prepared(tmp_path / "artifacts", ("a", "b", "c", "d"), known=known))
    tasks = tuple(task for index, task in enumerate(TASKS) if index in known)
    assert load_pretrained(artifact.path).config.tasks == tasks
    assert check_histories(artifact, "evaluation.npz").target_outcomes.shape[1] == len(known)
    assert {name for name in metrics(tmp_path / "artifacts") if name.startswith("auc")} == {f"auc_{t}" for t in tasks}
    assert "no task heads for" in capfd.readouterr().err


def build_names(prepared: Path) -> tuple[str, ...]:
    return Vocabulary.load(prepared / "prepare-data" / "vocabulary.json").items


def test_the_same_inputs_give_the_same_artifact(prepared: Path, tmp_path: Path) -> None:
    first, again = (run(copy_of(prepared, tmp_path / name)) for name in make_folders(tmp_path, "one", "two"))
    assert first.id == again.id


def make_folders(tmp_path: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (tmp_path / name).mkdir()
    return names


def test_a_meta_checkpoint_without_a_log(prepared: Path, tmp_path: Path, capfd: Any) -> None:
    path = write_meta_checkpoint(tmp_path / "trained.pt", epoch=42)
    artifacts = copy_of(prepared, tmp_path)
    artifact = run(artifacts, **meta(path))
    assert set(artifact.manifest["files"]) == FILES
    assert Vocabulary.load(artifact.file("vocabulary.json")) == Vocabulary.raw(40)
    calibration, evaluation = (check_histories(artifact, f"{name}.npz") for name in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (4, 12)
    assert not np.array_equal(calibration.item_ids[:15], evaluation.item_ids[:15])
    details = json.loads(artifact.file("checkpoint.json").read_text())
    assert (details["source"], details["histories"], details["epoch"]) == ("meta", "drawn", 42)
    assert "drawn from its own vocabulary" in capfd.readouterr().err
    weights = sum(value.numel() for name, value in meta_weights().items() if "_mask" not in name)
    assert metrics(artifacts) == {"num_parameters": weights}


def test_where_the_file_lay_is_not_in_the_artifact(prepared: Path, tmp_path: Path) -> None:
    ids = []
    for name in make_folders(tmp_path, "one", "two"):
        path = write_meta_checkpoint(tmp_path / name / "trained.pt")
        artifact = run(copy_of(prepared, tmp_path / name), **meta(path))
        assert artifact.params["path"] == "trained.pt"
        assert str(tmp_path).encode() not in b"".join(content(artifact).values())
        assert str(tmp_path) not in (artifact.path / "manifest.json").read_text()
        ids.append(artifact.id)
    assert ids[0] == ids[1]
    path = write_meta_checkpoint(tmp_path / "two" / "trained.pt", seed=1)
    assert run(tmp_path / "two" / "artifacts", **meta(path)).id != ids[0]


def test_a_meta_checkpoint_with_its_log(integers: Path, tmp_path: Path) -> None:
    shape = replace(SMALL, item_rows=61)
    path = write_meta_checkpoint(tmp_path / "trained.pt", shape)
    artifact = run(integers, **meta(path, event_log="prepared"))
    evaluation = check_histories(artifact, "evaluation.npz")
    prepared = Histories.load(integers / "prepare-data" / "evaluation.npz")
    names = Vocabulary.load(integers / "prepare-data" / "vocabulary.json")
    first = prepared.select([0]).newest(20).item_ids
    assert [int(names.item(item)) for item in first] == evaluation.select([0]).item_ids.tolist()
    assert not evaluation.actions.any()
    details = json.loads(artifact.file("checkpoint.json").read_text())
    assert details["histories"] == "prepared"
    assert set(metrics(integers)) == {"num_parameters", "hr_at_10", "ndcg_at_10"}


def test_a_log_with_other_items_is_refused(prepared: Path, integers: Path, tmp_path: Path) -> None:
    path = write_meta_checkpoint(tmp_path / "trained.pt")
    for artifacts in (copy_of(prepared, tmp_path), integers):  # names that are no numbers; numbers above 40
        with pytest.raises(InputError, match=r"(?s)items that the checkpoint does not know.*the integers 1\.\.40"):
            run(artifacts, **meta(path, event_log="prepared"))
        assert not (artifacts / "checkpoint").exists()


@pytest.mark.parametrize("source", ["artifact", "plain folder"])
def test_a_huggingface_folder_keeps_every_byte(source: str, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    theirs = write_checkpoint(folder)
    if source == "plain folder":
        for name in ("manifest.json", "checkpoint.json", "vocabulary.json", "calibration.npz", "evaluation.npz"):
            (folder / name).unlink()
    artifact = run(copy_of(prepared, tmp_path), source="huggingface", path=str(folder))
    assert (artifact.path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    ours, before = load_pretrained(artifact.path).state_dict(), load_pretrained(folder).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in ours.items())
    vocabulary = Vocabulary.load(artifact.file("vocabulary.json"))
    assert vocabulary.num_items == theirs_items(theirs)
    again = run(tmp_path / "artifacts", source="huggingface", path=str(copy_files(artifact, tmp_path / "again")))
    assert content(again) == content(artifact) | {"checkpoint.json": content(again)["checkpoint.json"]}
    assert check_histories(again, "evaluation.npz").actions.max() <= 3


def theirs_items(artifact: Artifact) -> int:
    return load_pretrained(artifact.path).config.num_items


def copy_files(artifact: Artifact, folder: Path) -> Path:
    folder.mkdir()
    for name, data in content(artifact).items():
        (folder / name).write_bytes(data)
    return folder


def test_the_reference_through_huggingface_on_its_own_log(prepared: Path, tmp_path: Path) -> None:
    artifacts = copy_of(prepared, tmp_path)
    first = run(artifacts)
    quality = metrics(artifacts)
    again = run(artifacts, source="huggingface", path=str(first.path), event_log="prepared")
    for name in ("model.safetensors", "config.json", "vocabulary.json", "calibration.npz", "evaluation.npz"):
        assert first.manifest["files"][name] == again.manifest["files"][name]
    assert metrics(artifacts) == {name: value for name, value in quality.items() if name in metrics(artifacts)}
    assert "hr_at_10" in metrics(artifacts)


def test_a_corrupt_byte_in_an_artifact_is_found(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_checkpoint(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        run(copy_of(prepared, tmp_path), source="huggingface", path=str(folder))


def test_a_vocabulary_of_another_model_is_refused(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_checkpoint(folder)
    (folder / "manifest.json").unlink()
    Vocabulary.raw(151).save(folder / "vocabulary.json")
    with pytest.raises(InputError, match="not the vocabulary of this model"):
        run(copy_of(prepared, tmp_path), source="huggingface", path=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "onnx"}, "source"),
        ({"source": "meta", "path": "c.pt"}, "num_heads"),
        ({"source": "meta", "num_heads": 2}, "path"),
        ({"source": "huggingface"}, "path"),
        ({"path": "c.pt"}, "reference_num_heads"),
        ({"num_heads": 2}, "reference_num_heads"),
        ({"event_log": "none"}, "trained on the prepared log"),
        ({"source": "meta", "path": "c.pt", "num_heads": 0}, "num_heads"),
        ({"evaluation_histories": 0}, "evaluation_histories"),
        ({"seed": -1}, "seed"),
        ({"reference_dropout": 1.0}, "reference_dropout"),
        ({"reference_learning_rate": 0.0}, "reference_learning_rate"),
        ({"reference_temperature": -0.1}, "reference_temperature"),
        ({"reference_epochs": 0}, "reference_epochs"),
        ({"reference_epochs": 1.5}, "reference_epochs"),
    ],
)
def test_parameters_that_do_not_go_together(changes: dict[str, Any], message: str, prepared: Path) -> None:
    with pytest.raises(ParameterError, match=message):
        run(prepared, **changes)
    assert not (prepared / "checkpoint").exists()


def test_num_heads_that_the_folder_contradicts(prepared: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "theirs")
    with pytest.raises(ParameterError, match="num_heads"):
        run(copy_of(prepared, tmp_path), source="huggingface", path=str(tmp_path / "theirs"), num_heads=4)


class RunsCode:
    """Unpickled by the ordinary unpickler, this creates a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_bad_files_leave_the_earlier_artifact_whole(prepared: Path, tmp_path: Path) -> None:
    artifacts, path, witness = copy_of(prepared, tmp_path), tmp_path / "trained.pt", tmp_path / "witness"
    earlier = run(artifacts, **meta(write_meta_checkpoint(path)))
    before, report = content(earlier), metrics(artifacts)
    weights = meta_weights()
    nan = weights | {"module._embedding_module._item_emb.weight": torch.full((41, 12), float("nan"))}
    short = {name: value for name, value in weights.items() if not name.endswith("_o.bias")}
    for bad in (nan, short, weights | {"module.more": torch.zeros(1)}, weights | {"code": RunsCode(witness)}):
        write_meta_checkpoint(path, weights=bad)  # type: ignore[arg-type]
        with pytest.raises(CompilerError) as caught:
            run(artifacts, **meta(path))
        assert caught.value.exit_code == 2
        assert content(open_artifact(artifacts / "checkpoint", stage="checkpoint")) == before
        assert metrics(artifacts) == report
        left = {entry.name for entry in artifacts.iterdir() if not entry.name.endswith("lock")}
        assert left == {"checkpoint", "prepare-data"}
    assert not witness.exists()


def test_metas_own_answers_after_the_stage(oracle: Path, prepared: Path, tmp_path: Path) -> None:
    """What the stage writes for the oracle's file still gives Meta's user embeddings."""
    from hstu.model import History

    artifact = run(copy_of(prepared, tmp_path), **meta(oracle / "checkpoint.pt", num_heads=1))
    model, golden = load_pretrained(artifact.path), np.load(oracle / "golden.npz")
    lengths, times = torch.tensor(golden["past_lengths"]), torch.tensor(golden["timestamps"])
    history = History(
        item_ids=torch.tensor(golden["past_ids"])[:, : model.config.max_history],
        timestamps=times[:, : model.config.max_history],
        lengths=lengths,
        query_time=times.gather(1, lengths.unsqueeze(1)).squeeze(1),
    )
    assert np.abs(model.retrieve(history)[0].numpy() - golden["user_embeddings"]).max() <= 1e-5
