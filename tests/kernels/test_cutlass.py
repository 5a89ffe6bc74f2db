"""CUTLASS libraries: cached by content, compiled without spills or serialised products, and launched as they should."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import cutlass
from kernels.errors import KernelError
from kernels.hstu_attention import op as attention
from kernels.interaction import op as interaction
from kernels.spec import SHARED_LIMIT

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
OURS = [name for name, source in cutlass.SOURCES.items() if not source.function.startswith("uvqk")]
LOG = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"""


def test_a_library_is_named_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cutlass.library_name(source) for source in cutlass.SOURCES.values()}
    assert len(names) == len(cutlass.SOURCES)
    assert all(name.endswith(".so") for name in names)
    shutil.copytree(ROOT / "kernels" / "hstu_attention", tmp_path / "hstu_attention")
    monkeypatch.setattr(cutlass, "_ROOT", tmp_path)
    source = cutlass.SOURCES["hstu_attention-bf16-d64"]
    assert cutlass.library_name(source) in names
    header = tmp_path / "hstu_attention" / "schedule.h"
    header.write_text(header.read_text() + "// another\n")
    assert cutlass.library_name(source) not in names


def test_what_ptxas_says_is_read() -> None:
    built = cutlass.read_log(Path("x.so"), LOG)
    assert (built.registers, built.spilled_bytes, built.serialised_products) == (168, 12, 1)


def test_a_library_that_is_there_is_not_compiled_again(tmp_path: Path) -> None:
    source = cutlass.SOURCES["uvqk_silu-bf16"]
    path = tmp_path / cutlass.library_name(source)
    path.write_bytes(b"library")
    path.with_suffix(".log").write_text(LOG)
    assert cutlass.build(source, tmp_path, nvcc="no-such-compiler").path == path


def test_a_missing_compiler_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="there is no no-such-compiler here"):
        cutlass.build(cutlass.SOURCES["uvqk_silu-bf16"], tmp_path, nvcc="no-such-compiler")


def test_a_missing_library_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        KernelError, match=r"there is no interaction-bf16-\w+\.so(.|\n)*cutlass_build .* interaction-bf16"
    ):
        cutlass.Loaded(cutlass.SOURCES["interaction-bf16"], tmp_path, 90)


@pytest.mark.parametrize(("name", "sm"), [("interaction-bf16", 89), ("hstu_attention-bf16-d64", 80)])
def test_an_sm_without_code_is_a_clear_error(name: str, sm: int, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"{name}: no code for sm_{sm}"):
        cutlass.Loaded(cutlass.SOURCES[name], tmp_path, sm)


def library(name: str) -> Any:
    return SimpleNamespace(source=cutlass.SOURCES[name], call=lambda *_: pytest.fail("it was launched"))


def attention_launch(uvqk: torch.Tensor, width: int = 64, gated: bool = False) -> Any:
    u, v, q, k = (part.unflatten(1, (2, width)) for part in uvqk.split(2 * width, 1)[:4])
    out, offsets = torch.empty_like(q.contiguous()), torch.tensor([0, len(uvqk)])
    return attention.launch(
        q, k, v, out, offsets, torch.tensor([0]), longest=len(uvqk), max_length=99, bias=None, u=u if gated else None
    )


