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
elif find_spec("tensorrt_libs") is not None:
    MISSING = "TensorRT's own libraries are here: nothing has to stand in for them"
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


def write_stubs(folder: Path) -> None:
    """`folder` holds the package `tensorrt`, a stub of the bindings, and `tensorrt.plugin`, whose files are Python."""
    import tensorrt
    import tensorrt.plugin as plugin
    from pybind11_stubgen import main

    sys.modules["tensorrt.tensorrt"] = sys.modules["tensorrt_bindings.tensorrt"]
    main(["tensorrt_bindings.tensorrt", "-o", str(folder), "--ignore-all-errors"])
    package = folder / "tensorrt"
    (package / "plugin").mkdir(parents=True)
    bound = (folder / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    (package / "__init__.pyi").write_text(f"{bound}\n__version__: str\n")
    assert plugin.__file__ is not None
    for path in Path(plugin.__file__).parent.glob("_[a-z]*.py"):
        shutil.copyfile(path, package / "plugin" / path.name)
    names = {name: vars(plugin)[name].__module__.rpartition(".")[2] for name in plugin.__all__ if name != "op"}
    lines = [f"from tensorrt.plugin.{module} import {name} as {name}" for name, module in sorted(names.items())]
    (package / "plugin" / "__init__.py").write_text("\n".join(lines) + "\n")
    assert tensorrt.__version__.startswith("11.")


if __name__ == "__main__":
    import_bindings(Path(sys.argv[1]))
    write_stubs(Path(sys.argv[2]))
