"""The one archive of a bundle: an uncompressed tar of which every byte follows from the bundle's manifest.

First `bundle/manifest.json`, then the files that it names in the order of their names, each a plain file of mode 0644,
owner 0 and time 0, then two empty blocks. So nothing in an archive has to be believed: the reader writes down what the
manifest promises and refuses whatever differs, be it a link, a path that leads out, another order or one bit.
"""

from __future__ import annotations

import errno
import hashlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hstu.artifact import MANIFEST
from hstu.errors import ArtifactError
from hstu.manifest import parse_manifest

FOLDER = "bundle/"
COPY_AGAIN = "copy the shipped folder again, byte for byte (through a registry: skopeo copy --preserve-digests)"
MAX_MANIFEST_BYTES = 64 << 20
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_CHUNK = 1 << 20
_UNHOLDABLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}

Progress = Callable[[int], None]


def archive_size(manifest: Mapping[str, Any], manifest_bytes: int) -> int:
    """Bytes of the archive of the bundle with this manifest."""
    files = [(MANIFEST, manifest_bytes), *((name, int(entry["bytes"])) for name, entry in _files(manifest))]
    return len(_END) + sum(len(_header(FOLDER + name, size)) + size + len(_padding(size)) for name, size in files)


def pack(folder: Path, manifest: Mapping[str, Any], data: bytes, out: IO[bytes], advance_to: Progress) -> str:
    """Write the archive of the bundle at `folder` with manifest bytes `data`; its SHA-256.

    Every file is read once and hashed on its way. Raises ArtifactError when one is not what the manifest says.
    """
    written = _Counted(out, advance_to)
    written.write(_header(FOLDER + MANIFEST, len(data)) + data + _padding(len(data)))
    for name, entry in _files(manifest):
        written.write(_header(FOLDER + name, entry["bytes"]))
        digest, left = hashlib.sha256(), entry["bytes"]
        with _open(folder / name) as stream:
            while chunk := stream.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                written.write(chunk)
        if left != 0 or digest.hexdigest() != entry["sha256"]:
            raise ArtifactError(
                f"{folder / name}: not the file that was written",
                got=f"sha256 {digest.hexdigest()}" if left == 0 else "another size",
                expected=f"sha256 {entry['sha256']}, {entry['bytes']} bytes",
                fix="run the bundle stage again",
            )
        written.write(_padding(entry["bytes"]))
    written.write(_END)
    return written.digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})", fix="run the bundle stage again") from None


def pack_one(name: str, data: bytes) -> bytes:
    """The archive of a single file of these bytes."""
    return _header(name, len(data)) + data + _padding(len(data)) + _END


def unpack_one(archive: bytes, name: str, *, source: str) -> bytes:
    """The bytes in what `pack_one` made; ArtifactError when it is anything else."""
    size = _size_in(archive)
    start = len(_header(name, 0))
    data = archive[start : start + size]
    if pack_one(name, data) != archive:
        raise ArtifactError(f"{source}: not the archive of {name}", fix=COPY_AGAIN)
    return data


def read_manifest(archive: Path) -> bytes:
    """The bytes of the manifest that an archive begins with; ArtifactError when it does not."""
    with archive.open("rb") as stream:
        return _take_manifest(_Reader(stream, archive))


