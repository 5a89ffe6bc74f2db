"""The build log in a few figures: what the engine needs in memory, and what the builder warned of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_MEMORY = {  # name in our summary: as the builder's log has it
    "weights_bytes": r"Total Weights Memory: (\d+) bytes",
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
    "host_persistent_bytes": r"Total Host Persistent Memory: (\d+) bytes",
    "device_persistent_bytes": r"Total Device Persistent Memory: (\d+) bytes",
}


def memory(lines: Sequence[str]) -> dict[str, int]:
    """What the builder said of memory, in bytes; of several profiles the largest."""
    found: dict[str, int] = {}
    for name, pattern in _MEMORY.items():
        sizes = [int(match.group(1)) for line in lines if (match := re.search(pattern, line))]
        if sizes:
            found[name] = max(sizes)
    return found


def kinds(warnings: Sequence[str]) -> dict[str, int]:
    """Warnings counted by kind: one that names a node or tensor stands for all of its kind.

    "A node named … already exists" is how the parser says that a function is called more than once: it keeps
    output tensors by node name for `getLayerOutputTensor`, which nothing here asks, and for nothing else.
    """
    return dict(Counter(re.sub(r"\b(named|input|output) \S+", r"\1 …", text) for text in warnings))


def without_position(message: str) -> str:
    """A message without the source file and line that NVIDIA puts before it."""
    return re.sub(r"^\S+\.(?:[ch]pp|h):\d+: ", "", message.strip())
