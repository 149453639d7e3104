"""Bytes by peer, direction and purpose, as the network sees them: payload plus what the layers below add."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .frames import Purpose

Direction = Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What the layers below a message cost, in bytes at IP level: what a line's data cap counts. Calibrate here only.

    Defaults: gRPC message prefix; HTTP/2 frame header per 16 KiB; TLS 1.3 record (header 5, tag 16, type 1)
    per 16 KiB; IPv4 and TCP with timestamps (20 + 32) per segment of a 1500-byte line; one bare
    acknowledgement of the same size back for every second segment, and for a message that comes after
    ``silence_seconds`` (the delayed acknowledgement's timer) one at least.

    gRPC's receiver also probes the line (its bandwidth-delay estimator): two window updates and a ping back, the
    ping's answer, and that one's acknowledgement, with the first message of a connection and then no oftener than
    after a pause that grows with every probe (``probe_pauses``: first, growth on average, longest).

    A connection's opening and end are two TLS handshakes, the one that fetches the certificate and the one that
    is kept, and the headers of a call; between peers the proof of both keys comes on top.

    Not counted: keepalive pings of an idle connection (25 bytes a second at most), ARP, dials that end before
    TLS stands, what the line loses and TCP repeats, and of a hop over several connections the 8 bytes that number
    each message and the probes of all connections but one.

    Against the kernel's counters on 1500-byte, 100 Mbit/s lines (``tests/processes/test_meter_kernel.py``): whole
    workers within 1 %, one that only waits within 3 %. The acknowledgements of a long transfer alone read up to
    45 % high where receive offload or a busy receiver merges them: under a percent of the whole.
    """

    grpc_prefix: int = 5
    http2_frame: int = 9
    http2_frame_payload: int = 16 * 1024
    tls_record: int = 22
    tls_record_payload: int = 16 * 1024
    segment_header: int = 52
    segment_payload: int = 1448
    segments_per_ack: float = 2
    silence_seconds: float = 0.04
    http2_ping: int = 17
    window_updates: int = 26
    probe_pauses: tuple[float, float, float] = (0.1, 0.15, 10.0)
    connection_dialler: int = 3500
    connection_listener: int = 4400
    proof_dialler: int = 900
    proof_listener: int = 750

    def of(self, nbytes: int) -> tuple[float, float]:
        """Bytes added in the message's own direction, and bytes of acknowledgements coming back."""
        body = nbytes + self.grpc_prefix
        body += _parts(body, self.http2_frame_payload) * self.http2_frame
        body += _parts(body, self.tls_record_payload) * self.tls_record
        segments = max(1.0, body / self.segment_payload)
        acks = segments / self.segments_per_ack * self.segment_header
        return body - nbytes + segments * self.segment_header, acks

    def of_probe(self) -> tuple[int, int]:
        """A probe's bytes in the direction of the message that brought it about, and in the other."""
        each = self.tls_record + self.http2_ping + self.segment_header
        return each, each + self.window_updates + self.segment_header


INTERNET = Overhead()
NO_OVERHEAD = Overhead(
    grpc_prefix=0,
    http2_frame=0,
    tls_record=0,
    segment_header=0,
    http2_ping=0,
    window_updates=0,
    connection_dialler=0,
    connection_listener=0,
    proof_dialler=0,
    proof_listener=0,
)


class Traffic(NamedTuple):
    """Totals since the meter was made; ``dense_nbytes`` is the same tensors in fp16, once per frame."""

    peer: str
    direction: Direction
    purpose: Purpose
    nbytes: int
    dense_nbytes: int
    messages: int


@dataclass(slots=True)
class _Flow:
    """One peer's messages in one direction."""

    last: float = -math.inf
    probe_at: float = -math.inf
    pause: float = 0.0


class Meter:
    """Counts traffic; may be used from any thread. ``clock`` gives seconds."""

    def __init__(self, overhead: Overhead = INTERNET, clock: Callable[[], float] = time.monotonic) -> None:
        self._overhead, self._clock = overhead, clock
        self._probe = overhead.of_probe()
        self._flows: dict[tuple[str, Direction], _Flow] = {}
        self._lock = threading.Lock()
        self._totals: dict[tuple[str, Direction, Purpose], list[float]] = {}

    def record(
        self, peer: str, direction: Direction, purpose: Purpose, payload_nbytes: int, dense_nbytes: int = 0
    ) -> None:
        """One message of ``payload_nbytes``; its acknowledgements are booked to the other direction.

        What depends on timing (probes, acknowledgements of a single message) is booked as control.
        """
        added, acks = self._overhead.of(payload_nbytes)
        now = self._clock()
        with self._lock:
            self._add(peer, direction, purpose, payload_nbytes + added, dense_nbytes, 1)
            self._add(peer, _opposite(direction), purpose, acks, 0, 0)
            flow = self._flows.setdefault((peer, direction), _Flow())
            if now - flow.last >= self._overhead.silence_seconds and acks < self._overhead.segment_header:
                self._add(peer, _opposite(direction), Purpose.CONTROL, self._overhead.segment_header - acks, 0, 0)
            flow.last = now
            if now >= flow.probe_at:
                first, growth, longest = self._overhead.probe_pauses
                flow.pause = min(longest, flow.pause + growth) if flow.pause else first
                flow.probe_at = now + flow.pause
                self._add(peer, direction, Purpose.CONTROL, self._probe[0], 0, 0)
                self._add(peer, _opposite(direction), Purpose.CONTROL, self._probe[1], 0, 0)

    def counterfactual(self, peer: str, purpose: Purpose, dense_nbytes: int) -> None:
        """What the uncompressed method would have sent meanwhile, where nothing was sent at all."""
        with self._lock:
            self._add(peer, "out", purpose, 0, dense_nbytes, 0)

    def record_connection(self, peer: str, *, dialled: bool, proof: bool = False) -> None:
        """One connection, from the side that dialled it or the side that listened; ``proof``: between peers."""
        overhead = self._overhead
        dialler = overhead.connection_dialler + (overhead.proof_dialler if proof else 0)
        listener = overhead.connection_listener + (overhead.proof_listener if proof else 0)
        with self._lock:
            self._flows.pop((peer, "out"), None)  # a new connection probes anew
            self._flows.pop((peer, "in"), None)
            self._add(peer, "out", Purpose.CONTROL, dialler if dialled else listener, 0, 0)
            self._add(peer, "in", Purpose.CONTROL, listener if dialled else dialler, 0, 0)

    @property
    def messages(self) -> int:
        with self._lock:
            return int(sum(total[2] for total in self._totals.values()))

    def snapshot(self) -> list[Traffic]:
        """Everything counted so far, sorted."""
        with self._lock:
            totals = sorted((key, tuple(total)) for key, total in self._totals.items())
        return [Traffic(*key, round(nbytes), int(dense), int(messages)) for key, (nbytes, dense, messages) in totals]

    def _add(self, peer: str, direction: Direction, purpose: Purpose, nbytes: float, dense: int, messages: int) -> None:
        total = self._totals.setdefault((peer, direction, purpose), [0.0, 0, 0])
        total[0] += nbytes
        total[1] += dense
        total[2] += messages


def _opposite(direction: Direction) -> Direction:
    return "in" if direction == "out" else "out"


def _parts(nbytes: int, size: int) -> int:
    return -(-nbytes // size)
