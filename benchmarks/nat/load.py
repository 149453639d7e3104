"""What one relay bears: pairs of peers that send through it as fast as it goes, all on this machine, over loopback.

Peers do TLS inside TLS and checksums, which costs more than passing it on, and they share the cores with the relay. So
the relay's own CPU time is measured, and what a core of its own would pass on in a second follows from it.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .talk import Failed, Talk

HOST, WARM_SECONDS, START_SECONDS = "127.0.0.1", 3.0, 120.0
WINDOW_NBYTES, LEAST_WINDOW = 4 << 20, 256 << 10


@dataclass(kw_only=True)
class Load:
    """Rates are of frames, 10^6 bytes a second: ``rate`` of all pairs together, the others of single pairs."""

    pairs: int
    seconds: float
    rate: float
    cpu_per_gb: float  # seconds of the relay's process for 10^9 bytes of its messages
    memory_mb: float  # of the relay's process, at most
    least: float
    median: float
    most: float


def bear(pairs: int, *, seconds: float, folder: Path) -> Load:
    """``pairs`` senders in one process, their receivers in another, the relay in a third."""
    window = max(LEAST_WINDOW, WINDOW_NBYTES // pairs)
    with ExitStack() as stack:
        hub, senders, receivers = (
            stack.enter_context(Talk(subprocess.Popen, f"benchmarks.nat.{module}", folder / f"{pairs}-{k}.log"))
            for k, module in enumerate(("hub", "peer", "peer"))
        )
        spot = hub.ask("start", host=HOST)
        names = [str(k) for k in range(pairs)]
        for name in names:
            senders.ask("open", name=name, host=HOST, spot=spot, window=window)
        peers = [receivers.ask("open", name=name, host=HOST, spot=spot, window=window)["peer"] for name in names]
        deadline = time.monotonic() + START_SECONDS
        while hub.ask("state")["attached"] < 2 * pairs:
            if time.monotonic() > deadline:
                raise Failed(f"{hub.ask('state')['attached']} of {2 * pairs} peers are at the relay")
            time.sleep(0.1)
        for name, peer in zip(names, peers, strict=True):
            told = senders.ask("dial", name=name, peer=peer, addresses=[])
            if told.get("path") != "relayed":
                raise Failed(f"{name}: {told}")
        for name, peer in zip(names, peers, strict=True):
            senders.ask("stream", name=name, peer=peer)
        time.sleep(WARM_SECONDS)
        before, first = hub.ask("state"), received(receivers)
        began = time.monotonic()
        time.sleep(seconds)
        after, last = hub.ask("state"), received(receivers)
        took = time.monotonic() - began
    rates = [(last[name] - first[name]) / took / 1e6 for name in names]
    return Load(
        pairs=pairs,
        seconds=took,
        rate=sum(rates),
        cpu_per_gb=(after["cpu"] - before["cpu"]) / (after["nbytes"] - before["nbytes"]) * 1e9,
        memory_mb=after["memory"] / 1e6,
        least=min(rates),
        median=statistics.median(rates),
        most=max(rates),
    )


def received(receivers: Talk) -> dict[str, int]:
    return {name: sum(nbytes for _, _, nbytes in by.values()) for name, by in receivers.ask("received").items()}
