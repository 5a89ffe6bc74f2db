"""The contract: a destination holds a whole artifact or none, whatever happens to the run that writes it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import MANIFEST, Artifact, open_artifact, write_manifest
from hstu.errors import ArtifactError, MissingBackendError, ParameterError, UsageError
from stages.contract import Outcome, Stage, Workspace, execute, hold, say, write_report

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyParams:
    value: int
    names: tuple[str, ...]


def run(params: ToyParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Two files that must agree, one in a folder of its own."""
    (folder / "nested").mkdir()
    (folder / "value.txt").write_text(str(params.value))
    (folder / "nested" / "again.txt").write_text(str(params.value) * 1000)
    return Outcome(metrics={"value": params.value})


TOY = Stage(name="toy", summary="Write a number twice.", params=ToyParams, toolchain=("numpy",), run=run)


def with_run(function: Callable[[ToyParams, Mapping[str, Artifact], Path], Outcome]) -> Stage:
    return replace(TOY, run=function)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return workspace_at(tmp_path)


def workspace_at(folder: Path, value: int = 1) -> Workspace:
    return Workspace(
        artifacts=folder / "artifacts", reports=folder / "reports", values={"toy": {"value": value, "names": ["a"]}}
    )


def check_whole(workspace: Workspace) -> int | None:
    """The value of the artifact at the destination, every byte verified; None when there is none."""
    path = workspace.artifacts / "toy"
    if not path.exists():
        return None
    artifact = open_artifact(path, stage="toy")
    value = int(artifact.file("value.txt").read_text())
    assert artifact.params["value"] == value
    assert artifact.file("nested/again.txt").read_text() == str(value) * 1000
    return value


def leftovers(workspace: Workspace) -> list[str]:
    return sorted(p.name for p in workspace.artifacts.rglob(".*") if p.name != ".lock") + sorted(
        p.name for p in workspace.reports.rglob(".*")
    )


def test_writes_an_artifact_and_a_report(workspace: Workspace) -> None:
    artifact = execute(TOY, workspace)
    assert artifact.path == workspace.artifacts / "toy"
    assert open_artifact(artifact.path, stage="toy").id == artifact.id
    assert artifact.params == {"value": 1, "names": ["a"]}
    assert set(artifact.manifest["toolchain"]) == {"numpy"}
    assert artifact.manifest["inputs"] == {}
    assert json.loads((workspace.reports / "metrics/toy.json").read_text()) == {"value": 1}
    assert leftovers(workspace) == []
    assert artifact.path.stat().st_mode & 0o777 == 0o755


def test_the_same_run_gives_the_same_id(tmp_path: Path) -> None:
    first, second = (execute(TOY, workspace_at(tmp_path / name)) for name in ("here", "elsewhere"))
    assert first.id == second.id
    assert execute(TOY, workspace_at(tmp_path / "here", 2)).id != first.id
    assert execute(TOY, workspace_at(tmp_path / "here")).id == first.id


def test_overrides_win(workspace: Workspace) -> None:
    assert execute(TOY, workspace, overrides={"value": 9}).params["value"] == 9
    with pytest.raises(ParameterError, match="unknown parameter 'vlaue'"):
        execute(TOY, workspace, overrides={"vlaue": 9})


def test_a_missing_section_is_named(workspace: Workspace) -> None:
    with pytest.raises(ParameterError, match="no section 'toys'") as caught:
        execute(replace(TOY, name="toys"), workspace)
    assert caught.value.fix == "did you mean 'toy'?"


