"""Two peers behind routers of every kind: which path they get, how soon, how much of the line it takes.

Real transports and a real relay, in processes with a network namespace each (``benchmarks/netlab``). Peers name the
addresses that they have; the relay's host tries them as a coordinator does, and others hear of those that answer. Who
has one asks who has none to dial (``protocol/reversal.py``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.nat import NATS
from benchmarks.netlab.profiles import PROFILES, UNLIMITED

from .talk import Failed, Talk

WARM_SECONDS, WINDOW_NBYTES = 2.0, 1 << 20
HUB = 0


@dataclass(kw_only=True)
class Pair:
    """``rate`` is MB/s (10^6 bytes) of frames, ``share`` that over the line's; ``later``: the path after ``hold``."""

    dialler: str
    listener: str
    path: str = ""
    later: str = ""
    first_seconds: float | None = None  # from dialling to the first frame at the other side
    rate: float | None = None
    share: float | None = None
    failed: str = ""


@dataclass
class End:
    """One peer: its process, its name, and what others are told of it."""

    talk: Talk
    name: str
    peer: str
    addresses: list[str]


@contextmanager
def ends(lab: Lab, hosts: dict[str, int], folder: Path) -> Iterator[dict[str, End]]:
    """A relay on the hub, and peers by name on hosts, all attached to it."""
    with ExitStack() as stack:

        def talk(host: int, module: str) -> Talk:
            log = folder / f"{module}-{host}.log"
            return stack.enter_context(Talk(functools.partial(lab.popen, host), f"benchmarks.nat.{module}", log))

        hub = talk(HUB, "hub")
        spot = hub.ask("start", host=lab.address(HUB))
        made = {}
        for name, host in hosts.items():
            process = talk(host, "peer")
            about = process.ask("open", name=name, host=lab.inside(host), spot=spot, window=WINDOW_NBYTES)
            reached = hub.ask("confirm", addresses=about["addresses"], key=about["key"])
            if reached:
                process.ask("dialable", name=name)
            made[name] = End(process, name, about["peer"], reached)
        deadline = time.monotonic() + 60
        while hub.ask("state")["attached"] < len(made):
            if time.monotonic() > deadline:
                raise Failed(f"only {hub.ask('state')['attached']} of {len(made)} peers are at the relay")
            time.sleep(0.1)
        yield made


def measure(
    line: str, *, seconds: float, hold: float, folder: Path, kinds: Sequence[str] = tuple(NATS)
) -> Iterator[Pair]:
    """Every kind with every kind, one pair after the other; those that have a path are given out at the end, ``hold``
    seconds after it was found or later."""
    profile = PROFILES[line]
    hosts = {f"{role} {kind}": 1 + k for k, (role, kind) in enumerate((r, k) for r in ("to", "from") for k in kinds)}
    nats = {host: NATS[name.split()[1]] for name, host in hosts.items()}
    with Lab(profile.after(UNLIMITED), hosts=1 + len(hosts), nats=nats) as lab, ends(lab, hosts, folder) as made:
        up = profile.line(0).up_mbit / 8
        found: list[tuple[float, Pair, End, End]] = []
        for dialler in kinds:
            for listener in kinds:
                near, far = made[f"from {dialler}"], made[f"to {listener}"]
                pair = one(near, far, Pair(dialler=dialler, listener=listener), seconds)
                if pair.failed:
                    yield pair
                    continue
                assert pair.rate is not None
                pair.share = pair.rate / up
                found.append((time.monotonic(), pair, near, far))
        for since, pair, near, far in found:
            time.sleep(max(0.0, since + hold - time.monotonic()))
            told = near.talk.ask("send", name=near.name, peer=far.peer)
            pair.later = told.get("path") or f"broken ({told['failed']})"
            yield pair


def one(near: End, far: End, pair: Pair, seconds: float) -> Pair:
    """Dials, sends a first frame, then as many as the path takes for ``seconds``."""
    far.talk.ask("tell", name=far.name, peer=near.peer, addresses=near.addresses)
    told = near.talk.ask("dial", name=near.name, peer=far.peer, addresses=far.addresses)
    if "failed" in told:
        pair.failed = f"{told['failed']}: {told['why']}"
        return pair
    pair.path = told["path"]
    pair.first_seconds = received(far, near)["first_at"] - told["began"]
    near.talk.ask("stream", name=near.name, peer=far.peer)
    time.sleep(WARM_SECONDS)
    before = received(far, near)
    time.sleep(seconds)
    after = received(far, near)
    near.talk.ask("rest", name=near.name, peer=far.peer)
    pair.rate = (after["nbytes"] - before["nbytes"]) / (after["last_at"] - before["last_at"]) / 1e6
    return pair


def received(end: End, sender: End) -> dict[str, Any]:
    first_at, last_at, nbytes = end.talk.ask("received")[end.name][sender.peer]
    return {"first_at": first_at, "last_at": last_at, "nbytes": nbytes}
