"""Graphs with the plugin, computed node by node, the plugin by our kernel in Triton's interpreter.

Run as `TRITON_INTERPRET=1 python -m tests.stages.tensorrt.interpreted_plugin FOLDER`: for every `<entry>.plugin.onnx`
of the folder prints one JSON line with each output's largest difference from `<entry>.onnx` on ONNX Runtime.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from hstu.checkpoints.histories import drawn_histories
from hstu.config import HSTUConfig
from kernels import jit
from kernels.hstu_attention.op import padded_launch
from kernels.hstu_attention.variants import padded
from kernels.spec import Config

NAMES = {torch.float32: "fp32", torch.float16: "fp16"}


class HSTUPaddedAttention(OpRun):
    """One call of the plugin; inputs and attributes as the node gives them, in its order."""

    op_domain = "hstu"

    def _run(self, *inputs: Any, num_heads: int, head_dim: int, max_length: int, **as_plugin: Any) -> tuple[Any, ...]:
        assert as_plugin == {"plugin_namespace": "hstu", "plugin_version": "1", "aot": 1}
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        users, rows, _ = tensors[0].shape
        out = torch.full((users, rows, num_heads * head_dim), float("nan"), dtype=tensors[0].dtype)
        launch = padded_launch(*tensors, out, heads=num_heads, max_length=max_length)
        config = Config({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
        qk_dim = tensors[0].shape[2] // (2 * num_heads) - head_dim
        jit.run(padded(NAMES[out.dtype], head_dim, qk_dim), config, launch, {"FAST": False})
        return (out.numpy(),)


def main(folder: Path) -> None:
    config = HSTUConfig.from_pretrained(folder)
    every: dict[str, Any] = dict(drawn_histories(config, count=5, seed=3).feeds(config))
    every["candidate_ids"] = np.arange(1, 31, dtype=np.int64).reshape(5, 6)
    for path in sorted(folder.glob("*.plugin.onnx")):
        entry = path.name.partition(".")[0]
        evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[HSTUPaddedAttention])  # type: ignore[list-item]
        feeds = {name: every[name] for name in evaluator.input_names}
        found = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
        session = onnxruntime.InferenceSession(folder / f"{entry}.onnx", providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        wanted = dict(zip(names, session.run(None, feeds), strict=True))
        floats = [name for name in names if wanted[name].dtype == np.float32]
        print(json.dumps({"entry": entry} | {n: float(np.abs(found[n] - wanted[n]).max()) for n in floats}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