@pytest.mark.parametrize(
    ("name", "uvqk", "gated", "message"),
    [
        ("hstu_attention-bf16-d64", torch.zeros((9, 512), dtype=torch.float16), False, "not a kernel for this call"),
        ("hstu_attention-bf16-d128", torch.zeros((9, 512), dtype=torch.bfloat16), False, "not a kernel for this call"),
        ("hstu_attention-bf16-d64-g3", torch.zeros((9, 512), dtype=torch.bfloat16), True, "not a kernel for this call"),
        (
            "hstu_attention-bf16-d64",
            torch.zeros((9, 515), dtype=torch.bfloat16),
            False,
            "q_row is not a multiple",
        ),
        (
            "hstu_attention-bf16-d64",
            torch.zeros(9 * 512 + 1, dtype=torch.bfloat16)[1:].view(9, 512),
            False,
            "q is not a multiple",
        ),
    ],
)
def test_what_an_attention_library_cannot_take_is_refused_before_the_launch(
    name: str, uvqk: torch.Tensor, gated: bool, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        cutlass.run_attention(library(name), attention_launch(uvqk, gated=gated), 132, 0)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 33, 128), "at most 32 features"), ((3, 27, 64), "not a kernel for this call")]
)
def test_what_an_interaction_library_cannot_take_is_refused_before_the_launch(
    shape: tuple[int, int, int], message: str
) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    out = torch.zeros((3, shape[1] * (shape[1] - 1) // 2), dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=message):
        cutlass.run_interaction(library("interaction-bf16"), interaction.launch(x, out, with_self=False), 132, 0)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's libraries are, or the folder in CUTLASS_LIBRARIES."""
    return Path(os.environ.get("CUTLASS_LIBRARIES") or tmp_path_factory.mktemp("cutlass"))


def assembly(path: Path) -> str:
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", cutlass.SOURCES)
def test_a_library_compiles_cleanly(name: str, libraries: Path) -> None:
    source = cutlass.SOURCES[name]
    built = cutlass.build(source, libraries)
    assert built.spilled_bytes == 0
    assert built.serialised_products == 0
    assert 0 < built.registers <= 255
    text = assembly(built.path)
    assert not re.search(r"\b(LDL|STL)\b", text)
    product = {"interaction": "HMMA"}.get(source.function, "IGMMA" if "int8" in name else "HGMMA")
    assert product in text
    if source.function != "interaction":
        assert "MUFU.TANH" in text
        assert "UTMALDG" in text
        assert "USETMAXREG" in text
    assert set(re.findall(r"arch = sm_(\w+)", text)) == set(source.targets)
    needed = subprocess.run(["readelf", "-d", built.path], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libcuda" not in needed


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("hstu")])
def test_weights_are_made_while_the_other_product_runs(name: str, libraries: Path) -> None:
    """Between two waits for products a thread makes all of a tile's weights or none: none slipped past a wait."""
    text = assembly(cutlass.build(cutlass.SOURCES[name], libraries).path)
    code = re.findall(r"\b(HGMMA\.64x\d+x16|WARPGROUP\.DEPBAR|MUFU\.TANH)", text)
    parts = " ".join(code).split("WARPGROUP.DEPBAR")
    tanh = [part.count("MUFU.TANH") for part in parts]
    products = [part.count("HGMMA") for part in parts]
    width = int(name.split("-d")[1].partition("-")[0])
    assert sorted(set(tanh)) == [0, 64], "64 rows of 128 scores are 64 a thread"
    assert tanh.count(64) == 3, "the first tile, tiles with a mask, tiles without"
    assert sum(products) == 3 * (width // 16 + 128 // 16)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1500)
def test_launches_ask_the_runtime_for_the_right_things(libraries: Path, tmp_path: Path) -> None:
    """Grid, shared memory, arguments and tensor maps, as a runtime without a GPU sees them."""
    for name in OURS:
        cutlass.build(cutlass.SOURCES[name], libraries)
    fake = tmp_path / "libcudart.so.13"
    source = Path(__file__).parent / "fake_cudart.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(fake), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cutlass_launch", str(libraries), *OURS],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        launched = json.loads(line)
        name = launched["name"]
        assert launched["shared"] == launched["allowed"] == launched["said_shared"], name
        limit = min(SHARED_LIMIT[int(target.rstrip("a"))] for target in cutlass.SOURCES[name].targets)
        assert launched["shared"] <= limit, name
        assert launched["stream"] == 7
        assert "the launch failed: invalid argument" in launched["error"]
        (interaction_launched if name.startswith("interaction") else attention_launched)(launched)


def interaction_launched(launched: dict[str, Any]) -> None:
    assert launched["grid"] == min(-(-999 // 4), 100 * 2)
    assert launched["block"] == 128
    assert [int.from_bytes(bytes.fromhex(a), "little") for a in launched["argument"]] == launched["wanted"]


def attention_launched(launched: dict[str, Any]) -> None:
    name, (q, k, v, out, offsets, targets) = launched["name"], launched["wanted"]
    groups, width = 3 if name.endswith("g3") else 2, int(name.split("-d")[1].partition("-")[0])
    rows, row = 64 * groups, 4 * 3 * width
    blocks = -(-500 // rows)
    assert launched["grid"] == min(3 * 3 * blocks, 100)
    assert launched["block"] == 128 * (groups + 1)
    assert len(launched["map"]) == 3
    kind = 9 if "bf16" in name else 6  # CUtensorMapDataType
    for text, address, box in zip(launched["map"], (q, k, v), (rows, 128, 128), strict=True):
        assert text == (
            f"kind {kind} address {address} sizes {width} 900 3 strides {2 * row} {2 * width} box 64 {box} 1"
            " swizzle 3 interleave 0 fill 0"
        )
    # behind the maps: out, offsets, num_targets, out_row, rows, scale, and the list's heads, users, blocks and together
    together = min(9, (24 << 20) // (500 * 2 * width * 2))
    wanted = struct.pack("<QQQqif4i", out, offsets, targets, 3 * width, 900, 1 / 512, 3, 3, blocks, together)
    assert wanted in bytes.fromhex(launched["argument"][0])
