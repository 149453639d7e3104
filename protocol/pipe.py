"""What a channel runs on: a raw pipe, settings for patience and generosity, and the ways it can end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NamedTuple, Protocol

from .errors import PotluckError, UnreachableError, WireError
from .frames import MAX_FRAME_NBYTES, Check, Reason
from .meter import Meter
from .throttle import Pace

_log = logging.getLogger(__name__)

PathKind = Literal["memory", "direct", "punched", "relayed"]  # punched: straight, as libp2p found it


class PipeClosed(UnreachableError):
    """The pipe is gone; its channel may live on."""

    code = "pipe"


class Pipe(Protocol):
    """Messages both ways, in order, until it breaks; both then raise ``PipeClosed``.

    ``send`` waits while the other side cannot take more. What was sent before ``close`` still arrives.
    ``congestion`` names the congestion control of our side's sockets (``cubic``, ``bbr``), empty where that is unknown.
    """

    kind: PathKind
    connections: int

    @property
    def congestion(self) -> str: ...

    async def send(self, message: bytes) -> None: ...

    async def recv(self) -> bytes: ...

    async def close(self) -> None: ...


class PathInfo(NamedTuple):
    """The path in use, as seen by this side's sending; None until enough was sent."""

    kind: PathKind
    rtt_seconds: float | None
    bytes_per_second: float | None
    connections: int = 1
    congestion: str = ""


def _allow(header: object) -> None:
    pass


def _log_wire_error(peer_id: str, error: WireError) -> None:
    _log.warning("peer %s: %s", peer_id, error.one_line())


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """``check`` sees a header before its payload is kept; ``on_error`` hears of every message refused.

    ``give_up`` is how long a broken path may stay broken; ``dial_timeout`` bounds one attempt. ``pace`` is one for all
    channels: the owner's cap on what goes out.
    """

    check: Check = _allow
    on_error: Callable[[str, WireError], None] = _log_wire_error
    meter: Meter = field(default_factory=Meter)
    pace: Pace | None = None
    send_window_nbytes: int = 64 << 20
    receive_window_nbytes: int = 64 << 20
    max_frame_nbytes: int = MAX_FRAME_NBYTES
    max_wire_errors: int = 3
    dial_timeout: timedelta = timedelta(seconds=10)
    give_up: timedelta = timedelta(seconds=30)
    close_timeout: timedelta = timedelta(seconds=10)
    first_backoff: timedelta = timedelta(seconds=0.1)
    last_backoff: timedelta = timedelta(seconds=3)


FINAL_CODES = frozenset({"identity", "admission", "reset", "closed", "refused"})
"""Codes of errors after which dialling the same peer again cannot resume a channel."""


def lost(peer_id: str, give_up: timedelta) -> UnreachableError:
    return UnreachableError(
        f"the path to {peer_id} broke and did not come back within {give_up.total_seconds():g} s",
        hint="send to another replica",
        code="lost",
    )


def told(peer_id: str, reason: Reason, text: str) -> PotluckError:
    """What it means here that the peer dropped the pipe for ``reason``."""
    match reason:
        case Reason.REFUSED:
            return PipeClosed(f"{peer_id} dropped the pipe: {text}")
        case Reason.FAILED:
            return UnreachableError(
                f"{peer_id} refused what we sent: {text}", hint="compare the versions", code="refused"
            )
        case Reason.RESET:
            return UnreachableError(
                f"{peer_id} does not know this channel any more: it has restarted",
                hint="dial again and send what was not acknowledged",
                code="reset",
            )
