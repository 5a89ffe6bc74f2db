"""PTX as it is handed to a launcher that knows nothing of Triton: no parameter that it would not pass."""

from __future__ import annotations

import re

from kernels.errors import KernelError

_WIDTHS = {"i32": "u32", "i64": "u64", "fp32": "f32"}  # every other argument is an address


def without_scratch(ptx: str, entry: str, types: list[str]) -> str:
    """The text with exactly one parameter for each type, in order: Triton's two scratch areas behind them are gone.

    A launcher that passes as many arguments as a kernel has would otherwise let the driver read two more from beyond
    its array. Raises KernelError when the parameters differ, or when a scratch area is read: then it is needed.
    """
    head, opening, rest = ptx.partition(f".entry {entry}(")
    declared, closing, body = rest.partition(")")
    parameters = [line.strip().rstrip(",") for line in declared.strip().splitlines()]
    found = [match[1] for line in parameters if (match := re.search(r"\.param (?:\.align \d+ )?\.(\w+)", line))]
    expected = [_WIDTHS.get(kind, "u64") for kind in types]
    if found != [*expected, "u64", "u64"]:
        raise KernelError(
            f"{entry}: not these parameters", got=" ".join(found), expected=" ".join([*expected, "u64 u64"])
        )
    for place in (len(types), len(types) + 1):
        if re.search(rf"\b{entry}_param_{place}\b", body):
            raise KernelError(f"{entry}: reads its scratch area", got=f"{entry}_param_{place}", expected="no use of it")
    kept = ",\n".join(f"\t{line}" for line in parameters[: len(types)])
    return f"{head}{opening}\n{kept}\n{closing}{body}"
