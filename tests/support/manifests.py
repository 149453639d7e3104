"""Corpora of one text: some exist only by their description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from potluck.coordinator.recipes.shards import ShardWriter, windows
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest, Shard, plain


def manifest(n_train: int, n_heldout: int, seq_len: int, **changes: Any) -> Manifest:
    """A corpus of 300 words that nobody reads."""
    fields: dict[str, Any] = {
        "source": "test",
        "license": "unknown",
        "seq_len": seq_len,
        "dtype": "uint16",
        "vocab_size": 300,
        "eos": 0,
        "tokenizer_sha256": "0" * 64,
        "train": (Shard("0" * 64, n_train),),
        "heldout": (Shard("1" * 64, n_heldout),),
    }
    return plain(**fields | changes)


def write_corpus(
    folder: Path, train: NDArray[Any], heldout: NDArray[Any], seq_len: int, *, rows_each: int = 1 << 20, **changes: Any
) -> Manifest:
    """Two streams of tokens as shards of ``rows_each`` rows in ``folder``."""
    dtype, shards = changes.get("dtype", "uint16"), []
    for stream in (train, heldout):
        with ShardWriter(folder / SHARDS_FOLDER, seq_len + 1, dtype, rows_each) as writer:
            writer.add(windows(stream, seq_len))
        shards.append(tuple(writer.shards))
    made = manifest(1, 1, seq_len, train=shards[0], heldout=shards[1], **changes)
    (folder / MANIFEST_FILE).write_bytes(made.encode())
    return made


MANIFEST = manifest(10**5, 100, 8)
