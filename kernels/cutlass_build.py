"""Builds the CUTLASS libraries into a folder: python -m kernels.cutlass_build FOLDER [NAME ..]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kernels.cutlass import SOURCES, build
from kernels.errors import KernelError


def main(folder: Path, names: list[str]) -> None:
    """One JSON line per library: its file, registers, spilled bytes and serialised products (both must be 0)."""
    for name in names or list(SOURCES):
        if name not in SOURCES:
            raise KernelError(f"there is no CUTLASS library {name}", expected=", ".join(SOURCES))
        built = build(SOURCES[name], folder)
        facts = {"name": name, "file": built.path.name, "registers": built.registers}
        facts |= {"spilled_bytes": built.spilled_bytes, "serialised_products": built.serialised_products}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
