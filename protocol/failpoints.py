"""Named places where a test can let a process fail: by a signal, an error, a full disk, or a pause.

``failpoint("worker.round.captured")`` does nothing, for the price of a look into an empty dictionary, unless a test
has armed that name in this very process; nothing else can. A place says itself which error it may raise.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Do = Literal["kill", "stop", "error", "full", "delay"]
MakeError = Callable[[str], BaseException]


@dataclass(frozen=True, kw_only=True)
class Action:
    """What happens at the ``hit``-th time (from 1 on) that the place is reached, once.

    ``kill`` and ``stop`` are signals to this process, ``error`` raises what the place names, ``full`` what a full disk
    raises, ``delay`` sleeps for ``seconds``.
    """

    do: Do
    hit: int = 1
    seconds: float = 0.0


_armed: dict[str, Action] = {}
_hits: dict[str, int] = {}
_lock = threading.Lock()
_tell: list[Callable[[str, Action], None]] = []


def arm(actions: Mapping[str, Action], tell: Callable[[str, Action], None]) -> None:
    """For tests alone: from now on these places fail. ``tell`` hears of each before it does."""
    with _lock:
        _armed.clear()
        _hits.clear()
        _armed.update(actions)
        _tell[:] = [tell]


def failpoint(name: str, error: MakeError = OSError) -> None:
    """A place in a thread of its own, or where an event loop may stand still. ``error`` is made with a message."""
    if _armed and (action := _due(name)):
        if action.do == "delay":
            time.sleep(action.seconds)
        else:
            _fail(name, action, error)


async def failpoint_async(name: str, error: MakeError = OSError) -> None:
    """A place in an event loop: only its own task waits."""
    if _armed and (action := _due(name)):
        if action.do == "delay":
            await asyncio.sleep(action.seconds)
        else:
            _fail(name, action, error)


def _due(name: str) -> Action | None:
    with _lock:
        if (action := _armed.get(name)) is None:
            return None
        _hits[name] = _hits.get(name, 0) + 1
        if _hits[name] != action.hit:
            return None
        del _armed[name]
        for tell in _tell:
            tell(name, action)
        return action


def _fail(name: str, action: Action, error: MakeError) -> None:
    if action.do == "error":
        raise error(f"failpoint {name}")
    if action.do == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGKILL if action.do == "kill" else signal.SIGSTOP)
