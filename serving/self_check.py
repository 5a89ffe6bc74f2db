"""What every engine must show: asked again it answers the same, and nobody's answer depends on the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hstu.errors import GateError
from hstu.signature import EntryName, entry
from serving.engine import Array, Engine

NOISE = 1e-5  # what sums in another order may differ by
CALLS = (1, 3, 10)  # some runtimes drift from the second call on, some when a buffer is used again


def check_repeatable(engine: Engine, name: EntryName, feeds: Mapping[str, Array]) -> None:
    """The first, third and tenth answer to `feeds` are the same bits; GateError names the output that is not."""
    answers = {call: engine.run(name, feeds) for call in range(1, max(CALLS) + 1)}
    first = answers[CALLS[0]]
    for call in CALLS[1:]:
        for output, values in first.items():
            if not np.array_equal(values, answers[call][output], equal_nan=True):
                raise GateError(
                    f"{engine.backend} {engine.precision}: entry {name!r} answers differently when asked again",
                    got=f"{output} of call {call} is not that of call 1",
                    expected="the same bits",
                    fix="build this engine with another backend",
                )


def check_independent(engine: Engine, name: EntryName, feeds: Mapping[str, Array], *, limit: float) -> float:
    """No answer depends on who shares the batch; returns how far a row alone is from the row in the batch.

    Each row is asked beside other mates in a batch of the same shape, where up to `NOISE` it must answer the
    same, and alone without padding, where rounding may differ up to `limit`. Item ids are not compared: where
    scores tie up to rounding their order may differ.
    """
    together = engine.run(name, feeds)
    signature = entry(engine.config, name)
    letters = {spec.name: spec.shape for spec in signature.inputs}
    worst = 0.0
    for row in range(len(feeds["lengths"])):
        length = max(1, int(feeds["lengths"][row]))
        sizes = {"L": length, "E": length, "P": max(1, int(feeds["cached_lengths"][row])) if name == "extend" else 1}
        mates = {key: np.repeat(values[row : row + 1], len(values), axis=0) for key, values in feeds.items()}
        alone = {key: _row(value, letters[key], row, sizes) for key, value in feeds.items()}
        moved = _difference(engine, name, engine.run(name, mates), together, row, row, {})
        if not moved <= NOISE:
            raise _dependence(engine, name, f"with other mates it moves by {moved:.3g}", NOISE)
        worst = max(worst, _difference(engine, name, engine.run(name, alone), together, 0, row, sizes))
    if not worst <= limit:
        raise _dependence(engine, name, f"it differs by {worst:.3g} from the answer alone", limit)
    return worst


def _difference(
    engine: Engine,
    name: EntryName,
    answers: Mapping[str, Array],
    together: Mapping[str, Array],
    row: int,
    of: int,
    sizes: Mapping[str, int],
) -> float:
    """The largest difference of a float output between `row` of some answers and row `of` of others, cut to `sizes`."""
    found = 0.0
    for spec in entry(engine.config, name).outputs:
        if spec.dtype == "float32":
            others = _row(together[spec.name], spec.shape, of, sizes)
            difference = float(np.abs(answers[spec.name][row : row + 1] - others).max(initial=0.0))
            found = max(found, difference if np.isfinite(difference) else float("inf"))
    return found


def _dependence(engine: Engine, name: EntryName, got: str, limit: float) -> GateError:
    return GateError(
        f"{engine.backend} {engine.precision}: an answer of entry {name!r} depends on who shares the batch",
        got=got,
        expected=f"at most {limit:g}",
        fix="build this engine with another backend or precision",
    )


def _row(values: Array, shape: tuple[int | str, ...], row: int, sizes: Mapping[str, int]) -> Array:
    """One user of a batch, cut to the user's own sizes where the letters of `shape` are among them."""
    ends = (sizes.get(letter) if isinstance(letter, str) else None for letter in shape[1:])
    return np.ascontiguousarray(values[(slice(row, row + 1), *(slice(end) for end in ends))])
