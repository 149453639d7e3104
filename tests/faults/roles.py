"""What a forked process is: a coordinator or a worker by the command line's own functions, armed and watched."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from potluck import cli
from potluck.coordinator import service
from potluck.protocol.failpoints import Action, arm
from potluck.protocol.ticket import Ticket

from .record import record


@dataclass(frozen=True, kw_only=True)
class Times:
    """Patience, shortened where waiting for it would make a scenario long; None: as it is."""

    silence_seconds: float | None = None
    heartbeat_seconds: float | None = None
    give_up_seconds: float | None = None
    divide_seconds: float | None = None


def fired(path: Path) -> Callable[[str, Action], None]:
    """Writes down the moment of a fault, even one that kills."""

    def tell(name: str, action: Action) -> None:
        line = json.dumps({"name": name, "do": action.do, "time": time.time()}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    return tell


def coordinator(folder: Path, faults: Mapping[str, Action], times: Times) -> None:
    """``potluck coordinator up`` in ``folder``."""
    rules_of = service.rules_of
    named = {"silence_seconds": times.silence_seconds, "divide_seconds": times.divide_seconds}
    changes = {name: seconds for name, seconds in named.items() if seconds is not None}
    service.rules_of = lambda *args: replace(rules_of(*args), **changes)
    service.LAST_LOOK_SECONDS = 0.0
    arm(faults, fired(folder / "coordinator.fired"))
    place = ["--data-dir", str(folder / "coordinator"), "--ready-file", str(folder / "ready.json")]
    cli.main(["coordinator", "up", str(folder / "run.yaml"), *place])


def worker(
    folder: Path,
    name: str,
    faults: Mapping[str, Action],
    times: Times,
    *,
    dial: str = "",
    announce: str = "",
    sabotage: str = "",
    speed: float = 1.0,
) -> None:
    """``potluck worker join``. ``dial``: a proxy before the coordinator; ``announce``: one before this worker."""
    from datetime import timedelta

    from potluck.worker import control, session
    from potluck.worker.links import Links

    if times.heartbeat_seconds is not None:
        control.HEARTBEAT_SECONDS = times.heartbeat_seconds
    if times.give_up_seconds is not None:
        session.GIVE_UP = timedelta(seconds=times.give_up_seconds)
    if announce:
        start = Links.start

        @functools.wraps(start)
        async def behind_a_proxy(self: Links, transport: object) -> list[str]:
            (address,) = await start(self, transport)  # type: ignore[arg-type]
            write(folder / f"{name}.address", address)
            return [announce]

        Links.start = behind_a_proxy  # type: ignore[method-assign]
    if sabotage:
        spoil(sabotage)
    record(folder / f"{name}.record")
    arm(faults, fired(folder / f"{name}.fired"))
    ticket = json.loads((folder / "ready.json").read_text(encoding="utf-8"))["ticket"]
    if dial:
        decoded = Ticket.decode(ticket, time.time())
        ticket = Ticket(
            url=dial,
            fingerprint=decoded.fingerprint,
            run=decoded.run,
            secret=decoded.secret,
            expires=decoded.expires,
        ).encode()
    options = ["--name", name, "--data-dir", str(folder / name), "--threads", "1", "--memory-gb", "4"]
    options += ["--speed", str(speed)]
    cli.main(["worker", "join", ticket, *options])


def spoil(what: str) -> None:
    """Training that is a little wrong, and that nobody in the run can see."""
    from potluck.worker.data import Dataset
    from potluck.worker.stage import Stage

    update, batch = Stage.update, Dataset.batch

    def other_gradient(self: Stage, targets: int) -> None:
        self.grad.mul_(1.01)
        update(self, targets)

    def other_sample(self: Dataset, indices: range, seed: int) -> object:
        return batch(self, [index + (index == 40) for index in indices], seed)

    if what == "gradient":
        Stage.update = other_gradient  # type: ignore[method-assign]
    else:
        Dataset.batch = other_sample  # type: ignore[assignment]


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
