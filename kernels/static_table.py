"""What the compilers say of every kernel on every SM, in one table to be looked at and held against: nothing measured.

    python -m kernels.static_table OUT.json --cutlass FOLDER --kernels FOLDER [FOLDER ..]

FOLDERs hold `sm_XX/` as `build-kernels` writes them, and libraries as `kernels.cutlass_build` writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernels.cutlass import SOURCES, Loaded, build, library_name
from kernels.spec import SHARED_LIMIT

SCHEMA = 1


def row(description: dict[str, Any]) -> dict[str, Any]:
    """Of one compiled kernel what decides whether it may ship."""
    found = description["instructions"]
    return {
        "config": description["config"], "registers": description["registers"], "spills": description["spills"],
        "stack_bytes": description["stack_bytes"], "shared_bytes": description["shared_bytes"],
        "warpgroup_products": found["warpgroup_products"], "warp_products": found["warp_products"],
        "tanh": found["tanh"], "configs_pruned": len(description["pruned"]),
    }  # fmt: skip


def triton_rows(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Rows by kernel and SM, of the configs that ship."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in sorted(folder.glob("sm_*/*.json")):
            if "@" not in path.stem:
                description = json.loads(path.read_text(encoding="utf-8"))
                rows.setdefault(description["kernel"], {})[f"sm_{description['sm']}"] = row(description)
    return rows


def cutlass_rows(folder: Path) -> dict[str, Any]:
    """Rows of the libraries that are there; each is loaded, which needs CUDA's runtime, but no GPU."""
    rows = {}
    for name, source in SOURCES.items():
        if not (folder / library_name(source)).is_file():
            continue
        built = build(source, folder)
        shared = Loaded(source, folder, int(source.targets[-1].rstrip("a"))).shared_bytes()
        rows[name] = {
            "targets": [f"sm_{target}" for target in source.targets], "registers": built.registers,
            "spilled_bytes": built.spilled_bytes, "serialised_products": built.serialised_products,
        } | ({} if shared is None else {"shared_bytes": shared})  # fmt: skip
    return rows


def main() -> None:
    """The table is written."""
    parser = argparse.ArgumentParser(prog="python -m kernels.static_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernels", type=Path, nargs="+", required=True)
    parser.add_argument("--cutlass", type=Path, required=True)
    given = parser.parse_args()
    tools = [
        json.loads(path.read_text(encoding="utf-8"))["tools"] | {"sm": int(path.parent.name.removeprefix("sm_"))}
        for folder in given.kernels
        for path in sorted(folder.glob("sm_*/*.json"))[:1]
    ]
    table = {
        "schema": SCHEMA, "measured": False, "shared_limit": {f"sm_{sm}": most for sm, most in SHARED_LIMIT.items()},
        "tools": sorted(tools, key=lambda one: one["sm"]), "triton": triton_rows(given.kernels),
        "cutlass": cutlass_rows(given.cutlass),
    }  # fmt: skip
    given.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
