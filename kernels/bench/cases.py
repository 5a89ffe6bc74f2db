"""What is checked and what is timed, the most wanted first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from kernels.bench import problems
from kernels.bench.problems import Problem

Make = Callable[[torch.device, int], Problem]  # device and seed → problem

_LENGTHS, _TARGETS = [0, 1, 63, 64, 65, 511, 130, 31], [0, 1, 10, 64, 0, 100, 130, 0]
_PAGED = [1, 15, 16, 17, 63, 64, 65, 511]
_CONTEXTS, _NEW, _NEW_TARGETS = [0, 1, 15, 16, 17, 300, 40], [20, 1, 17, 130, 1, 65, 0], [0, 1, 10, 130, 0, 33, 0]


@dataclass(frozen=True, slots=True)
class Case:
    """A problem for a kernel. floor: `matrix` or `memory`, the ceiling it is measured against; target_us: what it is
    meant to take on an H200, None where nothing is asked."""

    name: str
    kernel: str
    make: Make
    floor: str = "matrix"
    target_us: float | None = None
    sweep: bool = False
    rivals: bool = False


def checks(kernels: list[str], *, small: bool = False) -> Iterator[Case]:
    """One case of odd lengths, page edges, targets and poison for every kernel; `small` ones for the interpreter."""
    for name in kernels:
        dtype = next(d for d in ("bf16", "fp16", "fp32") if d in name)
        found = re.search(r"-d(\d+)", name)
        width, biased = int(found[1]) if found else 0, "-bias" in name
        make: Make
        if name.startswith("hstu_attention"):
            entry = next((e for e in ("gated", "tma") if name.endswith(e)), "pointer")
            lengths, targets = ([0, 1, 70], [0, 1, 20]) if small else (_LENGTHS, _TARGETS)
            make = partial(_attention, dtype, lengths, targets, width, biased, entry)
            if name.endswith("-padded"):
                make = partial(_padded, dtype, lengths, width)
        elif "-decode-" in name:
            make = partial(_decode, dtype, _PAGED[:3] if small else _PAGED, width, biased)
        elif "-extend-" in name:
            end = 3 if small else len(_NEW)
            make = partial(_extend, dtype, _CONTEXTS[:end], _NEW[:end], _NEW_TARGETS[:end], width, biased)
        elif "-write-" in name:
            make = partial(_write, dtype, 40 if small else 1000, width)
        elif "-reduce-" in name:
            make = partial(_reduce, dtype, width)
        elif name.startswith("uvqk_silu"):
            make = partial(_uvqk, dtype, 65 if small else 1000, 80 if small else 528, 256, "int8" in name)
        elif name.startswith("interaction"):
            features = re.search(r"-f(\d+)", name)
            make = partial(
                _interaction,
                dtype,
                5 if small else 999,
                int(features[1]) if features else 0,
                width,
                name.endswith("self"),
            )
        else:
            make = partial(_bag, dtype, width)
        yield Case(f"check {name}", name, make)


def _attention(dtype: str, lengths: list[int], targets: list[int], width: int, biased: bool, entry: str,
               device: torch.device, seed: int) -> Problem:  # fmt: skip
    return problems.attention(
        device, dtype, lengths, 2, width, targets=targets, biased=biased, entry=entry, seed=seed
    )  # fmt: skip


def _padded(dtype: str, lengths: list[int], width: int, device: torch.device, seed: int) -> Problem:
    return problems.padded(device, dtype, lengths, 2, width, seed=seed)


def _decode(dtype: str, lengths: list[int], width: int, biased: bool, device: torch.device, seed: int) -> Problem:
    return problems.decode(device, dtype, lengths, 2, width, biased=biased, splits=1, seed=seed)


def _reduce(dtype: str, width: int, device: torch.device, seed: int) -> Problem:
    return problems.decode(device, dtype, _PAGED, 2, width, splits=3, seed=seed)


def _extend(dtype: str, contexts: list[int], new: list[int], targets: list[int], width: int, biased: bool,
            device: torch.device, seed: int) -> Problem:  # fmt: skip
    return problems.extend(device, dtype, contexts, new, targets, 2, width, biased=biased, seed=seed)


def _write(dtype: str, rows: int, width: int, device: torch.device, seed: int) -> Problem:
    return problems.write(device, dtype, rows, 2, width, seed=seed)


def _uvqk(dtype: str, m: int, n: int, k: int, int8: bool, device: torch.device, seed: int) -> Problem:
    return problems.uvqk_silu(device, dtype, m, n, k, int8=int8, seed=seed)


def _interaction(dtype: str, samples: int, features: int, width: int, with_self: bool, device: torch.device,
                 seed: int) -> Problem:  # fmt: skip
    return problems.interaction(device, dtype, samples, features, width, with_self=with_self, seed=seed)


def _bag(dtype: str, width: int, device: torch.device, seed: int) -> Problem:
    return problems.embedding_bag(device, dtype, 1000, 77, 13, width, seed=seed)


def timings() -> Iterator[Case]:
    """The shapes that figures are published for, and ours; those with `sweep` rank a kernel's configs."""
    for heads, width, length, target in (
        (8, 64, 2048, 360.0), (8, 128, 2048, 580.0), (8, 128, 4096, 2000.0), (8, 64, 512, None), (8, 64, 1024, None),
        (8, 64, 4096, None), (4, 64, 2048, None), (4, 128, 2048, None), (8, 128, 512, None), (8, 128, 1024, None),
    ):  # fmt: skip
        for suffix in ("", "-tma"):
            name = f"attention{suffix} bf16 B32 H{heads} D{width} N{length}"
            rivals = not suffix and heads == 8 and length in (1024, 2048)
            make = partial(_full_attention, heads, width, length, False, suffix[1:] or "pointer", rivals)
            yield Case(
                name, f"hstu_attention-bf16-d{width}{suffix}", make, target_us=target,
                sweep=heads == 8 and length == 2048, rivals=rivals,
            )  # fmt: skip
    for width in (64, 32):
        for suffix in ("-bias", "-bias-gated", "-gated"):
            make = partial(
                _full_attention, 8, width, 2048, "bias" in suffix, "gated" if "gated" in suffix else "pointer", False
            )
            kernel = f"hstu_attention-bf16-d{width}{suffix}"
            yield Case(f"attention{suffix} bf16 B32 H8 D{width} N2048", kernel, make, sweep=True)
    for requests, heads, width, length, biased in (
        (128, 8, 64, 2048, False), (256, 4, 128, 4096, False), (128, 8, 64, 2048, True), (8, 8, 64, 4096, False),
    ):  # fmt: skip
        suffix = "-bias" if biased else ""
        yield Case(
            f"decode{suffix} bf16 R{requests} H{heads} D{width} N{length}",
            f"paged_hstu_attention-decode-bf16-d{width}{suffix}",
            partial(_full_decode, requests, heads, width, length, biased), floor="memory", sweep=requests >= 128,
        )  # fmt: skip
    for heads, width, targets in ((4, 128, 2048), (8, 64, 2048), (8, 64, 0)):
        yield Case(
            f"extend bf16 R32 H{heads} D{width} prefix 1024 new {targets or 64} targets {targets}",
            f"paged_hstu_attention-extend-bf16-d{width}", partial(_full_extend, heads, width, targets),
            sweep=targets > 0,
        )  # fmt: skip
    for int8, target in ((False, 215.0), (True, 125.0)):
        kind = "int8-" if int8 else ""
        yield Case(
            f"uvqk_silu {kind}bf16 M16384 N4096 K1024", f"uvqk_silu-{kind}bf16", partial(_full_uvqk, int8),
            floor="int8" if int8 else "matrix", target_us=target, sweep=True, rivals=True,
        )  # fmt: skip
    for with_self in (False, True):
        suffix = "-self" if with_self else ""
        yield Case(
            f"interaction{suffix} bf16 B65536 F27 D128", f"interaction-bf16-f27-d128{suffix}",
            partial(_full_interaction, with_self), floor="memory", sweep=True, rivals=not with_self,
        )  # fmt: skip
    yield Case(
        "write bf16 T65536 H8 D64", "paged_hstu_attention-write-bf16-d64", partial(_full_write), floor="memory",
        sweep=True,
    )  # fmt: skip
    yield Case(
        "embedding_bag bf16 V1000000 B65536 x32 D128", "embedding_bag-bf16-d128", partial(_full_bag), floor="memory",
        sweep=True, rivals=True,
    )  # fmt: skip


