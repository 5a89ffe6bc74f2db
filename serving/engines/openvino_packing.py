"""Packed rows in an OpenVINO graph: where they stand is fed, and attention takes them without padding.

Surgery's pass `packing` puts the rows of all users one after the other, [1, T, ·], and pads them for attention alone.
Our attention kernel needs no padding, only where each user's rows start. All of that depends on the lengths, is a
few integers a batch, and is computed here before the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino

from hstu.errors import ArtifactError
from serving.engine import Array

ROWS = "packed_rows"  # int32 [T]: where each packed row stands in the padded rows, [B·L]
PLACES = "packed_places"  # int32 [B, L]: the packed row at each padded place
LAST = "packed_last"  # int32 [B]: the packed row of each user's last event
STARTS = "packed_starts"  # int32 [B+1]: where each user's packed rows start
NAMES = (ROWS, PLACES, LAST, STARTS)
GIVES_HISTORY = ("HSTUAttention", "HSTUExtendAttention")  # a row of output for every row of the history
_TENSORS = {"packing.rows": (ROWS, 1), "packing.places": (PLACES, 2), "packing.last": (LAST, 1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The inputs of a graph that say where packed rows stand."""

    rows: Any
    places: Any


def replace_places(model: openvino.Model, feature: Callable[[str, int], Any]) -> Places | None:
    """The graph is fed what it computed of lengths to pack rows; None when it packs none."""
    found: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        for output in node.outputs():
            for name in output.get_names() & _TENSORS.keys():
                found[name] = output
    if not found:
        return None
    inputs = {name: feature(*_TENSORS[name]) for name in found}
    for name, output in found.items():
        for reader in output.get_target_inputs():
            reader.replace_source_output(inputs[name])
    return Places(rows=inputs["packing.rows"], places=inputs["packing.places"])


def packed_rows(padded: Any, places: Places) -> Any:
    """The packed rows [1, T, ·] that `padded` [B, L, ·] was made of; ArtifactError when it was not."""
    squeeze = padded.get_node()
    if squeeze.get_type_name() in ("Squeeze", "Reshape"):
        gather = squeeze.input_value(0).get_node()
        if gather.get_type_name() == "Gather" and _reads(gather, places.places):
            return gather.input_value(0)
    raise ArtifactError(
        f"attention {padded.get_node().get_friendly_name()} does not read packed rows",
        expected="a graph as the surgery pass packing leaves it",
        fix="run surgery, then build-engine again",
    )


def packings(padded: Any, places: Places) -> Iterator[Any]:
    """Everything that is the packed form [1, T, ·] of `padded` [B, L, ·], whatever casts stand before."""
    for reader in padded.get_target_inputs():
        node = reader.get_node()
        if node.get_type_name() in ("Reshape", "Convert"):
            yield from packings(node.output(0), places)
        elif node.get_type_name() == "Gather" and _reads(node, places.rows):
            yield node.output(0)


def _reads(gather: Any, index: Any) -> bool:
    """Whether a Gather takes what stands at `index`, an input of the graph."""
    return bool(gather.input_value(1).get_node().get_friendly_name() == index.get_node().get_friendly_name())


def layout(lengths: Array, width: int, *, places: bool) -> dict[str, Array]:
    """The inputs of a batch of histories that are padded to `width` events; PLACES only if asked for.

    A user without events has one row, which no one reads: no tensor is empty, and every user has a last row.
    """
    counts = np.maximum(lengths, 1)
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    if starts[-1] == len(counts) * width:
        rows = np.arange(starts[-1], dtype=np.int32)
    else:
        rows = np.flatnonzero(np.arange(width) < counts[:, None]).astype(np.int32)
    found = {ROWS: rows, LAST: starts[1:] - 1, STARTS: starts}
    if places:
        at = np.minimum(np.arange(width), counts[:, None] - 1)
        found[PLACES] = (starts[:-1, None] + at).astype(np.int32)
    return found
