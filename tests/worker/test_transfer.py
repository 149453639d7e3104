"""Fetching a stage's state piece by piece: from several donors, from liars and dead ones, and from where it stopped."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potluck.protocol.errors import WireError
from potluck.protocol.frames import Frame, Kind
from potluck.protocol.plan import SavePoint
from potluck.protocol.throttle import Bucket
from potluck.worker import inventory as inv
from potluck.worker import transfer
from potluck.worker.donor import MOST_REQUESTS, Donor
from potluck.worker.inventory import PARTS, Part, PieceName, StateName
from potluck.worker.mailbox import Fenced
from potluck.worker.stage import State, digest
from potluck.worker.transfer import Desk, Fetch, Wanted

SIZE = 3 * inv.PIECE_NBYTES // 4 + 12345
RUN = b"testrun1"
Change = Callable[[Frame], Frame | None]


def make_state(seed: int = 0, *, momentum: bool = False, own: int = 0, updates: int = 7) -> State:
    shared, private = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + own)
    g = torch.randn(SIZE, generator=shared)
    outer = torch.randn(SIZE, generator=shared) if momentum else None
    point = SavePoint(kind="round", generation=3, step=40, first_layer=0, last_layer=2, digest=digest(g))
    m, v = torch.randn(SIZE, generator=private), torch.rand(SIZE, generator=private)
    return State(point=point, g=g, m=m, v=v, updates=updates, momentum=outer)


def without_moments(state: State) -> State:
    return replace(state, m=None, v=None, updates=0)


class Market:
    """Donors and one newcomer, joined by memory; ``changes`` may alter or swallow what a donor sends."""

    def __init__(self, states: dict[str, State | None], mbps: float = 0.0) -> None:
        self.sent = Counter[str]()
        self.changes: dict[str, Change] = {}
        self.donors: dict[str, Donor] = {}
        for peer, state in states.items():
            post = lambda _, frame, peer=peer: self._deliver(peer, frame)  # noqa: E731
            self.donors[peer] = Donor(RUN, lambda _, s=state: s, lambda _: None, post, Bucket(mbps))
        self.desk = Desk(RUN, lambda peer, frame: self.donors[peer].ask("me", frame.header))

    def _deliver(self, peer: str, frame: Frame) -> None:
        changed = self.changes.get(peer, lambda f: f)(frame)
        if changed is not None:
            self.sent[peer] += len(changed.payload)
            self.desk.put(peer, changed)

    def fetch(self, folder: Path, wanted: State, **more: object) -> State:
        want = Wanted(point=wanted.point, size=SIZE, moments=bool(more.pop("moments", True)))
        limit = more.pop("limit", None) or Bucket(0.0)
        self.newest = Fetch(want, list(self.donors), self.desk, folder, limit, **more)  # type: ignore[arg-type]
        return self.newest.run()

    def close(self) -> None:
        for donor in self.donors.values():
            donor.close()


@pytest.fixture
def market():
    made: list[Market] = []

    def make(**states: State | None) -> Market:
        made.append(Market(states))
        return made[-1]

    yield make
    for one in made:
        one.close()


def only(piece: Callable[[PieceName], bool], then: Change) -> Change:
    return lambda frame: then(frame) if piece(inv.read(frame.header)[1]) else frame


def no_listing(piece: PieceName) -> bool:
    return piece.part != Part.INVENTORY


def other_bytes(frame: Frame) -> Frame:
    name, piece = inv.read(frame.header)
    return inv.frame(Kind.STATE, RUN, name, piece, bytes(len(frame.payload)))


def equal(a: State, b: State) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in ((a.g, b.g), (a.m, b.m), (a.v, b.v), (a.momentum, b.momentum))
    ) and (a.updates, a.point) == (b.updates, b.point)


@pytest.mark.parametrize("momentum", [False, True])
def test_one_donor_gives_it_all(market, tmp_path, momentum):
    state = make_state(momentum=momentum)
    got = market(a=state).fetch(tmp_path / "fetch", state)
    assert equal(got, state)
    assert not (tmp_path / "fetch").exists()


def test_pieces_come_from_all_donors_and_moments_of_a_piece_from_one(market, tmp_path):
    states = {p: make_state(own=i) for i, p in enumerate("abc")}
    ours = market(**states)
    together, first = threading.Barrier(3), set[int]()

    def begin_together(frame: Frame) -> Frame:
        me = threading.get_ident()
        if me not in first:
            first.add(me)
            together.wait(10.0)  # until each has been asked for a piece
        return frame

    ours.changes = dict.fromkeys("abc", only(no_listing, begin_together))
    got = ours.fetch(tmp_path / "fetch", states["a"])
    assert torch.equal(got.g, states["a"].g)
    for number in range(inv.count(SIZE, Part.MOMENTS)):
        start, end = inv.span(SIZE, PieceName(Part.MOMENTS, number))
        givers = [s for s in states.values() if torch.equal(s.m[start:end], got.m[start:end])]
        assert len(givers) == 1
        assert torch.equal(givers[0].v[start:end], got.v[start:end])
    assert all(ours.sent[p] >= inv.PIECE_NBYTES for p in "abc")


def test_a_dead_donors_pieces_are_asked_elsewhere(market, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)
    state = make_state()
    ours = market(a=state, b=state, c=state)
    ours.changes = {"a": only(no_listing, lambda frame: None), "b": lambda frame: None}
    assert equal(ours.fetch(tmp_path / "fetch", state), state)


def test_donors_that_all_fall_silent_are_given_up(market, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.2)
    state = make_state()
    ours = market(a=state, b=state)
    ours.changes = dict.fromkeys("ab", only(no_listing, lambda frame: None))
    with pytest.raises(transfer.LackingError, match="does not answer") as error:
        ours.fetch(tmp_path / "fetch", state)
    assert error.value.donors == ()  # it may be our line


def test_a_donor_whose_pieces_are_not_as_listed_is_asked_no_more(market, tmp_path):
    state = make_state()
    ours = market(a=state, b=state)
    ours.changes = {"a": only(no_listing, other_bytes)}
    assert equal(ours.fetch(tmp_path / "fetch", state), state)
    assert list(ours.newest._donors) == ["b"]


def test_a_listing_of_other_weights_is_found_out_by_the_digest(market, tmp_path):
    """Every piece is as listed, and yet it is not the run's state."""
    state, other = make_state(), make_state(seed=1, own=5)
    ours = market(a=other, b=state)
    got = ours.fetch(tmp_path / "fetch", state)
    assert torch.equal(got.g, state.g)
    liars = market(a=other)
    with pytest.raises(WireError, match="not the run's"):
        liars.fetch(tmp_path / "liars", state)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_moments_that_would_ruin_every_weight_are_refused(market, tmp_path, bad):
    state = make_state()
    wrong = replace(state, v=state.v.clone())
    wrong.v[SIZE - 1] = bad
    with pytest.raises(WireError, match="its "):
        market(a=wrong).fetch(tmp_path / "fetch", state)


