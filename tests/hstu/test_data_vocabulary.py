"""Raw ids to model ids and back, and the file between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.data.vocabulary import Vocabulary
from hstu.errors import ArtifactError, InputError

VOCABULARY = Vocabulary(items=("b", "10", "ä"), actions=("view", "like"))


def test_ids_start_at_one_and_unknown_is_zero() -> None:
    assert VOCABULARY.encode_items(["b", 10, "ä", "10", "c", ""]).tolist() == [1, 2, 3, 2, 0, 0]
    assert VOCABULARY.encode_actions(["like", None, "view", "dance"]).tolist() == [2, 0, 1, 0]
    assert [VOCABULARY.item(model_id) for model_id in (1, 2, 3)] == ["b", "10", "ä"]
    assert (VOCABULARY.num_items, VOCABULARY.num_actions) == (3, 3)


def test_raw_vocabulary_takes_its_integers_only() -> None:
    raw = Vocabulary.raw(50)
    texts = [1, "50", "51", "0", "-1", "007", "x", "", "1.0", "²", "9" * 9999, " 7"]
    assert raw.encode_items(texts).tolist() == [1, 50] + [0] * 10
    assert (raw.item(50), raw.num_items, raw.num_actions) == ("50", 50, 0)


@pytest.mark.parametrize("model_id", [0, -1, 4])
def test_an_id_that_is_none_is_an_error(model_id: int) -> None:
    with pytest.raises(InputError):
        VOCABULARY.item(model_id)
    with pytest.raises(InputError):
        Vocabulary.raw(3).item(model_id)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, Vocabulary.raw(10**6)])
def test_saved_and_loaded_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert (tmp_path / "vocabulary.json").stat().st_size < 200


def test_the_file_is_what_is_documented(tmp_path: Path) -> None:
    VOCABULARY.save(tmp_path / "vocabulary.json")
    assert json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8")) == {
        "items": ["b", "10", "ä"],
        "actions": ["view", "like"],
    }
    Vocabulary.raw(9).save(tmp_path / "vocabulary.json")
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == {"raw_items": 9, "actions": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"items": [], "actions": []}',
        '{"items": ["a", "a"], "actions": []}',
        '{"items": ["a", ""], "actions": []}',
        '{"items": ["a", 1], "actions": []}',
        '{"items": "abc", "actions": []}',
        '{"items": ["a"], "actions": ["x", "x"]}',
        '{"items": ["a"], "raw_items": 3, "actions": []}',
        '{"raw_items": -3, "actions": []}',
        '{"raw_items": true, "actions": []}',
        '{"raw_items": 3}',
    ],
)
def test_what_is_no_vocabulary_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        Vocabulary.load(tmp_path / "none.json")
