"""Bundles of a few small files, keys, and shipped folders harmed on purpose."""

from __future__ import annotations

import hashlib
import json
import tarfile
from importlib.metadata import version as installed
from io import BytesIO
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from hstu.artifact import encode_json, write_manifest
from stages.shipping.archive import unpack
from stages.shipping.layout import Blob, documents, open_shipment

FILES = {"README.md": b"# a bundle\n", "model.safetensors": bytes(range(256)) * 3, "engines/fp32/engine.json": b"{}\n"}
FILES["golden/an-empty-one"] = b""
FILES[f"lang/{'ü' * 70}.txt"] = b"a name that needs an extended header\n"


def write_bundle(folder: Path, version: str = "0.1.0", *, backend: str = "onnxruntime", text: bytes = b"") -> Path:
    """A bundle without ancestors at `folder`, whole by its manifest."""
    engine = {
        "backend": backend,
        "product": backend,
        "version": installed("onnxruntime"),
        "device": "cpu",
        "executed": True,
    }
    description = {"version": version, "default_engine": "fp32", "engines": {"fp32": engine}, "checkpoint": {}}
    files = FILES | {"bundle.json": encode_json(description)} | ({"extra.txt": text} if text else {})
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, stage="bundle", params={"version": version}, inputs={}, toolchain={})
    return folder


def write_keys(folder: Path, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """(private, public) keys in PEM, new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / "key.pem", folder / "pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def read_whole(shipped: Path) -> None:
    """Everything of a shipped folder is checked; nothing is written."""
    shipment = open_shipment(shipped)
    unpack(shipment.archive, None, sha256=shipment.layer.sha256, advance_to=lambda done: None)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its bytes; of a link, where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def ship_archive(folder: Path, archive: bytes, *, version: str = "0.1.0", identity: str | None = None) -> Path:
    """A layout at `folder` in which everything belongs to `archive`, as somebody would write who means harm."""
    if identity is None:
        size = int(archive[124:135], 8)
        identity = hashlib.sha256(archive[512 : 512 + size]).hexdigest()
    layer = Blob(sha256=hashlib.sha256(archive).hexdigest(), size=len(archive))
    for name, data in {**documents(version, identity, [layer]), layer.path: archive}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An archive of these members in this order, ended as ours are."""
    stream = BytesIO()
    for info, data in members:
        info.size = len(data) if info.isreg() else 0
        stream.write(info.tobuf(tarfile.PAX_FORMAT))
        stream.write(data + bytes(-len(data) % 512))
    return stream.getvalue() + bytes(1024)


def members_of(bundle: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members that an honest archive of a bundle has, in its order."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = ["manifest.json", *sorted(manifest["files"])]
    return [(tarfile.TarInfo(f"bundle/{name}"), (bundle / name).read_bytes()) for name in names]