def test_who_has_no_state_says_so(market, tmp_path):
    state = make_state()
    assert equal(market(a=None, b=state).fetch(tmp_path / "b", state), state)
    with pytest.raises(transfer.LackingError, match="does not hold it") as error:
        market(a=None).fetch(tmp_path / "none", state)
    assert error.value.donors == ("a",)


def test_a_keepers_state_has_no_moments(market, tmp_path):
    """They come from a replica if there is one, and are said to begin anew if there is none."""
    state = make_state(momentum=True)
    bare = without_moments(state)
    assert equal(market(keeper=bare).fetch(tmp_path / "a", state), bare)
    assert equal(market(keeper=bare, replica=state).fetch(tmp_path / "b", state), state)
    assert equal(market(replica=state).fetch(tmp_path / "c", state, moments=False), bare)


def test_a_killed_fetch_goes_on_where_it_was(market, tmp_path):
    state = make_state(momentum=True)
    ours = market(a=state)
    arrived = threading.Event()
    count = Counter[int]()

    def stop_halfway(frame: Frame) -> Frame | None:
        count[0] += 1
        if count[0] > 8:
            arrived.set()
            return None
        return frame

    ours.changes = {"a": only(no_listing, stop_halfway)}
    with pytest.raises(Fenced):
        ours.fetch(tmp_path / "fetch", state, stopped=arrived.is_set)
    first = ours.newest.nbytes
    assert first >= 4 * inv.PIECE_NBYTES
    with (tmp_path / "fetch" / "journal").open("ab") as journal:  # killed in the middle of a record
        journal.write(b"\x01\x00")
    data = bytearray((tmp_path / "fetch" / "data").read_bytes())
    data[100] ^= 1  # and a piece that never reached the disk
    (tmp_path / "fetch" / "data").write_bytes(data)
    again = market(a=state)
    assert equal(again.fetch(tmp_path / "fetch", state), state)
    whole = sum(inv.nbytes(SIZE, PieceName(p, i)) for p in PARTS for i in range(inv.count(SIZE, p)))
    assert again.newest.nbytes == whole - first + inv.PIECE_NBYTES


