"""The one part of the page's server that changes anything: the operator's orders, for who has the run's token.

An answer that says ``done`` comes after the order is on the disk. What comes in is hostile until its token is right: no
cookie is looked at, a page of another origin is refused, and the token is in no answer, no log and no event.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ...protocol.errors import PotluckError
from ...protocol.identity import PEER_ID_LENGTH
from ...protocol.plan import Shape
from ..hub import Hub
from ..operate import Scale, preview
from ..operating import Objection
from ..state import Action, Order

log = logging.getLogger(__name__)
MOST_BODY_NBYTES = 4096
BODY_SECONDS = 10.0
DISK_SECONDS = 20.0  # that an answer waits for the disk
WRONG_TOKENS, WRONG_SECONDS = 10, 60.0  # of one address, before it has to wait
MOST_ADDRESSES = 1000
ACTIONS = get_args(Action)
ABOUT_A_PEER = ("drain", "ban", "unban")
PEER_ID = re.compile(rf"[a-z2-7]{{{PEER_ID_LENGTH}}}\Z")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An action's body. ``peer``: id, the beginning of one, or name. ``who``: the operator's name, which all see."""

    peer: Annotated[str, Meta(max_length=64)] = ""
    why: Annotated[str, Meta(max_length=200)] = ""
    who: Annotated[str, Meta(max_length=40)] = ""
    force: bool = False


class Answer(Struct, frozen=True, kw_only=True):
    """What would happen, or (``done``) has happened. ``needs_force``: only with ``force``."""

    text: str
    done: bool
    needs_force: bool = False


class Refused(Struct, frozen=True, kw_only=True):
    error: str
    hint: str
    needs_force: bool = False


class Operation(NamedTuple):
    """One line of the API's description. ``request``, and those in ``responses``: types of the JSON."""

    path: str
    method: str
    summary: str
    request: type[Struct]
    responses: Mapping[int, tuple[str, type[Struct]]]
    parameters: tuple[tuple[str, str, str], ...]  # name, where, what it says


OPERATIONS = (
    Operation(
        path="/api/actions/{name}",
        method="post",
        summary="An operator's order: " + ", ".join(ACTIONS),
        request=Asked,
        responses={
            200: ("It is done, or with preview what it would do", Answer),
            202: ("Taken; it is done once the coordinator's disk writes again", Answer),
            400: ("The body is not what it must be", Refused),
            401: ("No token, or a wrong one", Refused),
            403: ("Asked by a page of another origin", Refused),
            404: ("No such action", Refused),
            409: ("It cannot be, as the run is", Refused),
            413: (f"A body of more than {MOST_BODY_NBYTES} bytes", Refused),
            429: ("Too many wrong tokens from this address", Refused),
        },
        parameters=(
            ("name", "path", "which action"),
            ("preview", "query", "1: only say what it would do"),
            ("Authorization", "header", "Bearer and the operator's token"),
        ),
    ),
)


class RefusalError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, error: str, hint: str, *, needs_force: bool = False) -> None:
        super().__init__(error)
        self.status, self.said = status, Refused(error=error, hint=hint, needs_force=needs_force)


class Guesses:
    """Wrong tokens by the address they came from, within the last :data:`WRONG_SECONDS`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}

    def wrong(self, address: str) -> bool:
        """Notes one more; whether there are too many."""
        key, now = network_of(address), self._clock()
        times = self._seen.pop(key, None) or deque(maxlen=WRONG_TOKENS + 1)
        self._seen[key] = times  # the newest last
        times.append(now)
        while len(self._seen) > MOST_ADDRESSES:
            self._seen.pop(next(iter(self._seen)))
        return len(times) > WRONG_TOKENS and now - times[0] < WRONG_SECONDS


def network_of(address: str) -> str:
    """An address as one guesser: of IPv6 the whole /64, which belongs to one line."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


