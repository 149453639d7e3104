"""A pipe of several connections: order, bounds, breaks, and the joining of its parts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
from mutations import Mutator

from potluck.protocol.channel import Channel
from potluck.protocol.errors import UnreachableError, WireError
from potluck.protocol.frames import Hello, Kind, TensorSpec, make_frame
from potluck.protocol.memory import MemoryPipe
from potluck.protocol.pipe import ChannelConfig, Pipe, PipeClosed
from potluck.protocol.striped import MOST_AHEAD, MOST_CONNECTIONS, Gathering, Join, StripedPipe
from potluck.protocol.transport import Channels, TransportConfig

from .conftest import until

pytestmark = pytest.mark.timeout(30)
SECOND = timedelta(seconds=1)


class Slow:
    """A pipe that passes its messages only when it is told to."""

    kind, connections, congestion = "memory", 1, "cubic"

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self.open = asyncio.Event()
        self.close, self.send = pipe.close, pipe.send

    async def recv(self) -> bytes:
        await self.open.wait()
        return await self._pipe.recv()


def pairs(count: int, passes: Callable[[int], bool] = lambda _: True) -> tuple[list[MemoryPipe], list[MemoryPipe]]:
    made = [MemoryPipe.pair(passes) for _ in range(count)]
    return [near for near, _ in made], [far for _, far in made]


def number(i: int) -> bytes:
    return i.to_bytes(4, "big")


async def send(pipe: Pipe, count: int) -> None:
    for i in range(count):
        await pipe.send(number(i))


async def receive(pipe: Pipe, count: int) -> None:
    for i in range(count):
        assert await pipe.recv() == number(i)


@pytest.mark.parametrize("count", [2, 5, MOST_CONNECTIONS])
async def test_messages_come_in_order_however_fast_each_connection_is(count: int) -> None:
    near, far = pairs(count)
    slow = [Slow(pipe) for pipe in far]
    a, b = StripedPipe(near), StripedPipe(slow)
    sending = asyncio.create_task(send(a, 400))
    receiving = asyncio.create_task(receive(b, 400))
    chance = random.Random(count)
    for pipe in chance.sample(slow, count):
        for _ in range(chance.randrange(200)):
            await asyncio.sleep(0)
        pipe.open.set()
    await asyncio.gather(sending, receiving)
    assert (a.connections, a.congestion, b.congestion) == (count, "", "cubic")
    await asyncio.gather(a.close(), b.close())


async def test_every_connection_carries_some() -> None:
    near, far = pairs(4)
    a = StripedPipe(near)
    await send(a, 4 * (8 + 1))  # as many as the four pipes hold, and one that each has taken besides
    await until(lambda: [len(pipe._inbox) for pipe in far] == [8] * 4)
    far[0].cut()
    await a.close()


async def test_one_that_stands_still_holds_back_so_many_and_no_more() -> None:
    near, far = pairs(3)
    slow = [Slow(pipe) for pipe in far]
    a, b = StripedPipe(near), StripedPipe(slow)
    sending = asyncio.create_task(send(a, 4 * MOST_AHEAD))
    slow[1].open.set()
    slow[2].open.set()
    await until(lambda: len(b._incoming) >= MOST_AHEAD - 10 and not any(len(pipe._inbox) < 8 for pipe in far))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(b._incoming) <= MOST_AHEAD
    assert not sending.done()
    slow[0].open.set()
    await asyncio.gather(sending, receive(b, 4 * MOST_AHEAD))
    await asyncio.gather(a.close(), b.close())


async def test_what_was_sent_before_the_end_still_comes() -> None:
    near, far = pairs(4)
    a, b = StripedPipe(near), StripedPipe(far)
    await send(a, 25)
    await asyncio.gather(a.close(), receive(b, 25))
    with pytest.raises(PipeClosed, match="the other side ended it"):
        await b.recv()
    with pytest.raises(PipeClosed):
        await a.send(b"x")
    await b.close()


async def test_a_close_that_is_cancelled_goes_on() -> None:
    near, far = pairs(4)
    a, b = StripedPipe(near), StripedPipe(far)
    closing = asyncio.create_task(a.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    with pytest.raises(PipeClosed):
        await b.recv()
    await a.close()
    assert all(pipe._broken for pipe in near)
    await b.close()


async def test_if_one_breaks_all_do() -> None:
    near, far = pairs(4)
    a, b = StripedPipe(near), StripedPipe(far)
    await send(a, 10)
    await receive(b, 10)
    near[2].cut()
    for pipe in (a, b):
        with pytest.raises(PipeClosed, match="cut"):
            await pipe.recv()
        with pytest.raises(PipeClosed, match="cut"):
            await pipe.send(b"x")
        await pipe.close()
    assert all(pipe._broken for pipe in near)


HEAD = (0).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([b"short"], "cut short"),
        ([HEAD + b"x", HEAD + b"x"], "out of order"),
        ([(5).to_bytes(8, "big") + b"x", (4).to_bytes(8, "big") + b"x"], "out of order"),
    ],
)
async def test_what_no_sender_says_is_refused(said: Sequence[bytes], text: str) -> None:
    near, far = pairs(2)
    pipe = StripedPipe(far)
    for message in said:
        await near[0].send(message)
    await until(lambda: pipe._ended is not None)
    with pytest.raises(WireError, match=text):
        await asyncio.gather(pipe.recv(), pipe.recv())
    await pipe.close()


async def test_a_number_on_two_connections_is_refused() -> None:
    near, far = pairs(2)
    pipe = StripedPipe(far)
    for each in near:
        await each.send((3).to_bytes(8, "big") + b"x")
    with pytest.raises(WireError, match="twice"):
        await pipe.recv()
    await pipe.close()


async def test_channels_lose_nothing_when_single_connections_break() -> None:
    """Cut with chance, in mid-frame, one connection at a time; the channel dials four anew each time."""
    chance, cuts = random.Random(7), 0
    opened: asyncio.Queue[Channel] = asyncio.Queue()
    config = ChannelConfig(first_backoff=SECOND / 1000, last_backoff=SECOND / 500)
    channels = Channels(TransportConfig(run="r", channel=config))
    serving: set[asyncio.Task[None]] = set()

    async def connect() -> Pipe:
        nonlocal cuts
        left = chance.randrange(4, 12) if cuts < 8 else 1 << 30

        def passes(nbytes: int) -> bool:
            nonlocal left, cuts
            left -= 1
            cuts += left == 0
            return left != 0

        near, far = pairs(4, passes)
        serving.add(asyncio.create_task(channels.serve("a", StripedPipe(far), opened.put_nowait)))
        return StripedPipe(near)

    channel = Channel("b", config)
    await channel.open(connect)
    other = await opened.get()

    async def read() -> list[bytes]:
        return [(await other.recv()).payload for _ in range(20)]

    payloads = [bytes([i]) * 300_000 for i in range(20)]
    reading = asyncio.create_task(read())
    for i, payload in enumerate(payloads):
        spec = TensorSpec(codec="x", shape=(len(payload),), nbytes=len(payload))
        fields = {"generation": 1, "step": i, "stage": 0, "microbatch": 0, "part": 0, "attempt": 0}
        frame = make_frame(
            payload, kind=Kind.SHARD, run=b"testrun.", tensors=(spec,), targets=0, dense_nbytes=0, **fields
        )
        await channel.send(frame)
    assert await reading == payloads
    assert cuts == 8
    await channel.close()
    await asyncio.gather(*serving)


# Joining.


def test_a_join_comes_back_and_anything_else_is_no_join_or_refused() -> None:
    join = Join(b"i" * 16, 3, 4)
    assert Join.parse(join.encode()) == join
    assert Join.parse(b"\x01hello") is None
    mutate = Mutator(1)
    for _ in range(1000):
        data = mutate([join.encode()])
        try:
            found = Join.parse(data)
        except WireError:
            continue
        assert found is None or (found.encode() == data and found.index < found.count <= MOST_CONNECTIONS)


class Door:
    """A listener's gathering, and what came of it."""

    def __init__(self, patience: timedelta = SECOND * 10) -> None:
        self.errors: list[str] = []
        self.served: list[tuple[Pipe, bytes | None]] = []
        self.over = asyncio.Event()
        self.gathering = Gathering(patience, lambda peer, error: self.errors.append(f"{peer}: {error}"))
        self.tasks: list[asyncio.Task[None]] = []

    async def _serve(self, pipe: Pipe, first: bytes | None) -> None:
        self.served.append((pipe, first))
        await self.over.wait()
        await pipe.close()

    async def dial(self, peer: str, first: bytes) -> MemoryPipe:
        near, far = MemoryPipe.pair()
        self.tasks.append(asyncio.create_task(self.gathering.serve(peer, far, self._serve)))
        await near.send(first)
        return near

    async def end(self) -> None:
        self.over.set()
        await asyncio.gather(*self.tasks)


