"""Estimate: parameters and memory by component, what fits on a device, and the arithmetic of a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from hstu.config import TASKS, HSTUConfig
from hstu.errors import UsageError
from hstu.signature import MAX_BATCH, MAX_CANDIDATES, CacheForm, EntryName, cache_spec, entry_names
from stages.devices import HERE, Device, device
from stages.footprint import (
    WIDTH,
    Precision,
    activation_bytes,
    components,
    kv_cache,
    request_flops,
    serving_bytes,
    weight_bytes,
)

USABLE = 0.9  # of a device's memory: the rest is for the driver, the allocator's gaps and other programs
WORKSPACE_BYTES = 32 << 20  # what a runtime keeps for itself: streams, workspaces of matrix products


def config_of(
    *,
    embedding_dim: int,
    num_layers: int,
    num_heads: int,
    num_items: int,
    max_history: int = 200,
    qk_dim: int | None = None,
    v_dim: int | None = None,
    num_actions: int = 0,
    num_gap_buckets: int = 0,
    head_dim: int = 0,
) -> HSTUConfig:
    """The config that flags describe; without dims per head these are D / H. A head_dim brings the three tasks."""
    if (qk_dim is None or v_dim is None) and embedding_dim % max(1, num_heads):
        raise UsageError(
            "estimate: the width is no multiple of the heads",
            got=f"{embedding_dim} / {num_heads}",
            fix="give the dims per head",
        )
    per_head = embedding_dim // max(1, num_heads)
    return HSTUConfig(
        num_items=num_items,
        embedding_dim=embedding_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        qk_dim=per_head if qk_dim is None else qk_dim,
        v_dim=per_head if v_dim is None else v_dim,
        max_history=max_history,
        num_actions=num_actions,
        num_gap_buckets=num_gap_buckets,
        tasks=TASKS if head_dim else (),
        head_dim=head_dim,
    )


def config_at(folder: Path) -> HSTUConfig:
    """The config of a checkpoint, engine or bundle folder; InputError when it is none of these."""
    return HSTUConfig.from_pretrained(folder)


def estimate(
    config: HSTUConfig,
    *,
    precision: str = "fp32",
    device_name: str = HERE,
    batch: int = 8,
    length: int | None = None,
    candidates: int = 128,
    block_size: int = 16,
) -> dict[str, Any]:
    """Everything as JSON-able values; UsageError when an argument is out of range."""
    length = config.max_history if length is None else length
    kind = _precision(precision)
    _require("batch", batch, 1, 2**31)
    _require("length", length, 1, config.max_history)
    _require("candidates", candidates, 1, MAX_CANDIDATES)
    _require("block size", block_size, 1, 1024)
    place = device(device_name)
    parts = components(config)
    total = sum(part.parameters for part in parts)
    usable = int(place.memory_bytes * USABLE)
    served = sum(serving_bytes(part, kind) for part in parts if not part.name.startswith("head")) + 4 * config.num_items
    names = [name for name in entry_names(config) if name != "extend"]
    entries = {name: _entry(config, name, kind, batch, length, candidates, place) for name in names}
    rows = cache_spec(config)
    return {
        "config": config.to_dict() | {"uvqk_dim": config.uvqk_dim, "max_length": config.max_length},
        "precision": kind,
        "device": {
            "name": place.name,
            "memory_bytes": place.memory_bytes,
            "usable_bytes": usable,
            "source": place.source,
        },
        "batch": batch,
        "length": length,
        "candidates": candidates,
        "parameters": {
            "total": total,
            "billions": round(total / 1e9, 4),
            "components": [
                {
                    "name": part.name,
                    "parameters": part.parameters,
                    "share": round(part.parameters / total, 4),
                    "bytes": {name: weight_bytes(part, name) for name in get_args(Precision)},
                }
                for part in parts
            ],
        },
        "weights_bytes": {
            **{name: _weights(config, name) for name in WIDTH},
            "vllm": served,
        },
        "entries": entries,
        "kv_cache": kv_cache(
            config, kind, length=length, block_size=block_size, free_bytes=usable - served - WORKSPACE_BYTES
        ),
        "user_state": {form: rows.bytes_per_user(form, length - 1) for form in get_args(CacheForm)},
        "fits": all(found["fits"] for found in entries.values()),
        "assumptions": _assumptions(kind),
    }


def _entry(
    config: HSTUConfig, name: EntryName, precision: Precision, batch: int, length: int, candidates: int, place: Device
) -> dict[str, Any]:
    usable = int(place.memory_bytes * USABLE)
    count = candidates if name == "rank" else 0
    parts = components(config)
    weights = _weights(config, precision)

    def activations(batch: int, precision: Precision | None) -> int:
        return activation_bytes(config, name, batch, length, count, precision)

    def engine(batch: int) -> int:
        return weights + activations(batch, precision) + WORKSPACE_BYTES

    def eager(batch: int) -> int:
        return 4 * sum(part.parameters for part in parts) + activations(batch, None)

    flops = request_flops(config, name, length, count)
    read = sum(weight_bytes(part, precision) for part in parts[name == "rank" :])  # rank looks up a few items only
    return {
        "eager_bytes": {"activations": activations(batch, None), "total": eager(batch)},
        "engine_bytes": {
            "activations": activations(batch, precision),
            "workspace": WORKSPACE_BYTES,
            "total": engine(batch),
        },
        "fits": engine(batch) <= usable,
        "max_batch": {
            "memory": _largest(engine, usable),
            "profile": MAX_BATCH,
            "eager_memory": _largest(eager, usable),
        },
        "flops_per_request": flops,
        "lower_bound_ms": _bound(place, precision, flops["needed"] * batch, read),
    }


def _weights(config: HSTUConfig, precision: Precision) -> int:
    """Bytes of an engine's weights: the parameters and the reciprocal norm of every item.

    With two entries the last layer's projection stands there once more: retrieve has it split (k and v of all events,
    u and q of the last), rank has it whole.
    """
    parts = {part.name: weight_bytes(part, precision) for part in components(config)}
    split = parts["uvqk projections"] // config.num_layers if config.tasks else 0
    return sum(parts.values()) + split + 4 * config.num_items


def _bound(place: Device, precision: Precision, flops: int, moved: int) -> dict[str, float] | None:
    """What no implementation can beat: the arithmetic at the peak rate, or every weight read once from memory."""
    if place.peak_tops is None or place.bandwidth_gb_s is None:
        return None
    compute = flops / (place.peak_tops[precision] * 1e12) * 1e3
    memory = moved / (place.bandwidth_gb_s * 1e9) * 1e3
    return {"compute": compute, "memory": memory, "batch": max(compute, memory)}


def _largest(needed: Callable[[int], int], limit: int) -> int:
    """The largest batch whose bytes are within `limit`, 0 when not even one request is."""
    low, high = 0, 1
    while needed(high) <= limit and high < 2**31:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= limit else (low, middle)
    return low


def _precision(name: str) -> Precision:
    for known in get_args(Precision):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"there is no precision {name!r}", expected=", ".join(get_args(Precision)))


def _require(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"estimate: {what} out of range", got=value, expected=f"{low}..{high}")


def _assumptions(precision: Precision) -> list[str]:
    wide = {
        "fp32": "everything is float32",
        "fp16": "weights are float16; LayerNorm, the residual, item scores and time buckets are computed in float32",
        "bf16": "weights are bfloat16; LayerNorm, the residual, item scores and time buckets are computed in float32",
        "int8": "uvqk and hidden matrices are int8 with a float32 scale a column; all else stays float32",
    }[precision]
    return [
        wide,
        "activations: a padded batch in which every history has the full length, one request in flight",
        "an engine reuses buffers in place; what a runtime really takes is measured by `benchmark` (peak_memory_mib)",
        f"{USABLE:.0%} of the device's memory is usable, {WORKSPACE_BYTES >> 20} MiB of it for the runtime's workspace",
        "vLLM: matrices in float32 for fp32 and in 16 bits otherwise, tables and biases in float32, pages in the "
        "same width, no prefix shared between users",
        "lower bounds take the datasheet's peak rates; real kernels reach a part of them",
    ]


def render(found: dict[str, Any]) -> str:
    """The same for a person."""
    parameters, place = found["parameters"], found["device"]
    precision = found["precision"]
    lines = [f"{parameters['total']:,} parameters ({parameters['billions']:.4g} billion)", ""]
    lines.append(f"  {'component':<26}{'parameters':>14}{'share':>8}{'fp32':>12}{precision:>12}")
    for part in parameters["components"]:
        sizes = f"{_size(part['bytes']['fp32']):>12}{_size(part['bytes'][precision]):>12}"
        lines.append(f"  {part['name']:<26}{part['parameters']:>14,}{part['share']:>8.1%}{sizes}")
    weights = found["weights_bytes"]
    lines += [
        "",
        "weights   "
        + ", ".join(f"{name} {_size(weights[name])}" for name in WIDTH)
        + f"; vLLM {_size(weights['vllm'])}",
    ]
    lines.append(
        f"device    {place['name']}, {_size(place['memory_bytes'])}, {_size(place['usable_bytes'])} of it usable"
    )
    for name, entry in found["entries"].items():
        count = f" and {found['candidates']} candidates" if name == "rank" else ""
        engine, flops, limit = entry["engine_bytes"], entry["flops_per_request"], entry["max_batch"]
        lines += [
            f"{name:<10}batch {found['batch']}, {found['length']} events{count}: engine {_size(engine['total'])} "
            f"(activations {_size(engine['activations'])}), eager PyTorch {_size(entry['eager_bytes']['total'])}; "
            f"{'fits' if entry['fits'] else 'does not fit'}",
            f"{'':<10}memory allows batches of {limit['memory']:,} (eager {limit['eager_memory']:,}); profiles go to "
            f"{limit['profile']}",
            f"{'':<10}{flops['engine'] / 1e9:.4g} GFLOP a request (eager {flops['eager'] / 1e9:.4g})",
        ]
        bound = entry["lower_bound_ms"]
        if bound is not None:
            lines.append(
                f"{'':<10}no batch of {found['batch']} can take less than {bound['batch']:.3g} ms "
                f"(arithmetic {bound['compute']:.3g}, memory {bound['memory']:.3g})"
            )
    cache = found["kv_cache"]
    lines += [
        f"KV cache  {_size(cache['bytes_per_token'])} a token, {_size(cache['bytes_per_user'])} a user of "
        f"{found['length']} events; {cache['blocks']:,} blocks of "
        f"{cache['block_size_tokens']} hold {cache['users']:,} users",
        "state     of a returning user (engines' entry extend): "
        + ", ".join(f"{form} {_size(size)}" for form, size in found["user_state"].items()),
        "",
        *(f"assumed: {text}" for text in found["assumptions"]),
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