def test_what_nobody_asked_for_does_not_come_in(market):
    desk = market().desk
    with pytest.raises(WireError, match="not asked for"):
        desk.put("a", inv.frame(Kind.STATE, RUN, StateName(1, 2, 0, 1), PieceName(Part.G, 0), b"x"))


def test_one_peer_cannot_keep_a_donor_busy():
    gate = threading.Event()
    donor = Donor(RUN, lambda _: gate.wait(10.0) and None, lambda _: None, lambda peer, frame: None, Bucket(0.0))
    request = inv.frame(Kind.STATE_REQUEST, RUN, StateName(1, 2, 0, 1), PieceName(Part.G, 0)).header
    for _ in range(MOST_REQUESTS):
        donor.ask("a", request)
    with pytest.raises(WireError, match="too much"):  # the thread may have taken one of them
        donor.ask("a", request) or donor.ask("a", request)
    donor.ask("b", request)
    gate.set()
    donor.close()


@pytest.mark.parametrize(
    "change",
    [
        {"size": SIZE + 1},
        {"g": b""},
        {"g": b"x" * 32 * 4 * 1000},
        {"moments": b"x" * 33},
        {"momentum": b"x"},
    ],
    ids=str,
)
def test_an_inventory_of_another_size_is_refused(change):
    import msgspec

    good = inv.inventory(make_state())
    assert inv.decode(inv.encode(good), SIZE) == good
    with pytest.raises(WireError):
        inv.decode(inv.encode(msgspec.structs.replace(good, **change)), SIZE)
    with pytest.raises(WireError):
        inv.decode(inv.encode(good)[:-1], SIZE)


def test_the_owners_limit_is_kept():
    now = [0.0]
    bucket = Bucket(8.0, lambda: now[0])  # a megabyte a second
    assert bucket.take(1_000_000) == 0.0  # a second's worth at once
    assert bucket.take(500_000) == pytest.approx(0.5)
    assert bucket.take(1_000_000) == pytest.approx(1.5)
    now[0] = 2.0
    assert bucket.take(500_000) == pytest.approx(0.0)
    now[0] = 1000.0
    assert bucket.take(2_000_000) == pytest.approx(1.0)  # what was not used is not saved up
    assert Bucket(0.0).take(10**12) == 0.0


def test_a_fetch_asks_no_faster_than_the_owner_allows(market, tmp_path):
    state = make_state()
    taken: list[int] = []

    class Limit(Bucket):
        def take(self, nbytes: int) -> float:
            taken.append(nbytes)
            return 0.01

    market(a=state).fetch(tmp_path / "fetch", state, limit=Limit(0.0))
    assert sum(taken) == SIZE * 12