async def test_parts_of_a_pipe_find_each_other_in_any_order() -> None:
    door, names = Door(), (b"1" * 16, b"2" * 16)
    parts = [(peer, name, index) for peer in "ab" for name in names for index in range(3)]
    random.Random(1).shuffle(parts)
    near = {part: await door.dial(part[0], Join(part[1], part[2], 3).encode()) for part in parts}
    plain = await door.dial("a", b"\x01hello")
    await until(lambda: len(door.served) == 5)
    (alone,) = [(pipe, first) for pipe, first in door.served if first is not None]
    assert alone[1] == b"\x01hello"
    said = []
    for pipe, first in door.served:
        if first is None:
            assert pipe.connections == 3
            said.append(await whose(pipe, near))
    assert sorted(said) == sorted((peer, name) for peer in "ab" for name in names)
    await plain.close()
    await door.end()
    assert door.errors == []


async def whose(pipe: Pipe, near: dict[tuple[str, bytes, int], MemoryPipe]) -> tuple[str, bytes]:
    """Which peer's pipe of which name this is the other end of: its first message goes out on one of its parts."""
    await pipe.send(b"who")
    await until(lambda: any(end._inbox for end in near.values()))
    ((peer, name, _), end) = next((part, end) for part, end in near.items() if end._inbox)
    await end.recv()
    return peer, name


