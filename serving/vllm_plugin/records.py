"""One event as one input row for vLLM: bytes in the channels of a `prompt_embeds` row.

A byte is a small whole number, exact in float32, float16 and bfloat16, so ids and 64-bit times survive any
serving precision; the model looks the tables up itself. The row holds everything that the event's keys and
values depend on besides the rows before it, the time of the event that follows included: vLLM's prefix
cache is keyed on the row's content, and that makes it exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import InputError

_LAYOUT = np.dtype(
    [("item", "<u4"), ("kind", "u1"), ("action", "<u2"), ("time", "<i8"), ("next_time", "<i8"), ("spare", "u1")]
)
RECORD_WIDTH = _LAYOUT.itemsize
EVENT, TOKEN = 1, 0  # kinds: an event with its own times; a bare item id, which inherits the query time


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """T decoded rows: item_ids, actions, times, next_times int64 [T]; has_times bool [T], False for bare items."""

    item_ids: Tensor
    actions: Tensor
    times: Tensor
    next_times: Tensor
    has_times: Tensor


def encode_records(
    item_ids: npt.NDArray[np.int64],
    actions: npt.NDArray[np.int64],
    times: npt.NDArray[np.int64],
    next_times: npt.NDArray[np.int64],
) -> Tensor:
    """Rows uint8 [L, RECORD_WIDTH] of L events, whose values floats hold too; every argument is int64 [L]."""
    records = np.zeros(len(item_ids), dtype=_LAYOUT)
    records["item"], records["kind"], records["action"] = item_ids, EVENT, actions
    records["time"], records["next_time"] = times, next_times
    return torch.from_numpy(records.view(np.uint8).reshape(-1, RECORD_WIDTH))


def encode_items(item_ids: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows [T, RECORD_WIDTH] of bare item ids [T]: generated items, and prompts given as tokens."""
    rows = torch.zeros(len(item_ids), RECORD_WIDTH, dtype=dtype, device=item_ids.device)
    rows[:, :4] = item_ids.int().view(torch.uint8).view(-1, 4).to(dtype)
    return rows


def decode_records(rows: Tensor) -> Events:
    """The events of rows [T, RECORD_WIDTH]; whatever the values, every field is a number of its range."""
    channels = rows.float().nan_to_num().clamp(0, 255).round().to(torch.uint8)

    def field(name: str, dtype: torch.dtype) -> Tensor:
        offset = _LAYOUT.fields[name][1]  # type: ignore[index]
        octets = channels[:, offset : offset + dtype.itemsize].clone(memory_format=torch.contiguous_format)
        return octets.view(dtype).squeeze(1).long()

    return Events(
        item_ids=field("item", torch.int32) & 0xFFFFFFFF,
        actions=field("action", torch.int16) & 0xFFFF,
        times=field("time", torch.int64),
        next_times=field("next_time", torch.int64),
        has_times=channels[:, _LAYOUT.fields["kind"][1]] == EVENT,  # type: ignore[index]
    )


def check_records(rows: Tensor, config: HSTUConfig) -> list[int]:
    """The items of `rows` [L, RECORD_WIDTH]; InputError unless the model can take them."""
    if rows.dim() != 2 or rows.shape[1] != RECORD_WIDTH or not (rows.is_floating_point() or rows.dtype == torch.uint8):
        raise InputError(
            "not rows of records",
            got=f"{rows.dtype} {list(rows.shape)}",
            expected=f"floats or bytes [L, {RECORD_WIDTH}]",
        )
    if not 1 <= len(rows) <= config.max_history:
        raise InputError(
            "the history has too few or too many events", got=len(rows), expected=f"1..{config.max_history}"
        )
    if rows.dtype == torch.uint8:
        values = rows.numpy()
    else:
        channels = rows.float().numpy()
        with np.errstate(invalid="ignore"):
            values = channels.astype(np.uint8)
        if not np.array_equal(values, channels):
            raise InputError("not records: a channel is not a byte", expected="whole numbers 0..255")
    records = np.ascontiguousarray(values).view(_LAYOUT)[:, 0]
    _check(records["kind"] == EVENT, records["kind"], "records of another kind", f"{EVENT}")
    items = records["item"]
    _check((items >= 1) & (items <= config.num_items), items, "unknown items", f"1..{config.num_items}")
    actions = records["action"]
    _check(actions < max(1, config.num_actions), actions, "unknown actions", f"0..{max(0, config.num_actions - 1)}")
    times, next_times = records["time"], records["next_time"]
    _check(times[1:] == next_times[:-1], next_times[:-1], "an event's next time is not that of the next event", "equal")
    _check(times[1:] >= times[:-1], times[1:], "times fall", "oldest event first")
    return items.tolist()  # type: ignore[no-any-return]


def _check(right: npt.NDArray[np.bool_], values: npt.NDArray[np.generic], what: str, expected: str) -> None:
    if not right.all():
        raise InputError(what, got=values[~right][:5].tolist(), expected=expected)


def records_from_histories(histories: Histories, config: HSTUConfig) -> list[Tensor]:
    """One prompt of rows uint8 [length, RECORD_WIDTH] a user; InputError when a history is empty or too long.

    Over HTTP vLLM takes rows of floats alone: `.float()`.
    """
    lengths = histories.lengths
    if not len(lengths):
        return []
    if not (lengths.min() >= 1 and lengths.max() <= config.max_history):
        wrong = int(np.argmax((lengths < 1) | (lengths > config.max_history)))
        raise InputError(
            f"history {wrong} cannot be served",
            got=f"{lengths[wrong]} events",
            expected=f"1..{config.max_history}",
            fix="keep the newest events of a long history; answer a user without events by popularity",
        )
    times, last = histories.timestamps, histories.offsets[1:] - 1
    next_times = np.empty_like(times)
    next_times[:-1] = times[1:]
    next_times[last] = histories.feeds(config, length=int(lengths.max()))["query_time"]
    actions = histories.actions if config.num_actions else np.zeros_like(times)
    rows = encode_records(histories.item_ids, actions, times, next_times)
    return list(rows.split(lengths.tolist()))
