"""Where frames from other peers wait, by name, for the thread that computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from ..protocol.frames import Frame, Kind


class Fenced(Exception):
    """The generation this thread works for is over: stop, look at the view again."""


class Address(NamedTuple):
    """What a frame is called, its sender included: what somebody else sends under the name is never taken.

    ``place`` is a microbatch, or the replica that a piece of a round comes from.
    """

    generation: int
    kind: Kind
    step: int
    part: int
    place: int
    sender: str


MOST_NBYTES = 1 << 30  # that wait from one sender
FRAME_NBYTES = 512  # what a frame costs besides its payload


class Mailbox:
    """Thread-safe. Frames of past generations are dropped, frames of future ones kept until their time."""

    def __init__(self) -> None:
        self._frames: dict[Address, Frame] = {}
        self._waiting: dict[str, int] = {}  # bytes of each sender
        self._changed = threading.Condition()
        self._generation = 0
        self._closed = False

    def put(self, address: Address, frame: Frame) -> bool:
        """Keeps a frame until it is taken; False if its sender has too much waiting here already."""
        with self._changed:
            if address.generation >= self._generation:
                waiting = self._waiting.get(address.sender, 0) + len(frame.payload) + FRAME_NBYTES
                if waiting > MOST_NBYTES:
                    return False
                self._drop(address)
                self._waiting[address.sender] = waiting
                self._frames[address] = frame
                self._changed.notify_all()
            return True

    def _drop(self, address: Address) -> Frame | None:
        frame = self._frames.pop(address, None)
        if frame is not None:
            self._waiting[address.sender] -= len(frame.payload) + FRAME_NBYTES
        return frame

    def take(self, address: Address, timeout_seconds: float | None = None, also: Sequence[Address] = ()) -> Frame:
        """Waits for a frame at ``address`` or one of ``also``, which are looked at first; the frame's kind says which.

        Raises ``Fenced`` once the generation is over, ``TimeoutError`` after the timeout.
        """
        wanted = (*also, address)
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: (
                    self._closed
                    or address.generation < self._generation
                    or any(place in self._frames for place in wanted)
                ),
                timeout_seconds,
            )
            if self._closed or address.generation < self._generation:
                raise Fenced
            if not arrived:
                raise TimeoutError(f"no {address.kind.name.lower()} of step {address.step} arrived")
            frame = self._drop(next(place for place in wanted if place in self._frames))
            assert frame is not None
            return frame

    def fence(self, generation: int) -> None:
        """Ends every older generation."""
        with self._changed:
            self._generation = max(self._generation, generation)
            for address in [a for a in self._frames if a.generation < self._generation]:
                self._drop(address)
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes everybody for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