def _full_attention(heads: int, width: int, length: int, biased: bool, entry: str, rivals: bool,
                    device: torch.device, seed: int) -> Problem:  # fmt: skip
    return problems.attention(
        device, "bf16", [length] * 32, heads, width, biased=biased, entry=entry, seed=seed, rivals=rivals
    )


def _full_decode(requests: int, heads: int, width: int, length: int, biased: bool, device: torch.device,
                 seed: int) -> Problem:  # fmt: skip
    return problems.decode(device, "bf16", [length] * requests, heads, width, biased=biased, seed=seed)


def _full_extend(heads: int, width: int, targets: int, device: torch.device, seed: int) -> Problem:
    new = [targets or 64] * 32
    return problems.extend(device, "bf16", [1024] * 32, new, [targets] * 32, heads, width, seed=seed)


def _full_uvqk(int8: bool, device: torch.device, seed: int) -> Problem:
    return problems.uvqk_silu(device, "bf16", 16384, 4096, 1024, int8=int8, seed=seed, rivals=True)


def _full_interaction(with_self: bool, device: torch.device, seed: int) -> Problem:
    return problems.interaction(device, "bf16", 65536, 27, 128, with_self=with_self, seed=seed, rivals=not with_self)


def _full_write(device: torch.device, seed: int) -> Problem:
    return problems.write(device, "bf16", 65536, 8, 64, seed=seed)


def _full_bag(device: torch.device, seed: int) -> Problem:
    return problems.embedding_bag(device, "bf16", 1_000_000, 65536, 32, 128, seed=seed, rivals=True)
