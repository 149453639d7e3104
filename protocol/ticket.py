"""A ticket: all a volunteer needs to join a run, as one line of text to copy."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .errors import TicketError

PREFIX = "potluck1-"
_MAX_LENGTH = 2048
_CHECKSUM_NBYTES = 4


class Ticket(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Where the coordinator is, how to know it, which run, and the secret that opens the door.

    ``url`` is ``host:port``; ``fingerprint`` the SHA-256 of the coordinator's certificate, in hex;
    ``expires`` is in unix seconds.
    """

    url: Annotated[str, Meta(pattern=r"\A\S{1,255}:[0-9]{1,5}\Z")]
    fingerprint: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    run: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")]  # a folder is named after it
    secret: Annotated[str, Meta(min_length=1, max_length=128)]
    expires: Annotated[int, Meta(ge=0, le=2**53)]

    def encode(self) -> str:
        body = msgspec.msgpack.encode(self)
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str, now: float) -> Ticket:
        """The ticket in ``text``; line breaks a mail program put in are forgiven. ``now`` is unix seconds."""
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise TicketError(
                "this is not a potluck ticket", hint=f"a ticket starts with {PREFIX}", code="not-a-ticket"
            )
        damaged = TicketError(
            "the ticket is damaged: a part is missing or mistyped",
            hint="copy the whole line again",
            code="damaged",
        )
        encoded = text.removeprefix(PREFIX)
        if len(encoded) > _MAX_LENGTH or not encoded.isascii():
            raise damaged
        try:
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise damaged from None
        body, checksum = data[:-_CHECKSUM_NBYTES], data[-_CHECKSUM_NBYTES:]
        if checksum != _checksum(body):
            raise damaged
        try:
            ticket = msgspec.msgpack.decode(body, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise damaged from None
        if now >= ticket.expires:
            raise TicketError("the ticket has expired", hint="ask the operator for a new ticket", code="expired")
        return ticket


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_NBYTES]
