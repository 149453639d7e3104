"""Bytes from the network that nobody should send: each is taken for what it says or refused with the declared error.

Nothing else may be raised, and no memory taken out of proportion with what came in. The inputs come from seeds.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import tracemalloc
from collections import Counter, deque

import msgspec
import pytest
from google.protobuf.message import DecodeError
from manifests import MANIFEST
from mutations import Mutator, outcome, traced

from potluck.coordinator.addresses import is_acceptable, is_local
from potluck.protocol import control_pb2 as pb
from potluck.protocol.channel import Channel
from potluck.protocol.errors import PotluckError, StateError, TicketError, UnreachableError, WireError
from potluck.protocol.flow import Inbox
from potluck.protocol.frames import (
    MESSAGE_NBYTES,
    Ack,
    Bye,
    Frame,
    Hello,
    Kind,
    More,
    Reason,
    Start,
    TensorSpec,
    Trouble,
    encode_header,
    encode_message,
    frame_messages,
    make_frame,
    parse_header,
    parse_message,
)
from potluck.protocol.manifest import Manifest
from potluck.protocol.memory import MemoryPipe
from potluck.protocol.pipe import ChannelConfig, Pipe, PipeClosed
from potluck.protocol.plan import Lost, Plan, Replica, StagePlan
from potluck.protocol.ticket import PREFIX, Ticket, _checksum
from potluck.protocol.transport import Channels, TransportConfig

from .conftest import frame_of

pytestmark = pytest.mark.timeout(60)
SLACK = 32 * 1024  # bytes that a parser may need whatever comes, errors with their texts included


def frame(index: int, nbytes: int, tensors: int = 1) -> Frame:
    sizes = [nbytes, *([0] * (tensors - 1))]
    specs = tuple(TensorSpec(codec="mask4", shape=(size, 1, 2, 3), nbytes=size) for size in sizes)
    return frame_of(bytes([index % 251]) * nbytes, index, kind=Kind.SHARD, tensors=specs)


def messages(sequence: int, of: Frame) -> list[bytes]:
    return [m for _, m in frame_messages(sequence, encode_header(of.header), of.payload, 0)]


VALID = [
    *messages(0, frame(0, 60)),
    *messages(1, frame(1, 0, tensors=16)),
    *messages(2, frame(2, 66_000)),
    encode_message(Hello(b"c" * 16, True, 1, 2, 3, 4)),
    encode_message(Ack(1, 2, 3)),
    encode_message(Bye()),
    encode_message(Trouble(Reason.FAILED, "no")),
]


def test_messages() -> None:
    mutate, seen = Mutator(1), Counter[str]()
    with traced():
        for _ in range(4000):
            data = mutate(VALID)
            found = outcome(lambda data=data: parse_message(data), (WireError,), SLACK + 4 * len(data), seen)
            if isinstance(found, Start | More):
                assert len(found.chunk) < len(data) <= MESSAGE_NBYTES
    assert min(seen["taken"], seen["refused"]) > 500


def test_headers() -> None:
    mutate, seen = Mutator(2), Counter[str]()
    valid = [encode_header(frame(0, 100, tensors).header) for tensors in (1, 3, 16)]
    with traced():
        for _ in range(2500):
            data = mutate(valid)
            found = outcome(lambda data=data: parse_header(data), (WireError,), SLACK, seen)
            if found is not None:
                assert found[1] <= len(data)
                assert parse_header(encode_header(found[0]))[0] == found[0]
    assert min(seen["taken"], seen["refused"]) > 100


def spoil(mutate: Mutator, valid: list[bytes]) -> list[bytes]:
    """Messages out of order, twice, missing, changed, or of another conversation."""
    out = list(valid)
    for _ in range(mutate.random.randrange(1, 4)):
        at = mutate.random.randrange(len(out)) if out else 0
        match mutate.random.randrange(5):
            case 0 if out:
                del out[at]
            case 1 if out:
                out.insert(mutate.random.randrange(len(out) + 1), out[at])
            case 2 if out:
                out[at] = mutate([out[at]])
            case 3:
                out.insert(at, mutate(VALID))
            case _:
                out.insert(at, mutate.random.choice(VALID))
    return out


def test_an_inbox_gives_whole_frames_in_order_whatever_comes() -> None:
    mutate, seen = Mutator(3), Counter[str]()
    sizes = (0, 1, 300, 66_000, 140_000)
    with traced():
        for _ in range(350):
            frames = [frame(i, mutate.random.choice(sizes)) for i in range(3)]
            box, came = Inbox(1 << 20, 1 << 20, lambda header: None), 0
            good = [m for i, each in enumerate(frames) for m in messages(i, each)]
            before, _ = tracemalloc.get_traced_memory()
            for data in spoil(mutate, good):
                came += len(data)
                try:
                    message = parse_message(data)
                    if isinstance(message, Start | More):
                        box.add(message)
                    seen["taken"] += 1
                except WireError:  # the pipe is dropped, the next one goes on where this inbox is
                    seen["refused"] += 1
                assert box.partial_nbytes <= 1 << 20
            held = tracemalloc.get_traced_memory()[0] - before
            assert held <= SLACK + 2 * came
            got = [box.take() for _ in range(len(box))]
            assert box.received == box.consumed == len(got)
            for each in got:
                assert make_frame(each.payload, **fields(each)) == each
    assert min(seen["taken"], seen["refused"]) > 200


def fields(of: Frame) -> dict[str, object]:
    names = (name for name in of.header.__struct_fields__ if name != "checksum")
    return {name: getattr(of.header, name) for name in names}


@pytest.mark.parametrize("piece", [1, 7, 5000])
def test_a_frame_in_tiny_parts_takes_no_more_memory_than_a_frame(piece: int) -> None:
    """Else 18 bytes on the wire for each byte of payload would take 250 bytes of memory."""
    size = 20_000 if piece < 100 else 600_000
    whole = frame(0, size)
    box = Inbox(1 << 20, 1 << 20, lambda header: None)
    with traced():
        start = messages(0, frame(0, size))[0]
        head = len(start) - len(parse_message(start).chunk)  # type: ignore[union-attr]
        box.add(parse_message(start[:head] + whole.payload[:piece]))  # type: ignore[arg-type]
        for at in range(piece, size - piece, piece):
            data = b"\x04" + (0).to_bytes(8, "big") + at.to_bytes(8, "big") + whole.payload[at : at + piece]
            box.add(parse_message(data))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[0] < SLACK + 3 * size
    rest = box.partial_nbytes
    box.add(More(0, rest, memoryview(whole.payload)[rest:]))
    assert box.take() == whole


def test_frames_without_payload_take_no_more_memory_than_the_window() -> None:
    window = 1 << 18
    box = Inbox(window, 1 << 20, lambda header: None)
    (data,) = messages(0, frame(0, 0, tensors=16))
    with traced():
        fill = (box.add(parse_message(data[:1] + i.to_bytes(8, "big") + data[9:])) for i in range(window))  # type: ignore[arg-type]
        with pytest.raises(WireError, match="window"):
            deque(fill, maxlen=0)
        assert tracemalloc.get_traced_memory()[0] < 2 * window + SLACK


class Rig:
    """A channel against a peer that says anything."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.errors: list[WireError] = []
        self.caplog = caplog
        self.config = ChannelConfig(on_error=lambda _, error: self.errors.append(error))

    async def told(self, pipe: Pipe, script: list[bytes]) -> None:
        """Says everything, and reads what is answered as long as anything is."""

        async def read() -> None:
            while True:
                await pipe.recv()

        reading = asyncio.create_task(read())
        try:
            for message in script:
                await pipe.send(message)
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        except PipeClosed:
            pass
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await pipe.close()

    def check(self) -> None:
        """What a channel did not expect is logged as an error of ours."""
        assert not [r for r in self.caplog.records if r.levelno >= logging.ERROR]


