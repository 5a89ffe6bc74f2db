"""The model's config: what it derives, what it refuses, and that it survives its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import encode_json
from hstu.config import HSTUConfig
from hstu.errors import InputError
from tests.models import TINY, TINY_RESEARCH, tiny_config


def test_what_follows_from_the_shape() -> None:
    assert TINY.max_length == 20 + 10 + 1
    assert TINY.uvqk_dim == 2 * 2 * (8 + 6)
    assert TINY.item_scale == 4.0


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH])
def test_the_file_gives_the_config_back(config: HSTUConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(encode_json(config.to_pretrained()))
    assert HSTUConfig.from_pretrained(tmp_path) == config
    assert HSTUConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"num_items": 0},
        {"num_layers": -1},
        {"max_history": 0},
        {"num_actions": -1},
        {"tasks": (), "head_dim": 4},
        {"head_dim": 0},
        {"num_items": "many"},
        {"num_heads": 1.5},
        {"num_heads": True},
        {"tasks": "engagement"},
        {"absent_query_time": "now"},
    ],
)
def test_what_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        HSTUConfig.from_dict(TINY.to_dict() | changes)


def test_unknown_and_missing_keys_are_named() -> None:
    values = TINY.to_dict() | {"num_head": 2}
    del values["qk_dim"]
    with pytest.raises(InputError, match=r"(?s)unknown \['num_head'\], missing \['qk_dim'\].*max_history"):
        HSTUConfig.from_dict(values)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hstu": 3}', "\ud800".encode("utf-8", "surrogatepass").hex()])
def test_files_that_are_no_config(content: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        HSTUConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        HSTUConfig.from_pretrained(tmp_path)


def test_what_other_readers_look_for() -> None:
    values = json.loads(encode_json(tiny_config(num_layers=3).to_pretrained()))
    assert values["architectures"] == ["HSTUForCausalLM"]
    assert (values["num_hidden_layers"], values["vocab_size"], values["hidden_size"]) == (3, 151, 16)
