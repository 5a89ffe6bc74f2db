"""Training learns what there is to learn, the same every time, and leaves the process as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hstu import training
from hstu.config import TASKS
from hstu.data.histories import Histories
from hstu.errors import InputError
from hstu.evaluation import baseline_quality, ranking_quality, task_quality
from hstu.training import Progress, Training, train
from tests.models import TINY, random_histories, tiny_config

SETTINGS = Training(
    epochs=1, batch_size=16, learning_rate=0.01, dropout=0.1, temperature=0.1, num_negatives=64, seed=0, threads=1
)
CONFIG = tiny_config(num_items=60, max_history=12)


def walks(num_users: int, *, seed: int, targets: bool = False) -> tuple[Histories, np.ndarray]:  # type: ignore[type-arg]
    """Users who walk a ring of 60 items by a step of their own, ±1..±4: the last item alone does not tell the next.

    Outcomes: engagement when the item is even, retention never known, monetisation always.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 26, num_users)
    steps = rng.choice([-4, -3, -2, -1, 1, 2, 3, 4], num_users)
    starts = rng.integers(0, 60, num_users)
    items = [1 + (start + step * np.arange(n + 1)) % 60 for start, step, n in zip(starts, steps, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    past = np.concatenate([one[:-1] for one in items]).astype(np.int64)

    def outcomes(ids: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.stack([ids % 2 == 0, np.full(len(ids), -1), np.ones(len(ids))], axis=1).astype(np.int8)

    target = np.array([one[-1] for one in items], dtype=np.int64)
    times = 1_700_000_000 + 60 * np.arange(len(past), dtype=np.int64)
    histories = Histories(
        item_ids=past,
        actions=rng.integers(0, 4, len(past)),
        timestamps=times,
        offsets=offsets,
        query_time=times[offsets[1:] - 1] + 60,
        target_item=target if targets else np.zeros_like(target),
        target_outcomes=outcomes(target),
    )
    return histories, outcomes(past)


def test_it_learns_what_a_markov_chain_cannot() -> None:
    histories, outcomes = walks(600, seed=0)
    held_out, _ = walks(200, seed=1, targets=True)
    seen: list[Progress] = []
    model = train(CONFIG, histories, outcomes, replace(SETTINGS, epochs=14), report=seen.append)
    quality = ranking_quality(model, held_out) | task_quality(model, held_out)
    others = baseline_quality(histories, held_out, num_items=60)
    assert quality["ndcg_at_10"] > 1.3 * others["markov_ndcg_at_10"]
    assert quality["ndcg_at_10"] > 1.3 * others["repeats_ndcg_at_10"]
    assert quality["hr_at_10"] > others["popularity_hr_at_10"]
    assert quality["auc_engagement"] > 0.9
    assert "auc_retention" not in quality  # never known
    assert "auc_monetisation" not in quality  # always so: nothing to tell apart
    assert [progress.step for progress in seen] == list(range(1, seen[0].num_steps + 1))
    assert seen[-1].loss < seen[0].loss


def test_the_same_settings_give_the_same_bits() -> None:
    histories, outcomes = walks(60, seed=0)
    first, again = (train(CONFIG, histories, outcomes, SETTINGS).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = train(CONFIG, histories, outcomes, replace(SETTINGS, seed=1)).state_dict()
    assert not torch.equal(first["layers.0.uvqk.weight"], other["layers.0.uvqk.weight"])


def test_the_process_is_left_as_it_was() -> None:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    state = torch.random.get_rng_state()
    histories, outcomes = walks(20, seed=0)
    model = train(CONFIG, histories, outcomes, replace(SETTINGS, threads=threads + 1))
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_models_without_extras_are_trained_too() -> None:
    histories, outcomes = walks(40, seed=0)
    bare = tiny_config(num_items=60, max_history=12, num_actions=0, num_gap_buckets=0, tasks=(), head_dim=0)
    model = train(bare, histories, outcomes[:, :0], replace(SETTINGS, num_negatives=1000))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_outcomes_that_are_never_known_change_no_head() -> None:
    histories, outcomes = walks(40, seed=0)
    model = train(CONFIG, histories, np.full_like(outcomes, -1), SETTINGS)
    assert torch.equal(model.task_heads.logits.bias, torch.zeros(len(TASKS)))


@pytest.mark.parametrize("lengths", [[], [0, 1, 1]])
def test_nothing_to_predict(lengths: list[int]) -> None:
    histories = random_histories(lengths=lengths)
    with pytest.raises(InputError, match="no history has two events"):
        train(TINY, histories, np.zeros((sum(lengths), 3), dtype=np.int8), SETTINGS)


def test_a_training_that_diverges_is_told() -> None:
    histories, outcomes = walks(60, seed=0)
    with pytest.raises(InputError, match=r"(?s)the loss is no number.*lower the learning rate"):
        train(CONFIG, histories, outcomes, replace(SETTINGS, learning_rate=1e30, epochs=3))


def test_windows_cover_every_event_once_or_more_and_never_two_users() -> None:
    histories = random_histories(lengths=[2, 0, 1, 12, 13, 14, 26, 150, 3])
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    first = np.isin(np.arange(len(owner)), histories.offsets[:-1])
    for seed in range(20):
        batches = training._epoch(histories, CONFIG, SETTINGS, np.random.default_rng(seed))
        predicted = np.zeros(len(owner), dtype=bool)
        for start, end in np.concatenate(batches):
            assert 2 <= end - start <= CONFIG.max_history + 1
            assert owner[start] == owner[end - 1]
            predicted[start + 1 : end] = True
        assert np.array_equal(predicted, ~first)


def test_a_batch_holds_the_events_of_its_windows() -> None:
    histories, outcomes = walks(5, seed=3)
    windows = np.array([[histories.offsets[1], histories.offsets[1] + 3], [histories.offsets[3], histories.offsets[4]]])
    batch = training._batch(histories, outcomes, windows)
    for row, (start, end) in enumerate(windows):
        n = end - start - 1
        assert batch.history.lengths[row] == n
        assert batch.history.item_ids[row, :n].tolist() == histories.item_ids[start : end - 1].tolist()
        assert batch.targets[row, :n].tolist() == histories.item_ids[start + 1 : end].tolist()
        assert batch.outcomes[row, :n].tolist() == outcomes[start + 1 : end].tolist()
        assert batch.history.query_time[row] == histories.timestamps[end - 1]
        assert not batch.targets[row, n:].any()


def test_the_sampled_loss_against_everything_is_the_full_one() -> None:
    histories, outcomes = walks(8, seed=0)
    model = train(CONFIG, histories, outcomes, SETTINGS)
    states = torch.randn(30, CONFIG.embedding_dim, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(1, 61, (30,), generator=torch.Generator().manual_seed(1))
    settings = replace(SETTINGS, num_negatives=60)
    loss = training._item_loss(model, states, targets, settings, np.random.default_rng(0))
    logits = model.item_scores(states / states.norm(dim=1, keepdim=True)) / settings.temperature
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets - 1).item(), rel=1e-5)
