"""CUTLASS libraries: cached by content, and compiled without spills and without serialised products."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import cutlass
from kernels.errors import KernelError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
LOG = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"""


def test_a_library_is_named_by_what_is_in_it() -> None:
    names = {cutlass.library_name(source) for source in cutlass.UVQK.values()}
    assert len(names) == len(cutlass.UVQK)
    assert all(name.endswith(".so") for name in names)


def test_what_ptxas_says_is_read() -> None:
    built = cutlass.read_log(Path("x.so"), LOG)
    assert (built.registers, built.spilled_bytes, built.serialised_products) == (168, 12, 1)


def test_a_library_that_is_there_is_not_compiled_again(tmp_path: Path) -> None:
    source = cutlass.UVQK["bf16"]
    path = tmp_path / cutlass.library_name(source)
    path.write_bytes(b"library")
    path.with_suffix(".log").write_text(LOG)
    assert cutlass.build(source, tmp_path, nvcc="no-such-compiler").path == path


def test_a_missing_compiler_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="there is no no-such-compiler here"):
        cutlass.build(cutlass.UVQK["bf16"], tmp_path, nvcc="no-such-compiler")


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", cutlass.UVQK)
def test_the_projection_compiles_cleanly(name: str, tmp_path: Path) -> None:
    built = cutlass.build(cutlass.UVQK[name], tmp_path)
    assert built.spilled_bytes == 0
    assert built.serialised_products == 0
    assert 0 < built.registers <= 255
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    assembly = subprocess.run([cuobjdump, "-sass", built.path], capture_output=True, text=True, check=True).stdout
    assert ("IGMMA" if "int8" in name else "HGMMA") in assembly
    assert "MUFU.TANH" in assembly
    needed = subprocess.run(["readelf", "-d", built.path], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libcuda" not in needed
