from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from manifests import manifest

from potluck.protocol.manifest import WHOLE, Manifest, Shard, Source, Stage
from potluck.protocol.objective import Special
from potluck.worker.mixture import Mixture, turns
from potluck.worker.permutation import epoch_key, permute

ROWS = {"web": (40, 40, 7), "p3": (13, 13), "ni": (30,), "cot": (3, 2)}


def source(name: str, rows: tuple[int, ...], heldout: int) -> Source:
    train = tuple(Shard(f"{number:x}" * 64, n) for number, n in enumerate(rows))
    return Source(name=name, origin=name, license="MIT", train=train, heldout=(Shard("f" * 64, heldout),))


def mixed() -> Manifest:
    return Manifest(
        seq_len=8,
        dtype="uint16",
        vocab_size=300,
        special=Special(eos=0, pad=0),
        tokenizer_sha256="0" * 64,
        sources=tuple(source(name, rows, 4) for name, rows in ROWS.items()),
        stages=(
            Stage(name="first", rows=333, mix={"web": WHOLE}),
            Stage(name="second", rows=1000, mix={"web": 5_500, "p3": 2_000, "ni": 2_000, "cot": 500}),
            Stage(name="third", rows=100, mix={"cot": 3_333, "ni": 6_667}),
        ),
    )


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (55, 20, 20, 5), (3_333, 3_333, 3_334), (9_999, 1), (1, 2, 3, 4, 5, 6, 7, 8, 9, 955)]
)
def test_in_a_period_a_source_is_off_by_less_than_a_sample(weights: tuple[int, ...]) -> None:
    order = turns(weights)
    period = len(order.order)
    n = np.arange(period + 1)[:, None]
    off = order.before - n * np.array(weights) / sum(weights)
    assert period <= sum(weights)
    assert np.abs(off).max() < 1
    assert (order.before[-1] * sum(weights) == period * np.array(weights)).all()


@pytest.mark.parametrize("seed", [0, 7])
def test_shares_hold_over_every_window_from_a_stages_start(seed: int) -> None:
    mixture = Mixture(mixed(), seed)
    seen: Counter[int] = Counter()
    for n in range(1000):
        seen[mixture.place(333 + n).source] += 1
        for number, share in enumerate((0.55, 0.2, 0.2, 0.05)):
            assert abs(seen[number] - share * (n + 1)) < 2
    assert mixture.counts(1, 1000) == dict(seen) == {0: 550, 1: 200, 2: 200, 3: 50}


def test_who_takes_every_fourth_sample_meets_every_source() -> None:
    mixture = Mixture(mixed(), 3)
    for lane in range(4):
        seen = Counter(mixture.place(333 + n).source for n in range(lane, 1000, 4))
        assert len(seen) == 4
        assert 0.45 < seen[0] / 250 < 0.65


@pytest.mark.parametrize("seed", [0, 1])
def test_positions_count_up_in_every_source_through_all_stages(seed: int) -> None:
    """In closed form: any index can be asked for first."""
    mixture, counts = Mixture(mixed(), seed), Counter[int]()
    for index in range(1700):
        place = mixture.place(index)
        assert place.stage == (index >= 333) + (index >= 1333)
        assert place.position == counts[place.source]
        counts[place.source] += 1
    indices = np.random.default_rng(5).integers(0, 10**12, 200).tolist()
    assert [Mixture(mixed(), seed).place(i) for i in indices] == [mixture.place(i) for i in indices]


def test_an_epoch_is_every_row_once_shard_by_shard() -> None:
    mixture, whole = Mixture(mixed(), 5), mixed()
    first = 0
    for number, rows in enumerate(ROWS.values()):
        epochs = []
        for epoch in range(3):
            places = [mixture.at(number, epoch * sum(rows) + p) for p in range(sum(rows))]
            assert sorted(p.number for p in places) == list(range(first, first + sum(rows)))
            changes = sum(a.shard != b.shard for a, b in itertools.pairwise(places))
            assert changes == len(rows) - 1
            for place in places:
                assert place.number == first + sum(rows[: place.shard]) + place.row
            epochs.append([p.number for p in places])
        assert epochs[0] != epochs[1] != epochs[2]
        first += sum(rows)
    assert first == whole.n_train
    assert len({tuple(dict.fromkeys(mixture.at(0, e * 87 + p).shard for p in range(87))) for e in range(20)}) > 2


def test_the_next_shard_is_the_one_that_comes_next() -> None:
    mixture = Mixture(mixed(), 5)
    places = [mixture.at(0, position) for position in range(5 * 87)]
    for place, later in itertools.pairwise(places):
        if later.shard != place.shard:
            assert mixture.next_shard(place) == later.shard
    assert mixture.next_shard(places[0]) == next(p.shard for p in places if p.shard != places[0].shard)


@pytest.mark.parametrize("seed", [0, 3, 2**62 - 1])
def test_one_text_in_one_shard_has_the_order_that_it_always_had(seed: int) -> None:
    n, mixture = 37, Mixture(manifest(37, 5, 8), seed)
    for index in (*range(4 * n), 10**9, 2**40):
        epoch, place = divmod(index, n)
        found = mixture.place(index)
        assert found.number == found.row == permute(place, n, epoch_key(seed, epoch))
    assert [mixture.heldout(index, -1).row for index in range(5)] == list(range(5))


def test_heldout_samples_have_the_stages_shares_and_no_seed() -> None:
    places = [Mixture(mixed(), seed).heldout(index, 1) for seed in (0, 9) for index in range(100)]
    assert places[:100] == places[100:]
    assert Counter(p.source for p in places[:100]) == {0: 55, 1: 20, 2: 20, 3: 5}
    assert [p.row for p in places[:100] if p.source == 3] == [0, 1, 2, 3, 0]


def test_negative_indices_are_refused() -> None:
    with pytest.raises(IndexError, match="negative"):
        Mixture(mixed(), 0).place(-1)


def test_far_places_cost_no_more_than_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    mixture = Mixture(mixed(), 0)
    monkeypatch.setattr("potluck.worker.mixture.permute", lambda *a: calls.append(a) or permute(*a))
    mixture.place(10**15)
    assert len(calls) <= 1 + max(map(len, ROWS.values()))