async def test_a_channel_that_dials(caplog: pytest.LogCaptureFixture) -> None:
    mutate, rig, seen = Mutator(4), Rig(caplog), Counter[str]()
    for _ in range(250):
        near, far = MemoryPipe.pair()
        channel = Channel("peer", rig.config)
        hello = encode_message(Hello(channel.channel_id, True, 0, 0, 0, 1 << 20))
        good = [hello, *messages(0, frame(0, 60)), encode_message(Ack(1, 0)), *messages(1, frame(1, 66_000))]
        pipes = [near]

        async def connect(pipes: list[MemoryPipe] = pipes) -> Pipe:
            if not pipes:
                raise UnreachableError("once only", code="closed")
            return pipes.pop()

        peer = asyncio.create_task(rig.told(far, spoil(mutate, good)))
        try:
            await channel.open(connect)
            await channel.send(frame(0, 100))
            seen["open"] += 1
        except PotluckError:
            seen["refused"] += 1
        await peer
        for _ in range(5):
            await asyncio.sleep(0)
        channel.abort(UnreachableError("the test is over"))
        await channel.join()
    rig.check()
    assert min(seen["open"], seen["refused"], len(rig.errors)) > 20


async def test_channels_that_are_dialled(caplog: pytest.LogCaptureFixture) -> None:
    mutate, rig = Mutator(5), Rig(caplog)
    opened: list[Channel] = []
    channels = Channels(TransportConfig(run="r", channel=rig.config))
    for number in range(250):
        hello = Hello(number.to_bytes(16, "big"), False, 0, 0, 0, 1 << 20)
        good = [encode_message(hello), *messages(0, frame(0, 60)), *messages(1, frame(1, 66_000))]
        near, far = MemoryPipe.pair()
        serving = asyncio.create_task(channels.serve("peer", near, opened.append))
        await rig.told(far, spoil(mutate, good))
        await serving
    for channel in opened:
        channel.abort(UnreachableError("the test is over"))
        await channel.join()
    rig.check()
    assert len(opened) > 100
    assert len(rig.errors) > 50


