"""The gates of an engine: its answers on held-out histories beside those of eager PyTorch in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import GateError
from hstu.metrics import hit_rate, ndcg
from hstu.signature import CacheForm, cache_spec, entry_names
from hstu.tolerances import Tolerance
from serving.engine import Array, Engine, check_feeds
from serving.self_check import NOISE, check_independent, check_repeatable
from stages.entry_check import check_batches, worst_error
from stages.golden import spread_candidates
from stages.returning import CACHE_FORMS, answers_by_form, histories_from_feeds

BATCH = 32
TIE = 1e-6  # items whose fp32 scores are this near may stand in either order
_CHECK_SEED = 11
_ROUNDING = 0.1  # of the error a precision may have: what a few values that round the other way come to


def measure(engine: Engine, reference: Engine, histories: Histories) -> dict[str, Any]:
    """Figures of `engine` against `reference` on held-out histories.

    Always: embedding_cosine (min, mean), top10_overlap (mean), max_abs_error of every float output, and of the
    embeddings that `extend` gives the same users coming back, to eager's and to this engine's own; cache: for each
    form that a user's cache may have between the visits, the largest there is in bytes, and cosine and overlap after
    it. Where targets are known: hr_at_10 and ndcg_at_10 of both, and the relative loss of each (negative: a gain).
    """
    config = engine.config
    ours: list[dict[str, Array]] = []
    theirs: list[dict[str, Array]] = []
    errors: dict[str, float] = {}
    returned: dict[CacheForm, list[dict[str, Array]]] = {form: [] for form in CACHE_FORMS}
    for feeds in _batches(config, histories):
        for name in entry_names(config):
            if name == "extend":
                continue
            inputs = {key: value for key, value in feeds.items() if name == "rank" or key != "candidate_ids"}
            check_feeds(config, name, inputs)
            got, expected = engine.run(name, inputs), reference.run(name, inputs)
            for output, values in expected.items():
                if output != "top_item_ids":
                    errors[output] = max(errors.get(output, 0.0), _max_error(values, got[output]))
            if name == "retrieve":
                ours.append(got)
                theirs.append(expected)
                by_form = answers_by_form(engine, histories_from_feeds(inputs))
                for form, answers in by_form.items():
                    returned[form].append(answers)
                for other, answers in (("eager", expected), ("retrieve", got)):
                    key, output = f"extend_to_{other}", "user_embedding"
                    errors[key] = max(errors.get(key, 0.0), _max_error(answers[output], by_form["fp32"][output]))
    cosine = _cosine(_joined(ours, "user_embedding"), _joined(theirs, "user_embedding"))
    top, reference_top = _joined(ours, "top_item_ids"), _joined(theirs, "top_item_ids")
    figures: dict[str, Any] = {
        "histories": len(histories),
        "embedding_cosine": {"min": float(cosine.min()), "mean": float(cosine.mean())},
        "top10_overlap": top_overlap(top, reference_top, _joined(theirs, "top_scores")),
        "max_abs_error": errors,
        "cache": {form: _of_cache(config, form, answers, theirs) for form, answers in returned.items()},
    }
    if (histories.target_item > 0).any():
        for metric, function in (("hr_at_10", hit_rate), ("ndcg_at_10", ndcg)):
            value, base = function(top, histories.target_item), function(reference_top, histories.target_item)
            loss = (base - value) / base if base > 0 else 0.0
            figures[metric] = {"engine": value, "fp32_eager": base, "relative_loss": loss}
    return figures


def _of_cache(
    config: HSTUConfig, form: CacheForm, returned: list[dict[str, Array]], expected: list[dict[str, Array]]
) -> dict[str, float]:
    """What a form costs: bytes of the longest cache, and the answers after it beside those of eager PyTorch."""
    spec = cache_spec(config)
    cosine = _cosine(_joined(returned, "user_embedding"), _joined(expected, "user_embedding"))
    top, reference = _joined(returned, "top_item_ids"), _joined(expected, "top_item_ids")
    return {
        "bytes_per_user": spec.bytes_per_user(form, spec.max_positions),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "top10_overlap": top_overlap(top, reference, _joined(expected, "top_scores")),
    }


def top_overlap(top: Array, reference_top: Array, reference_scores: Array, *, k: int = 10) -> float:
    """The mean share of the first k items that are among the reference's first k, or tie with its k-th."""
    k = min(k, reference_top.shape[1])
    near = reference_scores >= reference_scores[:, k - 1 : k] - TIE
    found = ((top[:, :k, None] == reference_top[:, None, :]) & near[:, None, :]).any(axis=2)
    return float(found.mean())


