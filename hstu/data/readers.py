"""Files of events to one raw table: text as it stands, nothing judged yet beyond "this is a row".

Every reader returns columns `user`, `item`, `action` (strings), `timestamp`, `dwell`, `price` (strings, or what
the Parquet file holds), null where a field is missing. `hstu.data.cleaning` decides what becomes an event.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from hstu.errors import InputError

RATINGS = ("0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5")
MOVIELENS_ACTIONS = tuple(f"rating_{stars}" for stars in RATINGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What the columns (or JSON keys) of a log are called; None for action: the log has no actions."""

    user: str
    item: str
    action: str | None
    timestamp: str
    dwell: str
    price: str

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in (self.user, self.item, self.action, self.timestamp) if name is not None)


MOVIELENS_COLUMNS = Columns(user="userId", item="movieId", action="rating", timestamp="timestamp", dwell="", price="")


@dataclass(frozen=True, kw_only=True, slots=True)
class RawEvents:
    """`table` has the six columns of `Columns`; `unparsable` lines were no rows at all."""

    table: pa.Table
    unparsable: int
    has_actions: bool
    has_dwell: bool
    has_price: bool


def read_jsonl(path: Path, columns: Columns) -> RawEvents:
    """One JSON object a line; blank lines are no lines. Raises InputError when a column is in no line."""
    names = _names(columns)
    values: dict[str, list[str | None]] = {column: [] for column in names}
    seen: set[str] = set()
    unparsable = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                row = _object(json.loads(line))
                texts = {column: _text(row[name]) for column, name in names.items() if name in row}
            except (ValueError, TypeError, RecursionError):  # not JSON, not an object, or no value of ours
                unparsable += 1
                continue
            seen.update(texts)
            for column in names:
                values[column].append(texts.get(column))
    _require_rows(path, len(values["user"]), unparsable, "one JSON object a line")
    _require_columns(path, columns, [names[column] for column in seen])
    return _raw({column: pa.array(texts, pa.string()) for column, texts in values.items()}, unparsable, seen)


def read_csv(path: Path, columns: Columns) -> RawEvents:
    """Comma-separated UTF-8 text with a header line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise _wrong_format(path, error, "CSV in UTF-8 with a header line") from None
    _require_columns(path, columns, header)
    if len(set(header)) != len(header):
        raise InputError(f"{path}: a column stands twice", got=", ".join(header), expected="every name once")
    return _read_delimited(path, path.read_bytes(), _names(columns), header, delimiter=",", skip_rows=1)


def read_parquet(path: Path, columns: Columns) -> RawEvents:
    """A Parquet file; ids are strings or integers, timestamps numbers or a timestamp type."""
    try:
        file = pa_parquet.ParquetFile(path)
        _require_columns(path, columns, file.schema_arrow.names)
        present = {column: name for column, name in _names(columns).items() if name in file.schema_arrow.names}
        table = file.read(columns=list(dict.fromkeys(present.values())))
    except (pa.ArrowException, OSError) as error:
        raise _wrong_format(path, error, "a Parquet file") from None
    arrays = {}
    for column, name in present.items():
        array = table[name]
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        allowed = _PARQUET_TYPES[column]
        if not is_text and not any(test(array.type) for test in allowed.values()):
            raise InputError(
                f"{path}: column {name!r} has a type that cannot stand for {column}",
                got=array.type,
                expected=", ".join(["string", *allowed]),
                fix="convert the column, or name another one in the params",
            )
        arrays[column] = array.cast(pa.string()) if is_text or column in ("user", "item", "action") else array
    return _raw(arrays, 0, set(present), num_rows=table.num_rows)


def read_movielens(path: Path) -> RawEvents:
    """MovieLens `ratings.dat` (`user::item::rating::timestamp`) or `ratings.csv`; the action is `rating_<stars>`."""
    if path.suffix == ".dat":
        header = list(_names(MOVIELENS_COLUMNS).values())
        data = path.read_bytes()
        if b"::" not in data[:1024]:
            raise _wrong_format(path, "no '::' in it", "lines of user::item::rating::timestamp")
        data = data.replace(b"::", b"\t")
        raw = _read_delimited(path, data, _names(MOVIELENS_COLUMNS), header, delimiter="\t", skip_rows=0)
    elif path.suffix == ".csv":
        raw = read_csv(path, MOVIELENS_COLUMNS)
    else:
        raise InputError(f"{path}: not a MovieLens ratings file", expected="ratings.dat or ratings.csv")
    known = {text: f"rating_{stars}" for stars in RATINGS for text in (stars, f"{float(stars)}")}
    names = [None if text is None else known.get(text.strip(), text) for text in raw.table["action"].to_pylist()]
    index = raw.table.schema.get_field_index("action")
    return RawEvents(
        table=raw.table.set_column(index, "action", pa.array(names, pa.string())),
        unparsable=raw.unparsable,
        has_actions=True,
        has_dwell=False,
        has_price=False,
    )


def check_file(path: Path) -> None:
    """`path` is a file with something in it, or InputError."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file", fix="set prepare-data.path to the log of events")
    if not path.is_file():
        raise InputError(f"{path}: not a file", expected="the log itself, not its folder")
    if path.stat().st_size == 0:
        raise InputError(
            f"{path}: the log is empty", got="0 bytes", expected="at least a few users with several events"
        )


