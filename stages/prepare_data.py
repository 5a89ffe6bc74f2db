"""prepare-data: a log of events becomes a vocabulary and leave-one-out splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hstu.artifact import Artifact, encode_json
from stages.contract import Outcome, Stage, say
from stages.parameters import require


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareDataParams:
    source: Literal["reference"]
    seed: int
    reference_users: int
    reference_items: int
    reference_events_per_user: int
    evaluation_fraction: float
    calibration_fraction: float

    def __post_init__(self) -> None:
        for name in ("evaluation_fraction", "calibration_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"prepare-data.{name}: out of range", got=value, expected="above 0, below 1")


def run(params: PrepareDataParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write vocabulary, splits and summary.json into `folder`."""
    from hstu.data.reference_log import reference_log
    from hstu.data.splits import build_vocabulary, split_log

    log = reference_log(
        num_users=params.reference_users,
        num_items=params.reference_items,
        events_per_user=params.reference_events_per_user,
        seed=params.seed,
    )
    assert log.outcomes is not None
    vocabulary = build_vocabulary(log)
    splits = split_log(
        log,
        vocabulary,
        log.outcomes,
        evaluation_fraction=params.evaluation_fraction,
        calibration_fraction=params.calibration_fraction,
        seed=params.seed,
    )
    vocabulary.save(folder / "vocabulary.json")
    splits.train.save(folder / "train.npz")
    np.save(folder / "train_outcomes.npy", splits.train_outcomes)
    splits.evaluation.save(folder / "evaluation.npz")
    splits.calibration.save(folder / "calibration.npz")
    summary = {"events": len(log), "users": len(log.user_ids), "items": vocabulary.num_items}
    (folder / "summary.json").write_bytes(encode_json(summary))
    say(f"prepare-data: {len(log)} events of {len(log.user_ids)} users on {vocabulary.num_items} items")
    return Outcome(metrics=summary)


STAGE = Stage(
    name="prepare-data",
    summary="Read a log of events; write a vocabulary and leave-one-out splits.",
    params=PrepareDataParams,
    toolchain=("numpy",),
    run=run,
)
