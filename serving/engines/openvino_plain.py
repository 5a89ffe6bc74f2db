"""OpenVINO alone, on a graph as it is exported: what the kernels and rewrites of ours are measured against.

Not an engine that is shipped: OpenVINO keeps the graph's int64 in int32, so bucket edges and times beyond that are
wrong (`serving.time_features`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import openvino

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError
from hstu.signature import EntryName, entry, entry_names
from serving.engine import Array
from serving.engines.openvino import properties


class PlainOpenVinoEngine:
    """The plain export in `folder` (one .onnx file per entry, standard operators alone) on `threads` threads.

    With precision "bf16" OpenVINO itself chooses what to compute in bfloat16 (time buckets too, which it then misses).
    """

    backend = "openvino-plain"

    def __init__(
        self,
        folder: Path,
        *,
        precision: str = "fp32",
        threads: int | None = None,
        entries: tuple[EntryName, ...] | None = None,
    ) -> None:
        self.precision = precision
        self.config = HSTUConfig.from_pretrained(folder)
        self.entries = entry_names(self.config) if entries is None else entries
        hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
        core = openvino.Core()
        self._requests: dict[str, openvino.InferRequest] = {}
        for name in self.entries:
            try:
                compiled = core.compile_model(
                    folder / f"{name}.onnx", "CPU", properties(threads or len(os.sched_getaffinity(0))) | hints
                )
            except RuntimeError as error:
                raise ArtifactError(
                    f"{folder / name}.onnx: OpenVINO {openvino.__version__} cannot read it",
                    got=str(error)[:2000],
                    expected="a plain export: standard operators alone",
                ) from None
            self._requests[name] = compiled.create_infer_request()
        self._outputs = {name: [o.name for o in entry(self.config, name).outputs] for name in self.entries}

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name."""
        request = self._requests[entry]
        request.infer(dict(feeds), share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in self._outputs[entry]}

    def close(self) -> None:
        """Release memory and threads; the engine must not be used after."""
        self._requests.clear()
