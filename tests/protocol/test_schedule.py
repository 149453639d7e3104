"""When rounds happen and what is exchanged: from seed and step alone, and sensible together or refused."""

from __future__ import annotations

from collections import Counter

import pytest

from potluck.protocol.config import PRESETS, Sync, SyncConfig, parse
from potluck.protocol.errors import ConfigError
from potluck.protocol.schedule import fragments, is_applied, is_round, turn


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_make_sense(preset: str) -> None:
    assert SyncConfig(preset=preset).resolved() == PRESETS[preset]


def test_coin_and_every_replace_each_other() -> None:
    by_chance = SyncConfig(preset="cocktail", coin=0.25).resolved()
    assert (by_chance.coin, by_chance.every) == (0.25, None)
    regular = SyncConfig(preset="gptjt", every=7).resolved()
    assert (regular.coin, regular.every) == (None, 7)


def test_every_fragment_has_its_turn_once_in_an_interval() -> None:
    sync = Sync(every=20, fragments=5)
    rounds = [step for step in range(60) if is_round(sync, 1, step)]
    assert rounds == list(range(3, 60, 4))
    turns = [turn for step in rounds for turn in fragments(sync, 1, step, last=False)]
    assert Counter(turns) == dict.fromkeys(range(5), 3)
    assert all(set(turns[i : i + 5]) == set(range(5)) for i in range(len(turns) - 4))


def test_a_coin_falls_for_each_fragment_as_often_as_it_says() -> None:
    sync = Sync(coin=0.1, fragments=4)
    turns = Counter(f for s in range(10_000) if is_round(sync, 3, s) for f in fragments(sync, 3, s, last=False))
    assert all(900 < turns[f] < 1100 for f in range(4))


@pytest.mark.parametrize(
    "sync", [Sync(every=20, fragments=5), Sync(every=3), Sync(coin=0.1, fragments=3), Sync(coin=0.2)]
)
def test_a_fragments_turn_counts_its_own_rounds(sync: Sync) -> None:
    seen = {f: turn(sync, 1, 0, f) for f in range(sync.fragments)}
    for step in range(1, 3000):
        here = set(fragments(sync, 1, step, last=False)) if is_round(sync, 1, step) else set()
        now = {f: turn(sync, 1, step, f) for f in range(sync.fragments)}
        assert now == {f: seen[f] + (f in here) for f in seen}
        seen = now


def test_a_closing_round_and_the_last_one_exchange_everything() -> None:
    sync = Sync(every=20, fragments=5)
    assert fragments(sync, 1, 3, last=True) == range(5)
    assert fragments(sync, 1, 4, last=False) == range(5)


def test_a_round_is_applied_after_its_delay_or_before_the_next_begins() -> None:
    sync = Sync(every=10, delay=4)
    assert [d for d in range(11, 21) if is_applied(sync, 1, 10, d)] == list(range(14, 21))
    coin = Sync(coin=0.5, delay=100)
    done = next(d for d in range(1, 50) if is_applied(coin, 1, 0, d))
    assert is_round(coin, 1, done - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{every: 10, fragments: 3}", "cannot be shared"),
        ("{every: 2, fragments: 4}", "cannot be shared"),
        ("{every: 20, fragments: 5, delay: 5}", "Lower sync.delay to 4"),
        ("{coin: 0.3, fragments: 4}", "more than a round a step"),
        ("{preset: diloco, chunk: 4096}", "everything is sent anyway"),
        ("{topk: 0.001, chunk: 64}", "less than one value"),
        ("{topk: 0.1, chunk: 32}", "less than one value"),
        ("{bits: 1}", "Raise sync.bits to 2, or set sync.topk"),
        ("{bits: 5}", "must be one of 1, 2, 3, 4, 6, 8, 16, 32"),
        ("{preset: dense, feedback: explicit}", "everything is sent, in 32 bits"),
        ("{preset: dense, decay: 0.5}", "everything is sent, in 32 bits"),
        ("{feedback: sometimes}", "must be one of implicit, explicit"),
        ("{fragments: 0}", "sync.fragments"),
        ("{coin: 0.1, every: 3}", "both set"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"sync: {text}")
    assert message in f"{caught.value} {caught.value.hint}"
    assert caught.value.hint