@dataclass(kw_only=True)
class Desk:
    """Where orders are taken. ``everybody``: names of all peers that ever joined, by id, from the run's file."""

    hub: Hub
    token: str = field(repr=False)
    shape: Shape
    everybody: Callable[[], Awaitable[Mapping[str, str]]]

    def __post_init__(self) -> None:
        self._guesses = Guesses(self.hub.clock)

    def routes(self) -> list[BaseRoute]:
        return [Route("/api/actions/{name}", self.answer, methods=["POST"])]

    async def answer(self, request: Request) -> Response:
        try:
            status, said = await self.act(request)
        except RefusalError as refusal:
            headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": f"{WRONG_SECONDS:.0f}"}}
            return answered(refusal.said, refusal.status, headers.get(refusal.status))
        except PotluckError as error:  # of the disk
            return answered(Refused(error=str(error), hint=error.hint), 409)
        return answered(said, status)

    async def act(self, request: Request) -> tuple[int, Answer]:
        """The answer and its status; ``RefusalError`` for any other."""
        self.check_origin(request)
        self.check_token(request)
        name, is_preview = request.path_params["name"], request.query_params.get("preview", "0")
        if name not in ACTIONS:
            raise RefusalError(404, "there is no such action", f"One of: {', '.join(ACTIONS)}.")
        if is_preview not in ("0", "1"):
            raise RefusalError(400, "'preview' must be 1 or 0", "Leave it out to do the action.")
        asked = await body_of(request)
        if bool(asked.peer) != (name in ABOUT_A_PEER):
            takes = "needs a 'peer'" if name in ABOUT_A_PEER else "is not about one 'peer'"
            raise RefusalError(400, f"{name} {takes}", 'The body is like {"peer": "anna", "why": "wrong machine"}.')
        order = Order(action=name, why=plain(asked.why), who=plain(asked.who) or "the operator", force=asked.force)
        if asked.peer:
            peer, known = await self.found(name, asked.peer)
            order = replace(order, peer=peer, name=known)
        return await self.carry_out(order, is_preview=is_preview == "1")

    async def carry_out(self, order: Order, *, is_preview: bool) -> tuple[int, Answer]:
        hub = self.hub
        if is_preview:
            found = preview(hub.rules, hub.state, Scale(shape=self.shape, rates=hub.rates), order)
            if found.objection is not None and not found.objection.forcible:
                raise refused(found.objection)
            return 200, Answer(text=found.text, done=False, needs_force=found.objection is not None)
        if hub.standing is not None:
            raise RefusalError(409, hub.standing.note, "Mend that first; nothing was ordered.")
        log.info("the operator orders: %s %s", order.action, order.peer)
        pending = asyncio.ensure_future(hub.order(order))
        pending.add_done_callback(heeded)  # if nobody waits for it any more
        done, _ = await asyncio.wait({pending}, timeout=DISK_SECONDS)
        if not done:
            return 202, Answer(text="It is carried out as soon as the coordinator's disk writes again.", done=False)
        said = pending.result()
        if isinstance(said, Objection):
            raise refused(said)
        return 200, Answer(text=". ".join(said) + ".", done=True)

    async def found(self, action: str, text: str) -> tuple[str, str]:
        """Id and name of the peer that is meant."""
        state = self.hub.state
        here = {peer: member.name for peer, member in state.members.items()}
        people: Mapping[str, str] = {peer: ban.name for peer, ban in state.bans.items()} if action == "unban" else here
        matches = matching(text, people)
        if not matches and action == "ban":
            matches = matching(text, await self.everybody())
            if not matches and PEER_ID.match(text):
                return text, ""
        if len(matches) == 1:
            return next(iter(matches.items()))
        if matches:
            listed = ", ".join(f"{name} ({peer})" for peer, name in sorted(matches.items())[:10])
            raise RefusalError(409, f"{len(matches)} peers are meant by that: {listed}", "Name one by its id.")
        where = "banned" if action == "unban" else "here"
        raise RefusalError(409, f"nobody of that name or id is {where}", "Name a peer as the page does, or by its id.")

    # Who may.

    def check_origin(self, request: Request) -> None:
        """A browser says which page asks: it must be this one."""
        hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
        is_foreign = request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        for origin in origins:
            is_foreign |= len(hosts) != 1 or not is_same(origin, hosts[0])
        if is_foreign:
            raise RefusalError(403, "a page of another origin asks for this", "Use the run's own page, or the command.")

    def check_token(self, request: Request) -> None:
        given = request.headers.getlist("authorization")
        kind, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        is_right = hmac.compare_digest(token.strip().encode(), self.token.encode())
        if is_right and kind.lower() == "bearer":
            return
        if given and self._guesses.wrong(request.client.host if request.client else ""):
            raise RefusalError(429, "too many wrong tokens", f"Wait {WRONG_SECONDS:.0f} seconds.")
        what = "this is not the operator's token" if given else "this needs the operator's token"
        raise RefusalError(401, what, "On the coordinator's machine: potluck coordinator token.")


async def body_of(request: Request) -> Asked:
    """The body, read no further than it may be long."""
    data = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > MOST_BODY_NBYTES:
                    raise RefusalError(413, f"a body of more than {MOST_BODY_NBYTES} bytes", "Give a shorter reason.")
        return msgspec.json.decode(data, type=Asked) if data.strip() else Asked()
    except TimeoutError:
        raise RefusalError(400, "the body did not come", "Send it at once.") from None
    except ClientDisconnect:
        raise RefusalError(400, "the line broke", "Ask again.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusalError(
            400, f"the body is not what it must be: {error}", 'It is like {"why": "power cut"}.'
        ) from None


def matching(text: str, people: Mapping[str, str]) -> dict[str, str]:
    """Who is meant by an id, else by a name or the beginning of an id. Peers choose their names: two may match."""
    if text in people:
        return {text: people[text]}
    return {peer: name for peer, name in people.items() if name == text or (len(text) >= 4 and peer.startswith(text))}


def is_same(origin: str, host: str) -> bool:
    """Whether a page's origin is the host that was asked."""
    try:
        scheme, place = urlsplit(origin)[:2]
    except ValueError:
        return False
    end = DEFAULT_PORTS.get(scheme, "")
    return bool(end) and place.lower().removesuffix(end) == host.lower().removesuffix(end)


def plain(text: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def refused(against: Objection) -> RefusalError:
    return RefusalError(409, against.text, against.hint, needs_force=against.forcible)


def heeded(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def answered(said: Struct, status: int, headers: Mapping[str, str] | None = None) -> Response:
    packed = msgspec.json.encode(said)
    return Response(
        packed, status, headers={**(headers or {}), "Cache-Control": "no-store"}, media_type="application/json"
    )
