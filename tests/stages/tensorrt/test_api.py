"""Our TensorRT code against NVIDIA's own interface: stubs made from the bindings, and names that are no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.tensorrt.api_lint import import_error_handlers, removed_names
from tests.stages.tensorrt.bindings import MISSING, write_libraries

ROOT = Path(__file__).parents[3]
CHECKED = ("stages/tensorrt", "serving/engines/tensorrt.py", "serving/engines/tensorrt_entry.py")
SOURCES = sorted(
    path for package in ("hstu", "kernels", "serving", "stages") for path in (ROOT / package).rglob("*.py")
)


def test_nothing_of_ours_uses_a_name_that_tensorrt_11_removed() -> None:
    ours = [path for path in SOURCES if "tensorrt" in path.read_text() and path.name != "api_lint.py"]
    assert len(ours) >= 10
    assert [found for path in ours for found in removed_names(path.read_text(), path.name)] == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "x.py:1: FP16"),
        ("polygraphy.CreateConfig(tf32=False, fp16=True)", "x.py:1: CreateConfig(fp16=…)"),
        ("CreateConfig(int8=True, calibrator=calibrator)", "x.py:1: CreateConfig(int8=…)"),
        ("config.int8_calibrator = calibrator", "x.py:1: int8_calibrator"),
        ("class C(trt.IInt8EntropyCalibrator2): pass", "x.py:1: IInt8EntropyCalibrator2"),
    ],
)
def test_planted_flags_and_calibrators_are_found(planted: str, found: str) -> None:
    assert found in list(removed_names(planted, "x.py"))


def test_no_code_path_decides_by_catching_import_error() -> None:
    found = [line for path in SOURCES for line in import_error_handlers(path.read_text(), str(path.relative_to(ROOT)))]
    assert found == []
    planted = "try:\n    import tensorrt\nexcept (OSError, ImportError):\n    tensorrt = None\n"
    assert list(import_error_handlers(planted, "x.py")) == ["x.py:3: except ImportError"]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stubs of the installed TensorRT-RTX bindings, which also know no name that TensorRT 11 removed."""
    folder = tmp_path_factory.mktemp("stubs")
    command = [sys.executable, "-m", "pybind11_stubgen", "tensorrt_rtx_bindings.tensorrt_rtx", "-o", str(folder)]
    subprocess.run([*command, "--ignore-all-errors"], check=True, capture_output=True)
    package = folder / "tensorrt_rtx"
    package.mkdir()
    text = (folder / "tensorrt_rtx_bindings" / "tensorrt_rtx.pyi").read_text()
    (package / "__init__.pyi").write_text(f"{text}\n__version__: str\n")
    return folder


@pytest.fixture(scope="module")
def tensorrt_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stubs of TensorRT's own bindings, 11.4, and its plugin package as it is."""
    folder = tmp_path_factory.mktemp("stubs")
    libraries = write_libraries(tmp_path_factory.mktemp("libraries"))
    command = [sys.executable, "-m", "tests.stages.tensorrt.bindings", str(libraries), str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder


def pyright(stubs: Path, *paths: Path) -> list[str]:
    """What pyright says of the files, as "file: message"."""
    project = stubs / "pyrightconfig.json"
    settings = {
        "include": [str(path) for path in paths],
        "stubPath": str(stubs),
        "extraPaths": [str(ROOT), str(stubs)],
        "typeCheckingMode": "basic",
        "pythonVersion": "3.11",
        "reportMissingImports": "none",
        "reportMissingModuleSource": "none",
    }
    project.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(project)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    assert told["summary"]["filesAnalyzed"] >= len(paths)
    return [f"{Path(d['file']).name}: {d['message']}" for d in told["generalDiagnostics"] if d["severity"] == "error"]


WORKER, ENTRY, LOADER = "stages/tensorrt/worker.py", "serving/engines/tensorrt_entry.py", "serving/engines/tensorrt.py"
PLANTED = (  # (file, what stands there, a mistake in its place, what pyright says of it)
    (WORKER, "trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "FP16"),
    (WORKER, "parser.parse_from_file(MODEL)", "parser.parse_file(MODEL)", "parse_file"),
    (WORKER, "trt.OnnxParser(network, logger)", "trt.OnnxParser(logger)", '"logger"'),
    (ENTRY, "context.execute_async_v3(self._stream", "context.execute_async_v2(self._stream", "execute_async_v2"),
    (ENTRY, "self._engine.num_io_tensors", "self._engine.num_bindings", "num_bindings"),
    (ENTRY, "(name, tensor.data_ptr())", "(name, str(tensor.data_ptr()))", '"str"'),
    (LOADER, "refitter.get_missing_weights()", "refitter.missing()", "missing"),
)


def test_pyright_knows_every_call_and_finds_every_planted_mistake(stubs: Path, tmp_path: Path) -> None:
    assert pyright(stubs, *(ROOT / path for path in CHECKED)) == []
    wrong = []
    for number, (path, right, mistake, _) in enumerate(PLANTED):
        text = (ROOT / path).read_text()
        assert right in text, f"nothing to plant {mistake} in"
        copy = tmp_path / f"planted_{number}.py"
        copy.write_text(text.replace(right, mistake, 1))
        wrong.append(copy)
    found = pyright(stubs, *wrong)
    for number, (_, _, mistake, word) in enumerate(PLANTED):
        assert any(line.startswith(f"planted_{number}.py") and word in line for line in found), f"{mistake}: {found}"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_tensorrt_11_has_every_call_too(tensorrt_stubs: Path, tmp_path: Path) -> None:
    """The same files against TensorRT's own bindings, and the plugin, which TensorRT-RTX has no names for."""
    copies = []
    for path in (WORKER, ENTRY, LOADER):
        text = (ROOT / path).read_text()
        copy = tmp_path / Path(path).name
        copy.write_text(text.replace("import tensorrt_rtx as trt", "import tensorrt as trt"))
        assert text != copy.read_text()
        copies.append(copy)
    assert pyright(tensorrt_stubs, *copies, ROOT / PLUGIN) == []
    for number, (right, mistake, _) in enumerate(PLANTED_IN_PLUGIN):
        text = (ROOT / PLUGIN).read_text()
        assert right in text, f"nothing to plant {mistake} in"
        (tmp_path / f"planted_{number}.py").write_text(text.replace(right, mistake, 1))
    found = pyright(tensorrt_stubs, *sorted(tmp_path.glob("planted_*.py")))
    for number, (_, mistake, word) in enumerate(PLANTED_IN_PLUGIN):
        assert any(line.startswith(f"planted_{number}.py") and word in line for line in found), f"{mistake}: {found}"


PLUGIN = "stages/tensorrt/plugin.py"
PLANTED_IN_PLUGIN = (
    ("@trtp.aot_impl(ID)", "@trtp.aot(ID)", "aot"),
    ("trtp.SymIntExprs(len(NUMBERS))", "trtp.SymFloatExprs(len(NUMBERS))", "SymFloatExprs"),
    ("tensor.shape_expr[axis]", "tensor.shape_expression[axis]", "shape_expression"),
    ("trt.bfloat16", "trt.brainfloat16", "brainfloat16"),
)
