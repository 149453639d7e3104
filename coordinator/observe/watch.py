"""Looks at a run every few seconds, and tells those who want to know: the page, the log, a webhook, a tracker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from ...protocol.config import RunConfig
from ..dashboard.board import Board
from ..masking import masked
from .alerts import Look, Memory, judge
from .logs import JsonLog
from .metrics import Seen
from .track import Tracker
from .webhook import Webhook

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
USUAL_POINTS = 200
LAST_SECONDS = 5.0  # for what is still to be told when the coordinator stops
MEGABYTE = 1_000_000


class Watch:
    """``refusing`` says why the store takes no writes, None while it does."""

    def __init__(
        self, config: RunConfig, run_id: str, data_dir: Path, board: Board, refusing: Callable[[], str | None]
    ) -> None:
        """``ConfigError`` if what ``observe`` names is not installed or cannot be written."""
        observe = config.observe
        self.config, self.board, self.data_dir, self.refusing = observe, board, data_dir, refusing
        self.wall: Callable[[], float] = time.time
        self._run_id = run_id
        self.memory = Memory()
        self._disk: tuple[int, int] | None = None  # size, free
        self._last_point = 0
        self._disk_asked: asyncio.Task[None] | None = None
        self.tracker: Tracker | None = None
        if observe.track != "off":
            self.tracker = Tracker(observe.track, data_dir / "track", config, run_id)
        self.log: JsonLog | None = None
        if observe.log:
            self.log = JsonLog(data_dir / Path(observe.log).expanduser(), round(observe.log_mb * MEGABYTE))
            board.listeners.append(self.log.event)
        self.webhook: Webhook | None = None
        if observe.webhook:
            self.webhook = Webhook(observe.webhook, observe.webhook_kind, {"name": config.name, "id": run_id})

    @property
    def clock_offset(self) -> float:
        return self.wall() - self.board.clock()

    def seen(self) -> Seen:
        """For Prometheus."""
        size, free = self._disk or (None, None)
        return Seen(self.board.state(), free, size, self.clock_offset)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks until the block is left; then what is still to be told is, in a bounded time."""
        points = self.board.points(0)[-USUAL_POINTS - 1 :]  # what was usual before a restart still is
        self._last_point = points[0].id if points else 0
        tasks = [asyncio.create_task(self._follow(), name="watch")]
        if self.webhook:
            tasks.append(asyncio.create_task(self.webhook.follow(), name="webhook"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        if self.webhook:
            await self.webhook.last_word(LAST_SECONDS)
        if self.tracker:
            await self.tracker.close(self.board, LAST_SECONDS)
        if self.log:
            self.board.listeners.remove(self.log.event)
            await asyncio.to_thread(self.log.close)

    async def _follow(self) -> None:
        while True:
            try:
                self.look()
            except Exception:
                log.exception("looking at the run has failed")
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Once. Nothing here waits for a disk or a line."""
        if self._disk_asked is None or self._disk_asked.done():  # a disk that hangs is not asked again
            self._disk_asked = asyncio.get_running_loop().create_task(self._ask_disk())
        points = self.board.points(self._last_point)
        look = Look(
            state=self.board.state(),
            points=points,
            disk_free_nbytes=self._disk[1] if self._disk else None,
            refusing=self.refusing(),
            clock_offset=self.clock_offset,
        )
        now = self.board.clock()
        judged = judge(look, now, self.memory, self.config)
        self.memory = judged.memory
        if points:
            self._last_point = points[-1].id
        for alert in judged.raised:
            log.warning("Alert: %s", masked(alert.text))
        for alert in judged.resolved:
            log.warning("Resolved: %s", masked(alert.text))
        if self.log:
            for alert in (*judged.raised, *judged.resolved):
                self.log.alert(alert, now, is_raised=alert in judged.raised)
        self.board.alert(judged.alerts)
        if self.webhook:
            self.webhook.tell(judged.alerts)
        if self.tracker:
            self.tracker.feed(self.board)

    async def _ask_disk(self) -> None:
        with contextlib.suppress(OSError):
            usage = await asyncio.to_thread(shutil.disk_usage, self.data_dir)
            self._disk = (usage.total, usage.free)
