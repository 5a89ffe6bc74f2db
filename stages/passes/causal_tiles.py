"""For long histories the causal half of attention alone is computed, tile by tile, where no kernel replaces it."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from hstu.config import HSTUConfig
from stages.passes import function_bodies, functions

REASON = "without a kernel of its own a runtime computes all L² scores of a history, half of which the mask throws away"

LONG = 512  # events: below, more operators cost more than the scores they save
TILES = 4  # of 4, 8 and 16 none was faster from 512 to 2048 events, and each one costs short histories time


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """The body of HSTUAttention cuts the rows into tiles, each of which reads the keys up to its last row.

    (TILES + 1) / (2 · TILES) of the scores are left. Callers and kernels see the same function. Models that take only
    histories shorter than `LONG` keep the body they have.
    """
    if config.max_history < LONG:
        return graph
    for index, function in enumerate(graph.functions):
        if function.name == function_bodies.HISTORY:
            tiled = functions.attention_function(function.name, config, graph.opset, tiles=TILES)
            graph.functions[index] = OnnxImporter.import_function(tiled)
    return graph
