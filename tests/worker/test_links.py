"""Links to other peers: a lane dials again after an end at rest, and says when something was lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from potluck.protocol.channel import Channel
from potluck.protocol.errors import TicketError, UnreachableError
from potluck.protocol.frames import MESSAGE_NBYTES, Frame, Kind, Purpose, TensorSpec, make_frame
from potluck.protocol.memory import MemoryNetwork, MemoryPipe
from potluck.protocol.meter import Meter
from potluck.protocol.pipe import ChannelConfig
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.protocol.ticket import Ticket
from potluck.protocol.transport import TransportConfig
from potluck.worker import mailbox as mailboxes
from potluck.worker.links import Links
from potluck.worker.mailbox import Address, Mailbox

PLAN = Plan(
    generation=1,
    first_step=0,
    first_sample=0,
    origin="init",
    origin_generation=0,
    stages=(
        StagePlan(first_layer=0, last_layer=1, replicas=(Replica(peer="a", addresses=("a",)),)),
        StagePlan(first_layer=1, last_layer=2, replicas=(Replica(peer="b", addresses=("b",)),)),
    ),
    microbatches=1,
    microbatch_size=1,
)
GIVE_UP = timedelta(seconds=0.3)


def activation(step: int, payload: bytes = b"x" * 10, generation: int = 1) -> Frame:
    return make_frame(
        payload,
        kind=Kind.ACTIVATION,
        run=b"testrun1",
        generation=generation,
        step=step,
        stage=1,
        microbatch=0,
        part=0,
        attempt=0,
        tensors=(TensorSpec(codec="raw", shape=(len(payload),), nbytes=len(payload)),),
        targets=0,
        dense_nbytes=0,
    )


def fields(frame: Frame) -> dict[str, Any]:
    header = frame.header
    return {name: getattr(header, name) for name in header.__struct_fields__ if name != "checksum"}


class Pair:
    """Two peers' links over memory, what was complained of, and the channels from ``a`` to ``b``."""

    def __init__(self) -> None:
        self.network, self.faults = MemoryNetwork(), asyncio.Queue[str]()
        self.generations: list[int] = []
        self.dialled: list[Channel] = []
        self.accepted: list[Channel] = []
        self.links = {name: Links(Mailbox(), lambda peer, frame: None, self.fault) for name in "ab"}

    def fault(self, generation: int, peer: str, text: str) -> None:
        self.faults.put_nowait(text)
        self.generations.append(generation)

    async def __aenter__(self) -> Pair:
        accept, dial = self.links["b"]._accepted, self.links["a"]._dial

        def accepted(channel: Channel) -> None:
            self.accepted.append(channel)
            accept(channel)

        async def dialled(peer: str) -> Channel:
            self.dialled.append(await dial(peer))
            return self.dialled[-1]

        self.links["b"]._accepted, self.links["a"]._dial = accepted, dialled
        for name, links in self.links.items():
            config = TransportConfig(run="run", admit=links.admit, channel=ChannelConfig(give_up=GIVE_UP))
            await links.start(self.network.join(name, config))
            links.follow(PLAN)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(links.close() for links in self.links.values()))

    async def arrives(self, step: int) -> Frame:
        address = Address(1, Kind.ACTIVATION, step, 0, 0, "a")
        _, frame = await asyncio.to_thread(self.links["b"].mailbox.take, [address], 0, 10.0)
        return frame


async def test_a_channel_that_ended_at_rest_is_dialled_again():
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        assert (await pair.arrives(1)).payload == b"x" * 10
        pair.accepted[0].abort(UnreachableError("the peer started anew"))
        await asyncio.gather(pair.accepted[0].join(), pair.dialled[0].join())
        pair.links["a"].post("b", activation(2))
        assert (await pair.arrives(2)).header.step == 2
        assert pair.faults.empty()


async def test_who_was_given_up_can_still_ask_the_others_for_a_state():
    """A worker that is started again sees its old self among the lost of the plan: it has no part in that, but the plan
    says where those are who can give it the stage."""
    arrived = asyncio.Queue[tuple[str, Kind]]()
    async with Pair() as pair:
        late = Links(Mailbox(), lambda peer, frame: None, pair.fault)
        config = TransportConfig(run="run", admit=late.admit, channel=ChannelConfig(give_up=GIVE_UP))
        await late.start(pair.network.join("c", config))
        pair.links["b"].on_state = lambda peer, frame: arrived.put_nowait((peer, frame.header.kind))
        pair.links["b"].host((Replica(peer="c", addresses=("c",)),))
        late.watch(PLAN)
        late.post("b", activation(1))
        late.post("b", make_frame(b"", **{**fields(activation(1)), "kind": Kind.STATE_REQUEST, "tensors": ()}))
        assert await asyncio.wait_for(arrived.get(), 5) == ("c", Kind.STATE_REQUEST) and pair.faults.empty()
        assert not pair.links["b"].holds(Address(1, Kind.ACTIVATION, 1, 0, 0, "c"))
        await late.close()


async def test_what_could_not_be_delivered_is_reported():
    """Also when nothing more is sent: the receiver would wait for ever."""
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        await pair.arrives(1)
        pair.network.refuse("a", "b")
        pair.network.cut("a", "b")
        pair.links["a"].post("b", activation(2))
        assert "cannot send to b" in await asyncio.wait_for(pair.faults.get(), 10.0)


