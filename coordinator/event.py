"""What every event is (see :mod:`.events`)."""

from __future__ import annotations

from msgspec import Struct


class Event(Struct, frozen=True, kw_only=True, tag=True):
    """Base: ``text`` is the line that a person reads."""

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def text(self) -> str:
        raise NotImplementedError
