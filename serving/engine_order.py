"""Which engine of a bundle answers when the default one cannot run here: TensorRT, then ONNX Runtime, then PyTorch.

The one order there is. `open_default` opens the first that runs, for a process that answers with one engine; every
step down is logged once, counted in `FALLBACKS` and given back, so that each answer can name it. The service keeps
all of them open and goes down the same order request by request (`serving.fallback`).
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from hstu.errors import ArtifactError, MissingBackendError
from serving.bundle import Bundle
from serving.engine import Engine, open_engine, read_spec
from serving.fallback import Fallback

LOG = logging.getLogger(__name__)
FALLBACKS: Counter[tuple[str, str]] = Counter()  # (wanted, used), of engines opened by `open_default`
TORCH = "torch"
_ORDER = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")


def engine_order(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's engines in the order in which they are tried, "torch" last.

    The default one first; then those of other backends, of each the one nearest to fp32 (it changes answers least).
    """
    default = bundle.engines[0]
    backends = {name: read_spec(bundle.engine_folder(name)) for name in bundle.engines}
    rest = [name for name in bundle.engines[1:] if backends[name].backend != backends[default].backend]
    width = ("fp32", "bf16", "fp16", "int8")
    rest.sort(key=lambda name: (_ORDER.index(backends[name].backend), width.index(backends[name].precision)))
    first = {backends[name].backend: name for name in reversed(rest)}
    lower = [name for name in rest if first[backends[name].backend] == name]
    below = _ORDER[_ORDER.index(backends[default].backend) :]
    return (default, *(name for name in lower if backends[name].backend in below), TORCH)


def lane_order(bundle: Bundle, wanted: str | None) -> list[str]:
    """Who answers, in order: the engine that was asked for, if one was, then `engine_order`."""
    order = engine_order(bundle)
    return list(order) if wanted is None else [wanted, *(name for name in order if name != wanted)]


def open_default(
    bundle: Bundle, *, threads: int | None = None, rebuilt: Path | None = None
) -> tuple[Engine, Fallback | None]:
    """The first engine of `engine_order` that runs here, and what it stands in for (None: nothing).

    `rebuilt` is a folder that takes the default engine's place. Raises what the last one raises.
    """
    order = engine_order(bundle)
    reasons: list[str] = []
    for name in order:
        if name == TORCH:
            from serving.engines.torch import open_torch_engine

            engine: Engine = open_torch_engine(bundle.path, threads=threads)
        else:
            folder = rebuilt if rebuilt is not None and name == order[0] else bundle.engine_folder(name)
            try:
                engine = open_engine(folder, threads=threads)
            except (MissingBackendError, ArtifactError) as error:
                reasons.append(f"{name}: {error.what}" + (f" ({error.got})" if error.got else ""))
                continue
        if name == order[0]:
            return engine, None
        FALLBACKS[order[0], name] += 1
        reason = "; ".join(reasons)
        LOG.warning("engine %s cannot run here, %s answers for it: %s", order[0], name, reason)
        return engine, Fallback(level="engine", wanted=order[0], used=name, reason=reason)
    raise AssertionError("PyTorch opens or raises")