def worst_on_random_inputs(engine: Engine, reference: Engine) -> float:
    """The largest error on random histories that reach every corner of the dynamic shapes."""
    worst = 0.0
    for name in entry_names(engine.config):
        # An int8 engine is good for rows that a history can have, not for any.
        for feeds in check_batches(engine.config, name, seed=_CHECK_SEED, run=partial(reference.run, name)):
            expected = dict(reference.run(name, feeds))
            if engine.precision != "fp32":
                expected.pop("cache_rows", None)  # of any size; what they lead to is judged in `measure`
            worst = max(worst, worst_error(expected, engine.run(name, feeds)))
    return worst


def failures(figures: Mapping[str, Any], limits: Tolerance) -> list[str]:
    """One line for every figure beyond its limit; a figure that is not a number is beyond every limit."""
    found = [
        f"max abs error of {output} {value:.3g} > {limits.max_abs_error:g}"
        for output, value in figures["max_abs_error"].items()
        if not value <= limits.max_abs_error
    ]
    if not figures["embedding_cosine"]["min"] >= limits.min_cosine:
        found.append(
            f"lowest cosine of a user embedding {figures['embedding_cosine']['min']:.6f} < {limits.min_cosine:g}"
        )
    if not figures["embedding_cosine"]["mean"] >= limits.min_mean_cosine:
        found.append(
            f"mean cosine of the user embeddings {figures['embedding_cosine']['mean']:.6f} < {limits.min_mean_cosine:g}"
        )
    if not figures["top10_overlap"] >= limits.min_top10_overlap:
        found.append(f"mean top-10 overlap {figures['top10_overlap']:.4f} < {limits.min_top10_overlap:g}")
    for metric in ("hr_at_10", "ndcg_at_10"):
        if metric in figures and not figures[metric]["relative_loss"] <= limits.max_quality_loss:
            value, base = figures[metric]["engine"], figures[metric]["fp32_eager"]
            found.append(
                f"{metric} {value:.5f} against {base:.5f}: loses {figures[metric]['relative_loss']:.2%} > "
                f"{limits.max_quality_loss:.2%}"
            )
    return found


def gate(engine: Engine, reference: Engine, histories: Histories, limits: Tolerance) -> dict[str, Any]:
    """The figures of an engine that may be kept; GateError with them when it may not."""
    for name in entry_names(engine.config):
        feeds = next(iter(_batches(engine.config, histories.select(range(min(8, len(histories)))))))
        inputs = {key: value for key, value in feeds.items() if name == "rank" or key != "candidate_ids"}
        mixed = list(check_batches(engine.config, name, seed=_CHECK_SEED))[1]
        check_repeatable(engine, name, mixed if name == "extend" else inputs)
    figures = measure(engine, reference, histories)
    figures["max_abs_error"]["random_inputs"] = worst_on_random_inputs(engine, reference)
    figures["batch_dependence"] = {
        name: check_independent(engine, name, feeds, limit=max(NOISE, limits.max_abs_error * _ROUNDING))
        for name in entry_names(engine.config)
        for feeds in [list(check_batches(engine.config, name, seed=_CHECK_SEED))[1]]
    }
    found = failures(figures, limits)
    if found:
        raise GateError(
            f"the {engine.precision} engine on {engine.backend} does not pass its gate",
            got="; ".join(found),
            expected=", ".join(f"{key} {value:g}" for key, value in asdict(limits).items()),
            fix="keep more linears wide (build-engine.int8_keep_wide, float_keep_wide), calibrate on more histories, "
            "or use a wider precision",
        )
    return figures


def _batches(config: HSTUConfig, histories: Histories) -> Iterator[dict[str, Array]]:
    """The histories, cut to what the model takes, as inputs of both entries."""
    for start in range(0, len(histories), BATCH):
        rows = histories.select(range(start, min(start + BATCH, len(histories)))).newest(config.max_history)
        yield {**rows.feeds(config), "candidate_ids": spread_candidates(config, rows)}


def _joined(answers: list[dict[str, Array]], output: str) -> Array:
    return np.concatenate([answer[output] for answer in answers])


def _max_error(expected: Array, got: Array) -> float:
    difference = float(np.abs(expected - got).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def _cosine(a: Array, b: Array) -> Array:
    """Cosine of each pair of rows, in float64; 1 for two zero vectors, 0 for a zero vector and another."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    result: Array = np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(norms == 0.0, 1.0, norms))
    return result
