"""The unit of the data plane: a header, its payload, and the messages that carry both over a pipe.

A frame is what is retried, acknowledged and deduplicated (``channel.py``). On a pipe it travels as one
``Start`` (sequence number, header, first bytes) and as many ``More`` as it takes; every message fits
``MESSAGE_NBYTES``. Parsing is total: any bytes give a message or a ``WireError``, and no length is believed
before it is checked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from .errors import WireError

HEADER_NBYTES = 2048
MESSAGE_NBYTES = 64 * 1024
MAX_FRAME_NBYTES = 1 << 30
VERSION = 2


class Kind(IntEnum):
    ACTIVATION = 1
    GRADIENT = 2
    SHARD = 3  # a replica's compressed difference, to the owner of the shard
    MEAN = 4  # the owner's compressed mean, to all
    STATE_REQUEST = 5
    STATE = 6
    REDO = 8  # the owner's compressed mean, to the stage's keepers
    MISS = 7  # an activation's receiver lacks what a delta is against: once more, without deltas


class Purpose(StrEnum):
    """What bytes were spent on; the ledger of traffic is kept by these."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    WEIGHTS = "weights"
    STATE = "state"
    CONTROL = "control"
    RETRANSMIT = "retransmit"
    DATA = "data"


_PURPOSES = {
    Kind.ACTIVATION: Purpose.ACTIVATION,
    Kind.GRADIENT: Purpose.GRADIENT,
    Kind.SHARD: Purpose.WEIGHTS,
    Kind.MEAN: Purpose.WEIGHTS,
    Kind.REDO: Purpose.WEIGHTS,
    Kind.STATE_REQUEST: Purpose.STATE,
    Kind.STATE: Purpose.STATE,
    Kind.MISS: Purpose.ACTIVATION,
}


def purpose(kind: Kind) -> Purpose:
    return _PURPOSES[kind]


Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Small = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Size = Annotated[int, Meta(ge=0, le=2**40)]


class TensorSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """One compressed tensor in the payload: who wrote it, its shape when decoded, its bytes on the wire."""

    codec: Annotated[str, Meta(pattern=r"\A[!-~]{1,64}\Z")]
    shape: Annotated[tuple[Size, ...], Meta(max_length=4)]
    nbytes: Size


class Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What a payload is. Under 100 bytes for one or two tensors.

    ``stage`` is the receiver's; ``checksum`` is the payload's CRC-32; ``dense_nbytes`` is what the same
    tensors would have cost in fp16.
    """

    kind: Kind
    run: Annotated[bytes, Meta(min_length=8, max_length=8)]
    generation: Count
    step: Count
    stage: Small
    microbatch: Count
    part: Small
    attempt: Small
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=16)]
    targets: Count
    checksum: Small
    dense_nbytes: Count

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


Check = Callable[[Header], None]
"""Raises ``WireError`` when the receiver does not expect such a header; called before the payload is kept."""


@dataclass(frozen=True, slots=True)
class Frame:
    """``arrived``: when it came in, in seconds of ``time.perf_counter``; 0: it is our own."""

    header: Header
    payload: bytes
    arrived: float = field(default=0.0, compare=False)


def make_frame(payload: bytes, **fields: Any) -> Frame:
    """A frame from its payload and every header field but ``checksum``."""
    header = Header(checksum=zlib.crc32(payload), **fields)
    assert len(payload) == header.nbytes, f"{len(payload)} payload bytes, the tensors say {header.nbytes}"
    return Frame(header, payload)


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_LENGTH = struct.Struct("!H")


def encode_header(header: Header) -> bytes:
    """The header behind its two-byte length; ``WireError`` if a receiver would refuse it."""
    body = _encoder.encode(header)
    encoded = _LENGTH.pack(min(len(body), 0xFFFF)) + body
    parse_header(encoded)
    return encoded


def parse_header(data: bytes | memoryview) -> tuple[Header, int]:
    """A header at the start of ``data`` and the number of bytes it took."""
    if len(data) < _LENGTH.size:
        raise WireError("a frame header is cut short")
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    if length > HEADER_NBYTES:
        raise WireError(f"a frame header of {length} bytes is over the limit of {HEADER_NBYTES}")
    if len(data) < end:
        raise WireError("a frame header is cut short")
    try:
        return _header_decoder.decode(data[_LENGTH.size : end]), end
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a frame header is not valid: {one_line(str(error))}") from None


def one_line(text: str, limit: int = 200) -> str:
    """Foreign text made fit for one line of ours."""
    return "".join(c if c.isprintable() else " " for c in text)[:limit]


class Reason(IntEnum):
    """Why a side drops a pipe."""

    REFUSED = 0  # a message was not allowed; the channel may try again
    FAILED = 1  # once too often: the channel is over
    RESET = 2  # the channel to be resumed is not known here


@dataclass(frozen=True, slots=True)
class Hello:
    """First on every pipe: which channel this is and how far the sender has received and consumed it."""

    channel: bytes
    resume: bool
    received: int  # frames
    partial: int  # payload bytes of the frame after those
    consumed: int  # frames
    window: int  # bytes the sender of this message is ready to hold unconsumed


@dataclass(frozen=True, slots=True)
class Ack:
    received: int  # frames that are whole
    consumed: int  # frames taken by the program
    partial: int = 0  # payload bytes of the frame after those


@dataclass(frozen=True, slots=True)
class Start:
    sequence: int
    header: Header
    chunk: memoryview


@dataclass(frozen=True, slots=True)
class More:
    sequence: int
    offset: int
    chunk: memoryview


@dataclass(frozen=True, slots=True)
class Bye:
    pass


@dataclass(frozen=True, slots=True)
class Trouble:
    reason: Reason
    text: str


Message = Hello | Ack | Start | More | Bye | Trouble

_HELLO, _ACK, _START, _MORE, _BYE, _TROUBLE = range(1, 7)
_Hello = struct.Struct("!BB16s?QQQQ")
_Ack = struct.Struct("!BQQQ")
_Start = struct.Struct("!BQ")
_More = struct.Struct("!BQQ")
_Trouble = struct.Struct("!BB")


def encode_message(message: Hello | Ack | Bye | Trouble) -> bytes:
    match message:
        case Hello(channel, resume, received, partial, consumed, window):
            return _Hello.pack(_HELLO, VERSION, channel, resume, received, partial, consumed, window)
        case Ack(received, consumed, partial):
            return _Ack.pack(_ACK, received, consumed, partial)
        case Bye():
            return bytes((_BYE,))
        case Trouble(reason, text):
            return _Trouble.pack(_TROUBLE, reason) + one_line(text).encode()


def frame_messages(sequence: int, header: bytes, payload: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """The messages of one frame from payload byte ``offset`` on, each with the offset after it."""
    view = memoryview(payload)
    if offset == 0:
        start = _Start.pack(_START, sequence) + header
        offset = min(len(view), MESSAGE_NBYTES - len(start))
        yield offset, b"".join((start, view[:offset]))
    while offset < len(view):
        end = min(len(view), offset + MESSAGE_NBYTES - _More.size)
        yield end, b"".join((_More.pack(_MORE, sequence, offset), view[offset:end]))
        offset = end


def message_lengths(header_nbytes: int, payload_nbytes: int) -> Iterator[int]:
    """How long the messages of a frame are, without one: what ``frame_messages`` would yield."""
    start = _Start.size + header_nbytes
    first = min(payload_nbytes, MESSAGE_NBYTES - start)
    yield start + first
    for offset in range(first, payload_nbytes, MESSAGE_NBYTES - _More.size):
        yield _More.size + min(MESSAGE_NBYTES - _More.size, payload_nbytes - offset)


def parse_message(data: bytes) -> Message:
    """What one message of a pipe says; ``WireError`` for anything else."""
    if not data or len(data) > MESSAGE_NBYTES:
        raise WireError(f"a message of {len(data)} bytes is not allowed")
    try:
        return _parse(data)
    except struct.error:
        raise WireError("a message has the wrong length") from None


def _parse(data: bytes) -> Message:
    match data[0]:
        case 1:  # _HELLO
            _, version, *fields = _Hello.unpack(data)
            if version != VERSION:
                raise WireError(f"the peer speaks version {version}, this is {VERSION}", hint="update potluck")
            return Hello(*fields)
        case 2:
            return Ack(*_Ack.unpack(data)[1:])
        case 3:
            header, length = parse_header(memoryview(data)[_Start.size :])
            chunk = memoryview(data)[_Start.size + length :]
            if len(chunk) > header.nbytes:
                raise WireError("a frame holds more bytes than its header says")
            return Start(_Start.unpack_from(data)[1], header, chunk)
        case 4:
            _, sequence, offset = _More.unpack_from(data)
            return More(sequence, offset, memoryview(data)[_More.size :])
        case 5 if len(data) == 1:
            return Bye()
        case 6 if len(data) >= 2 and data[1] <= max(Reason):
            return Trouble(Reason(data[1]), one_line(data[2:802].decode(errors="replace")))
        case kind:
            raise WireError(f"a message of unknown kind {kind}")
