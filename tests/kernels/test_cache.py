"""Kept kernels: found again, made anew when anything about them is wrong, whole however many write at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kernels.cpu.cache import digest, files_of, user_cache

FILES = {"a.so": b"first", "b.so": b"second"}


class Maker:
    """Counts how often it had to make the files."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> dict[str, bytes]:
        self.made += 1
        return dict(FILES)


def test_files_are_made_once(tmp_path: Path) -> None:
    make = Maker()
    assert [files_of(tmp_path / "cache", "key", make) for _ in range(3)] == [FILES] * 3
    assert files_of(tmp_path / "cache", "other", make) == FILES
    assert make.made == 2
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["key", "other"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no sums", "odd sums"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: str) -> None:
    make = Maker()
    files_of(tmp_path, "key", make)
    file, sums = tmp_path / "key" / "a.so", tmp_path / "key" / "sums.json"
    if damage == "flipped":
        file.write_bytes(b"fjrst")
    elif damage == "cut":
        file.write_bytes(b"fi")
    elif damage == "gone":
        file.unlink()
    elif damage == "no sums":
        sums.unlink()
    else:
        sums.write_text("[1]")
    assert files_of(tmp_path, "key", make) == FILES
    assert make.made == 2
    assert files_of(tmp_path, "key", make) == FILES
    assert make.made == 2  # it was put right
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_builds_at_once_all_get_whole_files(tmp_path: Path) -> None:
    meet, answers = threading.Barrier(4), []

    def make() -> dict[str, bytes]:
        meet.wait()
        return dict(FILES)

    def build() -> None:
        answers.append(files_of(tmp_path, "key", make))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [FILES] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    assert files_of(tmp_path / "file", "key", Maker()) == FILES
    assert "cannot be kept" in caplog.text


def test_the_key_changes_with_every_part() -> None:
    keys = {digest(parts) for parts in ({"a": b"1", "b": b"2"}, {"a": b"2", "b": b"1"}, {"a": b"12"}, {"ab": b"12"})}
    assert len(keys) == 4


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "hstu-compiler" / "kernels"