def plan() -> Plan:
    def replicas(*names: str) -> tuple[Replica, ...]:
        return tuple(Replica(peer=name, addresses=("192.0.2.1:7000",)) for name in names)

    return Plan(
        generation=3,
        first_step=10,
        first_sample=80,
        origin="round",
        origin_generation=2,
        stages=(
            StagePlan(first_layer=0, last_layer=2, replicas=replicas("a", "b"), digest=b"d" * 32),
            StagePlan(first_layer=2, last_layer=4, replicas=replicas("c", "d", "e"), donors=replicas("f")),
        ),
        microbatches=4,
        microbatch_size=2,
        lost=(Lost(peer="d", since=12),),
        void=12,
        parts=(StagePlan(first_layer=0, last_layer=4, replicas=replicas("a")),),
    )


def test_plans() -> None:
    mutate, seen = Mutator(40), Counter[str]()
    valid = [plan().to_proto().SerializeToString(), Plan.from_proto(plan().to_proto()).to_proto().SerializeToString()]
    with traced():
        for _ in range(2500):
            data = mutate(valid)
            try:
                message = pb.Plan.FromString(data)
            except DecodeError:
                seen["no protobuf"] += 1
                continue

            def follow(message: pb.Plan = message) -> Plan:
                found = Plan.from_proto(message)
                for stage, replicas in enumerate(found.replicas):  # what a worker does with it
                    served = [m for i in range(len(replicas)) for m in found.served(stage, i)]
                    assert sorted(served) == list(range(found.microbatches_per_step))
                return found

            found = outcome(follow, (WireError,), 1 << 23, seen)
            assert found is None or Plan.from_proto(found.to_proto()) == found
    assert min(seen["taken"], seen["refused"], seen["no protobuf"]) > 100


@pytest.mark.parametrize("name", [d.name for d in pb.Plan.DESCRIPTOR.fields if d.cpp_type in (3, 4)])
@pytest.mark.parametrize("number", [0, 1, 1 << 16, (1 << 32) - 1])
def test_numbers_of_a_plan_at_their_edges(name: str, number: int) -> None:
    """2^32 microbatches would be a list of as many replicas."""
    message = plan().to_proto()
    setattr(message, name, number)
    with traced():
        found = outcome(lambda: Plan.from_proto(message), (WireError,), SLACK, Counter())
        if found is not None:
            outcome(lambda: found.served(0, 0), (), 1 << 23, Counter())


def test_tickets() -> None:
    mutate, seen = Mutator(50), Counter[str]()
    text = Ticket(url="host:7000", fingerprint="0f" * 32, run="r-1", secret="s", expires=2000).encode()
    bodies = [msgspec.msgpack.encode(["host:7000", "0f" * 32, "r-1", "s", 2000])]
    with traced():
        for number in range(1500):
            damaged = mutate([text.encode()]).decode(errors="replace")
            if number % 2:  # with a checksum that is right
                damaged = signed(mutate(bodies))
            found = outcome(lambda damaged=damaged: Ticket.decode(damaged, 1000), (TicketError,), SLACK, seen)
            assert found is None or Ticket.decode(found.encode(), 1000) == found
    assert seen["refused"] > 1000
    assert seen["taken"] > 20


def signed(body: bytes) -> str:
    """A ticket's text around any body."""
    return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def test_addresses() -> None:
    mutate, seen = Mutator(60), Counter[str]()
    valid = [b"8.8.8.8:11024", b"[2606:4700::1111]:25535", b"[fe80::1%eth0]:7000", b"[::ffff:8.8.8.8]:7000"]
    with traced():
        for _ in range(2500):
            text = mutate(valid).decode(errors="replace")
            yes = outcome(lambda text=text: is_acceptable(text, lan=False), (), SLACK, seen)
            outcome(lambda text=text: is_local(text.rpartition(":")[0]), (), SLACK, seen)
            if yes:
                seen["yes"] += 1
                assert is_acceptable(text, lan=True)
    assert 40 < seen["yes"] < 2400


def test_manifests() -> None:
    mutate, seen = Mutator(70), Counter[str]()
    with traced():
        for _ in range(600):
            data = mutate([MANIFEST.encode()])
            found = outcome(lambda data=data: Manifest.decode(data), (StateError,), SLACK, seen)
            assert found is None or Manifest.decode(found.encode()) == found
    assert min(seen["taken"], seen["refused"]) > 5
