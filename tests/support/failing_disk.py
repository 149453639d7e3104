"""A disk that refuses on demand."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from potluck.coordinator.store import Store


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
