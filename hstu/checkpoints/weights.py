"""Named tensors from a file somebody else wrote: every one is checked before a model is made of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.errors import InputError
from hstu.model import HSTU

LINE = "\n            "  # sets the lines of a list below one another in an error message
Shapes = Mapping[str, tuple[int | None, ...]]  # None: any size


def expected_shapes(config: HSTUConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `hstu.model.HSTU`; nothing is allocated, however large the config."""
    with torch.device("meta"):
        model = HSTU(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_names(
    weights: Mapping[str, object], expected: Shapes, *, source: str, fix: str, booleans: Container[str] = ()
) -> None:
    """`weights` holds exactly the `expected` tensors; InputError lists all that are missing, extra or wrong.

    Tensors hold floats, but for those named in `booleans`.
    """
    problems = [f"missing {name} {_sizes(shape)}" for name, shape in expected.items() if name not in weights]
    problems += [f"extra {name} {_describe(value)}" for name, value in weights.items() if name not in expected]
    for name, shape in expected.items():
        if name not in weights:
            continue
        value = weights[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or not _holds(value, name in booleans):
            kind = "booleans" if name in booleans else "floats"
            problems.append(f"wrong type of {name}: {_describe(value)}, expected {kind} {_sizes(shape)}")
        elif value.dim() != len(shape) or any(
            n not in (size, None) for size, n in zip(value.shape, shape, strict=True)
        ):
            problems.append(f"wrong shape of {name}: {_sizes(value.shape)}, expected {_sizes(shape)}")
    if problems:
        raise InputError(
            f"{source}: its tensors are not those of this model",
            got=LINE.join(problems),
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
            got=LINE.join(problems),
            expected="no NaN and no infinity",
            fix="export the checkpoint of an epoch before the training diverged",
        )


def model_from_weights(config: HSTUConfig, weights: Mapping[str, Tensor], *, source: str) -> HSTU:
    """The model of `config` in eval mode with exactly these weights, as float32, after every check above."""
    fix = "let config.json and the weights come from one model"
    if config.num_layers > len(weights):  # said before a list of that many missing tensors is made
        got = f"{config.num_layers} layers, {len(weights)} tensors"
        raise InputError(f"{source}: fewer tensors than layers", got=got, expected="several tensors a layer", fix=fix)
    check_names(weights, expected_shapes(config), source=source, fix=fix)
    with torch.device("meta"):
        model = HSTU(config)
    weights = {name: value.detach().to(torch.float32).contiguous() for name, value in weights.items()}
    check_finite(weights, source=source)
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return model


def _holds(value: Tensor, boolean: bool) -> bool:
    return value.dtype == torch.bool if boolean else bool(value.is_floating_point())


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(size == wanted or wanted is None for size, wanted in pairs)


def _sizes(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {_sizes(value.shape)}"
    return f"({type(value).__name__})"
