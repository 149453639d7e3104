"""Arithmetic of the traffic counter."""

from __future__ import annotations

import threading

import pytest

from potluck.protocol.frames import Purpose
from potluck.protocol.meter import INTERNET, NO_OVERHEAD, Meter, Overhead, Traffic

pytestmark = pytest.mark.timeout(30)


def test_what_a_small_message_costs() -> None:
    added, acks = INTERNET.of(100)
    assert added == 5 + 9 + 22 + 52
    assert acks == 26


def test_what_a_large_message_costs() -> None:
    added, acks = Overhead(segment_payload=1000, segments_per_ack=4).of(1_000_000)
    body = 1_000_000 + 5
    body += 62 * 9
    body += 62 * 22
    assert added == pytest.approx(body - 1_000_000 + body / 1000 * 52)
    assert acks == pytest.approx(body / 1000 / 4 * 52)
    assert (1_000_000 + added) / 1_000_000 < 1.06


def test_totals_by_peer_direction_and_purpose() -> None:
    meter = Meter(NO_OVERHEAD)
    for _ in range(3):
        meter.record("ann", "out", Purpose.ACTIVATION, 100, 400)
    meter.record("ann", "in", Purpose.CONTROL, 7)
    meter.record("bob", "out", Purpose.WEIGHTS, 50, 5000)
    totals = [t for t in meter.snapshot() if t.messages]
    assert totals == [
        Traffic("ann", "in", Purpose.CONTROL, 7, 0, 1),
        Traffic("ann", "out", Purpose.ACTIVATION, 300, 1200, 3),
        Traffic("bob", "out", Purpose.WEIGHTS, 50, 5000, 1),
    ]
    assert meter.messages == 5


def test_acknowledgements_are_booked_the_other_way() -> None:
    meter = Meter()
    meter.record("ann", "out", Purpose.GRADIENT, 1_000_000)
    totals = {t.direction: t for t in meter.snapshot() if t.purpose == Purpose.GRADIENT}
    added, acks = INTERNET.of(1_000_000)
    assert totals["out"].nbytes == round(1_000_000 + added)
    assert totals["in"].nbytes == round(acks)
    assert totals["in"].messages == 0


def test_a_single_message_brings_an_acknowledgement_and_a_probe() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)

    def cost_of_one() -> tuple[int, int]:
        before = {t[:3]: t.nbytes for t in meter.snapshot()}
        meter.record("ann", "out", Purpose.CONTROL, 74)
        after = {t[:3]: t.nbytes - before.get(t[:3], 0) for t in meter.snapshot()}
        return after["ann", "out", Purpose.CONTROL], after["ann", "in", Purpose.CONTROL]

    assert cost_of_one() == (110 + 52 + 91, 52 + 117 + 52)  # as a capture of one heartbeat shows it
    now = 0.01
    assert cost_of_one() == (110 + 52, 26)
    now = 0.09
    assert cost_of_one() == (110 + 52, 52)
    now = 0.11
    assert cost_of_one() == (110 + 52 + 91, 26 + 117 + 52)
    now = 0.3  # the pause has grown
    assert cost_of_one() == (110 + 52, 52)


def test_connections_cost_both_ends_the_same() -> None:
    dialler, listener = Meter(), Meter()
    dialler.record_connection("p", dialled=True, proof=True)
    listener.record_connection("p", dialled=False, proof=True)
    sent = {t.direction: t.nbytes for t in dialler.snapshot()}
    got = {t.direction: t.nbytes for t in listener.snapshot()}
    assert (sent["out"], sent["in"]) == (got["in"], got["out"])


def test_threads_lose_nothing() -> None:
    meter = Meter(NO_OVERHEAD)

    def count() -> None:
        for _ in range(2000):
            meter.record("p", "out", Purpose.DATA, 1, 2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (total,) = (t for t in meter.snapshot() if t.messages)
    assert (total.nbytes, total.dense_nbytes, total.messages) == (8000, 16000, 8000)
