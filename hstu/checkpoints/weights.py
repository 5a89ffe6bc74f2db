"""Named tensors from a file somebody else wrote: every one is checked before a model is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.errors import InputError
from hstu.model import HSTU

Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(config: HSTUConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `hstu.model.HSTU`; nothing is allocated, however large the config."""
    with torch.device("meta"):
        model = HSTU(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_names(weights: Mapping[str, object], expected: Shapes, *, source: str, fix: str) -> None:
    """`weights` holds exactly the `expected` tensors; InputError lists all that are missing, extra or wrong."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in weights]
    problems += [f"extra {name} {_describe(value)}" for name, value in weights.items() if name not in expected]
    for name, shape in expected.items():
        value = weights.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse:
            problems.append(f"wrong type of {name}: {_describe(value)}, expected floats {list(shape)}")
        elif tuple(value.shape) != shape:
            problems.append(f"wrong shape of {name}: {list(value.shape)}, expected {list(shape)}")
    if problems:
        raise InputError(
            f"{source}: its tensors are not those of this model",
            got="\n            ".join(problems),
            expected=f"{len(expected)} tensors with the names and shapes of the format",
            fix=fix,
        )


def check_finite(weights: Mapping[str, Tensor], *, source: str) -> None:
    """Every value is a finite number; InputError names each tensor with a NaN or an infinity and where it stands."""
    problems = []
    for name, value in weights.items():
        wrong = ~torch.isfinite(value)
        if wrong.any():
            first = [int(i) for i in wrong.nonzero()[0]]
            problems.append(f"{name}: {int(wrong.sum())} of {value.numel()}, the first at {first}")
    if problems:
        raise InputError(
            f"{source}: weights that are not finite numbers",
            got="\n            ".join(problems),
            expected="no NaN and no infinity",
            fix="export the checkpoint of an epoch before the training diverged",
        )


def model_from_weights(config: HSTUConfig, weights: Mapping[str, Tensor], *, source: str) -> HSTU:
    """The model of `config` in eval mode with exactly these weights, as float32, after every check above."""
    check_names(
        weights, expected_shapes(config), source=source, fix="let config.json and the weights come from one model"
    )
    with torch.device("meta"):
        model = HSTU(config)
    weights = {name: value.detach().to(torch.float32).contiguous() for name, value in weights.items()}
    check_finite(weights, source=source)
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return model


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"({type(value).__name__})"
