"""The bench for a GPU machine, as far as a machine without one can hold it: plan, checks, report, crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cutlass, eager
from kernels.bench import __main__ as bench
from kernels.bench import cases, cutlass_tasks, meta, problems, tasks, worker
from kernels.bench.machine import Timing
from kernels.errors import KernelError
from kernels.spec import Launch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Truthful:
    """A machine whose kernels are `kernels.eager`: it puts the truth where the launch wants its output."""

    device, num_sms = CPU, 4

    def __init__(self, wrong: float = 0.0, unstable: bool = False) -> None:
        self.wrong, self.unstable, self.problem, self.runs = wrong, unstable, None, 0

    def facts(self) -> dict[str, Any]:
        return {"device": "Fake", "sm": 90, "driver": "1", "torch": "2", "triton": "3"}

    def kernels(self) -> list[str]:
        return ["interaction-bf16-f27-d128"]

    def configs(self, kernel: str) -> list[str]:
        return ["ships", "other"]

    def run(self, launch: Launch, config: str | None = None) -> None:
        self.runs += 1
        x, out = launch.values["x"], launch.values["out"]
        from kernels import eager

        out.copy_(eager.interaction(x.double(), False) * (1 + self.wrong) + self.unstable * self.runs * 1e-3)

    def wait(self) -> None:
        pass

    def time(self, runs: Any, seconds: float) -> Timing:
        for run in runs:
            run()
        return Timing(100.0, 99.0, 101.0)


def small_case(name: str = "interaction") -> cases.Case:
    return cases.Case(
        name, "interaction-bf16-f27-d128", lambda d, s: problems.interaction(d, "bf16", 9, 27, 128, seed=s), "memory"
    )


def test_a_right_kernel_is_checked_and_timed() -> None:
    machine, found = Truthful(), {("ceiling", "copy"): {"value": 4.0}}
    found["check", small_case().kernel] = tasks.check(machine, small_case().make, small_case().kernel)
    assert found["check", small_case().kernel]["ok"]
    result = tasks.measure(machine, small_case(), 0.1, found)
    assert result["us"] == 100.0
    assert result["share_of_ceiling"] == pytest.approx(result["tb_s"] / 4.0)
    assert result["config"] == "ships"


def test_a_wrong_or_unstable_kernel_is_never_timed() -> None:
    for machine in (Truthful(wrong=0.1), Truthful(wrong=float("nan")), Truthful(unstable=True)):
        verdict = tasks.check(machine, small_case().make, small_case().kernel)
        assert not verdict["ok"]
        with pytest.raises(KernelError, match="did not pass its check"):
            tasks.measure(machine, small_case(), 0.1, {("check", small_case().kernel): verdict})
    with pytest.raises(KernelError, match="wrong at this size"):
        tasks.measure(Truthful(wrong=0.1), small_case(), 0.1, {("check", small_case().kernel): {"ok": True}})


def test_poison_left_behind_is_an_infinite_error() -> None:
    truth = torch.ones(4)
    assert tasks.error_of(torch.tensor([1.0, 1.0, float("nan"), 1.0]), truth) == float("inf")
    assert tasks.error_of(truth, truth) == 0.0


def test_the_plan_has_every_task_once_and_ceilings_first() -> None:
    from kernels.catalogue import catalogue

    machine = Truthful()
    names = [kernel.name for kernel in catalogue(("bf16", "fp16", "fp32"), (32, 64, 128))]
    machine.kernels = lambda: names  # type: ignore[method-assign]
    keys = [task.key for task in tasks.plan(machine, cutlass=Path("nowhere"))]
    assert len(set(keys)) == len(keys)
    assert [key[0] for key in keys[:3]] == ["ceiling"] * 3
    libraries = [f"cutlass {name}" for name in cutlass.SOURCES]
    assert {key[1] for key in keys if key[0] == "check"} == {*names, *libraries}
    timed_libraries = {key[1].partition(":")[0] for key in keys if key[0] == "cutlass"}
    assert timed_libraries == {name for name in cutlass.SOURCES if "bf16" in name}
    timed = [case for case in cases.timings() if case.kernel in names]
    assert len(timed) == len(list(cases.timings())), "every timed case has a kernel"
    assert list(dict.fromkeys(key[0] for key in keys)) == list(tasks.SECTIONS)


@pytest.mark.parametrize("kernel", ["hstu_attention-fp32-d32-bias-gated", "hstu_attention-fp32-d32-bias-padded",
                                    "paged_hstu_attention-extend-fp32-d32-bias",
                                    "paged_hstu_attention-reduce-fp32-d32", "paged_hstu_attention-write-fp16-d32",
                                    "uvqk_silu-int8-fp16", "embedding_bag-fp32-d128"])  # fmt: skip
def test_check_problems_have_poison_and_a_finite_truth(kernel: str) -> None:
    (case,) = cases.checks([kernel])
    problem = case.make(CPU, 0)
    assert problem.launches[-1].kernel == kernel
    truth = problem.truth()
    assert truth.shape == problem.out.shape
    assert bool(truth.isfinite().all())
    assert tasks.error_of(problem.out, truth) > 1e-2
    assert problem.bytes > 0


def run_bench(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--out", str(out), *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False, env=None,
    )  # fmt: skip
    return done, json.loads(out.read_text()) if out.is_file() else {}


def test_interpreted_checks_pass_and_are_reported(tmp_path: Path) -> None:
    only = "embedding_bag|hstu_attention-fp32-d32-bias(-padded)?$|reduce-fp16"
    done, report = run_bench(tmp_path, "--interpret", "--only", only, "--seconds", "500")
    assert done.returncode == 0, done.stderr
    assert report["finished"]
    assert report["device"]["device"] == "interpreter"
    assert len(report["checks"]) == 5
    assert all(check["ok"] for check in report["checks"].values())
    assert "checks passed: 5 of 5" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, report = run_bench(tmp_path)
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr
    assert not report["finished"]


def truthful_attention(problem: problems.Problem, wrong: float = 0.0) -> None:
    values = problem.launches[0].values
    names = ("q", "k", "v", "offsets", "num_targets", "max_length")
    q, k, v, offsets, targets, max_length = (values[name] for name in names)
    parts = [
        eager.attention(
            q[a:b].double(), k[a:b].double(), v[a:b].double(), torch.tensor([0, b - a]), t, max_length, None
        )
        for a, b, t in zip(offsets[:-1].tolist(), offsets[1:].tolist(), targets.split(1), strict=True)
    ]
    problem.out.copy_(torch.cat(parts) * (1 + wrong))


def test_a_library_is_checked_as_triton_s_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    source = cutlass.SOURCES["hstu_attention-bf16-d64"]
    for wrong, ok in ((0.0, True), (0.1, False)):
        monkeypatch.setattr(cutlass_tasks, "runner", lambda *_: lambda p: truthful_attention(p, wrong))  # noqa: B023
        verdict = cutlass_tasks.check(Truthful(), Path(), source, {})
        assert verdict["ok"] is ok
        found = {("check", "cutlass hstu_attention-bf16-d64"): verdict}
        case = cases.Case(
            "small", "hstu_attention-bf16-d64", lambda d, s: problems.attention(d, "bf16", [70, 3], 2, 64, seed=s)
        )
        if ok:
            assert cutlass_tasks.measure(Truthful(), Path(), source, case, 0.1, found)["us"] == 100.0
        else:
            with pytest.raises(KernelError, match="did not pass its check"):
                cutlass_tasks.measure(Truthful(), Path(), source, case, 0.1, found)


def test_a_library_that_lets_a_neighbour_s_nan_in_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(problem: problems.Problem) -> None:
        truthful_attention(problem)
        problem.out[0] = float("nan") if problem.out.isnan().any() else problem.out[0]

    verdict = cutlass_tasks.neighbours(Truthful(), cutlass.SOURCES["hstu_attention-bf16-d64"], leaky)
    assert not verdict["ok"]


def test_libraries_that_are_not_there_fail_their_checks_alone(tmp_path: Path) -> None:
    for task in cutlass_tasks.plan(Truthful(), tmp_path, 0.1):
        with pytest.raises(KernelError, match=r"there is no|did not pass its check"):
            task.run({})


def test_meta_s_kernel_is_called_by_whatever_names_it_has() -> None:
    q = torch.randn((6, 2, 8))
    offsets = torch.tensor([0, 3, 6])

    def older(
        N: int,  # noqa: N803
        alpha: float,
        q: Any,
        k: Any,
        v: Any,
        seq_offsets: Any,
        causal: bool,
        sort: bool = False,
    ) -> Any:
        assert (N, alpha, causal) == (3, 1.0, True)
        return q / N

    def newer(max_seq_len: int, alpha: float, q: Any, k: Any, v: Any, seq_offsets: Any, attn_scale: Any) -> Any:
        return q * attn_scale

    for function in (older, newer):
        assert torch.allclose(meta.bound(function, q, q, q, offsets, 3, 5), q / 5)


def test_a_rival_is_timed_absent_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    problem = problems.attention(CPU, "bf16", [5, 5], 2, 8, rivals=True)
    assert problem.rivals["meta_triton"] == "generative_recommenders is not installed"
    problem.rivals = {"fine": lambda: None, "gone": "not installed", "broken": lambda: 1 / torch.zeros(2)[3], "wrong":
                      lambda: torch.zeros_like(problem.out)}  # fmt: skip
    problem.same = ("wrong",)
    case = cases.Case("rivals", "hstu_attention-bf16-d8", lambda d, s: problem)
    result = tasks._rivals(Truthful(), case, 0.1, {})
    assert result["fine"] == {"us": 100.0}
    assert result["gone"] == {"absent": "not installed"}
    assert result["broken"]["failed"].startswith("IndexError")
    assert result["wrong"]["failed"].startswith("wrong, so not timed")
    text = bench.summary(
        {"device": {}, "finished": True, "ceilings": {}, "checks": {}, "timings": {}, "cutlass": {}, "sweep": {},
         "rivals": {"rivals": result}, "errors": {}}
    )  # fmt: skip
    assert "rival rivals: fine 100.0 us, gone absent, broken failed, wrong failed" in text


def test_a_hanging_task_is_given_up_after_its_own_patience(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    assert bench.patience(record) == bench.STALL_S
    record.write_text('{"key": ["check", "a"], "stall_s": 25.0}\n')
    assert bench.patience(record) == 25.0
    record.write_text('{"key": ["check", "a"], "stall_s": 25.0}\n{"key": ["check", "a"], "resu')
    assert bench.patience(record) == bench.STALL_S


def test_a_report_survives_crashes_errors_and_a_torn_last_line(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    lines = [
        {"device": {"device": "X"}}, {"key": ["check", "a"]}, {"key": ["check", "a"], "result": {"ok": True}},
        {"key": ["check", "b"]}, {"key": ["sweep", "a", "c1"]}, {"key": ["sweep", "a", "c1"], "result": {"us": 3.0}},
        {"key": ["sweep", "a", "c2"]}, {"key": ["sweep", "a", "c2"], "error": "KernelError: slow\nmore"},
    ]  # fmt: skip
    record.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"key": ["time", "t')
    report = bench.write(tmp_path / "r.json", record, finished=False)
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert report["checks"] == {"a": {"ok": True}, "b": {"ok": False}}
    assert report["sweep"] == {"a": {"c1": 3.0}}
    assert report["errors"]["check b"].startswith("crashed or hung")
    text = bench.summary(report)
    assert "checks passed: 1 of 2" in text
    assert "best of 1 configs of a: c1 3.0 us" in text
    assert "error sweep a c2: KernelError: slow" in text


def test_a_child_goes_on_where_the_last_one_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "r.jsonl"
    record.write_text('{"key": ["check", "one"]}\n')

    def plan(*_: Any, **__: Any) -> Any:
        yield tasks.Task(("check", "one"), lambda found: pytest.fail("it crashed before"))
        yield tasks.Task(("check", "two"), lambda found: 1 / 0)
        yield tasks.Task(("check", "two"), lambda found: (_ for _ in ()).throw(RuntimeError("out of memory")))
        yield tasks.Task(("check", "three"), lambda found: {"ok": True})

    monkeypatch.setattr(worker, "plan", lambda *a, **k: [t for i, t in enumerate(plan()) if i != 1])
    monkeypatch.setattr(worker, "open_machine", lambda given: Truthful())
    given = type("G", (), {"cutlass": None, "interpret": True, "section": None, "only": None, "until": 4e9})
    assert worker.work(given, record) == 0  # type: ignore[arg-type]
    _, found = bench.read(record)
    assert found["check", "three"] == {"ok": True}
    assert found["check", "two"]["error_message"] == "RuntimeError: out of memory"
    assert found["check", "one"]["error_message"].startswith("crashed")