async def test_what_could_not_be_delivered_in_time_is_no_fault_of_the_next_generation():
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        await pair.arrives(1)
        pair.network.refuse("a", "b")
        pair.network.cut("a", "b")
        pair.links["a"].post("b", activation(2))
        await asyncio.sleep(0)
        for links in pair.links.values():
            links.follow(replace(PLAN, generation=2))
        await asyncio.wait_for(pair.dialled[0].join(), 10.0)
        await asyncio.sleep(0.05)
        assert pair.faults.empty()
        pair.network.allow("a", "b")
        pair.links["a"].post("b", activation(3, generation=2))
        address = Address(2, Kind.ACTIVATION, 3, 0, 0, "a")
        await asyncio.to_thread(pair.links["b"].mailbox.take, [address], 0, 10.0)


async def test_a_frame_that_is_refused_is_a_fault_at_once(monkeypatch):
    monkeypatch.setattr(mailboxes, "MOST_NBYTES", 100)
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        assert "refused what a sends" in await asyncio.wait_for(pair.faults.get(), 10.0)
        assert pair.generations == [1]


async def test_links_that_close_say_goodbye():
    """Else the other side keeps the channel open for whoever may come back."""
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        await pair.arrives(1)
        began = asyncio.get_running_loop().time()
        await pair.links["a"].close()
        await asyncio.wait_for(pair.accepted[0].join(), 1.0)
        assert pair.accepted[0].closed
        await pair.links["b"].close()
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_a_peer_that_does_not_answer_at_once_is_dialled_again(monkeypatch):
    """A line full of a round answers late: nobody is given up for that."""
    async with Pair() as pair:
        transport, silent = pair.links["a"]._transport, [True, True]
        dial = transport.dial

        async def late(peer: str, addresses: tuple[str, ...]) -> Channel:
            if silent:
                silent.pop()
                raise UnreachableError("b did not answer within 10 s", code="silent")
            return await dial(peer, addresses)

        monkeypatch.setattr(transport, "dial", late)
        pair.links["a"].post("b", activation(1))
        assert (await pair.arrives(1)).header.step == 1
        assert pair.faults.empty() and not silent


async def test_a_round_gives_way_to_a_microbatch_in_the_middle_of_a_frame(monkeypatch):
    sent: list[Purpose] = []
    under_way = asyncio.Event()
    record = Meter.record

    def noted(meter: Meter, peer: str, direction: str, purpose: Purpose, *numbers: int) -> None:
        if direction == "out" and purpose is not Purpose.CONTROL:
            sent.append(purpose)
            if len(sent) == 4:
                under_way.set()
        record(meter, peer, direction, purpose, *numbers)

    async def slowly(pipe: MemoryPipe, message: bytes) -> None:
        await asyncio.sleep(0.001)
        await send(pipe, message)

    send = MemoryPipe.send
    monkeypatch.setattr(MemoryPipe, "send", slowly)
    monkeypatch.setattr(Meter, "record", noted)
    async with Pair() as pair:
        pair.links["a"].post("b", activation(1))
        await pair.arrives(1)
        large = 20 * MESSAGE_NBYTES
        shard = activation(1, b"x" * large)
        header = msgspec.structs.replace(shard.header, kind=Kind.SHARD)
        pair.links["a"].post("b", Frame(header, shard.payload))
        await under_way.wait()
        pair.links["a"].post("b", activation(2, b"x" * large))
        await pair.arrives(2)
        place = Address(1, Kind.SHARD, 1, 0, 0, "a")
        await asyncio.to_thread(pair.links["b"].mailbox.take, [place], 0, 10.0)
    first, last = sent.index(Purpose.ACTIVATION, 1), len(sent) - sent[::-1].index(Purpose.ACTIVATION)
    assert sent[first:last].count(Purpose.ACTIVATION) > 20
    assert sent[first:last].count(Purpose.WEIGHTS) <= 1  # one had passed the gate
    assert sent[last:].count(Purpose.WEIGHTS) > 10


def test_one_sender_cannot_fill_the_mailbox(monkeypatch):
    monkeypatch.setattr(mailboxes, "MOST_NBYTES", 2000)
    box = Mailbox()
    addresses = [Address(1, Kind.ACTIVATION, step, 0, 0, "a") for step in range(10)]
    kept = [box.put(address, activation(0)) for address in addresses]
    assert kept[0]
    assert not kept[-1]
    assert box.put(addresses[-1]._replace(sender="b"), activation(0))
    box.take(addresses[:1])
    assert box.put(addresses[-1], activation(0))


@pytest.mark.parametrize("run", ["../../etc", "/etc", "a/b", "..", ".hidden", ""])
def test_a_ticket_cannot_name_a_folder_elsewhere(run):
    good = Ticket(url="127.0.0.1:9", fingerprint="0" * 64, run="run", secret="s", expires=2**40)
    bad = msgspec.structs.replace(good, run=run).encode()
    with pytest.raises(TicketError, match="damaged"):
        Ticket.decode(bad, 0.0)


def test_a_plan_survives_the_wire():
    plan = replace(PLAN, stages=(replace(PLAN.stages[0], digest=b"d" * 32), PLAN.stages[1]))
    assert Plan.from_proto(plan.to_proto()) == plan
