"""Lines and traces as data, and what the lines do to packets in virtual time."""

from __future__ import annotations

import math

import pytest

from potluck.benchmarks.netlab import PROFILES, UNLIMITED, Line, Pair, Profile, Turn, daylight, sessions
from potluck.benchmarks.netlab.net import LEAST_PACKETS, Net

HOME = Line(up_mbit=8, down_mbit=80, delay_ms=10, queue_ms=100)


def network(*lines: Line, pairs: dict[tuple[int, int], Pair] | None = None, seed: int = 0, mtu: int = 1500) -> Net:
    profile = Profile(name="test", about="", lines=lines, pairs=pairs or {})
    return Net(profile, len(lines), mtu=mtu, seed=seed)


def arrivals(net: Net, until: float = math.inf) -> list[tuple[float, int, bytes]]:
    got = []
    while (moment := net.next()) is not None and moment <= until:
        got += net.due(moment)
    return got


def test_what_no_line_has_is_refused():
    for wrong in ({"up_mbit": 0}, {"delay_ms": -1}, {"loss": 1.0}, {"jitter_ms": math.inf}, {"queue_ms": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Line(**wrong)
    with pytest.raises(ValueError, match="no pair"):
        Profile(name="x", about="", lines=(HOME,), pairs={(0, 1): Pair()})


def test_scaled_changes_rates_by_one_factor_and_times_by_the_other():
    line = PROFILES["home-cable"].after(HOME).scaled(rate=0.01, time=0.5)
    assert line.line(0) == Line(up_mbit=0.08, down_mbit=0.8, delay_ms=5, queue_ms=50)
    assert (line.line(1).up_mbit, line.line(1).down_mbit) == (0.2, 2.0)
    assert line.line(1).jitter_ms == PROFILES["home-cable"].line(0).jitter_ms / 2
    assert UNLIMITED.scaled(rate=0.01, time=2) == Line(queue_ms=200)


def test_a_profile_gives_lines_to_any_number_of_hosts_and_pairs_to_those_behind_the_first():
    world = PROFILES["worldwide-8"].after(UNLIMITED)
    assert world.pair(0, 1) is None
    assert world.pair(1, 2) == world.pair(2, 1) == world.pair(9, 2) == Pair(mbit=790, delay_ms=33.5)
    assert world.pair(1, 9) == Pair(mbit=2000, delay_ms=2.5)
    assert len(PROFILES["worldwide-8"].pairs) == 8 * 9 / 2
    assert world.scaled(rate=0.1, time=2).pair(4, 5) == Pair(mbit=110, delay_ms=34, queue_ms=200)


def test_sessions_follow_from_the_seed_alone_and_have_the_rates_asked_for():
    asked = {"share_per_hour": 0.5, "back_seconds": 600.0, "duration": 100 * 3600.0}
    turns = sessions(3, hosts=40, **asked)
    assert turns == sessions(3, hosts=40, **asked) and turns != sessions(4, hosts=40, **asked)
    assert [t for t in turns if t.host < 5] == sessions(3, hosts=5, **asked)
    gone, away = 0, 0.0
    for host in range(40):
        own = [t for t in turns if t.host == host]
        assert [t.up for t in own] == [bool(k % 2) for k in range(len(own))]
        gone += sum(not t.up for t in own)
        away += sum(back.seconds - left.seconds for left, back in zip(own[::2], own[1::2], strict=False))
    up_hours = 40 * 100 - away / 3600
    assert gone / up_hours == pytest.approx(0.5, rel=0.1)
    assert away / gone == pytest.approx(600, rel=0.1)
    assert sessions(3, hosts=4, share_per_hour=0, back_seconds=1, duration=1e6) == []


def test_daylight_has_its_low_at_midnight_and_its_high_at_noon():
    turns = daylight(1, hosts=200, low=0.3, high=0.9, duration=2000.0, day_seconds=1000.0)
    assert turns == daylight(1, hosts=200, low=0.3, high=0.9, duration=2000.0, day_seconds=1000.0)
    up = [True] * 200

    def share(until: float) -> float:
        while turns and turns[0].seconds <= until:
            turn: Turn = turns.pop(0)
            assert turn.up != up[turn.host]
            up[turn.host] = turn.up
        return sum(up) / 200

    expected = {0.0: 0.3, 250.0: 0.6, 500.0: 0.9, 750.0: 0.6, 1000.0: 0.3, 1500.0: 0.9}
    for moment, asked in expected.items():
        assert share(moment) == pytest.approx(asked, abs=0.05), moment


def test_a_packet_takes_the_line_up_the_way_and_the_line_down():
    net = network(HOME, HOME, pairs={(0, 1): Pair(mbit=4, delay_ms=30)})
    net.enter(5.0, 0, 1, 1000, b"a")
    ((moment, host, packet),) = arrivals(net)
    assert (host, packet) == (1, b"a")
    assert moment - 5.0 == pytest.approx(0.001 + 0.002 + 0.010 + 0.030 + 0.010 + 0.0001)


def test_rates_hold_however_late_somebody_looks():
    net = network(HOME, HOME, UNLIMITED)
    for k in range(50):
        net.enter(0.0, 0, 1, 1000, bytes([k]))
    moments = [moment for moment, *_ in net.due(1000.0)]
    assert moments == [pytest.approx(0.001 * (k + 1) + 0.020 + 0.0001) for k in range(50)]


def test_all_who_send_to_a_host_share_its_line_down_in_the_order_of_arrival():
    far, near = Line(delay_ms=500), Line()
    net = network(far, near, Line(down_mbit=8))
    net.enter(0.0, 0, 2, 1000, b"far")
    for k in range(5):
        net.enter(0.4 + k / 2000, 1, 2, 1000, b"near")
    got = arrivals(net)
    assert [packet for *_, packet in got] == [b"near"] * 5 + [b"far"]
    assert got[4][0] == pytest.approx(0.405) and got[5][0] == pytest.approx(0.501)


def test_a_full_queue_drops_what_comes_next():
    net = network(HOME, HOME)
    for _ in range(1000):
        net.enter(0.0, 0, 1, 1000, b"x")
    assert len(arrivals(net)) == pytest.approx(8e6 / 8 * 0.100 / 1000, abs=2)  # 100 ms at 8 Mbit/s
    net = network(Line(up_mbit=0.08), UNLIMITED, mtu=500)
    for _ in range(1000):
        net.enter(0.0, 0, 1, 500, b"x")
    assert len(arrivals(net)) == pytest.approx(LEAST_PACKETS, abs=2)


def test_jitter_spreads_and_never_reorders():
    net = network(Line(jitter_ms=20), Line(jitter_ms=20), seed=7)
    for k in range(2000):
        net.enter(k / 1000, 0, 1, 100, k.to_bytes(2))
    got = arrivals(net)
    assert [packet for *_, packet in got] == [k.to_bytes(2) for k in range(2000)]
    late = [moment - k / 1000 for k, (moment, *_) in enumerate(got)]
    assert 0 <= min(late) < 0.030 and 0.030 < max(late) <= 0.040


def test_loss_is_the_share_asked_for_of_each_line_and_comes_from_the_seed():
    def lost(seed: int) -> list[int]:
        net = network(Line(loss=0.02), Line(loss=0.03), seed=seed)
        for k in range(20_000):
            net.enter(k / 1000, 0, 1, 100, k.to_bytes(2))
        return sorted(set(range(20_000)) - {int.from_bytes(packet) for *_, packet in arrivals(net)})

    assert len(lost(1)) / 20_000 == pytest.approx(1 - 0.98 * 0.97, rel=0.15)
    assert lost(1) == lost(1) != lost(2)


def test_a_line_can_change_and_be_cut_on_the_way():
    net = network(HOME, HOME)
    net.set(0, Line(up_mbit=80, delay_ms=40))
    net.enter(0.0, 0, 1, 1000, b"new")
    assert arrivals(net)[0][0] == pytest.approx(0.0001 + 0.050 + 0.0001)
    net.enter(1.0, 0, 1, 1000, b"left before the cut")
    net.hosts[0].cut = True
    net.enter(1.0, 0, 1, 1000, b"lost")
    net.enter(1.0, 1, 0, 1000, b"lost")
    assert [packet for *_, packet in arrivals(net)] == [b"left before the cut"]
    net.hosts[0].cut = False
    net.enter(2.0, 1, 0, 1000, b"mended")
    assert [packet for *_, packet in arrivals(net)] == [b"mended"]
