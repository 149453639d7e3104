"""What a prepared corpus is: the page that the coordinator writes and every worker checks its bytes against.

Layout of ``tokens.bin``, little-endian ``dtype``: the train part, then the held-out part. A part of n samples
is n * seq_len + 1 tokens; sample i is its tokens [i * seq_len, (i + 1) * seq_len], both ends included, so
inputs do not overlap and the last target of one sample is the first input of the next.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from .errors import StateError

MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.bin"
TOKENIZER_FILE = "tokenizer.json"

Dtype = Literal["uint16", "uint32"]
_Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(name: str) -> bool:
    """Whether ``name`` is a lower-case SHA-256 in hex, so that it may be used as a file or blob name."""
    return _SHA256.fullmatch(name) is not None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prepared corpus. Raises ValueError when the numbers contradict each other.

    ``vocab_size`` is the tokenizer's own, maybe below the one asked for; ``license`` is that of the text.
    """

    schema: Literal[1] = 1
    source: _Text
    tokens_sha256: str
    n_tokens: _Count
    dtype: Dtype
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    seq_len: _Count
    n_train: _Count
    n_heldout: _Count
    tokenizer_sha256: str
    eos_id: Annotated[int, msgspec.Meta(ge=0)]
    license: _Text

    def __post_init__(self) -> None:
        for field in ("tokens_sha256", "tokenizer_sha256"):
            if not is_sha256(getattr(self, field)):
                raise ValueError(f"{field} is not a lower-case SHA-256")
        if min(self.seq_len, self.n_train, self.n_heldout) < 1:
            raise ValueError("seq_len, n_train and n_heldout must be at least 1")
        if self.n_tokens != (self.n_train + self.n_heldout) * self.seq_len + 2:
            raise ValueError(f"n_tokens = {self.n_tokens} does not hold n_train + n_heldout samples of seq_len")
        if self.vocab_size > 1 << 8 * self.itemsize:
            raise ValueError(f"vocab_size = {self.vocab_size} does not fit {self.dtype}")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id = {self.eos_id} is outside the vocabulary of {self.vocab_size}")

    @property
    def masked(self) -> bool:
        """Whether samples have documents and prefixes of their own, or are one causal text each."""
        return False

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return 2 if self.dtype == "uint16" else 4

    @property
    def nbytes(self) -> int:
        """The exact size of ``tokens.bin``."""
        return self.n_tokens * self.itemsize

    @property
    def heldout_start(self) -> int:
        """The first token of the held-out part."""
        return self.n_train * self.seq_len + 1

    def encode(self) -> bytes:
        """JSON for people to read, the same bytes for the same manifest."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def decode(cls, data: bytes, name: str = MANIFEST_FILE) -> Manifest:
        """Raises StateError, naming ``name``, for anything but a consistent manifest of this schema."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(
                f"{name} is not a usable corpus manifest: {error}",
                hint="Prepare or download the corpus again.",
            ) from error