def unpack(archive: Path, target: Path | None, *, sha256: str, advance_to: Progress) -> None:
    """The bundle in `archive` stands in the empty folder `target` (None: it is read and checked only).

    Files are created new, below `target`, with the names, sizes and digests of the manifest. Raises ArtifactError
    at the first byte that is not the canonical archive's, or when the whole has another digest than `sha256`.
    """
    with archive.open("rb") as stream:
        reader = _Reader(stream, archive, advance_to)
        data = _take_manifest(reader)
        manifest = parse_manifest(data, source=f"{archive} {FOLDER}{MANIFEST}", fix=COPY_AGAIN)
        for name, entry in _files(manifest):
            reader.expect(_header(FOLDER + name, entry["bytes"]), f"the header of {name}")
            if target is None:
                digest = reader.copy(entry["bytes"], None)
            else:
                with _create(target, name) as out:
                    digest = reader.copy(entry["bytes"], out)
            if digest != entry["sha256"]:
                raise reader.refusal(f"{name} is not the file of the manifest", digest, entry["sha256"])
            reader.expect(_padding(entry["bytes"]), f"the end of {name}")
        reader.expect(_END, "the end")
        if stream.read(1):
            raise reader.refusal("something follows the end", "more bytes", "nothing")
        if reader.digest.hexdigest() != sha256:
            raise reader.refusal("not the archive that was written", reader.digest.hexdigest(), sha256)
        if target is not None:
            (target / MANIFEST).write_bytes(data)  # last: without it the folder is no artifact


class _Counted:
    """Bytes on their way into a file, counted and hashed."""

    def __init__(self, out: IO[bytes], advance_to: Progress) -> None:
        self.out, self.advance_to, self.digest, self.total = out, advance_to, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.out.write(data)
        self.digest.update(data)
        self.total += len(data)
        self.advance_to(self.total)


class _Reader:
    """An archive read from its start to its end, every byte counted and hashed."""

    def __init__(self, stream: IO[bytes], source: Path, advance_to: Progress = lambda done: None) -> None:
        self.stream, self.source, self.advance_to = stream, source, advance_to
        self.digest, self.total = hashlib.sha256(), 0

    def refusal(self, what: str, got: object = None, expected: object = None) -> ArtifactError:
        return ArtifactError(f"{self.source}: {what}", got=got, expected=expected, fix=COPY_AGAIN)

    def take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) != size:
            raise self.refusal("the archive ends too early", f"{self.total + len(data)} bytes")
        self.digest.update(data)
        self.total += size
        self.advance_to(self.total)
        return data

    def expect(self, data: bytes, what: str) -> None:
        if self.take(len(data)) != data:
            raise self.refusal(f"{what} is not as `ship` writes it", f"other bytes before byte {self.total}")

    def copy(self, size: int, out: IO[bytes] | None) -> str:
        digest = hashlib.sha256()
        while size:
            chunk = self.take(min(_CHUNK, size))
            digest.update(chunk)
            if out is not None:
                out.write(chunk)
            size -= len(chunk)
        return digest.hexdigest()


def _create(target: Path, name: str) -> IO[bytes]:
    """A new file at `name` below `target`; ArtifactError when no folder can hold the names of the manifest."""
    try:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        return (target / name).open("xb")
    except OSError as error:
        if error.errno not in _UNHOLDABLE:
            raise
        raise ArtifactError(f"{name!r}: cannot be the name of a file here ({error.strerror})", fix=COPY_AGAIN) from None


def _take_manifest(reader: _Reader) -> bytes:
    head = reader.take(_BLOCK)
    size = _size_in(head)
    if head != _header(FOLDER + MANIFEST, size):
        raise reader.refusal(f"the archive does not begin with {FOLDER}{MANIFEST} as `ship` writes it")
    if size > MAX_MANIFEST_BYTES:
        raise reader.refusal("the manifest is too large", f"{size} bytes", f"at most {MAX_MANIFEST_BYTES}")
    data = reader.take(size)
    reader.expect(_padding(size), "the end of the manifest")
    return data


def _files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from sorted(manifest["files"].items())


def _header(name: str, size: int) -> bytes:
    """The tar header of a plain file: what TarInfo has by default is mode 0644, owner 0, time 0."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _size_in(head: bytes) -> int:
    """What a header says of its file's size, -1 when nothing; it counts only once the whole header is as expected."""
    digits = head[124:135]
    return int(digits, 8) if len(digits) == 11 and all(48 <= digit < 56 for digit in digits) else -1
