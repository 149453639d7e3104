"""AQ-SGD: samples that come back are sent as what changed since their last visit.

Wang et al., "Fine-tuning language models over slow networks using activation quantization with guarantees"
(NeurIPS 2022, arXiv 2206.01299). Both ends of a boundary keep the last value m(sample) that they agreed on. The sender
sends Q(a - m) with an unbiased Q, both add Q(a - m) to m, and the receiver computes with the new m. So the error is
that of quantizing a *change*, which shrinks as training settles, and it does not add up: every delta is taken against
what the receiver really has.

What differs from the paper: a first visit is quantized like any other (the paper sends it in full). The sender
quantizes both the value and the delta and sends what ends up nearer, so a delta never does harm (at 2 bits it often
would: the theorem wants a quantizer that loses less than 0.7 of what it is given). And nothing is trusted: a delta
names the version and the hash of the value it is against, and a receiver that holds another never computes with it but
asks for the plain value.

What it is good for: samples that come back (several epochs) between the same two peers. In a run of one epoch it only
costs disk. With R routes over a boundary a sample comes back on its own with probability 1 / R in each epoch; a value
is kept per route, so on a later return it still serves, as an older and weaker reference. A value costs 2 T D bytes on
the disk of each end, 8.4 GB for 2000 samples of 1024 tokens at width 2048, and every visit writes it anew: four times
what int4 sends.

Values are kept as fp16: rounding adds at most 2^-11 of a value, which is below what 8 bits leave, and both ends round
the same sum, so they stay equal to the bit. Quantized buffers would halve the disk and put a floor under the error.

Shapes: B samples of a microbatch, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from .codec import Codec, CodecError, from_bytes, to_bytes
from .registry import build

log = logging.getLogger(__name__)
DIGEST_NBYTES = 8
NEVER = 2**63 - 1  # a version that no value has: the other end keeps nothing
_MARK = struct.Struct(f"<QQ{DIGEST_NBYTES}sB")
MARK_NBYTES = _MARK.size


class Mode(IntEnum):
    """How a sample is sent."""

    PLAIN = 0  # the value; the receiver keeps nothing of it, as the sender does not
    KEPT = 1  # the value, which both keep
    DELTA = 2  # its change, against what both have kept; both keep the sum


class Mark(NamedTuple):
    """What goes beside a sample; ``version`` and ``digest`` are those of the value that a delta is against."""

    sample: int
    mode: Mode
    version: int = 0
    digest: bytes = bytes(DIGEST_NBYTES)


def pack_marks(marks: Sequence[Mark]) -> bytes:
    """Marks as ``MARK_NBYTES`` bytes each: sample u64, version u64, hash, mode u8, little-endian."""
    return b"".join(_MARK.pack(m.sample, m.version, m.digest, m.mode) for m in marks)


def parse_marks(payload: bytes | memoryview) -> list[Mark]:
    """The marks that ``pack_marks`` made; ``CodecError`` for bytes that it does not make."""
    if len(payload) % MARK_NBYTES:
        raise CodecError(f"{len(payload)} bytes of marks, which are {MARK_NBYTES} each")
    marks = []
    for sample, version, digest, mode in _MARK.iter_unpack(payload):
        if mode > max(Mode) or (mode == Mode.DELTA) != (version > 0) or (version == 0 and any(digest)):
            raise CodecError("a mark that nobody makes")
        marks.append(Mark(sample, Mode(mode), version, digest))
    return marks


def unbiased(codec: Codec) -> Codec:
    """The same codec rounding by chance, as the theorem asks; ``CodecError`` if it has no such form.

    Casts stay as they are: their error is relative to each element and far below a quantizer's.
    """
    _, _, options = codec.spec.partition(":")
    if not options or "random" in options.split(","):
        return codec
    return build(f"{codec.spec},random")


class Slots:
    """Equal pieces of one file without a name, which is gone with the process: nothing stale is ever read.

    Plain reads and writes, not a memory map: on a full disk they are an error, a map would kill the process. After an
    error nothing is kept any more, and that is logged.
    """

    def __init__(self, folder: Path, most_nbytes: int, slot_nbytes: int) -> None:
        self.count, self.slot_nbytes = most_nbytes // slot_nbytes, slot_nbytes
        self.file: IO[bytes] | None = None
        self._free: list[int] = []
        self._fresh = 0  # slots from here on were never used, and take no room yet
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as this)
        except OSError as error:
            self._give_up(error)

    def take(self) -> int | None:
        """A slot that nobody has; None if there is none."""
        if self.file is None:
            return None
        if self._free:
            return self._free.pop()
        if self._fresh == self.count:
            return None
        self._fresh += 1
        return self._fresh - 1

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def write(self, slot: int, data: bytes) -> bool:
        if self.file is not None:
            try:
                self.file.seek(slot * self.slot_nbytes)
                self.file.write(data)
                self.file.flush()
                return True
            except OSError as error:
                self._give_up(error)
        return False

    def read(self, slot: int) -> bytes:
        """What was written there, or fewer bytes if it cannot be read."""
        if self.file is not None:
            try:
                self.file.seek(slot * self.slot_nbytes)
                return self.file.read(self.slot_nbytes)
            except OSError as error:
                self._give_up(error)
        return b""

    def close(self) -> None:
        """Gives the disk back."""
        file, self.file = self.file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _give_up(self, error: OSError) -> None:
        log.warning("activations are not kept for reuse any more: %s", error)
        self.close()


class Value(NamedTuple):
    """A kept value: fp16 [T, D], when it was agreed on, and the hash of its bytes."""

    version: int
    digest: bytes
    value_TD: Tensor


class _Entry(NamedTuple):
    slot: int
    version: int
    digest: bytes


class Buffer:
    """What one end of one route remembers: at most ``limit`` samples. Not thread-safe.

    Which samples stay is the sender's choice, and it never lets one go for another: an epoch visits every sample
    once, in a new order, so of n samples a buffer of c gets c / n right, where one that forgets the least recently
    used gets c / n + (1 - c / n) ln(1 - c / n): for a half, 0.50 against 0.15. The receiver follows it, and lets the
    least recently used go if it must.
    """

    def __init__(self, slots: Slots, shape: tuple[int, int], limit: int) -> None:
        assert slots.slot_nbytes == 2 * shape[0] * shape[1]
        self.shape, self.limit = shape, limit
        self._slots = slots
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._since = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample: int) -> bool:
        return sample in self._entries

    def find(self, sample: int) -> Value | None:
        """A kept value; None if there is none or what is on the disk is not what was written."""
        entry = self._entries.get(sample)
        if entry is None:
            return None
        data = self._slots.read(entry.slot)
        if digest(data) != entry.digest:
            self.drop(sample)
            return None
        return Value(entry.version, entry.digest, from_bytes(data, torch.float16).view(self.shape))

    def keep(self, sample: int, version: int, value_TD: Tensor, *, evict: bool = False) -> bool:
        """Remembers an fp16 value in place of the sample's last one; False if it is not kept (nor the last one)."""
        self._since = self._since or version
        entry = self._entries.pop(sample, None)
        slot = entry.slot if entry else None
        if slot is None and self._has_room(evict):
            slot = self._slots.take()
        if slot is None:
            return False
        data = to_bytes(value_TD)
        if not bool(torch.isfinite(value_TD).all()) or not self._slots.write(slot, data):
            self._slots.release(slot)
            return False
        self._entries[sample] = _Entry(slot, version, digest(data))
        return True

    def drop(self, sample: int) -> None:
        entry = self._entries.pop(sample, None)
        if entry is not None:
            self._slots.release(entry.slot)

    def drop_before(self, version: int) -> None:
        """Forgets what was agreed on before ``version``."""
        for sample in [s for s, entry in self._entries.items() if entry.version < version]:
            self.drop(sample)

    def resize(self, limit: int) -> None:
        """From now on at most ``limit`` samples; the least recently used go."""
        self.limit = limit
        while len(self._entries) > limit:
            self.drop(next(iter(self._entries)))

    def since(self, version: int) -> int:
        """Nothing that was agreed on before this version is here; ``version`` is that of now."""
        if self._slots.file is None or not self.limit:
            return NEVER
        return self._since or version

    def _has_room(self, evict: bool) -> bool:
        if evict and 0 < self.limit <= len(self._entries):
            self.drop(next(iter(self._entries)))
        return len(self._entries) < self.limit


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_NBYTES).digest()


