"""Real synchronizers joined by memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from potluck.protocol.frames import Frame
from potluck.worker.mailbox import Address, Mailbox
from potluck.worker.stage import Stage
from potluck.worker.sync import Outcome, Synchronizer


class Box:
    """A wire to mailboxes in memory."""

    def __init__(self, peer: str, boxes: dict[str, Mailbox]) -> None:
        self.peer, self.boxes = peer, boxes

    def post(self, peer: str, frame: Frame) -> None:
        self.boxes[peer].put(Address.of(frame.header, self.peer), frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        return self.boxes[self.peer].take(wanted, attempt, timeout_seconds=20.0)


def exchange_all(
    synchronizers: Sequence[Synchronizer],
    stages: Sequence[Stage],
    step: int,
    fragments: Sequence[int],
    *,
    full: bool = False,
) -> list[Outcome]:
    """One round of all replicas of a stage, each in a thread."""
    for synchronizer in synchronizers:
        synchronizer.counted_from = None  # any weights will do
    captures = [s.capture(stage, step, 1, fragments, full=full) for s, stage in zip(synchronizers, stages, strict=True)]
    outcomes: dict[int, Outcome] = {}
    threads = [
        threading.Thread(target=lambda i=i, s=s: outcomes.update({i: s.exchange(captures[i])}))
        for i, s in enumerate(synchronizers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return [outcomes[i] for i in range(len(threads))]
