"""prepare-data: a log of events becomes a vocabulary and leave-one-out splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hstu.artifact import Artifact, encode_json, sha256_file
from hstu.config import TASKS
from hstu.errors import InputError
from stages.contract import Outcome, Stage, say
from stages.parameters import require

if TYPE_CHECKING:
    from hstu.data.cleaning import CleaningReport
    from hstu.data.events import EventLog, Outcomes
    from hstu.data.readers import RawEvents
    from hstu.data.splits import Splits
    from hstu.data.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareDataParams:
    """Which log, how its columns are called, which rows count, what an outcome is, and who is held out."""

    source: Literal["reference", "jsonl", "csv", "parquet", "movielens"]
    path: str | None = field(metadata={"path": True})
    reference_users: int
    reference_items: int
    reference_events_per_user: int
    user_column: str
    item_column: str
    action_column: str | None
    timestamp_column: str
    dwell_column: str
    price_column: str
    timestamp_unit: Literal["s", "ms"]
    actions: tuple[str, ...]
    min_user_events: int
    min_item_events: int
    engagement_actions: tuple[str, ...]
    engagement_dwell_s: float
    engagement_rating: float
    purchase_actions: tuple[str, ...]
    return_after_h: float
    return_within_days: float
    evaluation_fraction: float
    calibration_fraction: float
    seed: int

    def __post_init__(self) -> None:
        self._require_ranges()
        external = self.source != "reference"
        require(
            external == (self.path is not None),
            f"prepare-data.path: does not go with source {self.source!r}",
            got=self.path,
            expected="the file of events" if external else "null: the reference log is drawn, not read",
        )
        columns = [self.user_column, self.item_column, self.timestamp_column, self.dwell_column, self.price_column]
        columns += [self.action_column] if self.action_column is not None else []
        require(
            len(set(columns)) == len(columns) and all(columns),
            "prepare-data: every column needs a name of its own",
            got=", ".join(map(repr, columns)),
            expected="different, non-empty names",
        )
        require(
            len(set(self.actions)) == len(self.actions) and all(self.actions) and bool(self.actions),
            "prepare-data.actions: not a set of names",
            got=list(self.actions),
            expected="different, non-empty names",
        )
        for name in ("engagement_actions", "purchase_actions"):
            unknown = [action for action in getattr(self, name) if action not in self.actions]
            require(not unknown, f"prepare-data.{name}: unknown action", got=unknown, expected=", ".join(self.actions))

    def _require_ranges(self) -> None:
        at_least = {
            "reference_users": 10,
            "reference_items": 100,
            "reference_events_per_user": 10,
            "min_user_events": 2,  # one to learn from, one to predict
            "min_item_events": 1,
            "seed": 0,
            "engagement_dwell_s": 0,
            "engagement_rating": 0,
            "return_after_h": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"prepare-data.{name}: out of range", got=value, expected=f"at least {least}")
        at_most = {"reference_users": 10**6, "reference_items": 10**6, "reference_events_per_user": 100}
        at_most |= {"return_after_h": 24 * 365, "return_within_days": 3650}
        for name, most in at_most.items():
            value = getattr(self, name)
            require(value <= most, f"prepare-data.{name}: out of range", got=value, expected=f"at most {most}")
        require(
            self.return_within_days * 24 > self.return_after_h,
            "prepare-data.return_within_days: ends before return_after_h",
            got=f"{self.return_within_days} days, {self.return_after_h} hours",
            expected="a time window",
        )
        for name in ("evaluation_fraction", "calibration_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"prepare-data.{name}: out of range", got=value, expected="above 0, below 1")


def run(params: PrepareDataParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:  # noqa: ARG001
    """Write vocabulary.json, train.npz, train_outcomes.npy, evaluation.npz, calibration.npz and summary.json."""
    from hstu.data.splits import build_vocabulary, split_log

    log, outcomes, origin = _reference(params) if params.source == "reference" else _read(params)
    vocabulary = build_vocabulary(log)
    splits = split_log(
        log,
        vocabulary,
        outcomes,
        evaluation_fraction=params.evaluation_fraction,
        calibration_fraction=params.calibration_fraction,
        seed=params.seed,
    )
    vocabulary.save(folder / "vocabulary.json")
    splits.train.save(folder / "train.npz")
    np.save(folder / "train_outcomes.npy", splits.train_outcomes)
    splits.evaluation.save(folder / "evaluation.npz")
    splits.calibration.save(folder / "calibration.npz")
    summary = {**_counts(log, vocabulary, splits), **origin}
    (folder / "summary.json").write_bytes(encode_json(summary))
    say(
        f"prepare-data: {len(log)} events of {summary['users']} users on {summary['items']} items;"
        f" {len(splits.train)} users to train on, {len(splits.evaluation)} held out,"
        f" {len(splits.calibration)} of the training users to calibrate on"
    )
    for task, known in summary["outcomes"].items():
        rate = f"{known['rate']:.1%} of {known['events']} training events" if known["events"] else "not known"
        say(f"prepare-data: {task}: {rate}")
    return Outcome(metrics={name: value for name, value in summary.items() if isinstance(value, (int, dict))})


def _reference(params: PrepareDataParams) -> tuple[EventLog, Outcomes, dict[str, Any]]:
    from hstu.data.reference_log import reference_log

    log, outcomes = reference_log(
        num_users=params.reference_users,
        num_items=params.reference_items,
        events_per_user=params.reference_events_per_user,
        seed=params.seed,
    )
    return log, outcomes, {"source": "reference"}


def _read(params: PrepareDataParams) -> tuple[EventLog, Outcomes, dict[str, Any]]:
    from hstu.data.cleaning import clean_events
    from hstu.data.outcomes import derive_outcomes
    from hstu.data.readers import MOVIELENS_ACTIONS, check_file

    path = Path(str(params.path))
    movielens = params.source == "movielens"
    check_file(path)
    try:
        raw = _read_file(params, path)
        digest = sha256_file(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error})", fix="check the file and its rights"
        ) from None
    log, report = clean_events(
        raw,
        actions=MOVIELENS_ACTIONS if movielens else params.actions,
        timestamp_unit="s" if movielens else params.timestamp_unit,
        min_user_events=params.min_user_events,
        min_item_events=params.min_item_events,
    )
    _say_cleaning(path, raw, report)
    liked = [name for name in MOVIELENS_ACTIONS if float(name.removeprefix("rating_")) >= params.engagement_rating]
    outcomes = derive_outcomes(
        log,
        engagement_actions=liked if movielens else params.engagement_actions,
        engagement_dwell_s=params.engagement_dwell_s,
        purchase_actions=() if movielens else params.purchase_actions,
        return_after_h=params.return_after_h,
        return_within_days=params.return_within_days,
    )
    origin = {
        "source": params.source,
        "source_sha256": digest,
        "rows": report.rows,
        "dropped": dict(report.dropped),
        "out_of_order_events": report.out_of_order_events,
        "notes": list(report.notes),
    }
    return log, outcomes, origin


def _read_file(params: PrepareDataParams, path: Path) -> RawEvents:
    from hstu.data import readers

    if params.source == "movielens":
        return readers.read_movielens(path)
    columns = readers.Columns(
        user=params.user_column,
        item=params.item_column,
        action=params.action_column,
        timestamp=params.timestamp_column,
        dwell=params.dwell_column,
        price=params.price_column,
    )
    read = {"jsonl": readers.read_jsonl, "csv": readers.read_csv, "parquet": readers.read_parquet}[params.source]
    return read(path, columns)


def _say_cleaning(path: Path, raw: RawEvents, report: CleaningReport) -> None:
    total = sum(report.dropped.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items() if count)
    say(f"prepare-data: {path}: {report.rows} rows, {total} dropped" + (f" ({reasons})" if reasons else ""))
    if report.out_of_order_events:
        say(f"prepare-data: the log was not in order: {report.out_of_order_events} events came late; sorted by time")
    for name, there in (("actions", raw.has_actions), ("dwell", raw.has_dwell), ("price", raw.has_price)):
        if not there:
            say(f"prepare-data: the log has no {name}")
    for note in report.notes:
        say(f"prepare-data: note: {note}")


def _counts(log: EventLog, vocabulary: Vocabulary, splits: Splits) -> dict[str, Any]:
    """What the splits hold; `outcomes`: for every task, how many training events it is known of, and the rate there."""
    known = splits.train_outcomes >= 0
    rates = {}
    for index, task in enumerate(TASKS):
        events = splits.train_outcomes[:, index][known[:, index]]
        rates[task] = {"events": len(events), "rate": round(float(events.mean()), 6) if len(events) else 0.0}
    trained = np.unique(splits.train.item_ids)
    return {
        "events": len(log),
        "users": len(log.user_ids),
        "items": vocabulary.num_items,
        "actions": list(vocabulary.actions),
        "train_users": len(splits.train),
        "train_events": len(splits.train.item_ids),
        "evaluation_users": len(splits.evaluation),
        "calibration_users": len(splits.calibration),
        "longest_history": int(np.diff(log.offsets).max()),
        "items_not_in_training": vocabulary.num_items - len(trained),
        "outcomes": rates,
    }


STAGE = Stage(
    name="prepare-data",
    summary="Read a log of events; write a vocabulary and leave-one-out splits.",
    params=PrepareDataParams,
    toolchain=("numpy", "pyarrow"),
    run=run,
)
