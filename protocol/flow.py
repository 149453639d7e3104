"""The two halves of a channel as plain state: what is still to be acknowledged, and what has arrived.

No I/O and no clock in here: ``channel.py`` moves the bytes and passes the time.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import WireError
from .frames import (
    Ack,
    Check,
    Frame,
    Header,
    Hello,
    Message,
    More,
    Purpose,
    Start,
    frame_messages,
    purpose,
)

_FRAME_COST = 256  # what an empty frame counts for in a window
_TENSOR_COST = 192  # what a tensor in its header counts for besides: its name, its shape, the objects around them
_SMALL_NBYTES = 4096  # of a part of a frame: below this it is copied, lest what is around it outweighs it
ACK_NBYTES = 32 * 1024  # of a frame, after which its sender hears how far it is


def cost(frame: Frame) -> int:
    """What a frame counts for in a window."""
    return len(frame.payload) + _FRAME_COST + _TENSOR_COST * len(frame.header.tensors)


@dataclass(slots=True, eq=False)
class Outgoing:
    sequence: int
    frame: Frame
    header: bytes
    high_water: int = -1  # payload bytes ever put on a pipe; -1: not even the header
    sent_at: float = 0.0
    alone: bool = False  # nothing else was in flight: its acknowledgement measures the round trip


class Outbox:
    """Frames kept until acknowledged; sequence numbers run acked <= cursor <= next."""

    def __init__(self, window_nbytes: int) -> None:
        self.unacked_nbytes = 0
        self.in_flight_nbytes = 0  # payload bytes on the present pipe that the peer has not told of
        self.rate = Rate()
        self.on_whole: Callable[[Frame], None] | None = None  # told of each frame that the peer has
        self._window_nbytes = window_nbytes
        self._entries: dict[int, Outgoing] = {}
        self._acked = self._cursor = self._next = 0
        self._dispatched = 0  # frames handed to the present pipe whole, or about to be
        self._offset = 0  # where in the frame at the cursor to go on
        self._partial = 0  # payload bytes that the peer has of the first frame that is not whole there
        self._peer_window = 0
        self._peer_consumed = 0
        self._unconsumed: deque[tuple[int, int]] = deque()
        self._unconsumed_nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, frame: Frame) -> bool:
        return not self._entries or self.unacked_nbytes + cost(frame) <= self._window_nbytes

    def admit(self, frame: Frame, header: bytes) -> None:
        self._entries[self._next] = Outgoing(self._next, frame, header)
        self._next += 1
        self.unacked_nbytes += cost(frame)

    def ready(self) -> bool:
        """Whether a frame may be started: half the peer's window is free, or the frame fits what is."""
        entry = self._entries.get(self._cursor)
        if entry is None:
            return False
        unconsumed = self._unconsumed_nbytes
        return unconsumed * 2 <= self._peer_window or unconsumed + cost(entry.frame) <= self._peer_window

    def messages(self, now: float) -> Iterator[tuple[bytes, Purpose, int, int]]:
        """The frame at the cursor as messages, each with its purpose, the dense bytes it stands for, and how much of
        the payload it is: what ``sent`` must hear once it goes."""
        entry = self._entries[self._cursor]
        if self._cursor == self._acked:
            self.rate.busy(now)
        entry.sent_at = now
        entry.alone = self._cursor == self._acked and entry.high_water < 0
        self._unconsumed.append((entry.sequence, cost(entry.frame)))
        self._unconsumed_nbytes += cost(entry.frame)
        size = len(entry.frame.payload)
        offset, self._offset = self._offset, 0
        for end, message in frame_messages(entry.sequence, entry.header, entry.frame.payload, offset):
            if end == size:
                self._dispatched = self._cursor = entry.sequence + 1
            spent_on = Purpose.RETRANSMIT if entry.high_water >= end else purpose(entry.frame.header.kind)
            dense = entry.frame.header.dense_nbytes if entry.high_water < 0 else 0
            entry.high_water = max(entry.high_water, end)
            begin, offset = offset, end
            yield message, spent_on, dense, end - begin

    def sent(self, nbytes: int) -> None:
        self.in_flight_nbytes += nbytes

    def acknowledge(self, ack: Ack, now: float) -> bool:
        """Forget what the peer has; whether that was anything."""
        if not self._acked <= ack.received <= self._dispatched or ack.consumed > ack.received:
            raise WireError("the peer acknowledges frames that were never sent")
        under_way = self._entries.get(ack.received)
        if ack.partial and (under_way is None or ack.partial > under_way.high_water):
            raise WireError("the peer acknowledges bytes that were never sent")
        whole = sum(len(self._entries[sequence].frame.payload) for sequence in range(self._acked, ack.received))
        arrived = whole + ack.partial - self._partial
        self.in_flight_nbytes = max(0, self.in_flight_nbytes - arrived)
        self._partial = ack.partial
        for sequence in range(self._acked, ack.received):
            entry = self._entries.pop(sequence)
            self.unacked_nbytes -= cost(entry.frame)
            self.rate.acked(entry, now, idle=sequence + 1 == self._cursor)
            if self.on_whole is not None:
                self.on_whole(entry.frame)
        advanced = ack.received > self._acked or arrived > 0
        self._acked = ack.received
        self._peer_consumed = max(self._peer_consumed, ack.consumed)
        while self._unconsumed and self._unconsumed[0][0] < self._peer_consumed:
            self._unconsumed_nbytes -= self._unconsumed.popleft()[1]
        return advanced

    def resume(self, hello: Hello, now: float) -> None:
        """Go on from where the peer says it is, on a new pipe."""
        self.acknowledge(Ack(hello.received, hello.consumed), now)
        entry = self._entries.get(self._acked)
        if hello.partial > 0 and (entry is None or hello.partial > entry.high_water):
            raise WireError("the peer claims bytes that were never sent")
        if entry is not None and 0 < len(entry.frame.payload) == hello.partial:
            raise WireError("the peer holds a whole frame and does not say so")
        self._cursor = self._dispatched = self._acked
        self._offset = self._partial = hello.partial
        self.in_flight_nbytes = 0
        while self._unconsumed and self._unconsumed[-1][0] >= self._cursor:
            self._unconsumed_nbytes -= self._unconsumed.pop()[1]
        for waiting in self._entries.values():
            waiting.alone = False
        self._peer_window = hello.window


