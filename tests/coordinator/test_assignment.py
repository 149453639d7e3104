"""Who sits where: what holds for every set of stages and offers."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.coordinator.assignment import MOVE_GAIN, Offer, StageNeed, assign

SIZES = st.sampled_from([1.0, 2.0, 4.0, 8.0])
NEEDS = st.lists(st.builds(StageNeed, work=SIZES, memory_gb=SIZES), min_size=1, max_size=4)
OFFERS = st.lists(
    st.builds(Offer, speed=SIZES, memory_gb=SIZES, home=st.one_of(st.none(), st.integers(0, 3))),
    min_size=1,
    max_size=6,
).map(lambda offers: {f"p{i}": offer for i, offer in enumerate(offers)})
TRIES = settings(max_examples=300, deadline=None)


def loads(needs: list[StageNeed], offers: dict[str, Offer], seats: list[list[str]]) -> list[float]:
    """Time per token of every stage, slowest first."""
    speeds = [sum(offers[p].speed for p in peers) for peers in seats]
    return sorted((n.work / s if s else float("inf") for n, s in zip(needs, speeds, strict=True)), reverse=True)


def feasible(needs: list[StageNeed], offers: dict[str, Offer]) -> bool:
    """Every stage can have a peer of its own."""
    return any(
        all(offers[p].memory_gb >= n.memory_gb for p, n in zip(peers, needs, strict=True))
        for peers in itertools.permutations(offers, len(needs))
    )


@TRIES
@given(NEEDS, OFFERS)
def test_every_stage_is_filled_whenever_that_is_possible(needs: list[StageNeed], offers: dict[str, Offer]) -> None:
    seats = assign(needs, offers)
    assert (seats is not None) == feasible(needs, offers)
    assert seats is None or all(seats)


@TRIES
@given(NEEDS, OFFERS)
def test_who_fits_somewhere_sits_once_and_where_it_fits(needs: list[StageNeed], offers: dict[str, Offer]) -> None:
    seats = assign(needs, offers)
    if seats is not None:
        seated = [p for peers in seats for p in peers]
        smallest = min(n.memory_gb for n in needs)
        assert sorted(seated) == sorted(p for p, o in offers.items() if o.memory_gb >= smallest)
        for need, peers in zip(needs, seats, strict=True):
            assert peers == sorted(peers) and all(offers[p].memory_gb >= need.memory_gb for p in peers)


@TRIES
@given(NEEDS, OFFERS, st.randoms(use_true_random=False))
def test_the_order_of_offers_does_not_matter(needs: list[StageNeed], offers: dict[str, Offer], chance: object) -> None:
    items = list(offers.items())
    chance.shuffle(items)  # type: ignore[attr-defined]
    assert assign(needs, dict(items)) == assign(needs, offers)


@TRIES
@given(NEEDS, OFFERS)
def test_peers_at_home_move_only_if_that_gains(needs: list[StageNeed], offers: dict[str, Offer]) -> None:
    """With everybody at home and every stage held, the slowest stages get faster or nobody moves."""
    seats = assign(needs, offers)
    if seats is None:
        return
    homes = {
        p: o.home if o.home is not None and o.home < len(needs) else s
        for s, ps in enumerate(seats)
        for p in ps
        for o in [offers[p]]
    }
    if any(offers[p].memory_gb < needs[h].memory_gb for p, h in homes.items()) or len(set(homes.values())) < len(needs):
        return
    offers = {p: Offer(speed=offers[p].speed, memory_gb=offers[p].memory_gb, home=h) for p, h in homes.items()}
    stay = [sorted(p for p, h in homes.items() if h == s) for s in range(len(needs))]
    found = assign(needs, offers)
    assert found is not None
    assert found == stay or loads(needs, offers, found) < loads(needs, offers, stay)


@TRIES
@given(NEEDS, OFFERS)
def test_an_assignment_is_at_rest(needs: list[StageNeed], offers: dict[str, Offer]) -> None:
    """Assigned again from where they sit, no stage is emptied and the slowest does not get slower."""
    seats = assign(needs, offers)
    if seats is not None:
        home = {p: s for s, peers in enumerate(seats) for p in peers}
        again = {p: Offer(speed=offers[p].speed, memory_gb=offers[p].memory_gb, home=s) for p, s in home.items()}
        found = assign(needs, again)
        assert found is not None and all(found)
        assert loads(needs, again, found) <= loads(needs, again, seats)


def test_a_newcomer_goes_where_work_per_speed_is_highest() -> None:
    needs = [StageNeed(work=1.0, memory_gb=1.0), StageNeed(work=3.0, memory_gb=1.0)]
    offers = {p: Offer(speed=1.0, memory_gb=1.0, home=h) for p, h in (("a", 0), ("b", 1), ("c", None))}
    assert assign(needs, offers) == [["a"], ["b", "c"]]


def test_a_small_gain_moves_nobody() -> None:
    needs = [StageNeed(work=1.0, memory_gb=1.0), StageNeed(work=1.05, memory_gb=1.0)]
    offers = {p: Offer(speed=1.0, memory_gb=1.0, home=h) for p, h in (("a", 0), ("b", 0), ("c", 1), ("d", 1))}
    assert MOVE_GAIN < 1 and assign(needs, offers) == [["a", "b"], ["c", "d"]]


def test_a_chain_of_moves_fills_a_stage_that_nobody_spare_fits() -> None:
    needs = [StageNeed(work=1.0, memory_gb=m) for m in (10.0, 5.0, 1.0)]
    offers = {
        "large": Offer(speed=1.0, memory_gb=10.0, home=1),
        "medium": Offer(speed=1.0, memory_gb=5.0, home=2),
        "small": Offer(speed=1.0, memory_gb=1.0),
    }
    assert assign(needs, offers) == [["large"], ["medium"], ["small"]]
