"""Every reader returns the rows of its file as they stand, and says what is wrong with a file that is not its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from hstu.data.readers import (
    Columns,
    RawEvents,
    check_file,
    read_csv,
    read_jsonl,
    read_movielens,
    read_parquet,
)
from hstu.errors import InputError

COLUMNS = Columns(
    user="user_id", item="item_id", action="action", timestamp="timestamp", dwell="dwell_s", price="price"
)
ROW = {"user_id": "u", "item_id": "i", "action": "view", "timestamp": 5}


def rows(raw: RawEvents) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in raw.table.to_pylist()]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_parquet(path: Path, **columns: pa.Array) -> Path:
    pa_parquet.write_table(pa.table(columns), path)
    return path


def test_jsonl_keeps_values_as_text_and_counts_what_is_no_row(tmp_path: Path) -> None:
    lines = [
        '{"user_id": 7, "item_id": "ä b", "action": "view", "timestamp": 1.5, "price": 0.1}',
        "",
        '{"user_id": null, "item_id": "i", "timestamp": "5", "extra": [1]}',
        "not json",
        '["a", "list"]',
        '{"user_id": true, "item_id": "i", "action": "view", "timestamp": 5}',
        '{"user_id": "\\ud800", "item_id": "i", "action": "view", "timestamp": 5}',
        '{"user_id": ' + "9" * 5000 + "}",
        "[" * 100_000,
    ]
    raw = read_jsonl(write(tmp_path / "log", "\n".join(lines)), COLUMNS)
    assert rows(raw) == [("7", "ä b", "view", "1.5", None, "0.1"), (None, "i", None, "5", None, None)]
    assert raw.unparsable == 6
    assert (raw.has_actions, raw.has_dwell, raw.has_price) == (True, False, True)


def test_csv_reads_quotes_and_a_byte_order_mark_and_skips_rows_of_another_width(tmp_path: Path) -> None:
    text = (
        '\ufeffprice,user_id,item_id,action,timestamp,other\r\n,u1,"a,b",view,1,x\r\n'
        "2.5,u2,i,,2,x\r\ntoo,few\r\n1,2,3,4,5,6,7\r\n"
    )
    raw = read_csv(write(tmp_path / "log", text), COLUMNS)
    assert rows(raw) == [("u1", "a,b", "view", "1", None, None), ("u2", "i", None, "2", None, "2.5")]
    assert raw.unparsable == 2
    assert (raw.has_actions, raw.has_dwell, raw.has_price) == (True, False, True)


def test_csv_ids_stay_the_text_they_are(tmp_path: Path) -> None:
    text = "user_id,item_id,action,timestamp\n007,1e5,true,1\nNULL,nan,NA,2\n"
    raw = read_csv(write(tmp_path / "log", text), COLUMNS)
    assert [row[:3] for row in rows(raw)] == [("007", "1e5", "true"), ("NULL", "nan", "NA")]


def test_parquet_takes_the_types_that_can_stand_for_a_field(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "log",
        user_id=pa.array([7, None], pa.int32()),
        item_id=pa.array(["a", "b"]).dictionary_encode(),
        action=pa.array(["view", "like"], pa.large_string()),
        timestamp=pa.array([1, 2], pa.timestamp("ms", tz="UTC")),
        price=pa.array([1, None], pa.float32()),
    )
    raw = read_parquet(path, COLUMNS)
    assert [row[:3] for row in rows(raw)] == [("7", "a", "view"), (None, "b", "like")]
    assert raw.table["timestamp"].type == pa.timestamp("ms", tz="UTC")
    assert raw.table["dwell"].null_count == 2


@pytest.mark.parametrize("name", ["user_id", "item_id", "action", "timestamp", "price"])
def test_parquet_refuses_a_type_that_cannot(tmp_path: Path, name: str) -> None:
    columns = {key: pa.array([str(value)]) for key, value in ROW.items()}
    path = write_parquet(tmp_path / "log", **{**columns, name: pa.array([[1.5]], pa.list_(pa.float64()))})
    with pytest.raises(InputError, match=f"column '{name}' has a type"):
        read_parquet(path, COLUMNS)


@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_parquet_refuses_ids_that_are_floats(tmp_path: Path, name: str) -> None:
    columns = {key: pa.array([str(value)]) for key, value in ROW.items()}
    path = write_parquet(tmp_path / "log", **{**columns, name: pa.array([1.0])})
    with pytest.raises(InputError, match="cannot stand for"):
        read_parquet(path, COLUMNS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ratings.dat", "1::1193::5::978300760\n1::661::3.5::978302109\n1::661::\n2::3::9::1\n"),
        (
            "ratings.csv",
            "userId,movieId,rating,timestamp\n1,1193,5.0,978300760\n1,661,3.5,978302109\n1,661\n2,3,9,1\n",
        ),
    ],
)
def test_movielens_ratings_become_actions(tmp_path: Path, name: str, text: str) -> None:
    raw = read_movielens(write(tmp_path / name, text))
    assert rows(raw) == [
        ("1", "1193", "rating_5", "978300760", None, None),
        ("1", "661", "rating_3.5", "978302109", None, None),
        ("2", "3", "9", "1", None, None),  # no such rating: cleaning drops it as an unknown action
    ]
    assert raw.unparsable == 1


def test_movielens_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected: ratings\.dat or ratings\.csv"):
        read_movielens(write(tmp_path / "ratings.tsv", "1\t2\t3\t4\n"))
    with pytest.raises(InputError, match="no '::' in it"):
        read_movielens(write(tmp_path / "ratings.dat", "1,2,3,4\n"))


READERS: list[tuple[str, Callable[[Path, Columns], RawEvents]]] = [
    ("jsonl", read_jsonl),
    ("csv", read_csv),
    ("parquet", read_parquet),
]


def file_of(kind: str, path: Path, row: dict[str, Any], count: int = 1) -> Path:
    if kind == "jsonl":
        return write(path, (json.dumps(row) + "\n") * count)
    if kind == "csv":
        return write(path, ",".join(row) + "\n" + (",".join(map(str, row.values())) + "\n") * count)
    return write_parquet(path, **{key: pa.array([value] * count) for key, value in row.items()})


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize("name", ["user_id", "item_id", "action", "timestamp"])
def test_a_missing_column_is_named(kind: str, read: Any, name: str, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path / "log", {key: value for key, value in ROW.items() if key != name})
    with pytest.raises(InputError, match=f"missing column '{name}'"):
        read(path, COLUMNS)


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_other_names_and_a_log_without_actions(kind: str, read: Any, tmp_path: Path) -> None:
    columns = Columns(user="who", item="what", action=None, timestamp="when", dwell="dwell_s", price="price")
    raw = read(file_of(kind, tmp_path / "log", {"when": 3, "who": "u", "what": "i", "action": "x"}), columns)
    assert [row[:3] for row in rows(raw)] == [("u", "i", None)]
    assert not raw.has_actions


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize(
    "data", [b"PAR1 and then nothing", b"\xff\xfe\x00\x01" * 50, b"\x00" * 64, b"\x1f\x8b\x08" + bytes(range(200))]
)
def test_a_file_of_another_format_is_an_input_error(kind: str, read: Any, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read(write(tmp_path / "log", data), COLUMNS)


def test_a_csv_read_as_jsonl_names_the_parameter_to_change(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prepare-data\.source"):
        read_jsonl(file_of("csv", tmp_path / "log", ROW), COLUMNS)


def test_a_truncated_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = file_of("parquet", tmp_path / "log", ROW, count=100)
    with pytest.raises(InputError):
        read_parquet(write(tmp_path / "cut", path.read_bytes()[:-20]), COLUMNS)


def test_a_csv_whose_header_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", "user_id,item_id,action,timestamp,action\nu,i,view,1,like\n")
    with pytest.raises(InputError, match="stands twice"):
        read_csv(path, COLUMNS)


@pytest.mark.parametrize(("kind", "read"), READERS[:2])
def test_a_log_without_events_is_empty(kind: str, read: Any, tmp_path: Path) -> None:
    text = {"jsonl": "\n\n", "csv": "user_id,item_id,action,timestamp\n"}[kind]
    with pytest.raises(InputError, match="the log is empty"):
        read(write(tmp_path / "log", text), COLUMNS)


def test_check_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        check_file(tmp_path / "none")
    with pytest.raises(InputError, match="not a file"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="empty"):
        check_file(write(tmp_path / "log", ""))
    check_file(write(tmp_path / "log", "x"))
