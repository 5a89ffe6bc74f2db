"""Which config of a kernel ships: the fastest measured on that SM, or else the first that is sound.

`measured.json` holds what `kernels.bench` measured on hardware, each run with its provenance: device, driver, versions
and the report it comes from. Nothing else ranks configs: compiler output says which are unsound, not which is fast.

    python -m kernels.tuning reports/gpu/h200.json        # adopt a report
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.aot import Compiled, compile_all
from kernels.errors import KernelError
from kernels.spec import Config, Kernel, configs_for

TABLE = Path(__file__).parent / "measured.json"
UNMEASURED = "not measured on this SM: the first sound config in the order of the source"


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table of measured runs; KernelError when it is of another schema."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table.get("schema") != 1:
        raise KernelError(f"{path}: not a table of measured configs", got=table.get("schema"), expected="schema 1")
    return table


def ranked(kernel: Kernel, sm: int, table: Mapping[str, Any]) -> tuple[list[Config], str]:
    """The kernel's configs, best first, and why: the newest run on this SM that timed it, then source order."""
    configs = configs_for(kernel, sm)
    for run in reversed(table["runs"]):
        times = run["times_us"].get(kernel.name, {})
        timed = [config for config in configs if config.label() in times]
        if run["sm"] == sm and timed:
            order = sorted(timed, key=lambda config: times[config.label()])
            rest = [config for config in configs if config not in timed]
            return order + rest, f"measured on {run['device']}, driver {run['driver']}: {run['report']}"
    return list(configs), UNMEASURED


def adopt(report: Mapping[str, Any], name: str, path: Path = TABLE) -> None:
    """The table holds the sweep of a bench report called `name`; an earlier run of that name is replaced."""
    table = read_table(path)
    run = {
        "report": name,
        **{key: report["device"][key] for key in ("device", "sm", "driver", "torch", "triton")},
        "times_us": report["sweep"],
    }
    table["runs"] = [*(one for one in table["runs"] if one["report"] != name), run]
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(
    work: list[tuple[Kernel, int]], *, processes: int, every_config: bool, table: Mapping[str, Any]
) -> Iterator[tuple[Compiled, bool]]:
    """Every (kernel, sm) compiled in the config that ships (marked True), and with every_config in all sound ones.

    Raises KernelError for a kernel of which no config is sound, with each config's faults.
    """
    queues = {(kernel.name, sm): ranked(kernel, sm, table) for kernel, sm in work}
    faults: dict[tuple[str, int], list[str]] = {key: [] for key in queues}
    shipped: set[tuple[str, int]] = set()
    places = [0] * len(work)
    left = list(range(len(work)))
    while left:
        batch = [(work[i][0], queues[work[i][0].name, work[i][1]][0][places[i]], work[i][1]) for i in left]
        again = []
        for i, compiled in zip(left, compile_all(batch, processes=processes), strict=True):
            kernel, sm = work[i]
            key = (kernel.name, sm)
            if compiled.faults:
                faults[key].append(f"{batch[left.index(i)][1].label()}: {'; '.join(compiled.faults)}")
            else:
                description = dict(compiled.description) | {"chosen": queues[key][1], "pruned": faults[key]}
                yield Compiled(description, compiled.cubin, compiled.ptx, ()), key not in shipped
                shipped.add(key)
            places[i] += 1
            if places[i] < len(queues[key][0]) and (every_config or key not in shipped):
                again.append(i)
            elif key not in shipped:
                raise KernelError(f"{kernel.name}: no config is sound on sm_{sm}", got="\n".join(faults[key]))
        left = again


if __name__ == "__main__":
    adopt(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[1]).as_posix())
