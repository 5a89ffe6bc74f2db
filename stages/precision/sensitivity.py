"""Which linear costs most to quantise: each alone in int8, by what it does to the user embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from serving.engine import Array
from serving.engines.onnxruntime import PROVIDER, session_options
from stages.precision import int8
from stages.precision.linears import find_linears
from stages.precision.recipe import Recipe, activation_scales, narrow_linears

OUTPUT = "user_embedding"


def modules_by_sensitivity(folder: Path, config: HSTUConfig, recipe: Recipe, histories: Histories) -> dict[str, float]:
    """Modules that the recipe makes int8 → squared error of the user embedding with that one alone, worst first.

    Measured in the retrieve entry of the surgery artifact; what only rank has is not there.
    """
    model = ir.load(folder / "retrieve.onnx")
    scales = activation_scales(folder, "retrieve", config, recipe, histories, narrow_linears(model, recipe))
    feeds = [dict(histories.select([row]).newest(config.max_history).feeds(config)) for row in range(len(histories))]
    exact = _embeddings(model, folder, feeds)
    errors: dict[str, float] = {}
    for module in dict.fromkeys(linear.module for linear in narrow_linears(model, recipe)):
        alone = ir.load(folder / "retrieve.onnx")
        int8.quantize(alone, [linear for linear in find_linears(alone) if linear.module == module], scales)
        errors[module] = float(np.square(_embeddings(alone, folder, feeds) - exact).sum(axis=1).mean())
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _embeddings(model: ir.Model, folder: Path, feeds: list[dict[str, Array]]) -> Array:
    options = session_options(threads=1)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=[PROVIDER])
    result: Array = np.concatenate([session.run([OUTPUT], one)[0] for one in feeds])
    return result
