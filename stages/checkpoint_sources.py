"""The three sources of a checkpoint, and the histories that go with each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hstu.artifact import MANIFEST, Artifact, open_artifact, sha256_file
from hstu.checkpoints.histories import drawn_histories, spread_rows, translated_histories, with_tasks
from hstu.checkpoints.huggingface import load_pretrained, weight_files
from hstu.checkpoints.meta_research import load_meta_research
from hstu.config import TASKS, HSTUConfig
from hstu.data.histories import Histories
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError, ParameterError
from hstu.evaluation import TOP, baseline_quality
from hstu.model import HSTU
from hstu.training import Progress, Training, train
from stages.checkpoint_params import CheckpointParams
from stages.contract import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A model with the vocabulary of its ids. details go into checkpoint.json, platform into the manifest."""

    model: HSTU
    vocabulary: Vocabulary
    details: Mapping[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    platform: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HistorySplits:
    """What later stages calibrate and judge on; source says whether it is of a log or drawn."""

    calibration: Histories
    evaluation: Histories
    source: Literal["prepared", "drawn"]


def train_reference(params: CheckpointParams, data: Artifact) -> Trained:
    """The model trained on the prepared log, and what it has to beat; InputError when there is nothing to learn."""
    vocabulary = Vocabulary.load(data.file("vocabulary.json"))
    histories = Histories.load(data.file("train.npz"))
    outcomes = np.load(data.file("train_outcomes.npy"))
    known = (outcomes >= 0).any(axis=0)  # a head for an outcome that nothing in the log tells would be a random one
    tasks = tuple(task for task, is_known in zip(TASKS, known, strict=True) if is_known)
    if len(tasks) < len(TASKS):
        say(
            f"checkpoint: no task heads for {', '.join(t for t in TASKS if t not in tasks)}: the log does not tell them"
        )
    config = HSTUConfig(
        num_items=vocabulary.num_items,
        embedding_dim=params.reference_embedding_dim,
        num_layers=params.reference_num_layers,
        num_heads=params.reference_num_heads,
        qk_dim=params.reference_qk_dim,
        v_dim=params.reference_v_dim,
        max_history=params.reference_max_history,
        max_generated=params.max_generated,
        num_actions=vocabulary.num_actions,
        num_gap_buckets=params.reference_gap_buckets,
        tasks=tasks,
        head_dim=params.reference_head_dim if tasks else 0,
        absent_query_time="last_event",
    )
    training = Training(
        epochs=params.reference_epochs,
        batch_size=params.reference_batch_size,
        learning_rate=params.reference_learning_rate,
        dropout=params.reference_dropout,
        temperature=params.reference_temperature,
        num_negatives=params.reference_negatives,
        seed=params.seed,
        threads=params.reference_threads,
    )
    with _training_bar() as report:
        model = train(config, histories, outcomes[:, known], training, report=report)
    evaluation = _some(Histories.load(data.file("evaluation.npz")), params.evaluation_histories, config, quiet=True)
    return Trained(
        model=model,
        vocabulary=vocabulary,
        details={"epoch": params.reference_epochs},
        metrics=baseline_quality(histories, evaluation, num_items=config.num_items),
        platform={"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": params.reference_threads},
    )


def read_meta(params: CheckpointParams) -> Trained:
    """The model of a file of Meta's research trainer; its items are the integers 1..num_items."""
    assert params.path is not None
    assert params.num_heads is not None
    path = Path(params.path)
    checkpoint = load_meta_research(path, num_heads=params.num_heads, max_generated=params.max_generated)
    return Trained(
        model=checkpoint.model,
        vocabulary=Vocabulary.raw(checkpoint.model.config.num_items),
        details={"epoch": checkpoint.epoch, "sha256": sha256_file(path)},
    )


def read_huggingface(params: CheckpointParams) -> Trained:
    """The model of a folder with config.json and safetensors, and its vocabulary.json if there is one.

    A folder with a manifest (an artifact or a bundle of ours) is verified first: ArtifactError when it is corrupt.
    """
    assert params.path is not None
    folder = Path(params.path)
    if (folder / MANIFEST).is_file():
        open_artifact(folder)
    model = load_pretrained(folder)
    config = model.config
    if params.num_heads not in (None, config.num_heads):
        raise ParameterError(
            "checkpoint.num_heads: not what the folder's config.json says",
            got=params.num_heads,
            expected=config.num_heads,
            fix="set it to null: config.json tells it",
        )
    vocabulary = _vocabulary_of(folder, config)
    hashes = {path.name: sha256_file(path) for path in weight_files(folder)}
    return Trained(model=model, vocabulary=vocabulary, details={"epoch": None, "sha256": hashes})


def histories_for(params: CheckpointParams, trained: Trained, data: Artifact) -> HistorySplits:
    """The prepared log's splits in the model's ids, or histories drawn from its own vocabulary, which is said."""
    config = trained.model.config
    counts = {"calibration": params.calibration_histories, "evaluation": params.evaluation_histories}
    if params.event_log == "prepared" or params.source == "reference":
        known_as = Vocabulary.load(data.file("vocabulary.json"))
        splits = {}
        for name, count in counts.items():
            some = _some(Histories.load(data.file(f"{name}.npz")), count, config)
            if known_as != trained.vocabulary:
                some = translated_histories(some, config, known_as=known_as, vocabulary=trained.vocabulary)
            splits[name] = with_tasks(some, config.tasks)
        return HistorySplits(calibration=splits["calibration"], evaluation=splits["evaluation"], source="prepared")
    say(
        f"checkpoint: no event log came with this {params.source} checkpoint: {counts['calibration']} calibration and "
        f"{counts['evaluation']} evaluation histories are drawn from its own vocabulary; gates compare with fp32 alone"
    )
    return HistorySplits(
        calibration=drawn_histories(config, count=counts["calibration"], seed=2 * params.seed),
        evaluation=drawn_histories(config, count=counts["evaluation"], seed=2 * params.seed + 1),
        source="drawn",
    )


def tell(source: str, metrics: Mapping[str, Any]) -> None:
    """Say on stderr what came out: the size, and for a trained model how it stands beside the baselines."""
    say(f"checkpoint: {source}, {metrics['num_parameters']:,} parameters")
    for prefix in ("", "markov_", "repeats_", "popularity_"):
        key = f"{prefix}hr_at_{TOP}"
        if key in metrics:
            value = f"HR@{TOP} {metrics[key]:.4f}, NDCG@{TOP} {metrics[f'{prefix}ndcg_at_{TOP}']:.4f}"
            say(f"checkpoint: {prefix.rstrip('_') or 'this model':<10} {value}")
    for name, value in metrics.items():
        if name.startswith("auc_"):
            say(f"checkpoint: AUC of the {name.removeprefix('auc_')} head {value:.4f} (a constant has 0.5)")


def _vocabulary_of(folder: Path, config: HSTUConfig) -> Vocabulary:
    path = folder / "vocabulary.json"
    if not path.is_file():
        actions = tuple(str(action) for action in range(1, config.num_actions))
        return Vocabulary(raw_items=config.num_items, actions=actions)
    vocabulary = Vocabulary.load(path)
    if vocabulary.num_items != config.num_items or vocabulary.num_actions not in (0, config.num_actions):
        raise InputError(
            f"{path}: not the vocabulary of this model",
            got=f"{vocabulary.num_items} items, {vocabulary.num_actions} rows of actions",
            expected=f"{config.num_items} items, {config.num_actions} rows of actions",
            fix="let config.json and vocabulary.json come from one model",
        )
    return vocabulary


def _some(histories: Histories, count: int, config: HSTUConfig, *, quiet: bool = False) -> Histories:
    """`count` histories evenly spread over all, each cut to what the model takes; what is cut or missing is said."""
    some = histories.select(spread_rows(histories, count))
    longer = int((some.lengths > config.max_history).sum())
    if len(some) == 0:
        raise InputError("the event log has no history to judge the model on", fix="bring a larger log")
    if not quiet and len(some) < count:
        say(f"checkpoint: the log has {len(some)} such histories, {count} were asked for")
    if not quiet and longer:
        say(f"checkpoint: kept the newest {config.max_history} events of {longer} of {len(some)} histories")
    return some.newest(config.max_history)


@contextmanager
def _training_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar with the loss on a terminal; elsewhere a line each tenth of the way."""
    if not sys.stderr.isatty():

        def line(progress: Progress) -> None:
            if progress.step * 10 // progress.num_steps != (progress.step - 1) * 10 // progress.num_steps:
                say(f"checkpoint: step {progress.step} of {progress.num_steps}, loss {progress.loss:.3f}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", loss=float("nan"), total=None)
        yield lambda progress: bar.update(task, completed=progress.step, total=progress.num_steps, loss=progress.loss)
