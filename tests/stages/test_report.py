"""The report: everything inside one page, true to its inputs, the same bytes from the same inputs."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import encode_json, open_artifact
from hstu.errors import InputError
from stages import conformance
from stages.contract import Workspace
from stages.report import PAGE, page, write_plots, write_report_page
from stages.report_evidence import Evidence, gather
from stages.report_markdown import markdown
from tests.stages import benchmarks
from tests.stages.bundles import copy, rewrite, write_artifacts

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br"}
SHAPES = {"line", "rect", "path", "circle"}


class Reader(HTMLParser):
    """Every tag is closed in order; texts, tags and attributes are kept."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and its upstream artifacts, one engine of them only built."""
    folder = tmp_path_factory.mktemp("report") / "artifacts"
    bundle = write_artifacts(folder)
    description = {"version": "1.2.3", "default_engine": "fp32", "engines": {"fp32": {}}}
    (bundle / "bundle.json").write_bytes(encode_json(description))
    rewrite(bundle)
    return folder


@pytest.fixture
def workspace(artifacts: Path, tmp_path: Path) -> Workspace:
    stale = benchmarks.METRICS["build-engine-int8"] | {"embedding_cosine": {"min": 0.9876, "mean": 0.9876}}
    engine = {"build-engine-fp32": benchmarks.METRICS["build-engine-int8"], "build-engine-int8": stale}
    benchmarks.write(tmp_path, benchmarks.benchmark(), benchmarks.METRICS | engine)
    params = {name: getattr(benchmarks.PARAMS, name) for name in benchmarks.PARAMS.__slots__}
    return Workspace(artifacts=artifacts, reports=tmp_path, values={"gate": params})


def reports(workspace: Workspace, **changes: Any) -> Evidence:
    """The evidence with other benchmark values."""
    evidence = gather(workspace)
    return dataclasses.replace(evidence, benchmark={**evidence.benchmark, **changes})


