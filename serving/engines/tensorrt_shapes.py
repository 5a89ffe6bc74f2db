"""Which optimisation profile of an engine takes a request, and what a request that none takes must change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hstu.errors import InputError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input: (min, typical, max)


def choose_profile(entry: str, profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The number of the first profile that holds every shape; InputError names the input that each one refuses."""
    refused = []
    for number, profile in enumerate(profiles):
        wrong = [name for name, shape in shapes.items() if not _holds(profile[name], shape)]
        if not wrong:
            return number
        low, _, high = profile[wrong[0]]
        refused.append(f"profile {number} takes {wrong[0]} {list(low)} to {list(high)}")
    raise InputError(
        f"{entry}: no profile of the engine holds these shapes",
        got=", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()),
        expected="; ".join(refused),
        fix="split the batch or cut the histories, or build with other build-engine.profiles",
    )


def _holds(limits: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    low, _, high = limits
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
