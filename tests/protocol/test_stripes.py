"""How many connections a hop takes: the rule, what the system tells, and that channels follow."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from potluck.protocol import route, sockets
from potluck.protocol.errors import UnreachableError, WireError
from potluck.protocol.grpc_pipes import DiallerPipe
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.sockets import Losses, Sent
from potluck.protocol.striped import Gathering
from potluck.protocol.stripes import CLEAN_LOOKS, FAR, FULL, GAIN, LEAST_LOSS, REST_LOOKS, TRIAL_LOOKS, Choice, Seen
from potluck.protocol.tls import Certificate

from .conftest import Rig, until
from .test_relay import pass_frames

pytestmark = pytest.mark.timeout(60)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the system tells nothing of sockets")
MB = 1e6


def follow(choice: Choice, *looks: tuple[float, float | None]) -> list[int]:
    """The numbers of connections after each look: a rate in MB/s, and the share lost."""
    out = []
    for rate, loss in looks:
        choice = choice.after(Seen(rate * MB, loss))
        out.append(choice.connections)
    return out


def test_without_losses_it_stays_one() -> None:
    assert follow(Choice(), *[(rate, 0.0) for rate in (12, 0.1, 12, 3)]) == [1] * 4
    assert follow(Choice(), (1, LEAST_LOSS * 0.99)) == [1]


def test_losses_of_a_full_line_are_its_own() -> None:
    """Its queue is in the round trip; with a queue, more connections carry no more. Nor is it a clean one."""
    assert [Choice().after(Seen(MB, 0.01, wait)).connections for wait in (1.0, FULL - 0.01, FULL)] == [2, 2, 1]
    four = Choice(connections=4)
    for _ in range(2 * CLEAN_LOOKS):
        four = four.after(Seen(MB, 0.01, FULL))
    assert four.connections == 4


def test_it_doubles_as_long_as_that_helps_and_is_allowed() -> None:
    loss = 0.01
    assert follow(Choice(), (0.4, loss), (0.8, loss), (1.6, loss), (3.0, loss), (5.5, loss)) == [2, 4, 8, 16, 16]
    assert follow(Choice(most=4), (0.4, loss), (0.8, loss), (1.6, loss), (1.6, loss)) == [2, 4, 4, 4]
    assert follow(Choice(most=1), (0.4, loss)) == [1]


def test_it_goes_back_if_it_did_not_help_and_rests() -> None:
    loss, rate = 0.01, 10.0
    less, enough = rate * GAIN - 0.01, rate * GAIN
    assert follow(Choice(), (rate, loss), *[(less, loss)] * TRIAL_LOOKS) == [*[2] * TRIAL_LOOKS, 1]
    assert follow(Choice(), (rate, loss), (enough, loss)) == [2, 4]
    late = [(less, loss)] * (TRIAL_LOOKS - 1) + [(TRIAL_LOOKS * rate, loss)]
    assert follow(Choice(), (rate, loss), *late) == [*[2] * TRIAL_LOOKS, 4]  # the first looks mislead
    first, most = REST_LOOKS
    looks = [(rate, loss)] * (first + 4 * first + 16 * first + 2 * most + 10)
    tried = [i for i, connections in enumerate(follow(Choice(), *looks)) if connections == 2]
    pauses = [b - a - 1 for a, b in itertools.pairwise(tried) if b > a + 1]
    assert pauses[:4] == [first, 4 * first, 16 * first, most]  # longer from time to time
    helped = Choice(pause=most, connections=2, before=1.0).after(Seen(2.0, 0.0))
    assert helped.pause == first


def test_a_gain_counts_even_if_nothing_was_lost_since() -> None:
    assert follow(Choice(), (1, 0.01), (2, 0.0), (2, 0.0)) == [2, 2, 2]


def test_after_a_clean_while_one_will_do_again() -> None:
    four = Choice(connections=4)
    assert follow(four, *[(5, 0.0)] * CLEAN_LOOKS) == [*[4] * (CLEAN_LOOKS - 1), 1]
    looks = [(5.0, 0.0)] * (CLEAN_LOOKS - 1)
    assert follow(replace(four, rest=10**6), *looks, (5, 0.01), *looks)[-1] == 4
    assert follow(replace(four, least=4), *[(5, 0.0)] * CLEAN_LOOKS)[-1] == 4


def test_where_losses_cannot_be_seen_a_rate_far_below_the_best_is_a_reason() -> None:
    assert follow(Choice(), (10, None), (10 * FAR, None), (10 * FAR - 0.1, None)) == [1, 1, 2]
    assert follow(Choice(), *[(0.1, None)] * 5) == [1] * 5
    assert follow(Choice(), (10, None), (1, None), *[(1, None)] * TRIAL_LOOKS) == [1, *[2] * TRIAL_LOOKS, 1]


def test_what_failed_rests() -> None:
    choice = Choice(connections=4, before=1.0).failed(2)
    assert follow(choice, *[(1, 0.01)] * REST_LOOKS[0]) == [*[2] * (REST_LOOKS[0] - 1), 4]


# What Linux tells.


@linux
def test_our_own_connections_are_found_and_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        address, elsewhere = server.getsockname(), other.getsockname()
        with socket.create_connection(address) as near, server.accept()[0] as far:
            assert len(list(sockets.connections(address))) == 1
            assert list(sockets.connections(elsewhere)) == []
            assert list(sockets.connections(("no.literal.address", address[1]))) == []
            losses = Losses(address)
            first = losses.since()
            assert first is not None and first.repeated == 0
            near.sendall(bytes(200_000))
            got = 0
            while got < 200_000:
                got += len(far.recv(1 << 16))
            second = losses.since()
            assert second is not None and second.segments > 1 and second.wait >= 1
            assert losses.since() == Sent(0, 0, 1.0)
        assert losses.since() is None


@linux
def test_a_congestion_control_is_asked_for_where_it_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        address = server.getsockname()
        assert sockets.in_use(address) == sockets.congestion_of(near) != ""
        assert sockets.prefer("reno", address) == "reno"  # every kernel allows it
        assert sockets.prefer("no such thing", address) == "reno"


# Channels.


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Its transports may stripe, look all the time, and see what the tests want them to."""
    monkeypatch.setattr(route, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(route, "BUSY_SECONDS", 0.0001)
    made = Rig("grpc")

    def transport(name: str, config: object) -> GrpcTransport:
        one = GrpcTransport(Identity.generate(), Certificate.generate(), config, connections=(1, 8))  # type: ignore[arg-type]
        made.closing.append(one)
        return one

    monkeypatch.setattr(made, "transport", transport)
    yield made
    await made.close()


async def stream(rig: Rig, until_connections: int) -> None:
    near, far = await rig.connect()
    assert near.path().connections == 1
    async with asyncio.timeout(50):
        while near.path().connections != until_connections:
            await pass_frames(near, far, 4)
    await pass_frames(near, far, 4)
    assert rig.errors == []


async def test_a_channel_moves_to_more_connections_in_mid_stream(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Losses, "since", lambda self: Sent(1000, 10))
    monkeypatch.setattr(sockets, "prefer", lambda name, address: "cubic")
    monkeypatch.setattr(sockets, "in_use", lambda address: "cubic")
    monkeypatch.setattr("potluck.protocol.stripes.GAIN", 0.0)  # loopback gains nothing
    caplog.set_level(logging.INFO)
    await stream(rig, 8)
    advice = [r.message for r in caplog.records if "loses packets (1.00%)" in r.message]
    assert len(advice) == 1 and "cubic" in advice[0] and "tcp_congestion_control=bbr" in advice[0]


async def test_the_next_channel_to_a_peer_begins_with_what_was_found_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "prefer", lambda name, address: "cubic")
    monkeypatch.setattr(sockets, "in_use", lambda address: "cubic")
    monkeypatch.setattr(Losses, "since", lambda self: Sent(1000, 0))
    near, far = await rig.connect()
    (looking,) = rig.a._looking
    made = looking.get_coro().cr_frame.f_locals["route"]
    await made.judge(near, Seen(MB, 0.01))
    second = await rig.a.dial(rig.b.peer_id, rig.addresses)
    assert second.path().connections == 1  # two are on trial
    await made.judge(near, Seen(2 * MB, 0.0))
    third = await rig.a.dial(rig.b.peer_id, rig.addresses)
    assert third.path().connections == 2
    await pass_frames(near, far, 2)
    assert len([r for r in caplog.records if "loses packets" in r.message]) == 1