def test_inputs_are_opened_and_recorded(workspace: Workspace) -> None:
    toy = execute(TOY, workspace)
    values = {**workspace.values, "next": {"value": 1, "names": ["a", "b"]}}
    seen: list[Mapping[str, Artifact]] = []

    def run_next(params: ToyParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
        seen.append(inputs)
        return Outcome(platform={"backend": "cpu"})

    after = Stage(name="next", summary="", params=ToyParams, needs=("toy",), run=run_next)
    artifact = execute(after, replace(workspace, values=values))
    assert artifact.manifest["inputs"] == {"toy": toy.id}
    assert artifact.manifest["platform"] == {"backend": "cpu"}
    assert seen[0]["toy"].id == toy.id

    (toy.path / "value.txt").write_text("2")
    with pytest.raises(ArtifactError, match=r"value\.txt"):
        execute(after, replace(workspace, values=values))
    assert len(seen) == 1
    assert open_artifact(workspace.artifacts / "next").id == artifact.id


def test_variants_stand_side_by_side(workspace: Workspace) -> None:
    stage = replace(TOY, variant=lambda params: f"v{params.value}")
    one, two = execute(stage, workspace), execute(stage, workspace, overrides={"value": 2})
    assert (one.path, two.path) == (workspace.artifacts / "toy" / "v1", workspace.artifacts / "toy" / "v2")
    assert json.loads((workspace.reports / "metrics/toy-v2.json").read_text()) == {"value": 2}
    both = Stage(name="both", summary="", params=ToyParams, needs=("toy/{names}",), run=lambda *_: Outcome())
    values = {"both": {"value": 1, "names": ["v1", "v2"]}}
    assert execute(both, replace(workspace, values=values)).manifest["inputs"] == {"toy/v1": one.id, "toy/v2": two.id}


@pytest.mark.parametrize("name", ["../toy", "..", "a/b", "", "/etc", ".hidden"])
def test_a_variant_cannot_leave_the_artifacts_folder(workspace: Workspace, name: str) -> None:
    with pytest.raises(ParameterError, match="not the name of a variant"):
        execute(replace(TOY, variant=lambda params: name), workspace)
    both = Stage(name="both", summary="", params=ToyParams, needs=("toy/{names}",), run=lambda *_: Outcome())
    with pytest.raises(ParameterError, match="not the name of an artifact"):
        execute(both, replace(workspace, values={"both": {"value": 1, "names": [name]}}))


def test_a_missing_tool_is_named(workspace: Workspace) -> None:
    with pytest.raises(MissingBackendError, match="no-such-package is not installed"):
        execute(replace(TOY, toolchain=("no-such-package",)), workspace)


@pytest.mark.parametrize("error", [ValueError("bug"), ArtifactError("refused"), KeyboardInterrupt(), MemoryError()])
def test_an_error_keeps_the_earlier_artifact(workspace: Workspace, error: BaseException) -> None:
    before = execute(TOY, workspace)

    def fail(params: ToyParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
        run(params, inputs, folder)
        raise error

    with pytest.raises(type(error)):
        execute(with_run(fail), workspace, overrides={"value": 2})
    assert open_artifact(before.path).id == before.id
    assert json.loads((workspace.reports / "metrics/toy.json").read_text()) == {"value": 1}
    assert leftovers(workspace) == []


def test_metrics_that_are_no_json_leave_everything_as_it_was(workspace: Workspace) -> None:
    before = execute(TOY, workspace)
    with pytest.raises(ValueError, match="not JSON compliant"):
        execute(with_run(lambda *_: Outcome(metrics={"loss": float("nan")})), workspace)
    assert open_artifact(before.path).id == before.id
    assert leftovers(workspace) == []


def test_what_is_no_artifact_is_never_overwritten(workspace: Workspace) -> None:
    (workspace.artifacts / "toy").mkdir(parents=True)
    execute(TOY, workspace)  # an empty folder may be filled
    shutil.rmtree(workspace.artifacts / "toy")
    (workspace.artifacts / "toy").mkdir()
    (workspace.artifacts / "toy" / "thesis.txt").write_text("the only copy")
    with pytest.raises(UsageError, match="will not be overwritten"):
        execute(TOY, workspace)
    assert (workspace.artifacts / "toy" / "thesis.txt").read_text() == "the only copy"
    shutil.rmtree(workspace.artifacts / "toy")
    (workspace.artifacts / "toy").write_text("a file")
    with pytest.raises(UsageError, match="will not be overwritten"):
        execute(TOY, workspace)
    assert (workspace.artifacts / "toy").read_text() == "a file"


def test_a_link_to_an_artifact_is_replaced_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    before = execute(TOY, workspace)
    shutil.move(before.path, tmp_path / "elsewhere")
    before.path.symlink_to(tmp_path / "elsewhere")
    execute(TOY, workspace, overrides={"value": 2})
    assert not before.path.is_symlink()
    assert open_artifact(tmp_path / "elsewhere").id == before.id
    assert leftovers(workspace) == []


def test_artifacts_folder_that_cannot_be(workspace: Workspace) -> None:
    workspace.artifacts.write_text("a file")
    with pytest.raises(UsageError, match="cannot be written to"):
        execute(TOY, workspace)
    with pytest.raises(UsageError, match="cannot be written to"):
        execute(TOY, replace(workspace, artifacts=Path("/proc/nowhere")))


def test_publish_gets_the_finished_artifact(workspace: Workspace) -> None:
    def publish(artifact: Artifact, space: Workspace) -> None:
        write_report(space.reports / "toy.json", {"id": open_artifact(artifact.path).id})

    artifact = execute(replace(TOY, publish=publish), workspace)
    assert json.loads((workspace.reports / "toy.json").read_text()) == {"id": artifact.id}


def test_say_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("chosen: cpu")
    assert capsys.readouterr() == ("", "chosen: cpu\n")


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────

FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def in_child(workspace: Workspace, signum: int, moment: int) -> tuple[int, bool]:
    """Run the stage (value 2) in a forked child that sends itself `signum` at its `moment`-th file operation.

    Returns the child's exit code (negative: the signal that ended it) and whether the moment came.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event.startswith(FILE_EVENTS):
                count += 1
                if count == moment:
                    os.write(writer, b"x")
                    os.kill(os.getpid(), signum)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(hook)
        try:
            execute(TOY, workspace, overrides={"value": 2})
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(99)
        finally:
            moment = -1
            os._exit(0)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader, "rb") as stream:
        return code, stream.read() == b"x"


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync to disk thousands of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
def test_a_kill_at_every_file_operation(fast_folder: Path, signum: int, earlier: bool) -> None:
    """Every file operation of a run is a moment to die at; after each, the next run finds and makes it right."""
    execute(TOY, workspace_at(fast_folder / "warm"))
    old = 1 if earlier else None
    moment, reached, states = 0, True, set()
    while reached:
        moment += 1
        workspace = workspace_at(fast_folder / str(moment))
        if earlier:
            execute(TOY, workspace)
        code, reached = in_child(workspace, signum, moment)
        if not reached:
            assert code == 0
        elif signum == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code in (130, 0, -signum)  # -signum: before the run began to listen
        found = check_whole(workspace)
        states.add(found)
        assert found in (old, 2) or (signum == signal.SIGKILL and found is None)
        report = workspace.reports / "metrics" / "toy.json"
        if report.exists() and found is not None:
            assert json.loads(report.read_text()) == {"value": found}
        if signum == signal.SIGKILL and earlier:  # a pipeline runner removes the destination before it runs a stage
            again = workspace_at(fast_folder / f"{moment}-removed")
            shutil.copytree(workspace.artifacts, again.artifacts)
            shutil.rmtree(again.artifacts / "toy", ignore_errors=True)
            with pytest.raises(ZeroDivisionError):
                execute(with_run(lambda *_: 1 // 0), again)  # type: ignore[arg-type, return-value]
            assert check_whole(again) in (old, None)
            shutil.rmtree(fast_folder / f"{moment}-removed")
        with pytest.raises(ParameterError):  # a run that fails before it writes recovers nothing and harms nothing
            execute(TOY, workspace, overrides={"value": "x"})
        with pytest.raises(ZeroDivisionError):  # a run that fails later leaves what was whole before the kill
            execute(with_run(lambda *_: 1 // 0), workspace)  # type: ignore[arg-type, return-value]
        assert check_whole(workspace) in (old, 2)
        execute(TOY, workspace, overrides={"value": 3})
        assert check_whole(workspace) == 3
        assert json.loads(report.read_text()) == {"value": 3}
        assert leftovers(workspace) == []
        shutil.rmtree(fast_folder / str(moment))
    assert moment > 20
    assert {old, 2} <= states
    assert (None in states) or signum != signal.SIGKILL or not earlier  # died between the two renames, too


CHILD = """
import sys, time
from pathlib import Path
from tests.stages.test_contract import TOY, workspace_at
from stages.contract import execute, say
workspace = workspace_at(Path(sys.argv[1]))
say("ready")
for value in range(2, 100_000):
    execute(TOY, workspace, overrides={"value": value})
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the stage over and over, with another value each time."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_at_a_random_moment(workspace: Workspace, child: subprocess.Popen[str], signum: int) -> None:
    time.sleep(random.Random(int(signum)).uniform(0.05, 0.4))
    child.send_signal(signum)
    assert child.wait(20) != 0
    found = check_whole(workspace)
    assert found is None or found >= 2
    execute(TOY, workspace)
    assert check_whole(workspace) == 1
    assert leftovers(workspace) == []


def locked(artifacts: Path) -> bool:
    try:
        with hold(artifacts):
            return False
    except UsageError:
        return True


def test_a_held_workspace_refuses_another_run(workspace: Workspace) -> None:
    before = execute(TOY, workspace)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(workspace.artifacts):
            os.write(writer, b"x")
            signal.pause()
    assert os.read(reader, 1) == b"x"
    try:
        with pytest.raises(UsageError, match=f"another run is at work here .process {child}."):
            execute(TOY, workspace, overrides={"value": 2})
        assert open_artifact(before.path).id == before.id
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert execute(TOY, workspace, overrides={"value": 2}).params["value"] == 2


def test_a_run_may_hold_the_workspace_for_many_stages(workspace: Workspace) -> None:
    with hold(workspace.artifacts):
        execute(TOY, workspace)
        with hold(workspace.artifacts):
            execute(TOY, workspace, overrides={"value": 2})
    assert not locked(workspace.artifacts)


def test_readers_need_no_lock(workspace: Workspace) -> None:
    artifact = execute(TOY, workspace)
    with hold(workspace.artifacts):
        assert open_artifact(artifact.path).id == artifact.id


# ── what a killed run leaves ─────────────────────────────────────────────────────────────────────────


def test_orphaned_folders_are_removed(workspace: Workspace) -> None:
    execute(TOY, workspace)
    orphan = workspace.artifacts / ".toy.tmp-abc"
    shutil.copytree(workspace.artifacts / "toy", orphan)
    other = workspace.artifacts / ".other.tmp-abc"
    other.mkdir()
    execute(TOY, workspace)
    assert not orphan.exists()
    assert other.exists()  # another stage's, not this one's to judge


def test_a_set_aside_artifact_comes_back(workspace: Workspace) -> None:
    before = execute(TOY, workspace)
    before.path.rename(workspace.artifacts / ".toy.previous")
    with pytest.raises(ZeroDivisionError):
        execute(with_run(lambda *_: 1 // 0), workspace)  # type: ignore[arg-type, return-value]
    assert open_artifact(before.path).id == before.id


def test_a_set_aside_artifact_that_was_replaced_goes(workspace: Workspace) -> None:
    before = execute(TOY, workspace)
    shutil.copytree(before.path, workspace.artifacts / ".toy.previous")
    execute(TOY, workspace, overrides={"value": 2})
    assert check_whole(workspace) == 2
    assert leftovers(workspace) == []


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────

FULL = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from hstu.artifact import open_artifact
from hstu.errors import UsageError
from stages.contract import Outcome, execute
from tests.stages.test_contract import TOY, workspace_at

def python(folder):
    (folder / "big").write_bytes(bytes(2**22))

def numpy(folder):
    np.save(folder / "big.npy", np.zeros(2**22, dtype=np.uint8))

def torch(folder):
    import torch
    torch.save(torch.zeros(2**20), folder / "big.pt")

def safetensors(folder):
    from safetensors.numpy import save_file
    save_file({"x": np.zeros(2**20, dtype=np.float32)}, folder / "big.safetensors")

def small_files(folder):
    for number in range(100_000):
        (folder / str(number)).write_bytes(bytes(100))

def run_with(writer):
    def run(params, inputs, folder):
        writer(folder)
        return Outcome()
    return replace(TOY, run=run)

workspace = workspace_at(Path(sys.argv[1]))
before = execute(TOY, workspace)
free = lambda: __import__("shutil").disk_usage(workspace.artifacts).free
room = free()
for writer in (python, numpy, safetensors, small_files, torch):
    try:
        execute(run_with(writer), workspace)
    except UsageError as error:
        assert "the disk is full" in str(error) and error.exit_code == 2, error
    else:
        raise AssertionError("the disk was not full")
    assert open_artifact(before.path).id == before.id
    assert free() == room, (free(), room)

# no room for the report alone: the artifact stays the earlier one too
huge = replace(TOY, run=lambda *_: Outcome(metrics={"x": "x" * 2**21}))
try:
    execute(huge, workspace)
except UsageError as error:
    assert "the disk is full" in str(error), error
else:
    raise AssertionError("the disk was not full")
assert open_artifact(before.path).id == before.id
assert (workspace.reports / "metrics/toy.json").read_text().strip() != ""
execute(TOY, workspace)
print("held")
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of one MiB, in a mount namespace of its own: an error of ours, and nothing lost."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, mount, tmp_path, "true"], capture_output=True).returncode
    ):
        pytest.skip("no right to mount a small disk here")
    done = subprocess.run(
        [*namespace, mount, tmp_path, sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("held\n", 0), done.stderr


def test_a_file_size_limit_is_told_as_a_full_disk(workspace: Workspace) -> None:
    def run_over_limit(params: ToyParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
        raise OSError(27, os.strerror(27))

    with pytest.raises(UsageError, match="size limit"):
        execute(with_run(run_over_limit), workspace)


def test_other_system_errors_stay_what_they_are(workspace: Workspace) -> None:
    with pytest.raises(FileNotFoundError):
        execute(with_run(lambda p, i, folder: Outcome(metrics={"x": (folder / "none").read_text()})), workspace)


def test_a_manifest_is_the_last_thing_written(tmp_path: Path) -> None:
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path)
    write_manifest(tmp_path, stage="toy", params={}, inputs={}, toolchain={})
    assert open_artifact(tmp_path).stage == "toy"


def test_importing_the_contract_is_light() -> None:
    script = (
        "import sys, stages.contract; print(sorted({'torch', 'onnx', 'onnxruntime', 'vllm', 'dvc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
