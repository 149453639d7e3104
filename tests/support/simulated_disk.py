"""A disk that refuses on demand, and what must hold then."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace

from potluck.coordinator.state import Command, RunState
from potluck.coordinator.store import Store, passing
from potluck.protocol.errors import StateError

SHIFT = 4096.0  # seconds
LEDGER = "SELECT first, count, state, step FROM ledger"


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


class FailingDisk(Store):
    """``refuse(number, tries)``: the SQLite code with which the commit ``number`` fails, tried ``tries`` times before.

    The statements are carried out first: it is the commit that fails.
    """

    refuse: Callable[[int, int], int | None] = staticmethod(lambda number, tries: None)
    committed = refused = tries = 0

    def _commit(self) -> None:
        code = self.refuse(self.committed, self.tries)
        if code is not None:
            self.refused, self.tries = self.refused + 1, self.tries + 1
            error = sqlite3.OperationalError("refused by the test")
            error.sqlite_errorcode = code
            raise error
        super()._commit()
        self.committed, self.tries = self.committed + 1, 0

    def refused_write(self, commands: Sequence[Command], now: float, code: int) -> StateError:
        """A write that must fail, say so as something that may pass, and leave nothing."""
        before = self.rows(LEDGER)
        self.refuse = lambda number, tries: code
        try:
            self.write(commands, now)
        except StateError as error:
            hold(passing(error), "the run is over because of a full disk")
            hold(self.rows(LEDGER) == before, "a refused write has left something")
            return error
        finally:
            del self.refuse
        raise Broken("the disk does not refuse")


def same(one: RunState, other: RunState) -> bool:
    """Equal, but for the last bits of their times."""

    def rounded(state: RunState) -> RunState:
        return replace(
            state,
            since=round(state.since, 6),
            last_join=round(state.last_join, 6),
            leased_at={s: round(t, 6) for s, t in state.leased_at.items()},
            members={
                p: replace(
                    m,
                    joined=round(m.joined, 6),
                    last_seen=round(m.last_seen, 6),
                    away=None if m.away is None else round(m.away, 6),
                )
                for p, m in state.members.items()
            },
        )

    return rounded(one) == rounded(other)
