"""The attention plugin's kernel for the GPU that an engine is built on: its PTX, and what a launch needs to know."""

from __future__ import annotations

from pathlib import Path

from hstu.artifact import encode_json, sha256_file
from hstu.config import HSTUConfig
from hstu.errors import MissingBackendError, ParameterError
from kernels.errors import KernelError
from kernels.spec import SHARED_LIMIT

NAME = "attention_plugin"  # the files' stem
WHY = "set build-engine.tensorrt_attention: function"


def write_kernel(folder: Path, config: HSTUConfig, dtype: str, sm: int) -> dict[str, str]:
    """`attention_plugin.{ptx,json}` are in the folder; returns the SHA-256 of each by name.

    Compiled by Triton, as build-kernels does it, without the parameters that TensorRT would not pass. Raises
    ParameterError where there is no such kernel for the model or the GPU, MissingBackendError where Triton refuses.
    """
    from kernels.hstu_attention.variants import padded
    from kernels.ptx import without_scratch
    from kernels.tuning import build, read_table

    if max(config.qk_dim, config.v_dim) > 256 or sm not in SHARED_LIMIT:
        raise ParameterError(
            "there is no attention plugin for this model on this GPU",
            got=f"qk_dim {config.qk_dim}, v_dim {config.v_dim}, sm_{sm}",
            expected=f"both at most 256, and one of {', '.join(f'sm_{known}' for known in sorted(SHARED_LIMIT))}",
            fix=WHY,
        )
    rows = max(config.max_history, 1) * config.uvqk_dim
    if rows >= 2**31:
        raise ParameterError("one history's rows reach too far for the attention plugin", got=rows, fix=WHY)
    try:
        work = [(padded(dtype, config.v_dim, config.qk_dim), sm)]
        ((compiled, _),) = build(work, processes=1, every_config=False, table=read_table())
        description = dict(compiled.description)
        ptx = without_scratch(compiled.ptx, description["entry"], [a["type"] for a in description["arguments"]])
    except KernelError as error:
        raise MissingBackendError(
            "the attention plugin's kernel does not compile here", got=str(error), fix=WHY
        ) from None
    (folder / f"{NAME}.ptx").write_text(ptx)
    (folder / f"{NAME}.json").write_bytes(encode_json(description))
    return {name: sha256_file(folder / name) for name in (f"{NAME}.ptx", f"{NAME}.json")}
