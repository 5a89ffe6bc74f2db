"""Artifacts: what was written is what opens, and a changed byte anywhere is found."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.artifact import MANIFEST, Artifact, encode_json, open_artifact, write_manifest
from hstu.errors import ArtifactError
from hstu.manifest import CHECKSUM, manifest_checksum

INPUTS = {"prepare-data": "0" * 64}
FILES = {
    "model.onnx": b"\x00\x01\x02 weights",
    "nested/deep/table.json": b"{}\n",
    "empty": b"",
    "manifest.json.txt": b"x",
}


def write(folder: Path, files: dict[str, bytes] | None = None, **changes: Any) -> Artifact:
    for name, data in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    given: dict[str, Any] = {
        "stage": "surgery",
        "params": {"passes": ["a", "b"], "rate": 0.5, "limit": None},
        "inputs": INPUTS,
        "toolchain": {"onnx": "1.0"},
    }
    return write_manifest(folder, **{**given, **changes})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    folder = tmp_path / "surgery"
    folder.mkdir()
    return write(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make it consistent again, as somebody who knows the format would."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    manifest[CHECKSUM] = manifest_checksum(manifest)
    (folder / MANIFEST).write_bytes(encode_json(manifest))


def test_opens_what_was_written(artifact: Artifact) -> None:
    opened = open_artifact(artifact.path, stage="surgery")
    assert (opened.id, opened.manifest, opened.stage) == (artifact.id, artifact.manifest, "surgery")
    assert opened.params == {"passes": ["a", "b"], "rate": 0.5, "limit": None}
    assert set(opened.manifest["files"]) == set(FILES)
    assert opened.file("empty").read_bytes() == b""
    assert opened.id == hashlib.sha256((artifact.path / MANIFEST).read_bytes()).hexdigest()


def test_manifest_has_no_platform_unless_given(tmp_path: Path, artifact: Artifact) -> None:
    assert "platform" not in artifact.manifest
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", platform={"backend": "onnxruntime", "executed": True})
    assert open_artifact(other.path).manifest["platform"] == {"backend": "onnxruntime", "executed": True}


def test_unknown_file_names_the_known_ones(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"no file 'model\.bin'") as caught:
        artifact.file("model.bin")
    assert "nested/deep/table.json" in str(caught.value)


names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\."), min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def prefix_free(files: dict[str, bytes]) -> bool:
    return not any(other.startswith(f"{name}/") for name in files for other in files)


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(paths, st.binary(max_size=200), max_size=5).filter(prefix_free),
    params=st.dictionaries(names, values, max_size=4),
    toolchain=st.dictionaries(names, names, max_size=3),
)
def test_round_trip(files: dict[str, bytes], params: dict[str, Any], toolchain: dict[str, str]) -> None:
    """Whatever is written opens, with the same id and the same bytes, at any place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "here")
        folder.mkdir()
        written = write(folder, files, params=params, toolchain=toolchain)
        moved = Path(name, "there")
        shutil.move(folder, moved)
        opened = open_artifact(moved, stage="surgery")
        assert opened.id == written.id
        assert {name: opened.file(name).read_bytes() for name in opened.manifest["files"]} == files
        assert opened.params == params
        again = write(moved, files, params=params, toolchain=toolchain)
        assert again.id == written.id