@dataclass(slots=True, eq=False)
class _Partial:
    header: Header
    chunks: list[memoryview | bytearray] = field(default_factory=list)
    nbytes: int = 0
    checksum: int = 0

    def append(self, chunk: memoryview) -> None:
        """Small parts go into one buffer: a peer that sends a frame byte by byte makes us hold a frame, not more."""
        last = self.chunks[-1] if self.chunks else None
        if len(chunk) >= _SMALL_NBYTES:
            self.chunks.append(chunk)
        elif isinstance(last, bytearray):
            last += chunk
        else:
            self.chunks.append(bytearray(chunk))


class Inbox:
    """Frames put together, kept until the program takes them."""

    def __init__(self, window_nbytes: int, max_frame_nbytes: int, check: Check) -> None:
        self.received = self.consumed = 0  # frames
        self._window_nbytes = window_nbytes
        self._max_frame_nbytes = max_frame_nbytes
        self._check = check
        self._partial: _Partial | None = None
        self._frames: deque[Frame] = deque()
        self._held_nbytes = 0
        self._unadvertised_nbytes = 0
        self._told_nbytes = 0  # of the frame under way

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def partial_nbytes(self) -> int:
        return self._partial.nbytes if self._partial else 0

    def worth(self, message: Message) -> tuple[Purpose, int]:
        """What a message just read was sent for, and the dense bytes it stands for."""
        match message:
            case Start(sequence, header, _) if sequence >= self.received:
                return purpose(header.kind), header.dense_nbytes
            case More(sequence) if sequence >= self.received and self._partial is not None:
                return purpose(self._partial.header.kind), 0
            case Start() | More():
                return Purpose.RETRANSMIT, 0
        return Purpose.CONTROL, 0

    def add(self, message: Start | More) -> bool:
        """Take a part of a frame; whether the sender should hear of it: that it is whole, or how far it is.

        A frame that is here already is dropped.
        """
        if message.sequence > self.received:
            raise WireError("a frame was skipped")
        if message.sequence < self.received:
            return True  # its acknowledgement got lost: acknowledge again
        return self._start(message) if isinstance(message, Start) else self._more(message)

    def _start(self, message: Start) -> bool:
        header = message.header
        self._partial = None
        self._told_nbytes = 0
        if header.nbytes > self._max_frame_nbytes:
            raise WireError(f"a frame of {header.nbytes} bytes is over the limit of {self._max_frame_nbytes}")
        if self._held_nbytes > self._window_nbytes:
            raise WireError("the peer sends more than the receive window holds")
        self._check(header)
        self._partial = _Partial(header)
        return self._append(self._partial, message.chunk)

    def _more(self, message: More) -> bool:
        partial = self._partial
        if partial is None or message.offset != partial.nbytes or not message.chunk:
            raise WireError("a part of a frame is out of place")
        return self._append(partial, message.chunk)

    def _append(self, partial: _Partial, chunk: memoryview) -> bool:
        header = partial.header
        partial.nbytes += len(chunk)
        if partial.nbytes > header.nbytes:
            self._partial = None
            raise WireError("a frame holds more bytes than its header says")
        partial.checksum = zlib.crc32(chunk, partial.checksum)
        partial.append(chunk)
        if partial.nbytes < header.nbytes:
            return partial.nbytes - self._told_nbytes >= ACK_NBYTES
        self._partial = None
        if partial.checksum != header.checksum:
            raise WireError("a frame arrived damaged: its checksum is wrong")
        frame = Frame(header, b"".join(partial.chunks))
        self._frames.append(frame)
        self._held_nbytes += cost(frame)
        self.received += 1
        return True

    def take(self) -> Frame:
        frame = self._frames.popleft()
        self._held_nbytes -= cost(frame)
        self._unadvertised_nbytes += cost(frame)
        self.consumed += 1
        return frame

    @property
    def credit_due(self) -> bool:
        """Whether the peer should hear how much was taken, lest it hold back what would fit."""
        return self._unadvertised_nbytes * 4 >= self._window_nbytes

    def ack(self) -> Ack:
        self._unadvertised_nbytes = 0
        self._told_nbytes = self.partial_nbytes
        return Ack(self.received, self.consumed, self._told_nbytes)


