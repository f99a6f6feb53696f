"""What travels to a machine that fetches nothing: real graphs, other kernels' sources, the commit.

:func:`pack` makes the folder and :func:`check` looks at it where it arrived::

    manifest.json    the commit, a digest of the code, and of each file its bytes and SHA-256
    data/            real graphs, for FASTGT_DATA
    peers/           sources of other GPU kernels, for --peer-path
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from fastgt import files
from fastgt.bench import gpu_benchmarks, harness
from fastgt.real_graphs import data_folder

MANIFEST = "manifest.json"
LARGEST = 20_000_000  # bytes of all
# where a peer's sources are in its checkout; turbo-gnn's need an extension, which is not carried
_SOURCES = {
    "anemoi": "anemoi/models/triton/gt.py",
    "flash-bidirectional-linear-attention": "flash_bla",
}


def pack(folder: Path, peer_path: Path | None) -> list[str]:
    """Make the folder anew; -> what it holds, and what was left out and why, for people.

    Raises:
        ValueError: The folder holds something else, or would grow too large.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"--pack {folder}: it holds something else: name a new folder")
    data = data_folder()
    for source in (data, peer_path):
        if source is not None and folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"--pack {folder}: {source} is in it, and would be lost")
    if folder.exists():
        shutil.rmtree(folder)
    told = []
    for name in dict.fromkeys(x.problem for x in gpu_benchmarks.ATTENTION):
        file = None if data is None else data / f"{_FILES.get(name, name)}.npz"
        if file is not None and file.is_file():
            _copy(file, folder / "data" / file.name)
            told.append(f"{name}: {file.stat().st_size:,} bytes")
        elif name in _REAL:
            reason = "FASTGT_DATA names no folder" if file is None else f"{file} is absent"
            told.append(f"{name}: left out: {reason}")
    for peer, source in _SOURCES.items() if peer_path is not None else ():
        found = _find(peer_path, source)
        if found is None:
            told.append(f"{peer}: left out: there is no {source} under {peer_path}")
            continue
        sources = sorted(found.rglob("*.py")) if found.is_dir() else [found]
        for file in sources:
            _copy(file, folder / "peers" / source / file.relative_to(found))
        told.append(f"{peer}: {len(sources)} files from {found}")
    held = sorted(x for x in folder.rglob("*") if x.is_file())
    size = sum(x.stat().st_size for x in held)
    if size > LARGEST:
        raise ValueError(f"--pack {folder}: {size:,} bytes, and at most {LARGEST:,} travel")
    manifest = {
        "commit": harness.commit(),
        "code": digest_of_code(),
        "files": {x.relative_to(folder).as_posix(): _digest(x) for x in held},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return [*told, f"{folder}: {len(held)} files, {size:,} bytes, commit {manifest['commit']}"]


def check(folder: Path) -> dict[str, Any]:
    """-> the manifest of a folder that is whole.

    Raises:
        ValueError: A file is missing, or is another one; names it.
    """
    again = "make it anew with python -m fastgt.bench.gpu --pack, and carry all of it"
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"--carried {folder}: {MANIFEST} is missing: {again}")
    try:
        manifest = json.loads(path.read_text())
        wanted = dict(manifest["files"])
        _ = manifest["commit"], manifest["code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--carried {folder}: {MANIFEST} is damaged: {again}") from error
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"--carried {folder}: {name} is missing: {again}")
        if _digest(file) != digest:
            raise ValueError(f"--carried {folder}: {name} is damaged: {again}")
    return manifest


def commit(manifest: dict[str, Any]) -> str:
    """The commit of this code, by the manifest: marked where the code is no longer that."""
    same = manifest["code"] == digest_of_code()
    return manifest["commit"] if same else f"{manifest['commit'].removesuffix('-dirty')}-dirty"


def digest_of_code() -> str:
    """Of all Python files of the package, here."""
    import fastgt

    sha = hashlib.sha256()
    for part in ("", "kernels", "bench"):
        package = (Path(fastgt.__file__).resolve().parent.parent / (part or "fastgt")).resolve()
        for file in sorted(package.rglob("*.py")):
            sha.update(file.relative_to(package).as_posix().encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()


# graphs that are files, where those are named otherwise
_FILES = {"zinc": "zinc12k"}
_REAL = {"zinc", "amazon_computers", "tolokers", "dd", "cora", "debian", "flights"}


def _find(folder: Path, source: str) -> Path | None:
    """In the folder, or in a checkout in it."""
    for above in ("", "*/", "*/*/", "*/*/*/"):
        for found in sorted(folder.glob(above + source)):
            return found
    return None


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def _digest(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
