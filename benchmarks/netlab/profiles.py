"""Lines and networks as data.

A packet from host i to host j passes i's line up, the way between the two (if the profile has one), and j's line down.
Its delay is i's share, plus j's, plus the way's. So between two hosts with the same line and nothing between them, a
round trip takes four times ``delay_ms``, and, in the mean, twice ``jitter_ms``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

QUEUE_MS = 100.0


def positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


def no_less_than_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more, not {value}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A host's line: what all its traffic shares. Raises ``ValueError`` for what no line has.

    Rates are Mbit/s of IP packets (headers of IP and above count, those of the wire do not), infinite: no limit.
    ``delay_ms`` is one way and this host's share only; ``jitter_ms`` is the most that chance adds to it, evenly
    spread, drawn for each packet; packets between two hosts never overtake each other. ``loss`` is the share of packets
    lost on this line, either way, each by itself. A full queue of ``queue_ms`` at the line's rate, but never less than
    16 packets, drops what comes next.
    """

    up_mbit: float = math.inf
    down_mbit: float = math.inf
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    queue_ms: float = QUEUE_MS

    def __post_init__(self) -> None:
        positive(up_mbit=self.up_mbit, down_mbit=self.down_mbit, queue_ms=self.queue_ms)
        no_less_than_zero(delay_ms=self.delay_ms, jitter_ms=self.jitter_ms)
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be a share from 0 to below 1, not {self.loss}")

    def scaled(self, *, rate: float, time: float) -> Line:
        return replace(
            self,
            up_mbit=self.up_mbit * rate,
            down_mbit=self.down_mbit * rate,
            delay_ms=self.delay_ms * time,
            jitter_ms=self.jitter_ms * time,
            queue_ms=self.queue_ms * time,
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The way between two hosts, each direction by itself: a rate in Mbit/s of IP packets, a delay one way."""

    mbit: float = math.inf
    delay_ms: float = 0.0
    queue_ms: float = QUEUE_MS

    def __post_init__(self) -> None:
        positive(mbit=self.mbit, queue_ms=self.queue_ms)
        no_less_than_zero(delay_ms=self.delay_ms)

    def scaled(self, *, rate: float, time: float) -> Pair:
        return Pair(mbit=self.mbit * rate, delay_ms=self.delay_ms * time, queue_ms=self.queue_ms * time)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Lines for any number of hosts: ``first`` for the first of them, then ``lines``, over and over.

    ``pairs`` are between places in ``lines``, the smaller index first; hosts in ``first`` have none. ``(k, k)`` is
    between hosts that share a place.
    """

    name: str
    about: str
    lines: tuple[Line, ...]
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    first: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError(f"{self.name}: a profile has at least one line")
        for a, b in self.pairs:
            if not 0 <= a <= b < len(self.lines):
                raise ValueError(f"{self.name}: no pair ({a}, {b}) in {len(self.lines)} lines, the smaller index first")

    def line(self, host: int) -> Line:
        return self.first[host] if host < len(self.first) else self.lines[self._place(host)]

    def pair(self, a: int, b: int) -> Pair | None:
        """What lies between hosts ``a`` and ``b``, or None."""
        if min(a, b) < len(self.first):
            return None
        low, high = sorted((self._place(a), self._place(b)))
        return self.pairs.get((low, high))

    def _place(self, host: int) -> int:
        return (host - len(self.first)) % len(self.lines)

    def after(self, *lines: Line) -> Profile:
        """The same network for the hosts after these."""
        return replace(self, first=(*lines, *self.first))

    def scaled(self, *, rate: float = 1.0, time: float = 1.0) -> Profile:
        """All rates times ``rate``; all delays, jitters and queues (in milliseconds) times ``time``.

        ``first`` too. Packets do not shrink with the rates, see ``Lab(mtu=...)``.
        """
        return replace(
            self,
            name=f"{self.name} x{rate:g}/{time:g}",
            lines=tuple(line.scaled(rate=rate, time=time) for line in self.lines),
            first=tuple(line.scaled(rate=rate, time=time) for line in self.first),
            pairs={key: pair.scaled(rate=rate, time=time) for key, pair in self.pairs.items()},
        )


def line(*, up: float, down: float, round_trip_ms: float, jitter_ms: float = 0.0, loss: float = 0.0) -> Line:
    """A line by the round trip between two hosts that both have it, and by the share of packets lost between them."""
    return Line(
        up_mbit=up, down_mbit=down, delay_ms=round_trip_ms / 4, jitter_ms=jitter_ms, loss=1 - math.sqrt(1 - loss)
    )


UNLIMITED = Line()

# Regions of AWS, measured by the authors of DT-FM ("Decentralized Training of Foundation Models in Heterogeneous
# Environments", arXiv 2206.01288, case 5; the numbers are those of `scheduler/generate_sim_com_matrices.py` in
# github.com/DS3Lab/DT-FM): milliseconds and Gbit/s. The times are taken as round trips here, which they are by their
# size (London to Frankfurt 14 ms); DT-FM itself emulated each as a delay one way: `.scaled(time=2)`.
REGIONS = ("Oregon", "Virginia", "Ohio", "Tokyo", "Seoul", "London", "Frankfurt", "Ireland")
MEASURED = {
    "Oregon": "67/0.79 49/1.10 96/0.523 124/0.46 136/0.42 143/0.404 124/0.482",
    "Virginia": "11/1.12 143/0.524 172/0.50 76/1.16 90/1.02 67/1.05",
    "Ohio": "130/0.694 159/0.529 86/1.05 99/0.799 77/1.14",
    "Tokyo": "34/1.10 210/0.366 223/0.36 199/0.465",
    "Seoul": "238/0.342 235/0.358 228/0.335",
    "London": "14/1.14 12/1.09",
    "Frankfurt": "24/1.08",
}
WITHIN_A_REGION = Pair(mbit=2000.0, delay_ms=5 / 2)


def worldwide() -> dict[tuple[int, int], Pair]:
    pairs = {(i, i): WITHIN_A_REGION for i in range(len(REGIONS))}
    for i, region in enumerate(REGIONS[:-1]):
        for j, measured in enumerate(MEASURED[region].split(), i + 1):
            round_trip_ms, gbit = map(float, measured.split("/"))
            pairs[i, j] = Pair(mbit=gbit * 1000, delay_ms=round_trip_ms / 2)
    return pairs


def _profiles() -> dict[str, Profile]:
    lines = {
        "unlimited": (UNLIMITED, "as fast as the forwarder goes"),
        "datacenter": (line(up=10_000, down=10_000, round_trip_ms=0.5), "10 Gbit/s, 0.5 ms"),
        "1g": (line(up=1000, down=1000, round_trip_ms=5), "1 Gbit/s, 5 ms"),
        "100m": (line(up=100, down=100, round_trip_ms=15), "100 Mbit/s, 15 ms, steady"),
        "home-fibre": (line(up=100, down=100, round_trip_ms=15, jitter_ms=1), "100 Mbit/s, 15 ms"),
        "home-cable": (line(up=20, down=200, round_trip_ms=25, jitter_ms=2), "20 up, 200 down, 25 ms"),
        "home-dsl": (line(up=8, down=50, round_trip_ms=40, jitter_ms=2), "8 up, 50 down, 40 ms"),
        "home-mobile": (
            line(up=10, down=50, round_trip_ms=50, jitter_ms=5, loss=0.01),
            "10 up, 50 down, 50 ms, 1 % of packets lost between two such hosts",
        ),
    }
    made = {name: Profile(name=name, about=about, lines=(kind,)) for name, (kind, about) in lines.items()}
    made["worldwide-8"] = Profile(
        name="worldwide-8",
        about="8 regions of AWS, 0.34 to 1.16 Gbit/s and 11 to 238 ms between two, 2 Gbit/s and 5 ms within one",
        lines=(UNLIMITED,) * len(REGIONS),
        pairs=worldwide(),
    )
    return made


# Every time in `about` is a round trip between two such hosts, jitter apart.
PROFILES = _profiles()
