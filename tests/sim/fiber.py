"""Functions that block, in virtual time: each has a thread, and only who has the baton runs.

The kernel hands the baton to a fiber and gets it back when the fiber blocks or ends, so one seed stays one order of
events. A killed fiber's blocking call raises ``Killed``, and it unwinds.
"""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from types import coroutine
from typing import Any

from .kernel import Kernel, Process, Signal, Task

Request = tuple[Signal | None, float | None, Callable[[], bool]]


class Killed(BaseException):
    """The process of this fiber is no more."""


class Fiber:
    """``run()`` is its life as a task of the kernel."""

    current: Fiber | None = None

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._baton, self._kernels = _thread.allocate_lock(), _thread.allocate_lock()
        self._baton.acquire()
        self._kernels.acquire()
        self._request: Request = (None, None, bool)
        self._error: BaseException | None = None
        self._killed = self._done = False

    @coroutine
    def run(self) -> Generator[Any, None, None]:
        _thread.start_new_thread(self._main, ())
        try:
            while True:
                self._hand_over()
                if self._error is not None:
                    raise self._error
                if self._done:
                    return
                signal, seconds, ready = self._request
                if signal is None:
                    yield (None, seconds)
                while signal is not None and not ready():
                    yield (signal, None)
        finally:
            self._killed = True
            while not self._done:
                self._hand_over()

    def _hand_over(self) -> None:
        before, Fiber.current = Fiber.current, self
        self._baton.release()
        self._kernels.acquire()
        Fiber.current = before

    def _main(self) -> None:
        self._baton.acquire()
        try:
            self._function()
        except Killed:
            pass
        except BaseException as error:
            self._error = error
        self._done = True
        self._kernels.release()

    def block(self, request: Request) -> None:
        if not self._killed:
            self._request = request
            self._kernels.release()
            self._baton.acquire()
        if self._killed:
            raise Killed


def sleep(seconds: float) -> None:
    """Blocks the fiber that calls."""
    assert Fiber.current
    Fiber.current.block((None, seconds, bool))


def wait(signal: Signal, ready: Callable[[], bool]) -> None:
    """Blocks the fiber that calls until ``ready()``, looked at whenever ``signal`` rings."""
    assert Fiber.current
    if not ready():
        Fiber.current.block((signal, None, ready))


class Future:
    """As that of :mod:`concurrent.futures`."""

    def __init__(self, bell: Signal) -> None:
        self._bell = bell
        self._state = "waiting"
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._state in ("done", "cancelled")

    def cancel(self) -> bool:
        if self._state == "waiting":
            self._state = "cancelled"
        return self._state == "cancelled"

    def exception(self) -> BaseException | None:
        wait(self._bell, self.done)
        return CancelledError() if self._state == "cancelled" else self._error

    def result(self) -> Any:
        if error := self.exception():
            raise error
        return self._result

    def carry_out(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._state == "waiting":
            self._state = "running"
            try:
                self._result = function(*arguments)
            except Exception as error:
                self._error = error
            self._state = "done"
            self._bell.ring()


class Executor:
    """One thread's worth of fibers in a process, as ``ThreadPoolExecutor(1)``."""

    def __init__(self, kernel: Kernel, process: Process, bell: Signal) -> None:
        self._kernel, self._process, self._bell = kernel, process, bell
        self._waiting: deque[tuple[Future, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._running = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future = Future(self._bell)
        self._waiting.append((future, function, arguments))
        if not self._running:
            self._running = True
            spawn(self._kernel, self._work, self._process)
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        for future, _, _ in self._waiting if cancel_futures else ():
            future.cancel()

    def _work(self) -> None:
        while self._waiting:
            future, function, arguments = self._waiting.popleft()
            future.carry_out(function, arguments)
        self._running = False


def spawn(kernel: Kernel, function: Callable[[], None], process: Process) -> Task:
    async def life() -> None:
        await Fiber(function).run()

    return kernel.spawn(life(), process)
