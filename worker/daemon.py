"""A worker from its start to its end. Imports no torch, so that a wrong ticket is refused in a moment.

It takes part in its run in *sessions*: one ends when the owner pauses or the gate says so, the machine's memory is
given back, and another begins when that is over. Meanwhile it answers its owner (:mod:`.local_socket`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..protocol.errors import ConfigError, PotluckError, UnreachableError
from ..protocol.footprint import FRAGMENTED
from ..protocol.identity import Identity, lock
from ..protocol.meter import Meter
from ..protocol.ticket import Ticket
from ..protocol.tls import dial_pinned
from .condition import Condition, condition
from .control import COORDINATOR
from .energy import Energy
from .local_socket import Ended, listening, note_end
from .memory import release
from .offer import Say, WorkerConfig
from .report import Report
from .status import Answer, Ask
from .switch import Hold, Switch

log = logging.getLogger(__name__)
GRACE_SECONDS = 0.5  # that a pause waits for the worker to leave in order, before it leaves at once
LONG_GRACE_SECONDS = 120.0  # the same where nobody waits for the machine
AGAIN_SECONDS = 5.0  # between two tries to join again


async def join(ticket: Ticket, config: WorkerConfig, leave: asyncio.Event, say: Say) -> str:
    """Works for a run until it is finished, stopped, or ``leave`` is set and the stage is handed over.

    Returns one line that says how it ended. Raises what a person must mend, as a ``PotluckError``.
    """
    key = config.data_dir / "identity.pem"
    identity = Identity.load_or_create(key)
    with lock(key):
        note_end(config.data_dir, None)
        try:
            text = await Daemon(ticket, config, identity, say).run(leave)
        except PotluckError as error:
            note_end(config.data_dir, Ended(at=time.time(), text=error.one_line(), error=True))
            raise
        note_end(config.data_dir, Ended(at=time.time(), text=text, error=False))
        return text


class Daemon:
    """One worker of one run. Made and used in the event loop."""

    def __init__(self, ticket: Ticket, config: WorkerConfig, identity: Identity, say: Say) -> None:
        self.ticket, self.identity, self.say = ticket, identity, say
        self.config = config.decided(ticket, identity)
        self.switch = Switch(config.data_dir, config.rules)
        self.report = Report(ticket, identity, config.data_dir)
        self._chosen_gb = config.memory_gb
        self._finishing = asyncio.Event()
        self._loaded = False
        self._alone_since: float | None = None  # since when the coordinator does not answer, once we were in the run

    async def run(self, leave: asyncio.Event) -> str:
        """See :func:`join`."""
        await self.switch.look()
        async with listening(self.config.data_dir, self.serve):
            beside = [self.switch.follow(), self.report.follow(), self._finish(leave)]
            tasks = [asyncio.create_task(one) for one in beside]
            try:
                while True:
                    if not await self.free(leave):
                        return "left; nothing was under way"
                    if (ended := await self.work(leave)) is not None:
                        return ended
            finally:
                for task in tasks:
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(result, Exception):
                        log.error("something beside the work failed", exc_info=result)

    async def _finish(self, leave: asyncio.Event) -> None:
        await self._finishing.wait()
        leave.set()

    async def free(self, leave: asyncio.Event) -> bool:
        """Waits until the machine is the run's; False if the worker is to leave instead."""
        if self.switch.hold is not None and not leave.is_set():
            freed = self.report.freed_seconds
            self.say(self.text() + (f" (the memory was free after {freed:.1f} s)" if freed is not None else ""))
            await first(leave.wait(), self.switch.until(is_free))
            self.report.freed_seconds = None
            if not leave.is_set():
                self.say("going on")
        return not leave.is_set()

    async def work(self, leave: asyncio.Event) -> str | None:
        """Takes part until the run or the worker is at its end; None: to be called again once the machine is free."""
        meter = Meter()
        try:
            await self.find(meter)
            if not self._loaded:
                await self.load()
            if leave.is_set():
                return "left before it had a part in the run"
            if self.switch.hold is not None:
                return None
            freed_seconds, ended = await self.session(meter, leave)
        except UnreachableError as error:
            now = time.monotonic()
            if self._alone_since is None or error.code in ("certificate", "gone"):
                raise
            if now - self._alone_since > self.config.patience_minutes * 60.0:
                raise
            again = random.uniform(0.5, 1.0) * AGAIN_SECONDS
            await first(leave.wait(), self.switch.until(is_held), asyncio.sleep(again))
            return None
        if freed_seconds is None:
            return ended
        await asyncio.to_thread(release)
        self.report.freed_seconds = freed_seconds
        self._alone_since = time.monotonic()
        return None

    async def find(self, meter: Meter) -> None:
        """Whether the coordinator is there, and is the ticket's."""
        probe = await dial_pinned(self.ticket.url, self.ticket.fingerprint)
        meter.record_connection(COORDINATOR, dialled=True)
        await probe.close()
        if self._alone_since is not None:
            self._alone_since = time.monotonic()

    async def load(self) -> None:
        self.say("found the coordinator; loading torch")
        device = await asyncio.to_thread(prepare_torch, self.config.threads, self.config.device)
        self.config, self._loaded = replace(self.config, device=device), True
        if not self._chosen_gb and device.startswith("cuda"):
            self.config = replace(self.config, memory_gb=gpu_gb(device))
        self.report.energy = await asyncio.to_thread(Energy, gpu_uuid(device))

    async def session(self, meter: Meter, leave: asyncio.Event) -> tuple[float | None, str]:
        """How long making room took (None: nobody asked for that), and how it ended."""
        from .session import Notice, Session

        notice = Notice()
        session = Session(self.ticket, self.config, self.identity, meter, self.say)
        self.report.begin(session)
        told: float | None = None

        async def watch() -> None:
            nonlocal told
            await first(leave.wait(), self.switch.until(is_held))
            if not leave.is_set():
                told, self.report.freed_seconds = time.monotonic(), None
                notice.words = f"making room: {self.text()}"
            notice.leave.set()
            await first(self.urgent(), *([asyncio.sleep(LONG_GRACE_SECONDS)] if told is not None else []))
            notice.at_once.set()

        watching = asyncio.create_task(watch())
        try:
            ended = await session.run(notice)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self.report.end()
        over = session.views.newest[0].phase in ("finished", "stopped") or ended.startswith("the run is")
        if told is None or over or leave.is_set():
            return None, ended
        return (session.freed or time.monotonic()) - told, ended

    async def urgent(self) -> None:
        """Until somebody has waited for the machine long enough."""
        await self.switch.until(lambda hold: hold is not None and hold.at_once)
        await asyncio.sleep(GRACE_SECONDS)

    # For the owner.

    def serve(self, asked: Ask) -> Answer:
        """What the owner asks over the control socket."""
        if asked.what == "pause":
            if asked.until is not None and not asked.until > time.time():
                raise ConfigError("that moment is over", hint="Name one to come: --until 18:00")
            self.switch.pause_until(asked.until)
        elif asked.what == "resume":
            self.switch.resume()
        elif asked.what == "finish":
            self._finishing.set()
        elif asked.what != "status":
            return Answer(error=f"the worker does not know {asked.what!r}", hint="Is it of the same version?")
        return Answer(status=self.report.status(self.config, self.condition()))

    def condition(self) -> Condition:
        view, here = self.report.seen(finishing=self._finishing.is_set())
        return condition(view, here, self.switch.pause, self.switch.verdict)

    def text(self) -> str:
        return self.condition().text(datetime.now())


def is_held(hold: Hold | None) -> bool:
    return hold is not None


def is_free(hold: Hold | None) -> bool:
    return hold is None


async def first(*waiting: Coroutine[Any, Any, Any]) -> None:
    """Until one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def prepare_torch(threads: int, device: str) -> str:
    """Loads torch and everything that uses it; the device to compute on."""
    import torch

    from . import session  # noqa: F401  (its import takes seconds: here it holds nothing up)

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"this machine cannot compute on {device!r}", hint="Use --device cpu, or cuda where torch finds a GPU."
        ) from None
    return device


def gpu_gb(device: str) -> float:
    """What a GPU has for a stage, in 10^9 bytes."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory * (1 - FRAGMENTED) / 1e9


def gpu_uuid(device: str) -> str:
    """By which the driver knows the GPU; empty for the processor."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.startswith("cuda") else ""