_INTEGER: dict[str, Callable[[Any], bool]] = {"integer": pa.types.is_integer}
_REAL = {**_INTEGER, "float": pa.types.is_floating, "decimal": pa.types.is_decimal}
_TIME = {
    **_INTEGER,
    "float": pa.types.is_floating,
    "timestamp": pa.types.is_timestamp,
    "date": pa.types.is_date,
}
_PARQUET_TYPES: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {  # besides string, which any of them may be
    "user": _INTEGER,
    "item": _INTEGER,
    "action": {},
    "timestamp": _TIME,
    "dwell": _REAL,
    "price": _REAL,
}


def _read_delimited(
    path: Path, data: bytes, names: Mapping[str, str], header: list[str], *, delimiter: str, skip_rows: int
) -> RawEvents:
    present = {column: name for column, name in names.items() if name in header}
    unparsable: list[int] = []

    def skip(row: Any) -> str:
        unparsable.append(row.actual_columns)
        return "skip"

    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(column_names=header, skip_rows=skip_rows),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if delimiter == "," else False, invalid_row_handler=skip
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=list(present.values()),
                column_types=dict.fromkeys(present.values(), pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        raise _wrong_format(path, error, "delimited text in UTF-8") from None
    _require_rows(path, table.num_rows, len(unparsable), f"{len(header)} fields a line")
    return _raw({column: table[name] for column, name in present.items()}, len(unparsable), set(present))


def _raw(arrays: Mapping[str, Any], unparsable: int, present: set[str], *, num_rows: int | None = None) -> RawEvents:
    length = len(arrays["user"]) if num_rows is None else num_rows
    columns = {field.name: arrays.get(field.name, pa.nulls(length, pa.string())) for field in fields(Columns)}
    return RawEvents(
        table=pa.table(columns),
        unparsable=unparsable,
        has_actions="action" in present,
        has_dwell="dwell" in present,
        has_price="price" in present,
    )


def _names(columns: Columns) -> dict[str, str]:
    """Our name of each column → its name in the file."""
    pairs = {field.name: getattr(columns, field.name) for field in fields(Columns)}
    return {ours: name for ours, name in pairs.items() if name}


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def _text(value: object) -> str | None:
    """A JSON value as text, None for null; TypeError for an object, a list, a truth value or half a surrogate pair."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError("not a string or a number")
    text = str(value)
    text.encode()  # UnicodeEncodeError, a ValueError, on what UTF-8 cannot hold
    return text


def _require_rows(path: Path, rows: int, unparsable: int, expected: str) -> None:
    if rows == 0 and unparsable:
        raise _wrong_format(path, f"none of {unparsable} lines can be read", expected)
    if rows == 0:
        raise InputError(f"{path}: the log is empty", got="no events", expected="some users with several events each")


def _require_columns(path: Path, columns: Columns, present: list[str]) -> None:
    missing = [name for name in columns.required if name not in present]
    if missing:
        raise InputError(
            f"{path}: missing column {', '.join(map(repr, missing))}",
            got=", ".join(repr(name)[:40] for name in sorted(present)[:20]) or "no columns",
            expected=", ".join(columns.required),
            fix="name yours in prepare-data.<field>_column (action_column=null: no actions), or correct the source",
        )


def _wrong_format(path: Path, why: object, expected: str) -> InputError:
    return InputError(
        f"{path}: cannot be read in this format",
        got=why,
        expected=expected,
        fix="set prepare-data.source to the file's",
    )