def test_the_page_loads_nothing_and_runs_nothing(workspace: Workspace) -> None:
    html = write_report_page(workspace).read_text()
    reader = Reader(html)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        for name in ("src", "href", "srcset", "data", "style"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert not re.search(r"https?:|url\(|@import|javascript:|\bon\w+=", html)
    assert "prefers-color-scheme: dark" in html
    assert len(html) < 300_000


def test_the_same_inputs_give_the_same_bytes(workspace: Workspace) -> None:
    first = write_report_page(workspace).read_bytes()
    assert write_report_page(workspace).read_bytes() == first
    assert not list(workspace.reports.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_has_nothing_to_complain_of(workspace: Workspace, tmp_path: Path, width: int) -> None:
    """Chromium logs nothing to the console, and the page is no wider than the window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page_file = write_report_page(workspace)
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    page_file.write_text(page_file.read_text().replace("</body>", probe))
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", page_file.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    wide, window = (int(word) for word in re.findall(r"<title>(\d+) of (\d+)</title>", done.stdout)[0])
    assert wide <= window


def test_the_page_tells_what_was_measured(workspace: Workspace) -> None:
    text = Reader(write_report_page(workspace).read_text()).text
    bundle = open_artifact(workspace.artifacts / "bundle")
    assert "HSTU bundle 1.2.3" in text
    assert bundle.id[:12] in text
    assert "All 16 results agree with eager PyTorch" in text
    assert "No baseline has been accepted yet" in text
    assert "2.86 ms" in text  # the int8 engine, one user: 10 ms / 3.5
    assert "560/s" in text  # the int8 engine, batches of 32
    assert "0.490" in text  # HR@10
    assert "best baseline (popularity): 0.040" in text
    assert "0.998500" in text  # lowest cosine of the engine
    assert "≥ 0.999999" in text  # its limit
    assert "0.987600" not in text  # that of an engine which is not in the bundle
    assert "built, not executed" in text
    assert "Test CPU 9000, 2 cores" in text
    for name in ("prepare-data", "checkpoint", "export-onnx", "build-engine-fp32"):
        assert name in text


def test_the_summary_has_a_table_of_every_kind_that_was_measured(workspace: Workspace) -> None:
    report = benchmarks.benchmark()
    back = [
        row | {"entry": "extend", "new_events": new, "ratio_to_plain": 21.5}
        for row in report["results"]
        for new in (1, 10)
        if row["runtime"] == "engine" and row["thread_mode"] == "one"
    ]
    partly = [row | {"occupancy": 0.57, "ratio_to_padded": 1.55} for row in report["results"] if row["batch"] == 8]
    peer = benchmarks.row("openvino-plain", "openvino", "fp32", 1.7, 1, "one") | {"correct": False}
    text = markdown(report | {"results": [*report["results"], *back, *partly, peer]})
    lines = {line.partition(" |")[0] for line in text.splitlines()}
    assert {"| one user, one thread", "| returning user, one thread", "| batches, all threads"} <= lines
    assert "| onnxruntime fp32 | 5.556 | 1.80× | 1.38× | 50% | 1.85× | 100 | 1.15× |" in text
    assert "| onnxruntime int8 | 10 | 50 | 2.857 | 3.50× | 21.50× |" in text
    assert text.index("| 10 | 50 |") < text.index("| 1 | 50 |")
    assert "| 57% |" in text
    assert "1.55× |" in text
    assert "| openvino-plain † |" in text
    assert "fp32 100 (OpenVINO 512x64x256)" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {9, 7}


def test_artifacts_stand_in_the_order_in_which_they_were_made(workspace: Workspace) -> None:
    html = write_report_page(workspace).read_text()
    chain = html[html.index('<ol class="chain">') :]
    assert re.findall(r"<li><b>([^<]+)</b>", chain) == [
        "prepare-data", "checkpoint", "export-onnx", "build-engine-fp32", "build-engine-fp32-tensorrt-rtx", "bundle",
    ]  # fmt: skip


def test_cases_stand_in_the_order_of_the_registry(workspace: Workspace) -> None:
    about = benchmarks.benchmark()["cases"]["trained"]
    html = page(reports(workspace, cases={"reference-512": about, "small": about, "trained": about}))
    assert re.findall(r"<h3>([a-z0-9-]+):", html) == ["trained", "small", "reference-512"]


def test_wrong_results_are_the_first_thing_said(workspace: Workspace) -> None:
    rows = benchmarks.benchmark()["results"]
    none = {"latency_ms": None, "throughput_rps": None, "ratio_to_eager": None, "ratio_ci95": None,
            "peak_memory_mib": None, "share_of_ceiling": None}  # fmt: skip
    rows[3] |= {"correct": False, "max_abs_error": 0.5, **none}
    html = page(reports(workspace, results=rows))
    assert '<div class="verdict fail">' in html
    text = Reader(html).text
    assert text.index("1 of 16 results are wrong") < text.index("Model and data")


def test_disturbed_timings_are_marked(workspace: Workspace) -> None:
    rows = benchmarks.benchmark()["results"]
    rows[3]["core_wait_share"] = 0.4
    text = Reader(page(reports(workspace, results=rows))).text
    assert "1 of 16 timings were disturbed" in text
    assert text.count("3.50× ~") == 3  # in the chart and in both tables


def test_the_verdict_is_that_of_the_gate(workspace: Workspace) -> None:
    slow = benchmarks.scaled(benchmarks.benchmark(), lambda row: 0.4)
    (workspace.reports / "baseline.json").write_bytes(encode_json(benchmarks.benchmark()))
    assert '<div class="verdict pass">' in page(gather(workspace))
    benchmarks.write(workspace.reports, slow)
    html = page(gather(workspace))
    assert '<div class="verdict fail">' in html
    assert '<span class="fail-text">fail</span>' in html


def test_text_from_outside_cannot_become_markup(workspace: Workspace) -> None:
    hostile = "<script>alert(1)</script>\"'&"
    skipped = [{"case": "trained", "runtime": "torch-compile", "precision": "fp32", "reason": hostile}]
    environment = benchmarks.ENVIRONMENT | {"cpu_model": hostile, "versions": {hostile: hostile}}
    cases = {"trained": benchmarks.benchmark()["cases"]["trained"] | {"summary": hostile}}
    html = page(reports(workspace, skipped=skipped, environment=environment, cases=cases))
    assert "<script" not in html
    assert Reader(html).text.count(hostile) == 5


def test_a_checkpoint_without_known_quality_says_so(workspace: Workspace) -> None:
    evidence = dataclasses.replace(gather(workspace), metrics={"checkpoint": {"num_parameters": 1000}})
    text = Reader(page(evidence)).text
    assert "ranking quality is not known" in text
    assert "1,000" in text


def test_without_a_benchmark_there_is_no_page(workspace: Workspace) -> None:
    (workspace.reports / "benchmark.json").unlink()
    with pytest.raises(InputError, match="no benchmark to report"):
        write_report_page(workspace)
    assert not (workspace.reports / PAGE).exists()


def test_plots_hold_full_histories_on_all_threads(tmp_path: Path) -> None:
    report = benchmarks.benchmark()
    report["results"].append(report["results"][-1] | {"occupancy": 0.5})
    write_plots(report, tmp_path)
    with (tmp_path / "plots" / "throughput.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["what"] for row in rows] == [
        "trained retrieve torch-eager",
        "trained retrieve onnx-plain",
        "trained retrieve engine onnxruntime fp32",
        "trained retrieve engine onnxruntime int8",
    ]
    assert float(rows[3]["users_per_second"]) == pytest.approx(560)
    with (tmp_path / "plots" / "latency.csv").open() as stream:
        assert [float(row["p50_ms"]) for row in csv.DictReader(stream)] == pytest.approx(
            [10, 10 / 1.3, 10 / 1.8, 10 / 3.5]
        )


def test_the_page_of_dvc_plots_brings_its_libraries() -> None:
    template = (ROOT / ".dvc" / "plots" / "page.html").read_text()
    assert template.count("{plot_divs}") == 1
    assert "{scripts}" not in template  # where dvc would put three scripts from a CDN
    assert not re.search(r"<(script|link)[^>]+(src|href)=", template)
    for library in ("vega 5.", "vega-lite 5.", "vega-embed 6."):
        assert f"<!-- {library}" in template
    config = (ROOT / ".dvc" / "config").read_text()
    assert "html_template = plots/page.html" in config
    assert "analytics = false" in config


def test_an_engine_that_was_executed_is_no_conformance_row(workspace: Workspace, tmp_path: Path) -> None:
    only = tmp_path / "only"
    copy(workspace.artifacts / "bundle", only / "bundle")
    rewrite_from = open_artifact(workspace.artifacts / "bundle").manifest
    (only / "bundle" / "manifest.json").write_bytes(encode_json(rewrite_from))
    evidence = gather(dataclasses.replace(workspace, artifacts=only))
    assert evidence.built_only == {}
    assert "None was built" in page(evidence)


def test_the_page_has_the_conformance_matrix_and_every_refusal(workspace: Workspace) -> None:
    rows = [
        conformance.Row(
            model="ml-1m", entry="retrieve", precision=precision, product="TensorRT-RTX", version="1.7.1.116",
            result="rejected" if reason else "built", reason=reason, engine_sha256=None if reason else "0" * 64,
        )
        for precision, reason in (("fp32", None), ("int8", "Node <x> is not supported"))
    ]  # fmt: skip
    html = page(dataclasses.replace(gather(workspace), conformance=tuple(rows)))
    assert "ml-1m retrieve int8: Node &lt;x&gt; is not supported" in html
    assert "1 of 2 graphs built by TensorRT-RTX 1.7.1.116." in html
