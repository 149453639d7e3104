"""Where frames from other peers wait, by name, for the thread that computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..protocol.frames import Frame, Header, Kind
from ..protocol.plan import Plan

ROUND = (Kind.SHARD, Kind.MEAN)


class Fenced(Exception):
    """The generation this thread works for is over: stop, look at the view again."""


class Rerouted(Exception):
    """The generation goes on without somebody, as ``plan`` says: what is waited for may come from elsewhere."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(f"attempt {plan.attempt}")
        self.plan = plan


class Address(NamedTuple):
    """What a frame is called, its sender included: what somebody else sends under the name is never taken.

    ``place`` is a microbatch, or the replica that a piece of a round comes from; ``attempt`` is of rounds alone.
    """

    generation: int
    kind: Kind
    step: int
    part: int
    place: int
    sender: str
    attempt: int = 0

    @classmethod
    def of(cls, header: Header, sender: str) -> Address:
        """Where a frame from ``sender`` belongs."""
        attempt = header.attempt if header.kind in ROUND else 0
        return cls(header.generation, header.kind, header.step, header.part, header.microbatch, sender, attempt)


MOST_NBYTES = 1 << 30  # that wait from one sender
FRAME_NBYTES = 512  # what a frame costs besides its payload


class Mailbox:
    """Thread-safe. Frames of past generations are dropped, frames of future ones kept until their time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._frames: dict[Address, Frame] = {}
        self._waiting: dict[str, int] = {}  # bytes of each sender
        self._changed = threading.Condition()
        self._generation = 0
        self._plan: Plan | None = None  # if somebody is lost in it
        self._lost: frozenset[str] = frozenset()
        self._takers: set[int] = set()  # threads that wait for a frame
        self._closed = False

    def put(self, address: Address, frame: Frame) -> bool:
        """Keeps a frame until it is taken, with when it came; False if its sender has too much waiting here already."""
        with self._changed:
            if address.generation >= self._generation and not self._is_lost(address):
                waiting = self._waiting.get(address.sender, 0) + len(frame.payload) + FRAME_NBYTES
                if waiting > MOST_NBYTES:
                    return False
                self._drop(address)
                self._waiting[address.sender] = waiting
                self._frames[address] = replace(frame, arrived=self._clock())
                self._changed.notify_all()
            return True

    def _drop(self, address: Address) -> Frame | None:
        frame = self._frames.pop(address, None)
        if frame is not None:
            self._waiting[address.sender] -= len(frame.payload) + FRAME_NBYTES
        return frame

    def take(
        self, wanted: Sequence[Address], attempt: int = 0, timeout_seconds: float | None = None
    ) -> tuple[Address, Frame]:
        """Waits for a frame at one of ``wanted`` (of one generation), the first there are looked at first.

        Raises ``Fenced`` once the generation is over, ``Rerouted`` if it goes on with a later ``attempt`` than the
        caller's, ``TimeoutError`` after the timeout.
        """
        generation = wanted[0].generation

        def over() -> bool:
            return self._closed or generation < self._generation

        with self._changed:
            self._takers.add(threading.get_ident())
            arrived = self._changed.wait_for(
                lambda: over() or self._newer(generation, attempt) or any(place in self._frames for place in wanted),
                timeout_seconds,
            )
            self._takers.discard(threading.get_ident())
            if over():
                raise Fenced
            if plan := self._newer(generation, attempt):
                raise Rerouted(plan)
            if not arrived:
                raise TimeoutError(f"no {wanted[0].kind.name.lower()} of step {wanted[0].step} arrived")
            place = next(place for place in wanted if place in self._frames)
            frame = self._drop(place)
            assert frame is not None
            return place, frame

    def waits(self, thread: int | None) -> bool:
        """Whether a thread waits for a frame."""
        return thread in self._takers

    def holds(self, address: Address) -> bool:
        """Whether a frame waits there."""
        with self._changed:
            return address in self._frames

    def _newer(self, generation: int, attempt: int) -> Plan | None:
        plan = self._plan
        return plan if plan and plan.generation == generation and plan.attempt > attempt else None

    def _is_lost(self, address: Address) -> bool:
        return self._plan is not None and address.generation == self._plan.generation and address.sender in self._lost

    def reroute(self, plan: Plan) -> None:
        """Goes on with a plan that has lost somebody: what came from there and is not taken yet, and what still comes,
        is refused, so that everybody takes it from the same substitute."""
        with self._changed:
            self._plan, self._lost = plan, frozenset(lost.peer for lost in plan.lost)
            for address in [a for a in self._frames if self._is_lost(a)]:
                self._drop(address)
            self._changed.notify_all()

    def forget(self, generation: int, before: int) -> None:
        """Drops what waits for steps below ``before``: they are committed, it came twice."""
        with self._changed:
            for address in [a for a in self._frames if a.generation == generation and a.step < before]:
                self._drop(address)

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
