"""What a worker can tell its owner: put together from the session it is in, its meters and its contribution."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..protocol.identity import Identity
from ..protocol.ticket import Ticket
from .condition import Condition, Here
from .contribution import Contribution
from .energy import Energy
from .memory import held
from .offer import WorkerConfig
from .plan import View
from .status import Limits, Status, Way

if TYPE_CHECKING:
    from .session import Session

COUNT_SECONDS = 1.0  # between two looks at the meters
SAVE_SECONDS = 60.0  # between two times that the contribution goes to disk
RATE_SHARE = 0.2  # that a look has in the rates shown


class Report:
    """Owned by the event loop. ``energy`` is set once the device is known."""

    def __init__(self, ticket: Ticket, identity: Identity, folder: Path) -> None:
        self.ticket, self.identity = ticket, identity
        self.contribution = Contribution(folder)
        self.energy: Energy | None = None
        self.freed_seconds: float | None = None  # that the pause which holds took until the memory was free
        self._session: Session | None = None
        self._started, self._joined = time.time(), 0.0
        self._counted = time.monotonic()
        self._rates: tuple[float, float] | None = None

    def begin(self, session: Session) -> None:
        """A session begins."""
        self._session, self._joined, self._counted, self._rates = session, time.time(), time.monotonic(), None
        session.contribution = self.contribution
        self.contribution.begin(self.energy.joules() if self.energy else None)

    def end(self) -> None:
        """It is over: nothing of it is held here any more."""
        self.count()
        self.contribution.save()
        self._session = self._rates = None

    async def follow(self) -> None:
        """Adds up, and keeps it on disk now and then and in the end."""
        saved = time.monotonic()
        try:
            while True:
                await asyncio.sleep(COUNT_SECONDS)
                self.count()
                if time.monotonic() - saved >= SAVE_SECONDS:
                    saved = time.monotonic()
                    await asyncio.to_thread(self.contribution.save)
        finally:
            self.contribution.save()

    def count(self) -> None:
        """What came since the last time."""
        if self._session is None:
            return
        now = time.monotonic()
        seconds, self._counted = now - self._counted, now
        joules = self.energy.joules() if self.energy else None
        sent, received = self.contribution.spent(self._session.meter.snapshot(), seconds, joules, date.today())
        if seconds > 0:
            rates = sent / seconds, received / seconds
            old = self._rates or rates
            self._rates = (
                old[0] + RATE_SHARE * (rates[0] - old[0]),
                old[1] + RATE_SHARE * (rates[1] - old[1]),
            )

    def seen(self, *, finishing: bool) -> tuple[View | None, Here]:
        """The coordinator's newest view, None without a session, and what the worker knows of itself."""
        session = self._session
        if session is None:
            return None, Here(peer=self.identity.peer_id, finishing=finishing)
        view = session.views.newest[0] if session.engine is not None else None
        return view, Here(
            peer=self.identity.peer_id,
            connected=session.control.connected,
            step=session.engine.local.step if session.engine else 0,
            steps=session.engine.config.run.steps if session.engine else 0,
            finishing=finishing,
            trouble=session.points.trouble,
        )

    def status(self, config: WorkerConfig, condition: Condition) -> Status:
        session = self._session
        view, here = self.seen(finishing=False)
        view = view or View()
        plan = view.plan
        place = plan.places.get(here.peer) if plan else None
        rules, memory = config.rules, held()
        paths = session.control.paths() if session else {}
        return Status(
            word=condition.word,
            why=condition.why,
            until=condition.until,
            text=condition.text(datetime.now()),
            name=config.name,
            peer=here.peer,
            run=session.engine.config.run.name if session and session.engine else "",
            coordinator=self.ticket.url,
            pid=os.getpid(),
            version=__version__,
            now=time.time(),
            started=self._started,
            joined=self._joined if session else None,
            phase=view.phase if session and session.engine else "",
            note=view.note,
            generation=plan.generation if plan else None,
            stage=place[0] if place else None,
            layers=plan.layers[place[0]] if plan and place else None,
            stages=len(plan.stages) if plan else 0,
            replicas=len(plan.replicas[place[0]]) if plan and place else 0,
            peers=len(plan.peers) if plan else 0,
            step=here.step,
            steps=here.steps,
            committed=view.committed,
            doing=session.control.state if session else "",
            device=config.device,
            ram=memory.ram,
            gpu=memory.gpu,
            up=self._rates[0] if self._rates else None,
            down=self._rates[1] if self._rates else None,
            region=config.region,
            limits=Limits(
                memory_gb=config.memory_gb,
                threads=config.threads,
                upload_mbps=config.upload_mbps,
                state_mbps=config.state_mbps,
                hours=tuple(str(window) for window in rules.hours),
                on_battery=rules.on_battery,
                yield_to=rules.yield_to,
            ),
            totals=self.contribution.totals,
            ways=tuple(
                Way(peer=peer, path=p.kind, rtt_seconds=p.rtt_seconds, bytes_per_second=p.bytes_per_second)
                for peer, p in sorted(paths.items())
            ),
            freed_seconds=self.freed_seconds,
        )
