"""What a prepared corpus is: the page that the coordinator writes and every worker checks its bytes against.

A corpus is a set of sources, each cut into shards, and stages that mix them. A shard is a file named by its SHA-256:
n rows of seq_len + 1 tokens, little-endian ``dtype``, then, of a source with answers, n rows of packed bits
(``numpy.packbits``, one bit a token: whether it is part of an answer). A row holds what is read and, shifted by one,
what is to be said. Rows of a text overlap in one token, so that every token but the first is a target once.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import StateError
from .objective import Objective, Special

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
SHARDS_FOLDER = "shards"
WHOLE = 10_000  # the shares of a mix are whole numbers with this sum
MAX_NBYTES = 900_000  # of a manifest as it is sent: with the rest of a welcome it must fit one message
MAX_SHARD_NBYTES = 1 << 36
DENOISING = ("ul2r", "ul2")

Dtype = Literal["uint16", "uint32"]
_Count = Annotated[int, Meta(ge=1, lt=1 << 48)]
_Text = Annotated[str, Meta(max_length=1024)]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(name: str) -> bool:
    """Whether ``name`` is a lower-case SHA-256 in hex, so that it may be used as a file or blob name."""
    return _SHA256.fullmatch(name) is not None


class Shard(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file of rows, by its SHA-256."""

    sha256: str
    rows: _Count

    def __post_init__(self) -> None:
        if not is_sha256(self.sha256):
            raise ValueError("a shard's name is not a lower-case SHA-256")


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text of one kind. ``origin``: where it is from, for people. ``answers``: whether its rows say which tokens are
    answers. The shards of ``heldout`` are for evaluation alone."""

    name: _Name
    origin: _Text
    license: _Text
    answers: bool = False
    train: Annotated[tuple[Shard, ...], Meta(min_length=1, max_length=100_000)]
    heldout: Annotated[tuple[Shard, ...], Meta(max_length=100_000)] = ()

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.train)

    @property
    def heldout_rows(self) -> int:
        return sum(shard.rows for shard in self.heldout)


class Stage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``rows`` samples with the same mix and objective; the last stage goes on for as long as the run does.

    ``mix``: source to its share of the samples in ten-thousandths.
    """

    name: _Name
    rows: _Count
    mix: Annotated[dict[str, Annotated[int, Meta(ge=1, le=WHOLE)]], Meta(min_length=1, max_length=256)]
    objective: Objective = Objective()


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prepared corpus. Raises ValueError when its parts contradict each other.

    ``vocab_size``: rows of the embedding, maybe more than the tokenizer has words. ``locations``: addresses of folders
    with the shards, tried in this order before the coordinator is asked.
    """

    schema: Literal[2] = 2
    seq_len: _Count
    dtype: Dtype
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 32)]
    special: Special
    tokenizer_sha256: str
    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=256)]
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=64)]
    locations: Annotated[tuple[_Text, ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        if not is_sha256(self.tokenizer_sha256):
            raise ValueError("tokenizer_sha256 is not a lower-case SHA-256")
        if self.vocab_size > 1 << 8 * self.itemsize:
            raise ValueError(f"vocab_size = {self.vocab_size} does not fit {self.dtype}")
        special = self.special
        ids = [special.eos, special.pad, *special.sentinels, *(i for mode in special.modes.values() for i in mode)]
        if max(ids) >= self.vocab_size:
            raise ValueError(f"token {max(ids)} is outside the vocabulary of {self.vocab_size}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names) or len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two sources or two stages have the same name")
        for source in self.sources:
            if any(self.nbytes(source, shard) > MAX_SHARD_NBYTES for shard in (*source.train, *source.heldout)):
                raise ValueError(f"a shard of {source.name} is too large")
        for stage in self.stages:
            if missing := set(stage.mix) - set(names):
                raise ValueError(f"stage {stage.name} mixes unknown sources: {', '.join(sorted(missing))}")
            if sum(stage.mix.values()) != WHOLE:
                raise ValueError(f"the shares of stage {stage.name} sum to {sum(stage.mix.values())}, not {WHOLE}")
            if stage.objective.kind in DENOISING and not (special.sentinels and special.modes):
                raise ValueError(f"stage {stage.name} needs sentinels and modes, and the tokenizer has none")
            if not any(source.heldout for source in self.sources if source.name in stage.mix):
                raise ValueError(f"stage {stage.name} has nothing held out")

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return 2 if self.dtype == "uint16" else 4

    @property
    def eos_id(self) -> int:
        return self.special.eos

    @property
    def n_train(self) -> int:
        """Rows to train on, of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def n_heldout(self) -> int:
        """Held-out rows of the sources of the last stage."""
        return sum(source.heldout_rows for source in self.sources if source.name in self.stages[-1].mix)

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, to train on and held out."""
        return self.seq_len * sum(source.rows + source.heldout_rows for source in self.sources)

    @property
    def source(self) -> str:
        """Where the text is from, for people."""
        return ", ".join(source.origin for source in self.sources)

    @property
    def license(self) -> str:
        """Of all sources, each named once."""
        return ", ".join(dict.fromkeys(source.license for source in self.sources))

    @property
    def masked(self) -> bool:
        """Whether samples come with a layout: not if all are causal windows."""
        return any(stage.objective.kind != "causal" for stage in self.stages)

    @property
    def shards(self) -> dict[str, int]:
        """Every shard's size in bytes by its name."""
        return {
            shard.sha256: self.nbytes(source, shard)
            for source in self.sources
            for shard in (*source.train, *source.heldout)
        }

    @property
    def sha256(self) -> str:
        """Of everything but ``locations``: shards may move while a run goes on."""
        return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(self, locations=()))).hexdigest()

    def nbytes(self, source: Source, shard: Shard) -> int:
        """The exact size of a shard's file."""
        flags = math.ceil((self.seq_len + 1) / 8) if source.answers else 0
        return shard.rows * ((self.seq_len + 1) * self.itemsize + flags)

    def encode(self) -> bytes:
        """JSON for people to read, the same bytes for the same manifest."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def decode(cls, data: bytes, name: str = MANIFEST_FILE) -> Manifest:
        """Raises StateError, naming ``name``, for anything but a consistent manifest of this schema."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StateError(
                f"{name} is not a usable corpus manifest: {error}",
                hint="Prepare or download the corpus again.",
            ) from error


def plain(
    *,
    source: str,
    license: str,
    seq_len: int,
    dtype: Dtype,
    vocab_size: int,
    eos: int,
    tokenizer_sha256: str,
    train: tuple[Shard, ...],
    heldout: tuple[Shard, ...],
) -> Manifest:
    """A corpus of one text, learned causally."""
    text = Source(name="text", origin=source, license=license, train=train, heldout=heldout)
    return Manifest(
        seq_len=seq_len,
        dtype=dtype,
        vocab_size=vocab_size,
        special=Special(eos=eos, pad=eos),
        tokenizer_sha256=tokenizer_sha256,
        sources=(text,),
        stages=(Stage(name="text", rows=text.rows, mix={"text": WHOLE}),),
    )
