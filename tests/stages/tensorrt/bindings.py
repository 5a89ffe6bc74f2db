"""NVIDIA's TensorRT bindings without TensorRT's libraries, which do not install without NVIDIA's own index.

The bindings ask the libraries for nine functions. TensorRT-RTX has eight of them under the same names, and stands in:
its plugin registry, its network and its ONNX parser answer. Nothing is ever built this way.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MISSING = ""
if find_spec("tensorrt_bindings") is None:
    MISSING = "tensorrt-cu13-bindings is not installed"
elif shutil.which("cc") is None:
    MISSING = "there is no C compiler to stand in for TensorRT's libraries"
elif find_spec("tensorrt_rtx_libs") is None:
    MISSING = "TensorRT-RTX's libraries are not installed"
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def write_libraries(folder: Path) -> Path:
    """`folder` holds libraries of the names that the bindings ask for, with the one function TensorRT-RTX lacks."""
    source = folder / "empty.c"
    source.write_text("int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n")
    for library in LIBRARIES:
        file = f"{library}.so.11"
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / file), str(source), f"-Wl,-soname,{file}"]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def import_bindings(folder: Path) -> None:
    """`import tensorrt` and `import tensorrt.plugin` give NVIDIA's own in this process, with libraries of `folder`."""
    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    product = Path(next(iter(spec.submodule_search_locations)))
    own = [product / "libtensorrt_rtx.so.1", product / "libtensorrt_onnxparser_rtx.so.1"]
    for path in [*own, *(folder / f"{library}.so.11" for library in LIBRARIES)]:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_bindings

    sys.modules["tensorrt"] = tensorrt_bindings
    import tensorrt_bindings.plugin

    sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
