"""Virtual time: a heap of wake-ups, coroutines that sleep and wait on it, and processes that are killed or paused.

Nothing sleeps and nothing runs beside anything else: one seed is one order of events. What waits is a plain coroutine;
it gives the kernel either seconds to sleep or a ``Signal`` to wait for (with or without a timeout).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Task:
    """A coroutine in a process. ``ticket`` tells a wake-up that still counts from one that came too late."""

    __slots__ = ("coro", "done", "process", "ticket")

    def __init__(self, coro: Coroutine[Any, Any, Any], process: Process) -> None:
        self.coro, self.process = coro, process
        self.ticket, self.done = 0, False

    def cancel(self) -> None:
        """Never resumed again."""
        if not self.done:
            self.done = True
            self.process.tasks.pop(self, None)
            if not self.coro.cr_running:  # type: ignore[attr-defined]
                self.coro.close()


class Process:
    """What is killed and paused as one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.tasks: dict[Task, None] = {}

    def kill(self) -> None:
        self.alive = False
        for task in list(self.tasks):
            task.cancel()


class Signal:
    """Wakes everybody who waits for it."""

    __slots__ = ("kernel", "waiters")

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.waiters: list[tuple[Task, int]] = []

    def ring(self) -> None:
        waiters, self.waiters = self.waiters, []
        for task, ticket in waiters:
            if ticket == task.ticket:
                self.kernel.wake(task, 0.0)

    @coroutine
    def wait(self, timeout: float | None = None) -> Generator[Any, None, None]:
        yield (self, timeout)


class Gate:
    """An event, as asyncio's: set until it is cleared."""

    def __init__(self, kernel: Kernel, *, is_open: bool = False) -> None:
        self._open, self._signal = is_open, Signal(kernel)

    def is_set(self) -> bool:
        return self._open

    def set(self) -> None:
        self._open = True
        self._signal.ring()

    def clear(self) -> None:
        self._open = False

    async def wait(self) -> None:
        while not self._open:
            await self._signal.wait()


class Queue(Generic[T]):
    """As asyncio's."""

    def __init__(self, kernel: Kernel) -> None:
        self._items: deque[T] = deque()
        self._signal = Signal(kernel)

    def __len__(self) -> int:
        return len(self._items)

    def empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: T) -> None:
        self._items.append(item)
        self._signal.ring()

    def get_nowait(self) -> T:
        return self._items.popleft()

    async def get(self) -> T:
        while not self._items:
            await self._signal.wait()
        return self._items.popleft()


class Condition:
    """As asyncio's, for somebody who only notifies."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...

    def notify_all(self) -> None: ...


@coroutine
def sleep(seconds: float) -> Generator[Any, None, None]:
    yield (None, seconds)


class Kernel:
    """The clock and everything that is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Any, int]] = []
        self._count = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """``action()``, then."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._count), action, -1))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def wake(self, task: Task, seconds: float) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._count), task, task.ticket))

    def spawn(self, coro: Coroutine[Any, Any, Any], process: Process) -> Task:
        task = Task(coro, process)
        process.tasks[task] = None
        self.wake(task, 0.0)
        return task

    def turn(self) -> bool:
        """The next event; False if there is none."""
        if not self._heap:
            return False
        when, _, what, ticket = heapq.heappop(self._heap)
        self.now = max(self.now, when)
        if ticket < 0:
            self.events += 1
            what()
            return True
        task: Task = what
        if task.done or task.ticket != ticket:
            return True
        if task.process.paused_until > self.now:
            heapq.heappush(self._heap, (task.process.paused_until, next(self._count), task, ticket))
            return True
        self.events += 1
        self._resume(task)
        return True

    def _resume(self, task: Task) -> None:
        task.ticket += 1
        try:
            signal, timeout = task.coro.send(None)
        except StopIteration:
            task.done = True
            task.process.tasks.pop(task, None)
            return
        except BaseException:
            task.done = True
            task.process.tasks.pop(task, None)
            raise
        if task.done:  # it ended its own process
            task.coro.close()
            return
        if signal is not None:
            signal.waiters.append((task, task.ticket))
        if timeout is not None:
            self.wake(task, timeout)
