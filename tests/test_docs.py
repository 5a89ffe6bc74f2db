"""What the documents tell people to type exists, and what they are told to type first does what it says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import cli
from tests.meta_research import SMALL, write_meta_checkpoint

ROOT = Path(__file__).parent.parent
DOCS = ["README.md", "README.zh-CN.md", "examples/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
ELSEWHERE = ("make ", "dvc ", "docker ", "pip ", "skopeo ", "python -m vllm", "curl ", "export ")  # not of this test
PLACES = {"FILE": "meta.pt", "H": "2"}


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


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["README.md", "docs/QUICKSTART.md"])
def test_what_is_told_first_is_run(name: str, tmp_path: Path) -> None:
    """The commands in their order, in a copy of the tree and of what `make run` made (CI runs `make run` itself)."""
    if not (ROOT / "artifacts" / "bundle" / "manifest.json").is_file():
        pytest.skip("no artifacts/bundle: run make run first")
    ignored = shutil.ignore_patterns(".git", ".venv", ".dvc", "*cache*", "__pycache__")
    tree = Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))
    write_meta_checkpoint(tree / "meta.pt", SMALL)
    (tree / "requests.jsonl").write_text('{"user_id": 1, "events": [{"item_id": 3, "timestamp": 1000}]}\n')
    rows = [f"user-{u},item-{(u + e) % 40},view,{1_700_000_000 + 1000 * e}\n" for u in range(300) for e in range(8)]
    (tree / "events.csv").write_text("user_id,item_id,action,timestamp\n" + "".join(rows))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tree)}
    listed = commands(name)
    if "key.pem" in " ".join(listed) and not any("ecparam" in line for line in listed):
        listed = [line for line in commands("docs/QUICKSTART.md") if line.startswith("openssl")] + listed
    for line in listed:
        if line.startswith(ELSEWHERE) or not line[0].isascii() or "─►" in line:
            continue
        for word, value in PLACES.items():
            line = line.replace(f"={word}", f"={value}")
        if "rollback" in line:  # there must be something to go back to
            again = "python cli.py install shipped2 --root root --key pub.pem"
            bundle = (
                "python cli.py bundle -S bundle.version=9.0.0 && python cli.py ship --output shipped2 --sign key.pem"
            )
            line = f"{bundle} && {again} && {line}"
        if "--artifacts" not in line and " compile " in line:
            line += " --artifacts own --reports own-reports"
        shell = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(shell, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
