"""Are the lines what they should be? Measured from inside hosts, with real TCP and UDP.

A host without limits, the probe, stands beside the profile's. Rates: the interface's bytes over time, between two
moments at which packets arrived. The load is one TCP connection, or UDP at 1.3 times the rate where TCP cannot fill a
line: where packets are lost, or the queue is shorter than two round trips. Round trips: median of UDP echoes; headers
and the mean of the jitter are in what is asked. Loss: UDP of small packets at half the rate, so that no queue drops
any; as many as 3 standard deviations within 10 % need, or what goes in 25 seconds; then more is allowed, and said.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lab import MTU, Lab
from .net import LEAST_PACKETS
from .profiles import UNLIMITED, Profile

TRAFFIC = [sys.executable, "-I", "-S", str(Path(__file__).with_name("traffic.py"))]
PROBE = 0
RATE_SHARE, TRIP_SHARE, TRIP_MS, LOSS_SHARE = 0.05, 0.05, 2.0, 0.10
NOTHING_LOST = 0.001  # of a line that loses nothing: as much as a busy machine may lose
SIGMAS = 3.0
RATE_SECONDS, RATE_PACKETS, LOSS_SECONDS = 3.0, 60, 25.0
ECHOES, SMALL_NBYTES = 100, 36  # of IP: an echo, and what loss is measured with
MOST_PACKETS = 8000  # per second, of the small ones


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    asked: float
    measured: float
    unit: str
    allowed: float  # either way, in the unit
    note: str = ""

    @property
    def ok(self) -> bool:
        return math.isinf(self.asked) or abs(self.measured - self.asked) <= self.allowed

    def cells(self) -> tuple[str, ...]:
        if math.isinf(self.asked):
            return self.what, "no limit", f"{self.measured:.4g} {self.unit}", "", "", self.note
        off = self.measured - self.asked
        share = f" ({off / self.asked:+.1%})" if self.asked else ""
        verdict = "ok" if self.ok else "WRONG"
        return (
            self.what,
            f"{self.asked:.4g} {self.unit}",
            f"{self.measured:.4g} {self.unit}{share}",
            f"±{self.allowed:.2g}",
            verdict,
            self.note,
        )


@dataclass(kw_only=True)
class Report:
    profile: str
    how: str
    rows: list[Row] = field(default_factory=list)
    cpu_seconds: float = 0.0  # the forwarder's, while rates were measured
    nbytes: int = 0  # of all packets it handed over then
    packets: int = 0
    late: float = 0.0  # share of all packets handed over more than 1 ms after their moment

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        cells = [("", "asked", "measured", "allowed", "", ""), *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines = [f"{self.profile}: {'ok' if self.ok else 'WRONG'}", self.how, *table]
        if self.packets > 2000:  # with fewer, asking for counters costs more than packets do
            lines.append(
                f"forwarder: {self.cpu_seconds / self.nbytes * 1e9:.1f} CPU seconds per GB, "
                f"{self.cpu_seconds / self.packets * 1e6:.0f} µs a packet; {self.late:.2%} of packets late by over 1 ms"
            )
        return "\n".join(lines)


def check(profile: Profile, *, mtu: int = MTU, seed: int = 0, rootless: bool = False) -> Report:
    """Measures; see ``Report.ok``. 10 s to 60 s, longer for lines below 0.5 Mbit/s. Raises ``LabError``."""
    count = max(2, len(profile.first + profile.lines))
    network = profile.after(UNLIMITED)
    with Lab(network, hosts=1 + count, mtu=mtu, seed=seed, rootless=rootless) as lab:
        report = Report(profile=profile.name, how=lab.how)
        measure = Measure(lab, network, report)
        kinds: dict[Any, list[int]] = {}
        for host in range(1, 1 + count):
            kinds.setdefault(network.line(host), []).append(host)
        pairs = {(i, j): p for i in range(1, count + 1) for j in range(i + 1, count + 1) if (p := network.pair(i, j))}
        if pairs:  # the ways that differ most
            by_delay = sorted(pairs, key=lambda key: pairs[key].delay_ms)
            by_rate = sorted(pairs, key=lambda key: pairs[key].mbit)
            for i, j in (by_delay[0], by_delay[len(pairs) // 2], by_delay[-1]):
                measure.trip(i, j)
            for i, j in (by_rate[0], by_rate[-1]):
                measure.rate(i, j)
                measure.rate(j, i)
            measure.loss(*by_rate[0])
        for hosts in kinds.values():
            line = network.line(hosts[0])
            if pairs and math.isinf(line.up_mbit) and math.isinf(line.down_mbit):
                continue
            other = hosts[1] if len(hosts) > 1 else PROBE
            if not network.pair(hosts[0], other):
                measure.trip(hosts[0], other)
            measure.rate(hosts[0], PROBE)
            measure.rate(PROBE, hosts[0])
            measure.loss(hosts[0], other)
        packets, late = lab.forwarded()
        report.late = late / packets
    return report


class Measure:
    def __init__(self, lab: Lab, network: Profile, report: Report) -> None:
        self.lab, self.network, self.report = lab, network, report

    def mbit(self, i: int, j: int) -> float:
        pair = self.network.pair(i, j)
        return min(self.network.line(i).up_mbit, self.network.line(j).down_mbit, pair.mbit if pair else math.inf)

    def lost(self, i: int, j: int) -> float:
        return 1 - (1 - self.network.line(i).loss) * (1 - self.network.line(j).loss)

    def trip_ms(self, i: int, j: int, nbytes: int) -> float:
        """A round trip of a packet of ``nbytes``, in the mean."""
        ends, pair = (self.network.line(i), self.network.line(j)), self.network.pair(i, j)
        once = (pair.delay_ms if pair else 0.0) + sum(line.delay_ms + line.jitter_ms / 2 for line in ends)
        rates = [rate for line in ends for rate in (line.up_mbit, line.down_mbit)] + [
            pair.mbit if pair else math.inf
        ] * 2
        return 2 * once + sum(nbytes * 8 / (rate * 1000) for rate in rates)

    def queue_ms(self, i: int, j: int) -> float:
        """The queue before the narrowest place."""
        mbit, pair = self.mbit(i, j), self.network.pair(i, j)
        if math.isinf(mbit):
            return math.inf
        narrow = pair if pair and pair.mbit == mbit else self.network.line(i)
        if narrow is not pair and self.network.line(i).up_mbit != mbit:
            narrow = self.network.line(j)
        return max(narrow.queue_ms, LEAST_PACKETS * self.lab.mtu * 8 / (mbit * 1000))

    @contextmanager
    def listening(self, host: int, *role: str) -> Iterator[subprocess.Popen[Any]]:
        process = self.lab.popen(host, [*TRAFFIC, *role], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", f"no {role} in host {host}"
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    @contextmanager
    def sending(self, host: int, *role: str) -> Iterator[None]:
        process = self.lab.popen(host, [*TRAFFIC, *role])
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def trip(self, i: int, j: int) -> None:
        asked = self.trip_ms(i, j, SMALL_NBYTES)
        with self.listening(j, "echo"):
            every = max(0.02, 8 * (self.network.line(i).jitter_ms + self.network.line(j).jitter_ms) / 1000)
            wait = 1 + 3 * asked / 1000
            done = self.lab.run(i, [*TRAFFIC, "ping", self.lab.address(j), str(ECHOES), str(every), str(wait)])
        trips = json.loads(done.stdout)
        note = f"{min(trips):.4g} to {max(trips):.4g}" if trips else "no echo came"
        row = Row(
            what=f"round trip {self.name(i)} - {self.name(j)}",
            asked=asked,
            measured=statistics.median(trips) if trips else math.nan,
            unit="ms",
            allowed=max(TRIP_MS, TRIP_SHARE * asked),
            note=note,
        )
        self.report.rows.append(row)

    def rate(self, i: int, j: int) -> None:
        mbit, loss, address = self.mbit(i, j), self.lost(i, j), self.lab.address(j)
        packet_seconds = self.lab.mtu * 8 / (mbit * 1e6)
        seconds = max(RATE_SECONDS, RATE_PACKETS * packet_seconds)
        udp = loss > 0 or self.queue_ms(i, j) < 2 * self.trip_ms(i, j, self.lab.mtu)
        if udp:  # packets are lost behind the line up and before the line down
            asked = mbit if self.network.line(j).down_mbit == mbit else mbit * (1 - loss)
            spray = ["spray", address, str(1.3 * mbit), str(self.lab.mtu), "1000000000"]
            receiver, load, warm = ["count", "60"], spray, 0.5 + self.trip_ms(i, j, self.lab.mtu) / 1000
        else:
            asked, receiver, load = mbit, ["sink"], ["pour", address]
            warm = 0.7 + 20 * self.trip_ms(i, j, self.lab.mtu) / 1000
        cpu, packets = self.lab.forwarder_cpu(), self.lab.forwarded()[0]
        before = self.lab.received(i) + self.lab.received(j)
        with self.listening(j, *receiver), self.sending(i, *load):
            time.sleep(warm)
            first, last, nbytes = self.slope(j, seconds)
        self.report.cpu_seconds += self.lab.forwarder_cpu() - cpu
        self.report.packets += self.lab.forwarded()[0] - packets
        self.report.nbytes += self.lab.received(i) + self.lab.received(j) - before
        row = Row(
            what=f"{'UDP' if udp else 'TCP'} {self.name(i)} -> {self.name(j)}",
            asked=asked,
            measured=nbytes * 8 / (last - first) / 1e6,
            unit="Mbit/s",
            allowed=RATE_SHARE * asked,
            note=f"{seconds:.0f} s",
        )
        self.report.rows.append(row)
        if math.isfinite(mbit):
            time.sleep(2 * self.queue_ms(i, j) / 1000)

    def slope(self, host: int, seconds: float) -> tuple[float, float, int]:
        """From one arrival of packets to another, ``seconds`` apart or more: both moments, bytes between them."""
        marks: list[tuple[float, int]] = []
        at, nbytes, _ = self.lab.counted(host)
        give_up = at + 3 * seconds + 10
        while len(marks) < 2 or marks[-1][0] - marks[0][0] < seconds:
            before = nbytes
            time.sleep(0.002 if not marks or at - marks[0][0] > seconds - 0.5 else 0.1)
            at, nbytes, _ = self.lab.counted(host)
            if nbytes > before:
                marks.append((at, nbytes))
            elif at > give_up:
                break
        if len(marks) < 2:
            return 0.0, math.inf, 0
        return marks[0][0], marks[-1][0], marks[-1][1] - marks[0][1]

    def loss(self, i: int, j: int) -> None:
        asked, mbit = self.lost(i, j), min(self.mbit(i, j), self.mbit(j, i))
        per_second = min(MOST_PACKETS, 0.5 * mbit * 1e6 / (SMALL_NBYTES * 8))
        enough = math.ceil((SIGMAS / LOSS_SHARE) ** 2 * (1 - asked) / asked) if asked else 2000
        packets = int(min(enough, per_second * LOSS_SECONDS))
        allowed = asked * max(LOSS_SHARE, SIGMAS * math.sqrt((1 - asked) / asked / packets)) if asked else NOTHING_LOST
        quiet = 1 + 3 * self.trip_ms(i, j, self.lab.mtu) / 1000
        with self.listening(j, "count", str(quiet)) as counter:
            rate = per_second * SMALL_NBYTES * 8 / 1e6
            self.lab.run(i, [*TRAFFIC, "spray", self.lab.address(j), str(rate), str(SMALL_NBYTES), str(packets)])
            came = json.loads(counter.communicate()[0])
        row = Row(
            what=f"UDP loss {self.name(i)} -> {self.name(j)}",
            asked=100 * asked,
            measured=100 * (1 - came / packets),
            unit="%",
            allowed=100 * allowed,
            note=f"{packets} packets" + (f", {SIGMAS:.0f} sigma = ±{allowed / asked:.0%}" if asked else ""),
        )
        self.report.rows.append(row)

    def name(self, host: int) -> str:
        return "probe" if host == PROBE else f"host {host - 1}"