class Carried(NamedTuple):
    """Payload bytes that were acknowledged, and the seconds that their sending took: idle times do not count."""

    nbytes: int = 0
    seconds: float = 0.0


class Rate:
    """Smoothed round trip and sending rate over the times when something was in flight."""

    def __init__(self) -> None:
        self.carried = Carried()
        self.rtt_seconds: float | None = None
        self.bytes_per_second: float | None = None
        self._since = 0.0
        self._nbytes = 0

    def busy(self, now: float) -> None:
        self._since, self._nbytes = now, 0

    def round_trip(self, seconds: float) -> None:
        self.rtt_seconds = _smooth(self.rtt_seconds, seconds)

    def acked(self, entry: Outgoing, now: float, *, idle: bool) -> None:
        if entry.alone and len(entry.frame.payload) <= 64 * 1024:
            self.round_trip(now - entry.sent_at)
        self._nbytes += len(entry.frame.payload)
        elapsed = now - self._since
        if (idle and self._nbytes >= 256 * 1024) or elapsed > 1.0:
            # An idle end includes the way back of the last acknowledgement.
            spent = max(elapsed - (self.rtt_seconds or 0.0), elapsed / 2, 1e-6)
            self.bytes_per_second = _smooth(self.bytes_per_second, self._nbytes / spent)
            self.carried = Carried(self.carried.nbytes + self._nbytes, self.carried.seconds + spent)
            self.busy(now)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + (new - old) / 4
