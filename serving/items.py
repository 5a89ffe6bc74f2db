"""Embeddings of single items, read from the bundle's weights as they are needed, the hot ones kept in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving.cache import Codec, HotCache
from serving.engine import Array

_WEIGHTS, _TABLE = "model.safetensors", "item_embedding.weight"
_RECORD_BYTES = 256
_READ_COST_S = 5e-5  # of a row that is not in the page cache's first touch; only its ratio to a state's cost matters

EMBEDDING_CODEC: Codec[Array] = Codec(
    nbytes=lambda row: row.nbytes + _RECORD_BYTES,
    packed_nbytes=lambda row: row.nbytes + _RECORD_BYTES,
    pack=lambda row: row.astype("<f4").tobytes(),
    unpack=lambda data: np.frombuffer(data, "<f4"),
)


class ItemEmbeddings:
    """Rows of the item table, L2 norm 1."""

    def __init__(self, bundle: Path, cache: HotCache) -> None:
        from safetensors import safe_open

        self._file = safe_open(bundle / _WEIGHTS, framework="np")
        self._table = self._file.get_slice(_TABLE)  # type: ignore[no-untyped-call]
        self._cache = cache

    def rows(self, item_ids: Sequence[int]) -> Array:
        """float32 [n, D] of model ids."""
        now = time.time()
        found = []
        for item in item_ids:
            row = self._cache.get("item", str(item), now)
            if row is None:
                raw = np.asarray(self._table[item : item + 1], np.float32)[0]
                row = raw / max(float(np.linalg.norm(raw)), 1e-6)
                self._cache.put("item", str(item), row, cost_s=_READ_COST_S, now=now)
            found.append(row)
        return np.stack(found)
