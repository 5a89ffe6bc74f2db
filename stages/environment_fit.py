"""Whether this machine can run a bundle: what each of its engines was built for, beside what is here.

Nothing heavy is loaded: versions are looked up, and the driver is asked for the GPUs. What an engine answers here is
another question, which `verify --run` answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hstu.artifact import Artifact
from hstu.errors import ArtifactError, MissingBackendError
from stages import machine

_DISTRIBUTIONS = {  # backend → what may provide it
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
RUNS = ("fits", "other version")


def environment_fit(bundle: Artifact) -> dict[str, dict[str, Any]]:
    """By engine: what it was built with, what is here, and a status, the default engine first.

    fits: the same version · other version: it loads, and `verify --run` says whether it answers the same · missing:
    it cannot run here, `why` says what it lacks · conformance: it was built to be accepted, and runs nowhere.
    """
    try:
        description = json.loads(bundle.file("bundle.json").read_text())
        engines, default = description["engines"], description["default_engine"]
        return {name: _fit(engines[name]) for name in (default, *sorted(engines.keys() - {default}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{bundle.path}/bundle.json: does not name its engines ({error!r})", fix="run the bundle stage again"
        ) from None


def require_fit(bundle: Artifact, fit: Mapping[str, Mapping[str, Any]]) -> None:
    """MissingBackendError unless the bundle's default engine can run here."""
    default = next(iter(fit))
    if fit[default]["status"] not in RUNS:
        runs = ", ".join(name for name, found in fit.items() if found["status"] in RUNS)
        raise MissingBackendError(
            f"{bundle.path}: the bundle's default engine {default!r} cannot run here",
            got=fit[default]["why"],
            expected=f"{fit[default]['product']} {fit[default]['built_with']} on {fit[default]['device']}",
            fix=f"install it; is it for another machine, pass --elsewhere (engines that run here: {runs or 'none'})",
        )


def _fit(platform: Mapping[str, Any]) -> dict[str, Any]:
    built_with = platform["version"]
    found = {"product": platform["product"], "device": platform["device"], "built_with": built_with}
    here = next(filter(None, map(machine.installed, _DISTRIBUTIONS.get(platform["backend"], ()))), None)
    found["here"] = here
    if not platform["executed"]:
        return found | {"status": "conformance", "why": "built to be accepted by NVIDIA's builder; it runs nowhere"}
    if here is None:
        return found | {"status": "missing", "why": f"{platform['product']} is not installed"}
    if platform["backend"] == "tensorrt":
        names = [f"{gpu.name} sm_{gpu.sm.replace('.', '')}" for gpu in machine.gpus().devices]
        if not any(platform["device"].startswith(name) for name in names):
            return found | {"status": "missing", "why": f"GPUs here: {', '.join(names) or 'none'}"}
        if here != built_with:
            return found | {
                "status": "missing",
                "why": f"its engines load in the version that built them; here is {here}",
            }
    return found | ({"status": "fits"} if here == built_with else {"status": "other version"})
