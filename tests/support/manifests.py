"""Corpora that exist only by their description."""

from __future__ import annotations

from potluck.protocol.manifest import Manifest


def manifest(n_train: int, n_heldout: int, seq_len: int) -> Manifest:
    """A corpus of 300 words that nobody reads."""
    return Manifest(
        source="test",
        tokens_sha256="0" * 64,
        n_tokens=(n_train + n_heldout) * seq_len + 2,
        dtype="uint16",
        vocab_size=300,
        seq_len=seq_len,
        n_train=n_train,
        n_heldout=n_heldout,
        tokenizer_sha256="0" * 64,
        eos_id=0,
        license="unknown",
    )


MANIFEST = manifest(10**5, 100, 8)
