"""For long histories the causal half of attention alone is computed, tile by tile, where no kernel replaces it."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from hstu.config import HSTUConfig
from stages.passes import function_bodies, functions

REASON = "without a kernel of its own a runtime computes all L² scores of a history, half of which the mask throws away"

LONG = 512  # events: below, more operators cost more than the scores they save


def num_tiles(config: HSTUConfig) -> int:
    """Into how many tiles a model's histories are cut; more of them cost short histories more."""
    return 4 if config.max_history < 2 * LONG else 8


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """The body of HSTUAttention cuts the rows into tiles, each of which reads the keys up to its last row.

    Of n tiles' scores (n + 1) / 2n are left. Callers and kernels see the same function. Models that take only
    histories shorter than `LONG` keep the body they have.
    """
    if config.max_history < LONG:
        return graph
    for index, function in enumerate(graph.functions):
        if function.name == function_bodies.HISTORY:
            tiled = functions.attention_function(function.name, config, graph.opset, tiles=num_tiles(config))
            graph.functions[index] = OnnxImporter.import_function(tiled)
    return graph
