"""The order of a step against the best possible one, in seconds of a clock that nobody reads."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.links.schedule import Times, best, even, lower_bound, one_f_one_b, replay, uneven


def every_order(times: Times, count: int) -> float:
    """The shortest step of two stages, by trying every order of the first one's forwards and backwards."""
    shortest = float("inf")
    for order in set(itertools.permutations("F" * count + "B" * count)):
        if all(order[:i].count("B") <= order[:i].count("F") for i in range(len(order))):
            shortest = min(shortest, by_hand(times, count, order))
    return shortest


def by_hand(times: Times, count: int, order: tuple[str, ...]) -> float:
    now = line = free = back = 0.0
    home: list[float] = []
    for what in order:
        if what == "F":
            now += times.forward[0]
            line = max(now, line) + times.wire[0]
            free = max(free, line + times.latency[0]) + times.forward[1] + times.backward[1]
            back = max(free, back) + times.wire[0]
            home.append(back + times.latency[0])
        else:
            now = max(now, home.pop(0)) + times.backward[0]
    return now


@pytest.mark.parametrize(("wire", "latency"), [(0.0, 0.0), (0.3, 0.1), (0.9, 0.0), (0.2, 1.1)])
def test_the_search_finds_what_trying_everything_finds(wire: float, latency: float) -> None:
    times = even(2, wire=wire, latency=latency)
    found, proven = best(times, 4)
    assert proven
    assert found == pytest.approx(every_order(times, 4))
    assert lower_bound(times, 4) <= found + 1e-9


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(("wire", "latency"), [(0.0, 0.0), (0.2, 0.05), (0.5, 0.5), (1.0, 0.1), (1.5, 0.2)])
def test_the_rule_is_within_a_tenth_of_the_best(stages: int, wire: float, latency: float) -> None:
    times = even(stages, wire=wire, latency=latency)
    shortest, _ = best(times, 8, nodes=5_000)  # or a lower bound of it
    assert replay(times, 8) <= 1.1 * shortest


@pytest.mark.parametrize("seed", range(12))
def test_so_it_is_with_stages_and_lines_of_any_speed(seed: int) -> None:
    times = uneven(3, seed)
    assert replay(times, 8) <= 1.1 * best(times, 8, nodes=5_000)[0]


def test_what_1f1b_loses_on_a_slow_line() -> None:
    times = even(2, wire=0.5, latency=0.5)
    assert one_f_one_b(times, 16) > 1.8 * replay(times, 16)


def test_less_memory_is_kept_to() -> None:
    times = even(2, wire=0.5, latency=0.5)
    assert replay(times, 16, most=0) > 1.2 * replay(times, 16, most=4) > 1.2 * replay(times, 16)