@pytest.mark.parametrize("name", [*(n for n in FILES if FILES[n]), MANIFEST])
def test_a_changed_byte_anywhere_is_found(artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    data = path.read_bytes()
    positions = range(len(data)) if name == MANIFEST else [0, len(data) // 2, len(data) - 1]
    for position in positions:
        mask = random.Random(position).randrange(1, 256)
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        with pytest.raises(ArtifactError):
            open_artifact(artifact.path)
    path.write_bytes(data)
    assert open_artifact(artifact.path).id == artifact.id


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_changed_length_is_found(artifact: Artifact, name: str) -> None:
    data = (artifact.path / name).read_bytes()
    for changed in {b"", data[:-1], data + b" ", data + b"\n", data + data} - {data}:
        (artifact.path / name).write_bytes(changed)
        with pytest.raises(ArtifactError):
            open_artifact(artifact.path)


def remove(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def add(folder: Path) -> None:
    (folder / "nested" / "more").write_bytes(b"")


def rename(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "model.onnx2")


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    (folder / "nested").rename(folder.parent / "elsewhere")
    (folder / "nested").symlink_to(folder.parent / "elsewhere")


def link_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "elsewhere")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")


def folder_for_file(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()


def file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder / "nested")
    (folder / "nested").write_bytes(b"")


def pipe_for_file(folder: Path) -> None:
    (folder / "empty").unlink()
    os.mkfifo(folder / "empty")


def folder_for_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def not_a_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "harm",
    [
        remove, remove_manifest, add, rename, link, link_folder, link_manifest, folder_for_file, file_for_folder,
        pipe_for_file, folder_for_manifest, not_a_folder, gone,
    ],
)  # fmt: skip
def test_a_changed_folder_is_found(artifact: Artifact, harm: Callable[[Path], None]) -> None:
    harm(artifact.path)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(artifact.path, stage="surgery")
    assert "surgery" in str(caught.value)
    assert caught.value.exit_code == 4


def test_another_stage_or_schema_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="another stage") as caught:
        open_artifact(artifact.path, stage="bundle")
    assert (caught.value.got, caught.value.expected) == ("surgery", "bundle")
    rewrite(artifact.path, lambda manifest: manifest.update(schema=2))
    with pytest.raises(ArtifactError, match="another schema"):
        open_artifact(artifact.path)


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({key: value})


GOOD_FILE = {"sha256": "0" * 64, "bytes": 0}
MALFORMED = {
    "schema a bool": set_key("schema", True),
    "schema text": set_key("schema", "1"),
    "stage a list": set_key("stage", []),
    "params a list": set_key("params", []),
    "params null": set_key("params", None),
    "files a list": set_key("files", ["model.onnx"]),
    "file entry a string": set_key("files", {"model.onnx": "0" * 64}),
    "file entry empty": set_key("files", {"model.onnx": {}}),
    "file entry with more": set_key("files", {"model.onnx": {**GOOD_FILE, "mode": 0}}),
    "size negative": set_key("files", {"model.onnx": {**GOOD_FILE, "bytes": -1}}),
    "size a float": set_key("files", {"model.onnx": {**GOOD_FILE, "bytes": 0.0}}),
    "size a bool": set_key("files", {"model.onnx": {**GOOD_FILE, "bytes": False}}),
    "size huge": set_key("files", {"model.onnx": {**GOOD_FILE, "bytes": 10**400}}),
    "hash short": set_key("files", {"model.onnx": {**GOOD_FILE, "sha256": "0" * 63}}),
    "hash in capitals": set_key("files", {"model.onnx": {**GOOD_FILE, "sha256": "A" * 64}}),
    "hash a number": set_key("files", {"model.onnx": {**GOOD_FILE, "sha256": 0}}),
    "the manifest itself": set_key("files", {MANIFEST: GOOD_FILE}),
    "inputs a list": set_key("inputs", []),
    "input not an id": set_key("inputs", {"prepare-data": "latest"}),
    "input null": set_key("inputs", {"prepare-data": None}),
    "toolchain a list": set_key("toolchain", []),
    "version a number": set_key("toolchain", {"onnx": 1}),
    "platform a list": set_key("platform", []),
    "platform null": set_key("platform", None),
    "a key too many": set_key("signature", "x"),
    "a key too few": lambda manifest: manifest.pop("inputs"),
    "no schema": lambda manifest: manifest.pop("schema"),
    **{
        f"file name {name!r}": set_key("files", {name: GOOD_FILE})
        for name in (
            "",
            ".",
            "..",
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "a\nb",
            "a\0b",
            "\ud800",
        )
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_manifests_are_refused(artifact: Artifact, case: str) -> None:
    """Never a traceback of another kind, and never a file outside the folder."""
    manifest = json.loads((artifact.path / MANIFEST).read_bytes())
    MALFORMED[case](manifest)
    text = json.dumps(manifest, indent=2, sort_keys=True)
    (artifact.path / MANIFEST).write_text(text + "\n")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(artifact.path)
    str(caught.value).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff\xfe", b"{}", b"[" * 99_999,
        b'{"schema": ' + b"1" * 5000 + b"}",
        b'{"schema": NaN}', '{"schema": 1}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(artifact: Artifact, data: bytes) -> None:
    (artifact.path / MANIFEST).write_bytes(data)
    with pytest.raises(ArtifactError):
        open_artifact(artifact.path)


def test_a_key_that_stands_twice_is_refused(artifact: Artifact) -> None:
    """JSON readers differ in which of two equal keys they take, so the same bytes would mean two things."""
    path = artifact.path / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"stage": "surgery"', b'"stage": "bundle",\n  "stage": "surgery"'))
    with pytest.raises(ArtifactError, match="twice"):
        open_artifact(artifact.path)


def test_a_number_that_is_none_is_refused(artifact: Artifact) -> None:
    path = artifact.path / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"rate": 0.5', b'"rate": NaN'))
    with pytest.raises(ArtifactError):
        open_artifact(artifact.path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json({"rate": float("inf")})


def test_another_layout_of_the_same_values_is_refused(artifact: Artifact) -> None:
    path = artifact.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes())))
    with pytest.raises(ArtifactError, match="not the ones that were written"):
        open_artifact(artifact.path)


def test_a_consistent_edit_changes_the_id(artifact: Artifact) -> None:
    (artifact.path / "model.onnx").write_bytes(b"other weights")
    entry = {"sha256": hashlib.sha256(b"other weights").hexdigest(), "bytes": len(b"other weights")}
    rewrite(artifact.path, lambda manifest: manifest["files"].update({"model.onnx": entry}))
    assert open_artifact(artifact.path).id != artifact.id


@pytest.mark.parametrize(
    "change",
    [{"stage": "bundle"}, {"params": {}}, {"inputs": {}}, {"toolchain": {"onnx": "1.1"}}, {"platform": {"gpu": "L4"}}],
)
def test_everything_in_the_manifest_counts_for_the_id(
    tmp_path: Path, artifact: Artifact, change: dict[str, Any]
) -> None:
    (tmp_path / "other").mkdir()
    assert write(tmp_path / "other", **change).id != artifact.id


@pytest.mark.parametrize("harm", [link, link_folder, pipe_for_file])
def test_what_cannot_be_an_artifact_is_not_written_as_one(artifact: Artifact, harm: Callable[[Path], None]) -> None:
    (artifact.path / MANIFEST).unlink()
    harm(artifact.path)
    with pytest.raises(ArtifactError):
        write_manifest(artifact.path, stage="surgery", params={}, inputs={}, toolchain={})
    assert not (artifact.path / MANIFEST).exists()


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "\udcff"])
def test_file_names_that_do_not_travel_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="not the name of a file"):
        write(tmp_path, {name: b""})


