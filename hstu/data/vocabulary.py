"""Raw item ids and action names to the ids a model knows, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hstu.artifact import encode_json
from hstu.data.histories import Int64s
from hstu.errors import ArtifactError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Model id k is `items[k - 1]`, action id a is `actions[a - 1]`; 0 is padding, or "none".

    A foreign checkpoint that came without a vocabulary has `raw_items`: its items are the integers
    1..raw_items, written as decimal strings, and `items` is empty.
    """

    items: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    raw_items: int = 0
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)
    _action_ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {raw: index + 1 for index, raw in enumerate(self.items)})
        object.__setattr__(self, "_action_ids", {name: index + 1 for index, name in enumerate(self.actions)})
        if bool(self.items) == bool(self.raw_items) or self.raw_items < 0:
            raise InputError("vocabulary: either items or raw_items", got=(len(self.items), self.raw_items))
        for kind, names, ids in (("item", self.items, self._ids), ("action", self.actions, self._action_ids)):
            if len(ids) != len(names) or "" in ids:
                raise InputError(f"vocabulary: every {kind} must be there once and have a name")

    @classmethod
    def raw(cls, num_items: int) -> Vocabulary:
        """The vocabulary of a model whose items are the integers 1..num_items."""
        return cls(raw_items=num_items)

    @property
    def num_items(self) -> int:
        return self.raw_items or len(self.items)

    @property
    def num_actions(self) -> int:
        """Rows of the model's action table: every action, and row 0 for none; 0 when there are no actions."""
        return len(self.actions) + 1 if self.actions else 0

    def encode_item(self, raw: str | int) -> int:
        """The model id of a raw id, 0 when it is not known."""
        if not self.raw_items:
            return self._ids.get(str(raw), 0)
        text = str(raw)
        plain = text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= len(str(self.raw_items))
        return int(text) if plain and int(text) <= self.raw_items else 0

    def encode_items(self, raw: Iterable[str | int]) -> Int64s:
        """Model ids int64 [T] of raw ids, 0 where one is not known."""
        return np.fromiter((self.encode_item(one) for one in raw), dtype=np.int64)

    def encode_actions(self, names: Iterable[str | None]) -> Int64s:
        """Action ids int64 [T]: 0 for None and for a name that is not known."""
        return np.fromiter((0 if name is None else self._action_ids.get(name, 0) for name in names), dtype=np.int64)

    def item(self, model_id: int) -> str:
        """The raw id of a model id; InputError when there is none."""
        if not 1 <= model_id <= self.num_items:
            raise InputError("vocabulary: no such item id", got=model_id, expected=f"1..{self.num_items}")
        return str(model_id) if self.raw_items else self.items[model_id - 1]

    def save(self, path: Path) -> None:
        """Write `vocabulary.json`."""
        items: dict[str, object] = {"raw_items": self.raw_items} if self.raw_items else {"items": list(self.items)}
        path.write_bytes(encode_json({**items, "actions": list(self.actions)}))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """What `save` wrote; ArtifactError when it is not that."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            items, actions, raw_items = values.get("items", []), values["actions"], values.get("raw_items", 0)
            lists = isinstance(items, list) and isinstance(actions, list)
            if not lists or type(raw_items) is not int or not all(isinstance(name, str) for name in items + actions):
                raise TypeError("a value of another type")
            return cls(items=tuple(items), actions=tuple(actions), raw_items=raw_items)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError) as error:
            raise ArtifactError(
                f"{path}: not a vocabulary ({error})",
                expected='{"items": [...], "actions": [...]} or {"raw_items": N, "actions": []}',
                fix="run the stage that wrote it again",
            ) from None
