"""Alerts to an address of the operator's choice: a POST of JSON whenever what is wrong changes.

What counts is the newest: while an address does not answer, changes are put together, and the next message that comes
through says all that is new since the last one. Nobody waits for it, and the address is in no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ..dashboard.shapes import Alert

log = logging.getLogger(__name__)
SEND_SECONDS = 10.0  # for everything from dialling to the answer's first line
PAUSE_SECONDS = 10.0  # between two messages
FIRST_RETRY_SECONDS, MOST_RETRY_SECONDS, MOST_ASKED_SECONDS = 5.0, 300.0, 3600.0
MOST_TEXT, MOST_ALERTS = 300, 20  # characters of an alert; alerts in a message
MOST_CONTENT = 1900  # characters of a chat message: Discord takes 2000
MOST_HEADERS = 16 * 1024  # bytes of an answer that are read
Key = tuple[str, float]  # name and since


@dataclass(frozen=True)
class Answer:
    status: int
    retry_seconds: float | None = None  # as Retry-After asks


class Webhook:
    """``tell`` it what stands, whenever; ``follow`` delivers it in the background."""

    def __init__(
        self,
        url: str,
        kind: str,
        run: Mapping[str, str],
        pause_seconds: float = PAUSE_SECONDS,
        retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self._url, self.kind, self.run = url, kind, run
        self.pause_seconds, self.retry_seconds = pause_seconds, retry_seconds
        self.delivered: dict[Key, Alert] = {}
        self._newest: dict[Key, Alert] = {}
        self._told = asyncio.Event()
        self._failed = ""  # why the last try did, as it was logged

    def __repr__(self) -> str:
        return f"Webhook(kind={self.kind!r})"

    def tell(self, alerts: Sequence[Alert]) -> None:
        """All alerts that stand now."""
        self._newest = {(alert.name, alert.since): alert for alert in alerts}
        if self._newest.keys() != self.delivered.keys():
            self._told.set()

    async def follow(self) -> None:
        """Delivers until it is cancelled."""
        tries = 0
        while True:
            await self._told.wait()
            self._told.clear()
            newest = self._newest
            if newest.keys() == self.delivered.keys():
                continue
            asked = await self.deliver(newest)
            if asked is None:
                tries = 0
                await asyncio.sleep(self.pause_seconds)
            else:
                self._told.set()
                await asyncio.sleep(max(asked, min(MOST_RETRY_SECONDS, self.retry_seconds * 2.0 ** min(tries, 10))))
                tries += 1

    async def last_word(self, seconds: float) -> None:
        """One more try, if something is still to be told."""
        if self._newest.keys() != self.delivered.keys():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.deliver(self._newest)

    async def deliver(self, newest: Mapping[Key, Alert]) -> float | None:
        """One message of what differs from the last; None if it was taken, else seconds to wait at least."""
        raised = [alert for key, alert in newest.items() if key not in self.delivered]
        resolved = [alert for key, alert in self.delivered.items() if key not in newest]
        body = message(self.kind, self.run, raised, resolved, list(newest.values()), time.time())
        try:
            async with asyncio.timeout(SEND_SECONDS):
                answer = await post(self._url, body)
        except TimeoutError:
            return self._fails("it does not answer")
        except ssl.SSLError as error:
            return self._fails(f"its certificate or TLS is not right ({error.reason or type(error).__name__})")
        except OSError as error:
            return self._fails(f"it cannot be reached ({type(error).__name__})")  # its text names the address
        except (ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return self._fails("what it answers is not HTTP")
        if not 200 <= answer.status < 300:
            again = "; redirects are not followed" if 300 <= answer.status < 400 else ""
            return self._fails(f"it answers {answer.status}{again}", answer.retry_seconds or 0.0)
        self.delivered = dict(newest)
        if self._failed:
            log.info("observe.webhook takes messages again")
        self._failed = ""
        return None

    def _fails(self, why: str, pause: float = 0.0) -> float:
        if why != self._failed:
            log.warning("observe.webhook has not taken a message: %s. It is tried again.", why)
        self._failed = why
        return pause


async def post(url: str, body: bytes) -> Answer:
    """Sends ``body``, reads the answer's head. ``OSError`` if that cannot be, ``ValueError`` for what is not HTTP."""
    parts = urlsplit(url)
    is_tls, host = parts.scheme == "https", parts.hostname or ""
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"User-Agent: potluck\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    context = ssl.create_default_context() if is_tls else None
    reader, writer = await asyncio.open_connection(
        host, parts.port or (443 if is_tls else 80), ssl=context, limit=MOST_HEADERS
    )
    try:
        writer.write(head.encode("ascii") + body)
        await writer.drain()
        while True:
            status, headers = read_head(await reader.readuntil(b"\r\n\r\n"))
            if status >= 200:  # those below come before the answer
                return Answer(status, retry_after(headers.get("retry-after", "")))
    finally:
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            writer.transport.abort()


def read_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise ValueError("not HTTP")
    pairs = (line.partition(":") for line in lines if ":" in line)
    return int(rest[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def retry_after(text: str) -> float | None:
    """In seconds; a date is not read."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, MOST_ASKED_SECONDS) if math.isfinite(seconds) and seconds >= 0 else None


def message(
    kind: str,
    run: Mapping[str, str],
    raised: Sequence[Alert],
    resolved: Sequence[Alert],
    standing: Sequence[Alert],
    now: float,
) -> bytes:
    """What is sent: for programs all of it, for a chat one line each, whose words are nothing but words there."""
    if kind == "generic":
        lists = {"raised": raised, "resolved": resolved, "standing": standing}
        rows = {key: [row(alert) for alert in alerts[:MOST_ALERTS]] for key, alerts in lists.items()}
        return msgspec.json.encode({"run": dict(run), "time": now, **rows})
    lines = [f"{run['name']}: {text}" for text in [*map(short, raised), *(f"Resolved: {short(a)}" for a in resolved)]]
    text = "\n".join(lines[:MOST_ALERTS])
    if kind == "slack":
        for char, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            text = text.replace(char, name)
        return msgspec.json.encode({"text": text[:MOST_CONTENT]})
    marked = "".join(f"\\{char}" if char in "\\*_~`|>#[]()<" else char for char in text)
    content: dict[str, Any] = {"content": marked[:MOST_CONTENT], "allowed_mentions": {"parse": []}}
    return msgspec.json.encode(content)


def row(alert: Alert) -> dict[str, Any]:
    return {"name": alert.name, "text": short(alert), "since": alert.since}


def short(alert: Alert) -> str:
    return alert.text if len(alert.text) <= MOST_TEXT else f"{alert.text[: MOST_TEXT - 1]}…"
