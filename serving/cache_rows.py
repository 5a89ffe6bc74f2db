"""A user's cache between visits: its rows in one of the forms of `hstu.signature.CacheSpec`, growing as events come.

Rows only ever come after the rows that are there, so states of one user share memory: a newer one has more of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from hstu.errors import ArtifactError
from hstu.signature import CacheForm, CacheSpec
from serving.engine import Array

DTYPES: dict[CacheForm, type] = {"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}  # of the stored values
_LEVELS = 127
_LARGEST = 3.38e38  # what every form holds: above it bf16 rounds to infinity
_SPARE = 0.25  # of the rows in use, so that a visit seldom moves what is there


class CacheRows:
    """The first `length` rows of every layer, all of them numbers; never changed once made."""

    def __init__(self, spec: CacheSpec, form: CacheForm, *, length: int = 0, memory: _Memory | None = None) -> None:
        self.spec, self.form, self.length = spec, form, length
        self._memory = memory or _Memory(spec, form, capacity=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in this form."""
        return self.spec.bytes_per_user(self.form, self.length)

    @property
    def spare_bytes(self) -> int:
        """Bytes of memory held for rows still to come, or for rows of a newer state of this user."""
        return self._memory.values.nbytes + self._memory.scales.nbytes - self.nbytes

    def append(self, rows: Array) -> CacheRows:
        """These rows and then float32 [layers, M, width]; ArtifactError when one of the new ones is not a number."""
        if not (np.abs(rows) < _LARGEST).all():
            raise ArtifactError(
                "the engine gave cache rows that are not numbers",
                got="NaN or infinity",
                fix="use an engine of a wider precision, and look for extreme weights in the checkpoint",
            )
        end = self.length + rows.shape[1]
        memory = self._memory.grown(self.length, end)
        for layer in range(self.spec.num_layers):
            for part, scale, columns in self._parts(layer, slice(self.length, end), memory):
                _encode(rows[layer, :, columns], self.form, part, scale)
        return CacheRows(self.spec, self.form, length=end, memory=memory)

    def read(self, out: Array) -> None:
        """The rows stand in float32 `out` [layers, at least `length`, width], as far as they go."""
        for layer in range(self.spec.num_layers):
            for part, scale, columns in self._parts(layer, slice(0, self.length), self._memory):
                _decode(part, scale, self.form, out[layer, : self.length, columns])

    def view(self) -> Array | None:
        """float32 [layers, at least `length`, width] without a copy; None when the form is another."""
        return self._memory.values if self.form == "fp32" and self._memory.values.shape[1] else None

    def to_bytes(self) -> bytes:
        """Values [layers, length, width], then for int8 the scales float32 [layers, length, 2]; little-endian."""
        values, scales = self._memory.values[:, : self.length], self._memory.scales[:, : self.length]
        return b"".join(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes() for a in (values, scales))

    @classmethod
    def from_bytes(cls, data: bytes, spec: CacheSpec, form: CacheForm, length: int) -> CacheRows:
        """What `to_bytes` gave; ArtifactError when the size is another, or a row is not a number."""
        size = spec.bytes_per_user(form, length)
        if len(data) != size:
            raise ArtifactError(
                "a user's state has cache rows of another size", got=f"{len(data)} bytes", expected=f"{size} bytes"
            )
        memory = _Memory(spec, form, capacity=length)
        start = 0
        for array in (memory.values, memory.scales):
            little = array.dtype.newbyteorder("<")
            array.reshape(-1)[:] = np.frombuffer(data, little, count=array.size, offset=start)
            start += array.nbytes
        memory.used = length
        rows = cls(spec, form, length=length, memory=memory)
        rows._require_numbers()
        return rows

    def _require_numbers(self) -> None:
        memory = self._memory
        if self.form == "bf16":
            right = ((memory.values & 0x7F80) != 0x7F80).all()  # all bits of the exponent: NaN or infinity
        elif self.form == "int8":
            right = (np.abs(memory.scales) < _LARGEST / _LEVELS).all()
        else:
            right = np.isfinite(memory.values).all()
        if not right:
            raise ArtifactError(
                "a user's state holds what is not a number",
                got="NaN or infinity among its cache rows",
                fix="start this user anew from the history",
            )

    def _parts(self, layer: int, rows: slice, memory: _Memory) -> Iterator[tuple[Array, Array, slice]]:
        """k and v of some rows: values [M, ·], scales [M, 1] (none but for int8), and which columns they are."""
        for part, columns in enumerate((slice(0, self.spec.k_width), slice(self.spec.k_width, self.spec.width))):
            yield memory.values[layer, rows, columns], memory.scales[layer, rows, part : part + 1], columns


class _Memory:
    """What rows are kept in; `used` rows of it belong to somebody."""

    def __init__(self, spec: CacheSpec, form: CacheForm, *, capacity: int) -> None:
        self.values: Array = np.empty(spec.shape(capacity), DTYPES[form])
        self.scales = np.empty((spec.num_layers, capacity, 2 if form == "int8" else 0), np.float32)
        self.used = 0
        self._spec, self._form = spec, form
        self._lock = threading.Lock()

    def grown(self, length: int, end: int) -> _Memory:
        """Memory that holds these first `length` rows, in which rows up to `end` are the caller's to write.

        That is this one when it has room and nobody has extended the same rows before, otherwise a copy.
        """
        with self._lock:
            if self.used == length and end <= self.values.shape[1]:
                self.used = end
                return self
        capacity = max(end, min(end + int(end * _SPARE), self._spec.max_positions))
        other = _Memory(self._spec, self._form, capacity=capacity)
        other.values[:, :length] = self.values[:, :length]
        other.scales[:, :length] = self.scales[:, :length]
        other.values[:, end:] = 0  # never read, but given to engines
        other.used = end
        return other


def _encode(x: Array, form: CacheForm, out: Array, scale: Array) -> None:
    """`out` (and `scale` [M, 1]) hold float32 `x` [M, ·] in the form."""
    if form == "fp32":
        out[:] = x
    elif form == "bf16":
        bits = np.ascontiguousarray(x).view(np.uint32)
        out[:] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
    else:
        scale[:] = np.abs(x).max(axis=1, keepdims=True, initial=0.0) / _LEVELS
        np.rint(x / np.where(scale == 0.0, np.float32(1.0), scale), out=out, casting="unsafe")


def _decode(values: Array, scale: Array, form: CacheForm, out: Array) -> None:
    """`out`, float32 [M, ·], is what the values stand for."""
    if form == "fp32":
        out[:] = values
    elif form == "bf16":
        out[:] = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        np.multiply(values, scale, out=out)
