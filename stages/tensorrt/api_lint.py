"""Names of TensorRT's Python API that must not stand in our code: TensorRT 11 has them no more.

polygraphy hides some of them behind keywords that fail only when a network is built, on a machine with a GPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

REMOVED_ATTRIBUTES = {
    "FP16", "INT8", "BF16", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
    "int8_calibrator", "set_calibration_profile", "IInt8Calibrator", "IInt8EntropyCalibrator",
    "IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator", "IInt8LegacyCalibrator", "QuantizationFlag",
    "set_quantization_flag", "IAlgorithmSelector", "algorithm_selector", "set_dynamic_range", "EXPLICIT_BATCH",
    "max_workspace_size", "build_cuda_engine", "execute_async_v2", "num_bindings", "get_binding_name",
}  # fmt: skip
REMOVED_KEYWORDS = {
    "fp16", "int8", "bf16", "fp8", "calibrator", "algorithm_selector", "quantization_flags", "precision_constraints",
}  # fmt: skip
_TAKES_KEYWORDS = {"CreateConfig", "CreateConfigRTX", "create_config", "Calibrator"}


def removed_names(source: str, path: str) -> Iterator[str]:
    """Every use of a removed name in a module's text, as "path:line: name"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in REMOVED_ATTRIBUTES:
            yield f"{path}:{node.lineno}: {node.attr}"
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _TAKES_KEYWORDS:
                for keyword in node.keywords:
                    if keyword.arg in REMOVED_KEYWORDS:
                        yield f"{path}:{node.lineno}: {name}({keyword.arg}=…)"


def import_error_handlers(source: str, path: str) -> Iterator[str]:
    """Every place that catches ImportError or ModuleNotFoundError: no code path may be chosen that way."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for one in types:
                name = one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "")
                if name in ("ImportError", "ModuleNotFoundError"):
                    yield f"{path}:{node.lineno}: except {name}"