class Codecs(NamedTuple):
    """The run's quantizer and its unbiased form, which deltas go through: equally long on the wire."""

    plain: Codec
    delta: Codec

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of one sample [T, D], however it is sent. Each is coded on its own."""
        nbytes = self.plain.nbytes(shape)
        if self.delta.nbytes(shape) != nbytes:
            raise CodecError(f"{self.delta.spec} and {self.plain.spec} differ in length")
        return nbytes


class Sender:
    """The end of a route that has the true values."""

    def __init__(self, codecs: Codecs, buffer: Buffer) -> None:
        self.codecs, self.buffer = codecs, buffer

    def encode(
        self, x_BTD: Tensor, samples: Sequence[int], version: int, seeds: Sequence[int], *, plain: bool = False
    ) -> tuple[bytes, list[Mark]]:
        """A microbatch (fp32 on the CPU) as payload and marks; with ``plain``, without deltas.

        ``version`` is the step's number from 1 on: what is kept now carries it. ``seeds`` are for rounding by chance.
        Raises ``CodecError`` if a value is not finite.
        """
        pieces, marks = [], []
        for x_TD, sample, seed in zip(x_BTD, samples, seeds, strict=True):
            piece = self.codecs.plain.encode(x_TD, seed)
            value_TD = self.codecs.plain.decode(piece, x_TD.shape)
            mark = Mark(sample, Mode.KEPT)
            base = None if plain else self.buffer.find(sample)
            if base is not None:
                base_TD = base.value_TD.float()
                change = self.codecs.delta.encode(x_TD - base_TD, seed)
                sum_TD = base_TD + self.codecs.delta.decode(change, x_TD.shape)
                if _distance(sum_TD, x_TD) < _distance(value_TD, x_TD):
                    piece, value_TD = change, sum_TD
                    mark = Mark(sample, Mode.DELTA, base.version, base.digest)
            if not self.buffer.keep(sample, version, value_TD.half()) and mark.mode == Mode.KEPT:
                mark = Mark(sample, Mode.PLAIN)
            pieces.append(piece)
            marks.append(mark)
        return b"".join(pieces), marks

    def missed(self, since: int, version: int) -> None:
        """The receiver did not have something; ``since`` is what it says of itself, ``version`` that of now."""
        self.buffer.drop_before(since)
        if since > version:
            self.buffer.resize(0)


class Receiver:
    """The end of a route that computes with what it is sent."""

    def __init__(self, codecs: Codecs, buffer: Buffer) -> None:
        self.codecs, self.buffer = codecs, buffer

    def decode(self, payload: bytes | memoryview, marks: Sequence[Mark], version: int) -> Tensor | None:
        """A microbatch [B, T, D] in fp32; None if a delta is against a value that is not here, to the hash.

        Raises ``CodecError`` for a payload that no sender makes. Either way no wrong value is kept or returned: what
        was kept before the end is what the sender kept as well.
        """
        shape = self.buffer.shape
        nbytes = self.codecs.nbytes(shape)
        if len(payload) != nbytes * len(marks):
            raise CodecError(f"{len(payload)} bytes for {len(marks)} samples of {nbytes}")
        rows = []
        for i, mark in enumerate(marks):
            piece = memoryview(payload)[i * nbytes : (i + 1) * nbytes]
            if mark.mode == Mode.DELTA:
                base = self.buffer.find(mark.sample)
                if base is None or (base.version, base.digest) != (mark.version, mark.digest):
                    return None
                sum_TD = base.value_TD.float() + self.codecs.delta.decode(piece, shape)
                value_TD = sum_TD.half()
                self.buffer.keep(mark.sample, version, value_TD)
                rows.append(value_TD.float() if bool(torch.isfinite(value_TD).all()) else sum_TD)
                continue
            value_TD = self.codecs.plain.decode(piece, shape)
            if mark.mode == Mode.KEPT:
                self.buffer.keep(mark.sample, version, value_TD.half(), evict=True)
            else:
                self.buffer.drop(mark.sample)
            rows.append(value_TD)
        return torch.stack(rows) if rows else torch.empty((0, *shape))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square_().sum())
