"""What a host says while it trains: one JSON object a line, each with ``event`` and two times.

``at`` is the machine's monotonic clock, the same for all hosts of a test; ``time`` the seconds trained: since
``begin``, without what was ``paused``.

========== =========================================================================================
begin      setup is over, training begins
step       ``step`` steps done on ``samples`` samples (of everybody), train ``loss`` in nats per token if known
loss       ``loss`` of a rank that does not know when its step takes effect
round      weights or gradients were exchanged: ``values``, a sketch of them (rounds.py)
snapshot   ``file`` has ``part`` of ``parts`` of the weights after ``step`` steps
note       anything else worth knowing
end        training is over
========== =========================================================================================

With an interface every line has ``bytes``, sent and received by it since the host's boot; and every line has ``late``
and ``played``, see pace.py.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class Progress:
    """Appends lines to ``path``, at once to be read; ``more`` goes into every line."""

    def __init__(
        self,
        path: Path,
        interface: str = "",
        more: Callable[[], dict[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._interface, self._more, self._clock = interface, more, clock
        self._began: float | None = None
        self.paused_seconds = 0.0

    @property
    def time(self) -> float:
        """Seconds trained; 0 before the beginning."""
        return 0.0 if self._began is None else self._clock() - self._began - self.paused_seconds

    def begin(self) -> None:
        self._began = self._clock()
        self.say("begin")

    def step(self, step: int, samples: int, loss: float | None, **more: Any) -> None:
        self.say("step", step=step, samples=samples, loss=loss, **more)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is no part of the training."""
        since = self._clock()
        try:
            yield
        finally:
            self.paused_seconds += self._clock() - since

    def say(self, event: str, **fields: Any) -> None:
        line = {"event": event, "at": self._clock(), "time": self.time, **self._more(), **fields}
        if self._interface:
            line["bytes"] = interface_bytes(self._interface)
        self._file.write(json.dumps(line) + "\n")


def interface_of(address: str) -> str:
    """The network interface that has an address of this host."""
    for name, found in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in found):
            return name
    raise OSError(f"no network interface has the address {address}")


def interface_bytes(name: str) -> int:
    """Sent and received by a network interface of this process's host. Raises OSError if there is none."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == name:
            numbers = counters.split()
            return int(numbers[0]) + int(numbers[8])
    raise OSError(f"no network interface {name!r}")


def lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file from ``offset`` on, and where the next will begin."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)
