"""The Hugging Face layout: a folder with `config.json` and `model.safetensors`.

This is what the checkpoint stage writes and what vLLM reads. Saving and loading gives back every
weight bit for bit; the files' bytes depend on the weights alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hstu.artifact import encode_json
from hstu.checkpoints.weights import model_from_weights
from hstu.config import HSTUConfig
from hstu.errors import InputError
from hstu.model import HSTU

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def save_pretrained(model: HSTU, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (float32, names as in the module) into `folder`."""
    (folder / CONFIG).write_bytes(encode_json(model.config.to_pretrained()))
    weights = {name: value.detach().float().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file leaves it to its owner alone


def load_pretrained(folder: Path) -> HSTU:
    """The model of a folder, in eval mode, float32, without gradients.

    Several files with an index, as Hugging Face splits large models, are read as one. Raises InputError
    when a file is missing or truncated, or its tensors are not exactly those that `config.json` asks for.
    """
    config = HSTUConfig.from_pretrained(folder)
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= _load(path)
    return model_from_weights(config, weights, source=str(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; InputError when the index of several cannot be read."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: cannot be read ({error!r})", expected="an object with 'weight_map'") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: names a file outside its folder", got=repr(name), expected="plain file names")
    return [folder / name for name in names]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file", expected=f"{WEIGHTS} beside {CONFIG}", fix="copy the whole folder"
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error})",
            expected="a whole file, as safetensors writes it",
            fix="copy it again: it may be truncated",
        ) from None