async def test_parts_that_do_not_fit_are_refused() -> None:
    door = Door()
    first = await door.dial("a", Join(b"1" * 16, 0, 3).encode())
    for wrong in (Join(b"1" * 16, 0, 3), Join(b"1" * 16, 1, 2)):
        with pytest.raises(PipeClosed):
            await (await door.dial("a", wrong.encode())).recv()
    with pytest.raises(PipeClosed):
        await (await door.dial("a", Join(b"2" * 16, 4, 3).encode())).recv()
    assert len(door.errors) == 3
    for index in (1, 2):
        await door.dial("a", Join(b"1" * 16, index, 3).encode())
    await until(lambda: len(door.served) == 1)
    await door.end()
    assert first._broken


async def test_parts_that_never_come_leave_nothing_behind() -> None:
    door = Door(SECOND / 20)
    for index in range(2):
        await door.dial("a", Join(b"1" * 16, index, 3).encode())
    near, far = MemoryPipe.pair()
    await door.gathering.serve("a", far, door._serve)  # says nothing at all
    await asyncio.gather(*door.tasks)
    assert door.gathering._groups == {}
    assert door.served == []
    assert near._broken


async def test_a_part_whose_call_is_cancelled_breaks_the_pipe() -> None:
    door = Door()
    for index in range(2):
        await door.dial("a", Join(b"1" * 16, index, 2).encode())
    await until(lambda: len(door.served) == 1)
    (waiting,) = [task for task, other in zip(door.tasks, door.tasks[::-1], strict=True) if task is door.tasks[0]]
    waiting.cancel()
    with pytest.raises(PipeClosed, match="a connection broke"):
        await door.served[0][0].recv()
    door.over.set()
    await asyncio.gather(*door.tasks, return_exceptions=True)


async def test_an_error_of_a_channel_is_not_lost_in_the_end_of_its_pipe() -> None:
    """A session that is cancelled while its pipe closes still ends in order."""

    closing = asyncio.Event()

    class Lingering(MemoryPipe):
        async def close(self) -> None:
            closing.set()
            await asyncio.sleep(1000)

    near = Lingering(lambda _: True)
    far = MemoryPipe(lambda _: True)
    near._other, far._other = far, near
    channel = Channel("a", ChannelConfig(give_up=SECOND / 100))
    session = await channel.accept(near, Hello(channel.channel_id, False, 0, 0, 0, 1 << 20))
    await asyncio.sleep(0)
    far.cut()
    await closing.wait()
    session.cancel()
    with pytest.raises(UnreachableError, match="did not come back"):
        await channel.recv()