async def test_more_connections_that_do_not_work_are_done_without(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them can be dialled, but the listener does not join them."""

    async def refuse(*arguments: object) -> None:
        raise WireError("no joining here")

    monkeypatch.setattr(sockets, "prefer", lambda name, address: "cubic")
    near, far = await rig.connect()
    (looking,) = rig.a._looking
    made = looking.get_coro().cr_frame.f_locals["route"]
    monkeypatch.setattr(Gathering, "_join", refuse)
    pipe = near._pipe
    await made.judge(near, Seen(MB, 0.01))
    assert made.choice.connections == 2
    await pass_frames(near, far, 4)
    await until(lambda: near._pipe is not pipe)
    await pass_frames(near, far, 4)
    assert (near.path().connections, made.choice.connections) == (1, 1)
    known = rig.a._known[rig.b.peer_id]
    known.connections = 4  # of an earlier channel
    assert (await rig.a.dial(rig.b.peer_id, rig.addresses)).path().connections == 1
    assert known.connections == 1


async def test_with_bbr_one_connection_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prefer(name: str, address: tuple[str, int]) -> str:
        asked.append(name)
        return name

    monkeypatch.setattr(Losses, "since", lambda self: Sent(1000, 10))
    monkeypatch.setattr(sockets, "prefer", prefer)
    monkeypatch.setattr(sockets, "in_use", lambda address: "cubic")
    near, far = await rig.connect()
    assert near.path().congestion == "cubic"
    async with asyncio.timeout(50):
        while near.path().congestion != "bbr":
            await pass_frames(near, far, 4)
    for _ in range(5):
        await pass_frames(near, far, 4)
        await asyncio.sleep(0.03)
    assert near.path().connections == 1
    assert asked == ["bbr"]
    rig.cut()
    await pass_frames(near, far, 4)
    assert near.path().congestion == "bbr"  # the next connection has it from the start


@pytest.mark.parametrize("sent", [Sent(1000, 0), Sent(1000, 10, wait=3.0)])
async def test_a_clean_or_a_full_line_is_left_as_it_is(rig: Rig, monkeypatch: pytest.MonkeyPatch, sent: Sent) -> None:
    looks = 0

    def since(self: Losses) -> Sent:
        nonlocal looks
        looks += 1
        return sent

    monkeypatch.setattr(Losses, "since", since)
    near, far = await rig.connect()
    pipe, usual = near._pipe, near.path().congestion
    async with asyncio.timeout(50):
        while looks < 6:
            await pass_frames(near, far, 4)
    assert near._pipe is pipe and isinstance(pipe, DiallerPipe)
    assert near.path().congestion == usual


async def test_where_no_more_connections_are_to_be_had_it_goes_on_with_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = await rig.connect()
    (looking,) = rig.a._looking
    made = looking.get_coro().cr_frame.f_locals["route"]
    reach, tries = GrpcTransport.reach, 0

    async def refused(self: GrpcTransport, *arguments: object) -> DiallerPipe:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise UnreachableError("no more from here")
        return await reach(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GrpcTransport, "reach", refused)
    monkeypatch.setattr(sockets, "prefer", lambda name, address: "cubic")
    pipe = near._pipe
    await made.judge(near, Seen(MB, 0.01))
    assert tries == 2
    await until(lambda: near._pipe is not pipe)
    assert near.path().connections == 1
    assert made.choice.rest
    await pass_frames(near, far, 4)
