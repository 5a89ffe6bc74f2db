"""How fast vLLM generates, beside the loops a PyTorch user would write; `generation.json`.

One model of random weights (d=128, 4 layers, histories of 100 events, fp32, one thread), answers compared first, then
every contestant of a part in the same rounds on requests that none has seen. Ratios are medians over rounds. Parts are
written as they end; one that is there already for the same sources of `serving`, `hstu` and `kernels` stays (`again`).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.config import HSTUConfig
from hstu.errors import GateError, UsageError
from stages.contract import say
from stages.measure.statistics import median_with_interval, significant

if TYPE_CHECKING:
    from hstu.data.histories import Histories
    from hstu.model import History
    from serving.vllm_plugin.runtime import VllmRuntime

FILE = "generation.json"
USERS, LENGTH, ITEMS = 64, 100, 10
WIDTHS = (32, 128, 256)
LARGE = 50_000  # items
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """One ratio of a part and what it is to be at least or at most."""

    part: str
    ratio: str
    limit: float
    at_least: bool = False


LIMITS = (
    Limit(part="slates", ratio="vllm / ideal loop", limit=1.0),
    Limit(part="slates", ratio="vllm / ideal loop without bias", limit=1.2),
    Limit(part="slates", ratio="full recompute / vllm", limit=8.0, at_least=True),
    Limit(part="returning", ratio="cold / 96 of 100 cached", limit=4.0, at_least=True),
    *(Limit(part=f"beams-{width}", ratio="search / ideal beam loop", limit=1.15) for width in WIDTHS),
    *(Limit(part=f"beams-{width}-of-{LARGE}", ratio="search / ideal beam loop", limit=1.2) for width in WIDTHS),
    Limit(part="own-beam-search", ratio="LLM.beam_search / search", limit=30.0, at_least=True),
    Limit(part="start", ratio="LLM() after import, s", limit=5.0),
    Limit(part="start", ratio="server ready, s", limit=40.0),
)
PARTS = tuple(dict.fromkeys(limit.part for limit in LIMITS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The model behind vLLM and behind the ideal loops, and requests never seen before."""

    runtime: VllmRuntime
    config: HSTUConfig
    loops: Mapping[str, Any]  # ideal, unbiased: `stages.generation.ideal_loops.IdealLoop`
    model: Any
    seeds: list[int] = field(default_factory=lambda: [1000])

    def fresh(self, users: int) -> tuple[Histories, History]:
        """Users as vLLM takes them, and padded as PyTorch does."""
        import numpy as np
        import torch

        from hstu.checkpoints.histories import drawn_histories
        from hstu.model import history_from_feeds

        self.seeds[0] += 1
        histories = drawn_histories(self.config, count=users, seed=self.seeds[0], lengths=np.full(users, LENGTH))
        feeds = histories.feeds(self.config)
        return histories, history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


def write_folder(folder: Path, num_items: int) -> HSTUConfig:
    """`folder` holds a model that vLLM serves, with the kernel and the settings of a server."""
    from kernels.cpu.cache import user_cache
    from kernels.paged_hstu_attention.cpu import build
    from serving.vllm_plugin.server import write_server_settings
    from serving.vllm_plugin.tokenizer import write_tokenizer
    from stages.measure.case_models import write_random_model

    # `LLM.beam_search` makes a beam's items its prompt, so prompts may be longer than the histories that are asked with
    config = HSTUConfig(
        num_items=num_items,
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        qk_dim=32,
        v_dim=32,
        max_history=LENGTH + ITEMS,
    )
    folder.mkdir(parents=True)
    write_random_model(config, folder)
    write_tokenizer(folder, config)
    write_server_settings(folder)
    (folder / "runtime").mkdir()
    build(folder / "runtime", cache=user_cache())
    return config


def open_bench(folder: Path, num_items: int = 1000) -> Bench:
    """The bench on one thread."""
    import torch

    from hstu.checkpoints.huggingface import load_pretrained
    from serving.vllm_plugin.runtime import VllmRuntime
    from stages.generation.ideal_loops import IdealLoop

    config = write_folder(folder, num_items)
    model = load_pretrained(folder)
    runtime = VllmRuntime(folder, max_logprobs=256, additional_config={"hstu_attention": "kernel"})
    loops = {"ideal": IdealLoop(model), "unbiased": IdealLoop(model, biases=False)}
    bench = Bench(runtime=runtime, config=config, model=model, loops=loops)
    histories, _ = bench.fresh(1)
    runtime.embed(histories)
    runtime.greedy_slates(histories, 1)
    torch.set_num_threads(1)
    return bench


def _ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    value, interval = median_with_interval([a / b for a, b in zip(first, second, strict=True)])
    return {"value": value, "interval_95": list(interval)}


def _times(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: significant(statistics.median(values)) for name, values in times.items()}


