"""The Hugging Face layout: what is saved comes back bit for bit, and bad folders are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hstu.artifact import encode_json
from hstu.checkpoints.huggingface import load_pretrained, save_pretrained
from hstu.errors import InputError
from tests.models import TINY, TINY_RESEARCH, random_model


def saved(folder: Path) -> dict[str, Tensor]:
    """A folder with the tiny model; returns its tensors."""
    folder.mkdir(exist_ok=True)
    save_pretrained(random_model(), folder)
    return dict(load_file(folder / "model.safetensors"))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH])
def test_weights_and_bytes_come_back(config: object, tmp_path: Path) -> None:
    model = random_model(config)  # type: ignore[arg-type]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save_pretrained(model, first)
    again = load_pretrained(first)
    save_pretrained(again, second)
    assert again.config == model.config
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_several_files_with_an_index(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(encode_json({"metadata": {}, "weight_map": files}))
    assert all(torch.equal(value, weights[name]) for name, value in load_pretrained(tmp_path).state_dict().items())
    index.write_bytes(encode_json({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "outside its folder" in refused(tmp_path)
    index.write_text("[]")
    assert "weight_map" in refused(tmp_path)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in saved(tmp_path).items()}
    save_file(weights, tmp_path / "model.safetensors")
    state = load_pretrained(tmp_path).state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(torch.equal(value, weights[name].float()) for name, value in state.items())


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    del weights["layers.0.output.bias"]
    weights["layers.2.output.bias"] = torch.zeros(16)
    weights["item_embedding.weight"] = weights["item_embedding.weight"][:-1].clone()
    weights["layers.1.uvqk.weight"] = weights["layers.1.uvqk.weight"].int()
    save_file(weights, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert "missing layers.0.output.bias [16]" in message
    assert "extra layers.2.output.bias float32 [16]" in message
    assert "wrong shape of item_embedding.weight: [150, 16], expected [151, 16]" in message
    assert "wrong type of layers.1.uvqk.weight: int32" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    weights = saved(tmp_path)
    weights["layers.0.attention.time_bias"][100] = value
    save_file(weights, tmp_path / "model.safetensors")
    assert "layers.0.attention.time_bias: 1 of 129, the first at [100]" in refused(tmp_path)


def test_a_value_too_large_for_float32_is_named(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    weights["layers.0.output.bias"] = torch.full((16,), 1e300, dtype=torch.float64)
    save_file(weights, tmp_path / "model.safetensors")
    assert "layers.0.output.bias: 16 of 16" in refused(tmp_path)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        assert "cannot be read as safetensors" in refused(tmp_path), size
    path.unlink()
    assert "no such file" in refused(tmp_path)


def test_a_config_of_another_size_never_allocates(tmp_path: Path) -> None:
    """A config that asks for more than any memory is answered with the list of shapes, at once."""
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, answer in (
        ("num_items", 10**14, "expected [100000000000001, 16]"),
        ("num_layers", 10**9, "fewer tensors than layers"),
    ):
        changed = {**config, "hstu": {**config["hstu"], name: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert answer in refused(tmp_path)
