"""What each backend can do on this machine, tried in a child process each.

A library that crashes, hangs or prints to stdout while it is imported takes only its own child with it, and
this process never imports one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

Status = Literal["ready", "builds only", "missing", "broken"]
TIMEOUT_S = 120
_ANSWER = "hstu-probe:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How to find out about a backend: `code` sets `facts` (a dict) and may set `status`; `module` must be there."""

    module: str
    purpose: str
    code: str
    fix: str
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What a probe found; `fix` says how to get what is not ready."""

    name: str
    status: Status
    purpose: str
    facts: Mapping[str, Any]
    problem: str | None = None
    fix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


_CPU = "make environment"
_GPU = "on a machine with an NVIDIA GPU: make environment GPU=1"

PROBES: dict[str, Probe] = {
    "torch": Probe(
        module="torch",
        purpose="eager PyTorch: training, and the answers that every engine is held against",
        code="""
import torch
facts = {"version": torch.__version__, "threads": torch.get_num_threads(),
         "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cuda": torch.cuda.is_available()}
assert torch.equal(torch.ones(2, 2) @ torch.ones(2, 2), torch.full((2, 2), 2.0))
""",
        fix=_CPU,
    ),
    "onnxruntime": Probe(
        module="onnxruntime",
        purpose="engines in fp32, fp16, bf16 and int8, executed on the processor",
        code="""
import onnxruntime
facts = {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
assert "CPUExecutionProvider" in facts["providers"]
""",
        fix=_CPU,
    ),
    "openvino": Probe(
        module="openvino",
        purpose="engines for Intel and other x86 processors",
        code="""
import openvino
core = openvino.Core()
facts = {"version": openvino.__version__,
         "devices": {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}}
assert facts["devices"]
""",
        fix=_CPU,
    ),
    "tensorrt-rtx": Probe(
        module="tensorrt_rtx",
        purpose="conformance: NVIDIA's own parser and builder take the graph (no engine for Hopper)",
        code="""
import tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)) is not None
facts = {"version": trt.__version__}
status = "builds only"
""",
        fix=_CPU,
    ),
    "tensorrt": Probe(
        module="tensorrt",
        purpose="engines executed on an NVIDIA GPU",
        code="""
import tensorrt as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
facts = {"version": trt.__version__}
""",
        fix=_GPU,
    ),
    "vllm": Probe(
        module="vllm",
        purpose="serving with a paged KV cache, slates",
        code="""
import vllm
from importlib.metadata import entry_points
from vllm.platforms import current_platform
plugins = sorted(point.name for point in entry_points(group="vllm.general_plugins"))
facts = {"version": vllm.__version__, "platform": current_platform.device_type, "plugins": plugins}
assert "hstu" in plugins, "the plugin hstu is not registered: pip install --no-deps -e ."
""",
        fix=_CPU,
        environment={"VLLM_LOGGING_LEVEL": "ERROR"},
    ),
    "triton": Probe(
        module="triton",
        purpose="GPU kernels: run by the interpreter here, compiled ahead of time for any GPU",
        code="""
import linecache  # where triton looks for the text of a kernel
import torch, triton, triton.language as tl
source = "@triton.jit\\ndef double(x, n, B: tl.constexpr):\\n    i = tl.arange(0, B)\\n" \
         "    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)\\n"
linecache.cache["<probe>"] = (len(source), None, source.splitlines(True), "<probe>")
space = {"triton": triton, "tl": tl, "__name__": "probe"}
exec(compile(source, "<probe>", "exec"), space)
x = torch.ones(5)
space["double"][(1,)](x, 5, B=8)
facts = {"version": triton.__version__, "interpreter": x.tolist() == [2.0] * 5,
         "compiles_for": sorted(triton.backends.backends)}
assert facts["interpreter"], "the interpreter gives a wrong answer"
status = "ready" if torch.cuda.is_available() else "builds only"
""",
        fix=_CPU,
        environment={"TRITON_INTERPRET": "1"},
    ),
}


def probe_backends(probes: Mapping[str, Probe] = PROBES, *, timeout_s: float = TIMEOUT_S) -> list[Backend]:
    """What every probe found, in the order of the table; two run at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda item: probe_backend(*item, timeout_s=timeout_s), probes.items()))


def probe_backend(name: str, probe: Probe, *, timeout_s: float = TIMEOUT_S) -> Backend:
    """What the probe's code found in a process of its own."""

    def backend(status: Status, facts: Mapping[str, Any], problem: str | None = None) -> Backend:
        fix = None if status in ("ready", "builds only") else probe.fix
        return Backend(name=name, status=status, purpose=probe.purpose, facts=facts, problem=problem, fix=fix)

    if find_spec(probe.module) is None:
        return backend("missing", {}, f"the library {probe.module} is not installed")
    code = f"{_PRELUDE}{probe.code}\n{_REPORT}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(probe.environment or {})}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return backend("broken", {}, f"no answer within {timeout_s:g} s")
    answers = [line.removeprefix(_ANSWER) for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode == 0 and answers:
        answer = json.loads(answers[-1])
        return backend(answer["status"], answer["facts"])
    return backend("broken", {}, _why(done))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"importing it ends the process ({signal.Signals(-done.returncode).name})"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ends the process with exit code {done.returncode}"


_PRELUDE = 'import warnings; warnings.simplefilter("ignore"); status = "ready"\n'
_REPORT = f"""
import json as _json
print("\\n{_ANSWER}" + _json.dumps({{"status": status, "facts": facts}}), flush=True)
"""
