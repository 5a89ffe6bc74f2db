"""Static activation scales: one number per tensor, from histories that the gates do not see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from hstu.errors import InputError
from serving.engine import Array
from serving.engines.onnxruntime import PROVIDER, session_options

Method = Literal["max", "percentile", "mse"]
LEVELS = 127  # int8 magnitudes: symmetric, -128 is not used
_BINS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The scale of one tensor, and how it does on histories it was not fitted on.

    clipped: share of values beyond 127 scales; error: RMS of the rounding and clipping error over RMS of the values.
    """

    scale: float
    held_out_clipped: float
    held_out_error: float


class Histogram:
    """Magnitudes of a tensor's values: equal bins from 0 up; the range doubles when a value is beyond it."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, dtype=np.int64)
        self.width = 0.0  # of a bin; 0 until a value other than 0 has come
        self.largest = 0.0
        self.zeros = 0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count every value; InputError when one is not finite."""
        magnitudes = np.abs(values.reshape(-1))
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise InputError(
                "calibration: an activation is not finite", fix="look for extreme weights in the checkpoint"
            )
        self.largest = max(self.largest, largest)
        if self.largest == 0.0:
            self.zeros += magnitudes.size
            return
        if self.width == 0.0:
            self.width = self.largest / (_BINS - 1)
            self.counts[0] += self.zeros
        while self.largest >= self.width * _BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(_BINS // 2, dtype=np.int64)])
            self.width *= 2
        self.counts += np.bincount((magnitudes / self.width).astype(np.int64), minlength=_BINS)

    def limit(self, method: Method, *, percentile: float) -> float:
        """The magnitude that int8 127 stands for."""
        if self.largest == 0.0:
            return 1.0  # a tensor that is always zero: any scale does
        if method == "max":
            return self.largest
        if method == "percentile":
            reached = np.cumsum(self.counts) >= self.counts.sum() * (percentile / 100.0)
            return min(self.largest, float(np.argmax(reached) + 1) * self.width)
        candidates = self.largest * np.linspace(0.05, 1.0, 200)
        return float(candidates[np.argmin([self.squared_error(c / LEVELS) for c in candidates])])

    def squared_error(self, scale: float) -> float:
        """Sum of squared errors of rounding to multiples of `scale` and clipping at 127 of them."""
        centres = (np.arange(_BINS) + 0.5) * self.width
        rounding = np.minimum(scale, self.width) ** 2 / 12.0 if scale < self.width else scale**2 / 12.0
        error = np.where(centres > LEVELS * scale, (centres - LEVELS * scale) ** 2, rounding)
        return float((self.counts * error).sum())

    def clipped(self, scale: float) -> float:
        """Share of the values beyond 127 scales."""
        beyond = (np.arange(_BINS) + 0.5) * self.width > LEVELS * scale
        return float(self.counts[beyond].sum() / max(1, self.counts.sum()))

    def relative_error(self, scale: float) -> float:
        """RMS error over RMS value."""
        centres = (np.arange(_BINS) + 0.5) * self.width
        power = float((self.counts * centres**2).sum())
        return float(np.sqrt(self.squared_error(scale) / power)) if power else 0.0


def storable(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The next larger numbers of 8 significant bits: one value in float32, bfloat16 and float16.

    A graph around int8 may be of any of these types; the scale that divides and the one that multiplies are then the
    same number in all of them, on every backend. Positive; below 2^-17 float16 rounds what bfloat16 holds.
    """
    bits = np.ascontiguousarray(scales, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def observe(
    path: Path, tensors: Sequence[str], batches: Iterable[Mapping[str, Array]]
) -> tuple[dict[str, Histogram], ...]:
    """Histograms of the tensors of an ONNX file: those to fit on (batches 0, 2, 4…), those to check with (1, 3, 5…).

    Batches hold one history each, so that no padding is counted.
    """
    model = onnx.load(path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in present)
    options = session_options(threads=1)  # the same sums, so the same scales, on any number of cores
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
    halves: tuple[dict[str, Histogram], ...] = tuple({name: Histogram() for name in tensors} for _ in range(2))
    for index, feeds in enumerate(batches):
        for name, values in zip(tensors, session.run(list(tensors), dict(feeds)), strict=True):
            halves[index % 2][name].add(values)
    return halves


def fit(fitted: Histogram, held_out: Histogram, method: Method, *, percentile: float) -> Scale:
    """The scale that `method` takes from one histogram, judged by the other."""
    scale = float(storable(np.array([fitted.limit(method, percentile=percentile) / LEVELS], dtype=np.float32))[0])
    return Scale(
        scale=scale,
        held_out_clipped=held_out.clipped(scale),
        held_out_error=held_out.relative_error(scale),
    )