def measure_slates(bench: Bench, *, rounds: int = 15) -> dict[str, Any]:
    """64 users, 100 → 10 items: vLLM, the ideal loop with and without biases, full recompute in some rounds."""
    from serving.slate import greedy_slate

    times: dict[str, list[float]] = {"vllm": [], "ideal loop": [], "ideal loop without bias": []}
    recompute: list[float] = []
    against: list[float] = []
    histories, padded = bench.fresh(USERS)
    same = bench.runtime.greedy_slates(histories, ITEMS)[0] == bench.loops["ideal"].greedy(padded, ITEMS).numpy()
    if same.all(axis=1).mean() < 0.95:
        raise GateError("vLLM and the ideal loop make other slates", got=f"{same.all(axis=1).mean():.0%} equal")
    for round_ in range(rounds):
        histories, padded = bench.fresh(USERS)
        times["vllm"].append(_ms(lambda h=histories: bench.runtime.greedy_slates(h, ITEMS)))  # type: ignore[misc]
        times["ideal loop"].append(_ms(lambda p=padded: bench.loops["ideal"].greedy(p, ITEMS)))  # type: ignore[misc]
        times["ideal loop without bias"].append(_ms(lambda p=padded: bench.loops["unbiased"].greedy(p, ITEMS)))  # type: ignore[misc]
        if round_ % 5 == 4:
            recompute.append(_ms(lambda p=padded: greedy_slate(bench.model, p, ITEMS)))  # type: ignore[misc]
            against.append(times["vllm"][-1])
    return {
        "median_ms": _times(times | {"full recompute": recompute}),
        "ratios": {
            "vllm / ideal loop": _ratio(times["vllm"], times["ideal loop"]),
            "vllm / ideal loop without bias": _ratio(times["vllm"], times["ideal loop without bias"]),
            "full recompute / vllm": _ratio(recompute, against),
        },
        "rounds": rounds,
    }


def measure_returning(bench: Bench, *, rounds: int = 15) -> dict[str, Any]:
    """64 users, 100 → 1 item, cold and then with 96 of the 100 events in the pages (six whole pages)."""
    cold, warm = [], []
    for _ in range(rounds):
        histories, _ = bench.fresh(USERS)
        cold.append(_ms(lambda h=histories: bench.runtime.greedy_slates(h, 1)))  # type: ignore[misc]
        warm.append(_ms(lambda h=histories: bench.runtime.greedy_slates(h, 1)))  # type: ignore[misc]
    times = {"cold": cold, "96 of 100 cached": warm}
    return {"median_ms": _times(times), "ratios": {"cold / 96 of 100 cached": _ratio(cold, warm)}, "rounds": rounds}


def measure_beams(bench: Bench, width: int, *, rounds: int = 15) -> dict[str, Any]:
    """One user, `width` beams of 10 items: our search through vLLM, prefill and all, and the ideal beam loop."""
    from serving.slate import Slate

    slate = Slate(num_items=ITEMS, method="beam", width=width)
    ours, ideal = [], []
    for round_ in range(rounds + 2):
        histories, padded = bench.fresh(1)
        first = _ms(lambda h=histories: bench.runtime.slates(h, slate))  # type: ignore[misc]
        second = _ms(lambda p=padded: bench.loops["ideal"].beams(p, ITEMS, width))  # type: ignore[misc]
        if round_ >= 2:
            ours.append(first)
            ideal.append(second)
    totals = bench.loops["ideal"].beams(padded, ITEMS, width)[1]
    got = bench.runtime.slates(histories, slate).log_probabilities
    apart = float("inf") if got is None else float((got[0] - totals).abs().max())
    if apart > 1e-4 * ITEMS:  # a total is the sum of its items' log-probabilities
        raise GateError(
            "the search and the ideal beam loop find other beams",
            got=f"totals {apart:.2g} apart",
            expected=f"{1e-4 * ITEMS:g}",
        )
    times = {"search": ours, "ideal beam loop": ideal}
    return {"median_ms": _times(times), "ratios": {"search / ideal beam loop": _ratio(ours, ideal)}, "rounds": rounds}


def measure_own_beam_search(bench: Bench) -> dict[str, Any]:
    """128 beams of 10 items: `LLM.beam_search`, which our constraint refuses, without it, against our search.

    It takes ids without times, and an item may come twice in a beam: the same work, another answer.
    """
    from unittest.mock import patch

    import torch
    from vllm.sampling_params import BeamSearchParams

    from serving.slate import Slate
    from serving.vllm_plugin import constraints

    slate = Slate(num_items=ITEMS, method="beam", width=128)
    engine = bench.runtime._engine("generate")
    ours, theirs = [], []
    params = BeamSearchParams(beam_width=128, max_tokens=ITEMS)
    with patch.object(constraints, "is_a_beams_step", lambda _: False), torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            histories, _ = bench.fresh(1)
            ours.append(_ms(lambda h=histories: bench.runtime.slates(h, slate)))  # type: ignore[misc]
            prompt = [{"prompt_token_ids": histories.item_ids.tolist()}]
            theirs.append(_ms(lambda p=prompt: engine.beam_search(p, params)))  # type: ignore[misc]
    times = {"LLM.beam_search": theirs[1:], "search": ours[1:]}
    ratio = _ratio(theirs[1:], ours[1:])
    return {"median_ms": _times(times), "ratios": {"LLM.beam_search / search": ratio}, "rounds": 2}


