"""What the documents tell people to type exists, and what they are told to type first does what it says."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

import cli
from tests.meta_research import SMALL, write_meta_checkpoint
from tests.stages.bundles import write_artifacts

ROOT = Path(__file__).parent.parent
DOCS = ["README.md", "README.zh-CN.md", "examples/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
ELSEWHERE = {  # how a command begins, and where it is run: CI's first step, other tests, or as the environment here
    "make run": ".ci/run",
    "make test": ".ci/run",
    "dvc repro": "Makefile",
    "pip install --no-deps -r requirements.txt": "tests/stages/test_runtime_wheel.py",
    "python -m vllm.entrypoints": "tests/serving/test_vllm_server.py",
    'export PATH="$PWD/.venv/bin': "tests/test_docs.py",
}
PLACES = {"FILE": "meta.pt", "H": "2"}
TOLD_FIRST = ["README.md", "docs/QUICKSTART.md"]
QUICK = (  # what shortens a compilation: one engine, few users, one cell of the benchmark
    "bundle.engines=[fp32-onnxruntime]", "bundle.default_engine=fp32-onnxruntime", "checkpoint.reference_epochs=1",
    "checkpoint.evaluation_histories=60", "benchmark.cases=[trained]", "benchmark.threads=[one]",
    "benchmark.entries=[retrieve]", "benchmark.cell_seconds=0.1", "benchmark.max_rounds=5",
)  # fmt: skip


def commands(name: str) -> list[str]:
    """The indented lines of a document up to their comments, continued ones joined."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


def cli_commands(name: str) -> list[list[str]]:
    """The arguments of every `python cli.py …` in a document."""
    found = []
    for line in commands(name):
        for part in line.split(" | "):
            words = shlex.split(part.partition(" > ")[0])
            if "cli.py" in words:
                found.append(words[words.index("cli.py") + 1 :])
    return found


@pytest.mark.parametrize("name", DOCS)
def test_every_command_line_in_the_documents_is_one(name: str) -> None:
    """Commands and options exist, and values have the right type; nothing is run."""
    group: Any = typer.main.get_command(cli.app)
    for arguments in cli_commands(name):
        context = group.make_context("cli.py", list(arguments))
        _, (name_of_command, *options), _ = group.make_parser(context).parse_args(list(arguments))  # global ones first
        command = group.get_command(context, name_of_command)
        assert command is not None, arguments
        if "…" not in arguments and options != ["COMMAND"]:
            command.make_context(name_of_command, options, parent=context)


@pytest.mark.parametrize("name", DOCS)
def test_every_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for part in text.split("](")[1:]:
        target = part.partition(")")[0].partition("#")[0]
        if target and "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def told(name: str) -> list[str]:
    """The commands of a document that are run here, in their order; those that stand in a fence go together."""
    parts = (ROOT / name).read_text().split("```\n")
    fenced = [part.strip().splitlines() for part in parts[1::2]]
    lines = [line for line in commands(name) if line[0].isascii() and "─►" not in line]
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))] + [" & ".join(f) for f in fenced if f]


def test_commands_that_are_run_elsewhere_are() -> None:
    for words, place in ELSEWHERE.items():
        assert any(line.startswith(words) for name in TOLD_FIRST for line in commands(name)), words
        assert words.removeprefix("python -m ").split()[0].split(".")[0] in (ROOT / place).read_text(), place


CHEAP = ("openssl", *(f"python cli.py {name} " for name in
         ("lineage", "verify", "ship", "install", "bundles", "estimate", "doctor", "configure")))  # fmt: skip


@pytest.mark.parametrize("name", TOLD_FIRST)
def test_what_costs_little_is_run_on_a_tiny_bundle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; the slow test below runs every command on the bundle that `make run` made."""
    write_artifacts(tmp_path / "artifacts")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    keys = [line for line in commands("docs/QUICKSTART.md") if line.startswith("openssl")]
    lines = [line for line in told(name) if f"{line} ".startswith(CHEAP)]
    assert len(lines) >= 5
    for line in dict.fromkeys([*keys, *lines]):
        words = shlex.split(line)
        if words[0] == "openssl":
            subprocess.run(words, check=True, capture_output=True)
            continue
        monkeypatch.setattr("sys.argv", words[1:])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None), f"{line}\n{capsys.readouterr().err}"


def write_inputs(folder: Path) -> None:
    """What the documents take for granted: a checkpoint of Meta's, requests, a log of events."""
    write_meta_checkpoint(folder / "meta.pt", dataclasses.replace(SMALL, item_rows=201))
    (folder / "requests.jsonl").write_text('{"user_id": 1, "events": [{"item_id": 3, "timestamp": 1000}]}\n')
    rows = [f"user-{u},item-{(u + e) % 40},view,{1_700_000_000 + 1000 * e}\n" for u in range(300) for e in range(8)]
    (folder / "events.csv").write_text("user_id,item_id,action,timestamp\n" + "".join(rows))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree and of what `make run` made in it (CI runs `make run` itself), with the inputs."""
    if not (ROOT / "artifacts" / "bundle" / "manifest.json").is_file():
        pytest.skip("no artifacts/bundle: run make run first")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "cache", "tmp", "config.local", ".*_cache", "__pycache__", ".cases", "*-tensorrt-rtx"
    )
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("docs") / "tree", ignore=ignored))
    write_inputs(copy)
    return copy


def as_run_here(line: str, tree: Path) -> str:
    """A command with the placeholders filled, a compilation shortened, and what it needs before it made."""
    for word, value in PLACES.items():
        line = line.replace(f"={word}", f"={value}")
    if "--sign key.pem" in line and not (tree / "key.pem").exists():  # QUICKSTART says how to make one
        line = " && ".join([*(c for c in commands("docs/QUICKSTART.md") if c.startswith("openssl")), line])
    if " ship " in line:
        line = f"rm -rf shipped root && {line}"
    if "rollback" in line:  # there must be something to go back to
        next_one = "python cli.py bundle -S bundle.version=9.0.0 && rm -rf shipped2"
        shipped = "python cli.py ship --output shipped2 --sign key.pem"
        line = f"{next_one} && {shipped} && python cli.py install shipped2 --root root --key pub.pem && {line}"
    if " compile " in line:
        quick = " ".join(f"-S '{value}'" for value in QUICK)
        line = f"rm -rf mine && {line} {quick}" + ("" if "--artifacts" in line else " --artifacts mine")
        line += " --reports own-reports"
    if line.startswith("dvc exp run"):
        line += " --queue"  # checked and kept for later: to run it is most of the pipeline
        line = f"git init -q && git add -A && git -c user.name=a -c user.email=a@example.com commit -qm a && {line}"
    if " serve " in line:
        server, client = line.split(" & ")
        port = free_port()
        client = client.replace(":8000", f":{port}")
        line = f"{server} --port {port} & server=$!; trap 'kill -INT $server; wait $server || true' EXIT; "
        line += f"for _ in $(seq 600); do curl -fs http://127.0.0.1:{port}/ready && break; sleep 0.2; done; {client}"
    return line


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", TOLD_FIRST)
def test_what_is_told_first_is_run(name: str, tree: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tree)}
    for line in told(name):
        shell = ["bash", "-euo", "pipefail", "-c", as_run_here(line, tree)]
        started = time.monotonic()
        done = subprocess.run(shell, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shell[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        print(f"{time.monotonic() - started:6.1f} s  {line}")
