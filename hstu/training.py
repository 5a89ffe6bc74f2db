"""A reference model, trained on histories: next item at every event, outcomes at some of them.

    item loss  = −log softmax(cosine(state_i, item) / temperature)[item_{i+1}], over a sample of the corpus
    task loss  = binary cross-entropy of the heads for the events themselves, as candidates at their own
                 time and place that see the events before (outcomes that are not known do not count)

AdamW (Loshchilov & Hutter 2019), linear warm-up, cosine decay. The same histories, settings, seed and
kind of machine give the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.data.histories import Histories, Int64s
from hstu.errors import InputError
from hstu.model import HSTU, History, l2_normalize
from hstu.time_buckets import time_buckets

WARM_UP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.98)
TASK_WEIGHT = 2.0  # of the task loss beside the item loss, in the steps that have one
TASK_EVERY = 2  # steps: the heads learn from fewer events than the embeddings need
TASK_CANDIDATES = 12  # events of a window that stand as candidates in each step
GRADIENT_NORM = 1.0

Outcomes = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How to train; every field changes the weights."""

    epochs: int
    batch_size: int  # windows
    learning_rate: float  # the highest
    dropout: float
    temperature: float
    num_negatives: int  # items of the corpus that each target is told apart from, drawn anew in each step
    seed: int
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """After a step: steps done and in all, the running mean of the loss."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """B windows of L inputs: `history`; of the event after each, targets int64 [B, L], outcomes int8 [B, L, tasks]."""

    history: History
    targets: Tensor
    outcomes: Tensor


def train(
    config: HSTUConfig,
    histories: Histories,
    outcomes: Outcomes,
    training: Training,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
) -> HSTU:
    """A trained model in eval mode. outcomes: int8 [T, tasks] of the histories' events, -1 = not known.

    Raises InputError when no history has two events (there is nothing to predict), or when training diverges.
    """
    if not (histories.lengths >= 2).any():
        raise InputError("training: no history has two events, so no next item is known", fix="bring a larger log")
    with reproducible(seed=training.seed, threads=training.threads):
        rng = np.random.Generator(np.random.PCG64(training.seed))
        model = HSTU(config)
        initialise(model)
        plan = [batch for _ in range(training.epochs) for batch in _epoch(histories, config, training, rng)]
        optimizer = torch.optim.AdamW(_parameter_groups(model), lr=training.learning_rate, betas=BETAS, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, len(plan)))
        running = math.nan
        for step, windows in enumerate(plan, start=1):
            with_tasks = bool(config.tasks) and step % TASK_EVERY == 0
            loss = _loss(model, _batch(histories, outcomes, windows), training, rng, with_tasks=with_tasks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(
                    f"training: the loss is no number after step {step} of {len(plan)}",
                    got=f"learning rate {training.learning_rate}, temperature {training.temperature}",
                    fix="lower the learning rate",
                )
            running = value if math.isnan(running) else 0.98 * running + 0.02 * value
            report(Progress(step=step, num_steps=len(plan), loss=running))
    model.eval().requires_grad_(False)
    return model


@contextlib.contextmanager
def reproducible(*, seed: int, threads: int) -> Iterator[None]:
    """Inside, torch draws from `seed` on `threads` threads and uses deterministic kernels; all is put back after."""
    threads_before, deterministic_before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging that costs a tenth
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(deterministic_before)
            torch.utils.deterministic.fill_uninitialized_memory = fill_before


def initialise(model: HSTU) -> None:
    """Weights drawn so that every projection keeps the scale of its input; biases are zero."""
    dim = model.config.embedding_dim
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.zeros_(parameter)
        elif name == "item_embedding.weight":
            torch.nn.init.normal_(parameter, std=dim**-0.5)
        elif "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    with torch.no_grad():
        model.item_embedding.weight[0].zero_()


def _epoch(histories: Histories, config: HSTUConfig, training: Training, rng: np.random.Generator) -> list[Int64s]:
    """The batches of one epoch, in random order: windows int64 [B, 2] of similar length, as spans of events.

    A history is cut into windows of at most max_history inputs and one target. Where a long one is cut first
    changes from epoch to epoch, so that its events are predicted from shorter and longer pasts.
    """
    longest = config.max_history + 1
    spans = []
    for start, end in zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True):
        if end - start > longest:
            spans.append((end - longest, end))
            end -= int(rng.integers(1, longest))
        while end - start >= 2:
            spans.append((max(start, end - longest), end))
            end -= config.max_history
    windows = np.asarray(spans, dtype=np.int64)
    order = np.argsort((windows[:, 1] - windows[:, 0]) + 2.0 * rng.random(len(windows)), kind="stable")
    batches = np.array_split(windows[order], range(training.batch_size, len(windows), training.batch_size))
    return [batches[index] for index in rng.permutation(len(batches))]


def _batch(histories: Histories, outcomes: Outcomes, windows: Int64s) -> _Batch:
    starts, lengths = windows[:, 0], windows[:, 1] - windows[:, 0] - 1
    column = np.arange(lengths.max())
    inside = column < lengths[:, None]
    rows = np.where(inside, starts[:, None] + column, 0)

    def take(values: npt.NDArray[np.generic], shift: int = 0) -> Tensor:
        taken = values[np.where(inside, rows + shift, 0)]
        taken[~inside] = 0
        return torch.from_numpy(taken)

    return _Batch(
        history=History(
            item_ids=take(histories.item_ids),
            actions=take(histories.actions),
            timestamps=take(histories.timestamps),
            lengths=torch.from_numpy(lengths),
            query_time=torch.from_numpy(histories.timestamps[windows[:, 1] - 1]),
        ),
        targets=take(histories.item_ids, shift=1),
        outcomes=take(outcomes, shift=1),
    )


def _loss(model: HSTU, batch: _Batch, training: Training, rng: np.random.Generator, *, with_tasks: bool) -> Tensor:
    inside = batch.targets > 0
    states = _encode(model, batch.history, training.dropout)[inside]
    loss = _item_loss(model, states, batch.targets[inside], training, rng)
    if with_tasks:
        loss = loss + TASK_WEIGHT * _task_loss(model, batch, rng)
    return loss


def _item_loss(model: HSTU, states: Tensor, targets: Tensor, training: Training, rng: np.random.Generator) -> Tensor:
    """Softmax cross-entropy of states [P, D] with the next items int64 [P], against a sample of the corpus.

    The sample is uniform and shared by all positions; its share of the denominator is scaled up to that of
    the whole corpus (Bengio & Senécal 2008), and a target that was drawn as its own opponent does not count.
    """
    num_items, num_drawn = model.config.num_items, min(training.num_negatives, model.config.num_items)
    drawn = torch.from_numpy(rng.permutation(num_items)[:num_drawn] + 1)
    items = l2_normalize(model.item_embedding(torch.cat([drawn, targets])))
    states = l2_normalize(states) / training.temperature
    scale = math.log(num_items / num_drawn)
    against = states @ items[:num_drawn].T + scale
    against = against.masked_fill(drawn == targets.unsqueeze(1), -math.inf)
    own = (states * items[num_drawn:]).sum(-1)
    return (torch.logaddexp(own, against.logsumexp(-1)) - own).mean()


def _encode(model: HSTU, history: History, dropout: float) -> Tensor:
    """`HSTU.encode` with dropout on the input and on what each layer adds: float32 [B, L, D]."""
    buckets = time_buckets(history.next_timestamps.unsqueeze(2) - history.timestamps.unsqueeze(1))
    x = F.dropout(model.embed_history(history), dropout)
    for layer in model.layers:
        attended = layer.attention(layer.project(x), buckets, history.lengths)
        x = x + F.dropout(layer.output(attended), dropout)
    return x


def _task_loss(model: HSTU, batch: _Batch, rng: np.random.Generator) -> Tensor:
    """Binary cross-entropy of some events of every window, each a candidate where and when it happened."""
    length = batch.targets.shape[1]
    drawn = torch.from_numpy(rng.random((len(batch.targets), min(TASK_CANDIDATES, length))))
    column = (drawn * batch.history.lengths.unsqueeze(1)).long()  # the input before the candidate
    logits = model.rank_logits(
        batch.history,
        batch.targets.gather(1, column),
        position=column + 1,
        time=batch.history.next_timestamps.gather(1, column),
    )
    labels = batch.outcomes.gather(1, column.unsqueeze(-1).expand(-1, -1, batch.outcomes.shape[-1]))
    known = labels >= 0
    if not known.any():
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits[known], labels[known].float())


def _parameter_groups(model: HSTU) -> list[dict[str, object]]:
    """Weight decay for matrices alone: not for biases, nor for the bias tables."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def _learning_rate(step: int, num_steps: int) -> float:
    """Share of the highest learning rate: up in a line, down along a cosine to zero."""
    warm_up = max(1.0, WARM_UP * num_steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1.0, num_steps - warm_up)))