_LLM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
began = time.perf_counter()
from pathlib import Path
import os
from serving.vllm_plugin.runtime import ENVIRONMENT
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
from vllm import LLM
imported = time.perf_counter()
LLM(sys.argv[1], runner="generate", dtype="float32", enforce_eager=True, max_num_seqs=64,
    kv_cache_memory_bytes=512 << 20, disable_log_stats=True)
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def measure_start(folder: Path) -> dict[str, Any]:
    """Seconds of `LLM()` after its import in a new process, and from a server's command line to its first 200."""
    from stages.generation.server import ready_seconds

    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _LLM, str(folder)], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise GateError("LLM() did not start", got=done.stderr[-2000:])
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    servers = [ready_seconds(folder, settings) for settings in ("vllm.yaml", "vllm-pooling.yaml")]
    return {
        "import_s": significant(statistics.median(run[0] for run in runs)),
        "ratios": {
            "LLM() after import, s": {"value": significant(statistics.median(run[1] for run in runs))},
            "server ready, s": {"value": significant(max(servers))},
        },
        "rounds": 3,
    }


def run(reports: Path, parts: Sequence[str], *, again: bool = False) -> dict[str, Any]:
    """`generation.json` with the parts that were asked for (none: all); UsageError for one that is not known."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UsageError("there is no such part", got=unknown[0], expected=", ".join(PARTS))
    path, sources = reports / FILE, sources_digest()
    report = read_report(reports)
    if report.get("sources") != sources:
        report = {"schema": "generation/1", "sources": sources, "cores": os.cpu_count(), "parts": {}}
    wanted = [part for part in parts or PARTS if again or part not in report["parts"]]
    with tempfile.TemporaryDirectory() as name:
        bench, size = None, 0
        for part in wanted:
            say(f"generation: {part}")
            items = LARGE if part.endswith(f"-of-{LARGE}") else 1000
            if part != "start" and (bench is None or size != items):
                if bench is not None:
                    bench.runtime.close()
                folder = Path(name) / f"{len(list(Path(name).iterdir()))}"
                bench, size = open_bench(folder, items), items
            report["parts"][part] = _measure(part, bench, Path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _measure(part: str, bench: Bench | None, folder: Path) -> dict[str, Any]:
    if part == "start":
        write_folder(folder / "start", 1000)
        return measure_start(folder / "start")
    assert bench is not None
    if part == "slates":
        return measure_slates(bench)
    if part == "returning":
        return measure_returning(bench)
    if part == "own-beam-search":
        return measure_own_beam_search(bench)
    return measure_beams(bench, int(part.split("-")[1]), rounds=15 if bench.config.num_items < LARGE else 5)


def sources_digest() -> str:
    """A name for what is measured: the sources of `serving`, `hstu` and `kernels`."""
    digest = hashlib.sha256()
    for package in ("serving", "hstu", "kernels"):
        for path in sorted((_ROOT / package).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each limit whose part was measured: part, ratio, value, interval, limit, and whether it is kept."""
    found = []
    for limit in LIMITS:
        measured = report["parts"].get(limit.part, {}).get("ratios", {}).get(limit.ratio)
        if measured is None:
            continue
        value = measured["value"]
        kept = value >= limit.limit if limit.at_least else value <= limit.limit
        found.append(
            {
                "part": limit.part, "ratio": limit.ratio, "value": value, "interval_95": measured.get("interval_95"),
                "limit": f"{'≥' if limit.at_least else '≤'} {limit.limit:g}", "kept": kept,
            }
        )  # fmt: skip
    return found


def text_table(report: Mapping[str, Any]) -> str:
    """The rows for a terminal."""
    lines = [f"{'part':<22} {'ratio':<34} {'value':>8}  {'aim':<7} kept"]
    for row in rows(report):
        kept = "yes" if row["kept"] else "no"
        lines.append(f"{row['part']:<22} {row['ratio']:<34} {row['value']:>8.3g}  {row['limit']:<7} {kept}")
    return "\n".join(lines)


def read_report(reports: Path) -> dict[str, Any]:
    """What `run` wrote; no parts when nothing was measured yet."""
    path = reports / FILE
    return dict(json.loads(path.read_text())) if path.is_file() else {"parts": {}}


def html_table(report: Mapping[str, Any]) -> str:
    """The section of the report; empty when nothing was measured."""
    lines = []
    for row in rows(report):
        interval = row["interval_95"]
        spread = "" if interval is None else f" ({interval[0]:.3g}–{interval[1]:.3g})"
        cells = (row["part"], row["ratio"], f"{row['value']:.3g}{spread}", row["limit"], "yes" if row["kept"] else "no")
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("part", "ratio", "measured (95 %)", "aim", "kept"))
    note = "Medians over interleaved rounds, fp32 on one thread, beside loops of PyTorch with nothing around them."
    return f"<p>{note}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