def test_without_verify_only_the_manifest_is_read(artifact: Artifact) -> None:
    (artifact.path / "model.onnx").write_bytes(b"")
    assert open_artifact(artifact.path, verify=False).id == artifact.id
    with pytest.raises(ArtifactError, match="wrong size"):
        open_artifact(artifact.path)


def test_an_unreadable_file_is_an_artifact_error(artifact: Artifact) -> None:
    """Tried in a child that is nobody, because root may read everything."""
    (artifact.path / "model.onnx").chmod(0)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                for folder in (artifact.path, *artifact.path.parents[:3]):
                    folder.chmod(0o755)
                os.setuid(65534)
            open_artifact(artifact.path)
        except ArtifactError as error:
            os._exit(0 if "model.onnx: cannot be read (Permission denied)" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


SCRIPT = """
import sys
from pathlib import Path
from hstu.artifact import write_manifest
folder = Path(sys.argv[1])
for name in {"b", "a", "c/d", "c/e"}:  # written in the order of a set: another one in every process
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(name)
toolchain = {name: "1" for name in {"torch", "onnx", "numpy", "polygraphy"}}
print(write_manifest(folder, stage="s", params=dict.fromkeys({"x", "y", "z"}, 1), inputs={}, toolchain=toolchain).id)
"""


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    manifests = []
    for seed in ("0", "1", "4242"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC+{len(seed)}", "LC_ALL": "C"}
        subprocess.run([sys.executable, "-c", SCRIPT, folder], env=environment, check=True, capture_output=True)
        manifests.append((folder / MANIFEST).read_bytes())
    assert len(set(manifests)) == 1
