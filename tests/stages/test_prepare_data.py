"""The stage from end to end: what it writes, that it is the same every time, and every bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from hstu.artifact import Artifact
from hstu.data.histories import Histories
from hstu.data.vocabulary import Vocabulary
from hstu.errors import CompilerError, InputError, ParameterError
from stages.contract import Workspace, execute
from stages.parameters import read_params
from stages.prepare_data import STAGE

ROOT = Path(__file__).parents[2]
FILES = {"vocabulary.json", "train.npz", "train_outcomes.npy", "evaluation.npz", "calibration.npz", "summary.json"}
SMALL = {"reference_users": 60, "reference_items": 200, "reference_events_per_user": 15}


def prepare(folder: Path, **changes: Any) -> Artifact:
    values = read_params(ROOT / "params.yaml")
    values["prepare-data"] |= changes
    return execute(STAGE, Workspace(artifacts=folder / "artifacts", reports=folder / "reports", values=values))


def rows(num_users: int = 12) -> list[dict[str, Any]]:
    """Users of 4 events each, oldest first."""
    actions = ("view", "click", "like", "purchase")
    return [
        {
            "user_id": f"u{user:02d}",
            "item_id": f"i{(3 * user + k) % 7}",
            "action": actions[(user + k) % 4],
            "timestamp": 1_700_000_000 + 86_400 * k + user,
            "price": 2.5,
        }
        for user in range(num_users)
        for k in range(4)
    ]


def write_log(kind: str, path: Path, events: list[dict[str, Any]]) -> Path:
    if kind == "jsonl":
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    elif kind == "csv":
        lines = [",".join(events[0]), *(",".join(map(str, event.values())) for event in events)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pa_parquet.write_table(pa.Table.from_pylist(events), path)
    return path


def summary(artifact: Artifact) -> dict[str, Any]:
    return json.loads(artifact.file("summary.json").read_text())  # type: ignore[no-any-return]


def test_the_reference_log_becomes_an_artifact(tmp_path: Path) -> None:
    artifact = prepare(tmp_path, **SMALL)
    assert set(artifact.manifest["files"]) == FILES
    vocabulary = Vocabulary.load(artifact.file("vocabulary.json"))
    train = Histories.load(artifact.file("train.npz"))
    outcomes = np.load(artifact.file("train_outcomes.npy"))
    evaluation = Histories.load(artifact.file("evaluation.npz"))
    calibration = Histories.load(artifact.file("calibration.npz"))
    assert vocabulary.num_items == 200
    assert vocabulary.actions == ("view", "click", "like", "purchase")
    assert outcomes.shape == (len(train.item_ids), 3)
    assert outcomes.dtype == np.int8
    assert (len(train), len(evaluation), len(calibration)) == (50, 10, 3)
    for part in (train, evaluation, calibration):
        assert part.item_ids.min() >= 1
        assert part.item_ids.max() <= 200
        assert part.lengths.min() >= 1
    assert (evaluation.target_item > 0).all()
    metrics = json.loads((tmp_path / "reports" / "metrics" / "prepare-data.json").read_text())
    assert metrics["events"] == summary(artifact)["events"] == len(train.item_ids) + len(evaluation.item_ids) + 60


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    path = write_log("jsonl", tmp_path / "log.jsonl", rows())
    code = (
        "import sys; from pathlib import Path; from tests.stages.test_prepare_data import prepare, SMALL\n"
        "print(prepare(Path(sys.argv[1]), **SMALL).id, prepare(Path(sys.argv[1]), source='jsonl', path=sys.argv[2]).id)"
    )
    ids = set()
    for seed in ("1", "2"):
        folder = tmp_path / f"run{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(folder), str(path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
        )
        ids.add(done.stdout)
    assert len(ids) == 1
    assert len(set(ids.pop().split())) == 2


def test_all_formats_of_one_log_give_the_same_splits(tmp_path: Path) -> None:
    data = []
    for kind in ("jsonl", "csv", "parquet"):
        path = write_log(kind, tmp_path / f"log.{kind}", rows())
        artifact = prepare(tmp_path, source=kind, path=str(path))
        data.append({name: artifact.file(name).read_bytes() for name in FILES - {"summary.json"}})
    assert data[0] == data[1] == data[2]


def test_movielens(tmp_path: Path) -> None:
    lines = [
        f"{user}::{100 + (user + k) % 5}::{1 + (user + k) % 5}::{978_300_000 + k * 60}"
        for user in range(10)
        for k in range(5)
    ]
    path = tmp_path / "ratings.dat"
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    artifact = prepare(tmp_path, source="movielens", path=str(path))
    vocabulary = Vocabulary.load(artifact.file("vocabulary.json"))
    train, outcomes = Histories.load(artifact.file("train.npz")), np.load(artifact.file("train_outcomes.npy"))
    assert set(vocabulary.items) == {"100", "101", "102", "103", "104"}
    stars = np.array([float(vocabulary.actions[a - 1].removeprefix("rating_")) for a in train.actions])
    raw = np.array([int(vocabulary.item(i)) for i in train.item_ids])
    assert (stars == raw - 99).all()  # by construction
    assert (outcomes[:, 0] == (stars >= 4)).all()
    assert (outcomes[:, 2] == -1).all()


def test_what_is_dropped_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = rows()
    bad = [
        {**good[0], "user_id": None},
        {**good[0], "timestamp": "soon"},
        {**good[0], "action": "dance"},
        {**good[0], "price": -1},
        good[0],
        {**good[0], "user_id": "once"},
    ]
    path = write_log("jsonl", tmp_path / "log", [*good[::-1], *bad])
    with path.open("a") as stream:
        stream.write("not json\n")
    artifact = prepare(tmp_path, source="jsonl", path=str(path))
    counts = {
        "unparsable_row": 1,
        "missing_field": 1,
        "bad_timestamp": 1,
        "unknown_action": 1,
        "bad_dwell_or_price": 1,
        "duplicate": 1,
        "item_with_few_events": 0,
        "user_with_few_events": 1,
    }
    assert summary(artifact)["dropped"] == counts
    assert json.loads((tmp_path / "reports" / "metrics" / "prepare-data.json").read_text())["dropped"] == counts
    said = capsys.readouterr().err
    assert f"{len(good) + 7} rows, 7 dropped (unparsable_row 1, missing_field 1, bad_timestamp 1" in said
    assert "the log was not in order: 36 events came late; sorted by time" in said
    assert "the log has no dwell" in said
    clean = prepare(tmp_path / "clean", source="jsonl", path=str(write_log("jsonl", tmp_path / "log", good)))
    assert artifact.file("vocabulary.json").read_bytes() == clean.file("vocabulary.json").read_bytes()
    assert artifact.file("train.npz").read_bytes() == clean.file("train.npz").read_bytes()
    assert summary(clean)["events"] == summary(artifact)["events"] == len(good)


def test_another_file_of_the_same_name_is_another_artifact(tmp_path: Path) -> None:
    path = write_log("jsonl", tmp_path / "log", rows())
    first = prepare(tmp_path, source="jsonl", path=str(path)).id
    events = rows()
    events[0]["price"] = 2.25  # shows in no split
    write_log("jsonl", path, events)
    assert prepare(tmp_path, source="jsonl", path=str(path)).id != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "the log is empty"),
        ("user_id,item_id,action,timestamp\n", "the log is empty"),
        ("user_id,item_id,timestamp\nu,i,1\n", "missing column 'action'"),
        ("\x00\x01", "missing column"),
        ("user_id,item_id,action,timestamp\nu,i,view,1\n", "no events are left"),
        ("user_id,item_id,action,timestamp\nu,i,view,1\nu,i,view,2\nu,i,view,3\n", "too few users"),
    ],
)
def test_a_bad_log_is_one_clear_error_and_nothing_is_written(content: str | None, message: str, tmp_path: Path) -> None:
    kept = prepare(tmp_path, **SMALL)
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path, source="csv", path=str(path))
    assert caught.value.exit_code == 2
    assert caught.value.fix or caught.value.expected
    folder = tmp_path / "artifacts"
    assert (folder / "prepare-data" / "manifest.json").read_bytes() == (kept.path / "manifest.json").read_bytes()
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == ["prepare-data"]


def test_a_folder_and_an_unreadable_file_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        prepare(tmp_path, source="csv", path=str(tmp_path))
    if os.geteuid():
        path = write_log("csv", tmp_path / "log", rows())
        path.chmod(0)
        with pytest.raises(InputError, match="cannot be read"):
            prepare(tmp_path, source="csv", path=str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "excel"},
        {"source": "csv"},
        {"path": "log.csv"},
        {"reference_users": 0},
        {"reference_users": 10**7},
        {"reference_items": 99},
        {"reference_events_per_user": 1000},
        {"min_user_events": 1},
        {"min_item_events": 0},
        {"seed": -1},
        {"evaluation_fraction": 0.0},
        {"evaluation_fraction": 1.0},
        {"calibration_fraction": float("nan")},
        {"return_within_days": 0.25},
        {"return_within_days": float("inf")},
        {"engagement_dwell_s": -1.0},
        {"item_column": "user_id"},
        {"user_column": ""},
        {"actions": []},
        {"actions": ["view", "view"]},
        {"engagement_actions": ["love"]},
        {"purchase_actions": ["buy"]},
        {"timestamp_unit": "us"},
    ],
)
def test_a_bad_parameter_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="column|path" if "column" in str(changes) else r"prepare-data\."):
        prepare(tmp_path, **changes)
    assert not (tmp_path / "artifacts" / "prepare-data").exists()


def test_fractions_that_leave_nobody_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match="too few users"):
        prepare(tmp_path, **SMALL, evaluation_fraction=0.7, calibration_fraction=0.5)
