"""What a report holds: the answers to everything that its page may ask, of a run that is over or goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import msgspec

from . import bundle
from .answers import encoded
from .endpoints import TABLE, Arguments, Endpoint
from .parameters import LAST_MOMENT, Refused, read
from .server import FILES
from .shapes import EventRow, RoundRow, State
from .source import Source

T = TypeVar("T")
MOST_POINTS = 50_000  # of the curve as it was recorded; a longer one is there down-sampled only
MOST_EVENTS = 10_000
MOST_PEERS = 500
MOST_LINKS = 300  # whose course is there
MOST_ROUNDS, ROUND_PAGES = 2000, 200
LISTED_STEPS, SLOWEST_STEPS, NEWEST_STEPS = 100, 50, 20  # in lists, and with pages of their own
INCIDENT_MOMENTS, EVEN_MOMENTS = 300, 100
STATES_NBYTES = 48 << 20  # of all moments together, before they are compressed
PAGE = 1000  # rows asked for at once


def report(source: Source) -> bytes:
    """One HTML file. ``StateError`` if the run's file cannot be read."""
    return bundle.bundle(FILES, dict(answers(source)))


def answers(source: Source) -> Iterator[tuple[str, bytes]]:
    """Paths as the page asks them, with their JSON."""
    state = source.state()
    yield "api/state", msgspec.json.encode(state)
    for path in ("api/curve?most=2000", "api/traffic?most=500", "api/incidents", "api/leaderboard", "api/links"):
        yield path, asked(source, path)
    yield "api/evaluations", asked(source, "api/evaluations")
    points = source.points(0)
    if len(points) <= MOST_POINTS:
        yield "api/points", msgspec.json.encode(points)
    yield "api/events", msgspec.json.encode(newest_events(source))
    rounds = all_rounds(source)
    yield "api/rounds", msgspec.json.encode(thinned(rounds))
    slow, new = source.steps(LISTED_STEPS, "slowest"), source.steps(LISTED_STEPS, "newest")
    yield f"api/steps?limit={LISTED_STEPS}&order=newest", msgspec.json.encode(new)
    yield f"api/steps?limit={LISTED_STEPS}&order=slowest", msgspec.json.encode(slow)
    steps = {row.step for row in (*slow[:SLOWEST_STEPS], *new[:NEWEST_STEPS])}
    pages = [
        *(f"api/rounds/{row.step}" for row in rounds[:ROUND_PAGES]),
        *(f"api/steps/{step}" for step in sorted(steps)),
        *(f"api/peers/{peer}" for peer in peers(source, state)),
        *(f"api/links/{link.sender}/{link.receiver}" for link in source.links(None)[:MOST_LINKS]),
        *(f"api/state?at={at}" for at in moments(source, state, points[-1].time if points else state.now)),
    ]
    for path in pages:
        try:
            yield path, asked(source, path)
        except Refused as refused:
            if refused.status_code != 404:  # a run that goes on may have lost it since
                raise


def asked(source: Source, path: str) -> bytes:
    """The JSON that the server would answer. `Refused` if it would refuse."""
    endpoint, arguments = meant(path)
    return encoded(endpoint, endpoint.ask(source, arguments))


def meant(path: str) -> tuple[Endpoint, Arguments]:
    """Which question ``path`` asks, and with what."""
    parts = urlsplit(f"/{path}")
    for endpoint in TABLE:
        if found := re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", endpoint.path), parts.path):
            return endpoint, read(endpoint.params, found.groupdict(), parse_qsl(parts.query))
    raise Refused(404, "There is no such address", "")


def newest_events(source: Source) -> list[EventRow]:
    """Oldest first."""
    found: list[EventRow] = []
    while more := source.events(found[-1].id if found else 0, None, PAGE, None):
        found = (found + more)[-MOST_EVENTS:]
    return found


def all_rounds(source: Source) -> list[RoundRow]:
    """Newest first."""
    found: list[RoundRow] = []
    while more := source.rounds(found[-1].step if found else None, PAGE):
        found += more
    return found


def thinned(rounds: Sequence[RoundRow]) -> list[RoundRow]:
    """The newest, the degraded, and evenly so many of the others that there are about :data:`MOST_ROUNDS`."""
    if len(rounds) <= MOST_ROUNDS:
        return list(rounds)
    first, rest = rounds[:ROUND_PAGES], rounds[ROUND_PAGES:]
    kept = {row.step for row in evenly(rest, MOST_ROUNDS - ROUND_PAGES)}
    kept |= {row.step for row in evenly([row for row in rest if row.degraded], MOST_ROUNDS - ROUND_PAGES)}
    return [*first, *(row for row in rest if row.step in kept)]


def peers(source: Source, state: State) -> list[str]:
    """Those who are here first, then those who did most."""
    known = dict.fromkeys([*(row.id for row in state.peers), *(row.peer for row in source.leaderboard())])
    return list(known)[:MOST_PEERS]


def moments(source: Source, state: State, last: float) -> list[str]:
    """At which the state is worth a look: of every incident if there are not too many, and evenly through the run until
    ``last``; as JavaScript writes these numbers."""
    room = STATES_NBYTES // len(msgspec.json.encode(state))
    times = evenly([incident.time for incident in source.incidents(None)], min(INCIDENT_MOMENTS, room * 3 // 4))
    span, count = last - state.started, min(EVEN_MOMENTS, room // 4)
    if span > 0:
        times += [round(state.started + span * i / count, 1) for i in range(1, count + 1)]
    return [as_number(at) for at in sorted(set(times)) if 0 <= at <= LAST_MOMENT]


def as_number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def evenly(rows: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of them, the first and the last among these."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * (len(rows) - 1) // max(1, most - 1)] for i in range(most)]
