"""The way to other peers: what we send goes over channels we dial, everything that arrives into the mailbox.

Each side dials those it sends to, so nobody has to agree on who dials; the transport may have the other side make the
connection (``protocol/reversal.py``). A channel keeps its order, so rounds and
states have one of their own each beside that of the boundary tensors, and give way to it, a state also to a round:
message by message (64 KiB) they go when nothing that comes first is on its way to anybody, few at a time, or after a
second. So a long transfer never holds up a microbatch. States, and what goes to keepers, belong to no generation, and
nobody faults anybody for them: who misses something asks elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from ..protocol.channel import Channel
from ..protocol.errors import PotluckError, UnreachableError, WireError
from ..protocol.failpoints import failpoint_async
from ..protocol.frames import MESSAGE_NBYTES, Frame, Header, Kind
from ..protocol.pipe import PathInfo
from ..protocol.plan import Plan, Replica
from ..protocol.transport import Transport
from .boundary import TRAIN
from .inventory import RAW
from .mailbox import Address, Mailbox
from .reference import LONE
from .shards import WEIGHTS
from .squeeze import SUFFIX
from .tracing import Posted

log = logging.getLogger(__name__)
BOUNDARY = (Kind.ACTIVATION, Kind.GRADIENT, Kind.MISS)
DIAL_SECONDS = 30.0  # for a peer to hear of the plan that we know, to be at a relay, or to answer over a full line
STATES = (Kind.STATE_REQUEST, Kind.STATE, Kind.REDO)
GIVE_WAY_SECONDS = 1.0  # that a message of a round or a state waits at most for what comes first
OnState = Callable[[str, Frame], None]


class OnFault(Protocol):
    def __call__(self, generation: int, peer: str, text: str) -> None: ...


class Load(IntEnum):
    """What a lane carries; the smaller comes first."""

    BOUNDARY = 0
    ROUND = 1
    STATE = 2


def load_of(kind: Kind) -> Load:
    return Load.BOUNDARY if kind in BOUNDARY else Load.STATE if kind in STATES else Load.ROUND


LEAST_NBYTES = 3 * MESSAGE_NBYTES  # of rounds and states that may always be in flight before one more message goes
QUEUE_SECONDS = 0.1  # that rounds and states may add to what a microbatch waits for the line, beside a round trip
TOLD_STEPS = 4  # of which it is known what has arrived
Lane = tuple[str, Load]  # to a peer


class Links:
    """Owned by the event loop; ``post`` and ``take`` are for the computing threads."""

    def __init__(self, mailbox: Mailbox, on_state: OnState, on_fault: OnFault) -> None:
        """``on_state`` is told of all frames about states, in the loop; it may raise ``WireError``."""
        self.mailbox, self.on_state, self.on_fault = mailbox, on_state, on_fault
        self.plan: Plan | None = None
        self._others: Plan | None = None  # one that we have no part in any more
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._guests: tuple[Replica, ...] = ()
        self._outboxes: dict[Lane, asyncio.Queue[Frame]] = {}
        self._tasks: dict[Lane, asyncio.Task[None]] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._channels: dict[Lane, Channel] = {}
        self._told: dict[int, dict[Posted, float]] = {}  # by step
        self._turn = asyncio.Lock()  # of the one background message that waits for the line

    async def start(self, transport: Transport) -> list[str]:
        """Listens; returns the addresses to announce."""
        self._transport, self._loop = transport, asyncio.get_running_loop()
        return await transport.listen(self._accepted)

    async def close(self) -> None:
        tasks = [*self._tasks.values(), *self._readers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._transport:
            await self._transport.close()

    def admit(self, peer: str) -> bool:
        """Whether a peer may open a channel: those of the plan, and its donors."""
        return peer in self._addresses

    def addresses(self, peer: str) -> tuple[str, ...]:
        """Where a peer is dialled that may open a channel."""
        return self._addresses.get(peer, ())

    def follow(self, plan: Plan) -> None:
        """Takes over a plan: who may come in, where to dial, what is over. It may be of the same generation, which goes
        on without somebody."""
        same = self.plan is not None and plan.generation == self.plan.generation
        self.plan, self._others = plan, None
        self._reach()
        if plan.lost:
            self.mailbox.reroute(plan)
        if not same:
            self.mailbox.fence(plan.generation)

    def watch(self, plan: Plan) -> None:
        """Takes over a plan that goes on without us: those in it can give us a state, nothing else goes there."""
        self._others = plan
        self._reach()

    def host(self, guests: tuple[Replica, ...]) -> None:
        """Lets newcomers in, who have no part in the plan yet and ask for its states."""
        if guests != self._guests:
            self._guests = guests
            self._reach()

    def _reach(self) -> None:
        """Who may come in, and where to dial them; the ways to all others end."""
        replicas: list[Replica] = list(self._guests)
        if (plan := self._others or self.plan) is not None:
            gone = {lost.peer for lost in plan.lost}
            replicas += [r for r in plan.everybody if r.peer not in gone]
        moved = {r.peer for r in replicas if self._addresses.get(r.peer, r.addresses) != r.addresses}
        self._addresses = {r.peer: r.addresses for r in replicas}
        for lane in [x for x in self._tasks if x[0] not in self._addresses or x[0] in moved]:
            self._tasks.pop(lane).cancel()
            self._outboxes.pop(lane, None)

    def paths(self) -> dict[str, PathInfo]:
        """How peers that we send to are reached, by the channel that boundary tensors take where there is one."""
        return {peer: c.path() for (peer, _), c in sorted(self._channels.items(), reverse=True) if not c.closed}

    # For the computing threads.

    def post(self, peer: str, frame: Frame) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
            self._loop.call_soon_threadsafe(self._enqueue, peer, frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        return self.mailbox.take(wanted, attempt)

    def holds(self, address: Address) -> bool:
        return self.mailbox.holds(address)

    def told(self, step: int) -> Mapping[Posted, float]:
        return self._told.pop(step, {})

    def _arrived_there(self, frame: Frame) -> None:
        """A receiver has told that it has a frame of ours."""
        header = frame.header
        if header.kind in (Kind.ACTIVATION, Kind.GRADIENT) and header.part == TRAIN:
            self._told.setdefault(header.step, {})[header.kind, header.microbatch] = time.perf_counter()
            if len(self._told) > TOLD_STEPS:
                del self._told[min(self._told)]

    # In the loop.

    def _enqueue(self, peer: str, frame: Frame) -> None:
        lane = peer, load_of(frame.header.kind)
        if peer not in self._addresses or not self._is_current(lane, frame):
            return
        task = self._tasks.get(lane)
        if task is None or task.done():
            self._outboxes[lane] = asyncio.Queue()
            self._tasks[lane] = asyncio.create_task(self._send_all(lane, self._outboxes[lane]))
        self._outboxes[lane].put_nowait(frame)

    def _is_current(self, lane: Lane, frame: Frame) -> bool:
        if lane[1] is Load.STATE:
            return True
        return self.plan is not None and not self._others and frame.header.generation == self.plan.generation

    async def give_way(self) -> None:
        """For what goes to others than peers: it comes last, as states do."""
        await self._give_way(Load.STATE)

    async def _give_way(self, load: Load) -> None:
        """Until nothing that comes before ``load`` is on its way, and of the rest no more than the line takes in a
        moment: what is in its queue goes before a microbatch that comes later. Or it was long enough."""
        with contextlib.suppress(TimeoutError, PotluckError):
            async with asyncio.timeout(GIVE_WAY_SECONDS):
                for channel in [c for (_, other), c in self._channels.items() if other < load]:
                    await channel.drain()
                async with self._turn:
                    while (busy := self._background()) and sum(c.in_flight_nbytes for c in busy) > self._allowance():
                        await busy[0].progress()

    def _background(self) -> list[Channel]:
        """Channels of rounds and states with something in flight."""
        return [c for (_, load), c in self._channels.items() if load is not Load.BOUNDARY and c.in_flight_nbytes]

    def _allowance(self) -> float:
        """Bytes of rounds and states that may be in flight, all together, before one more message goes."""
        paths = [c.path() for c in self._channels.values()]
        moments = [p.bytes_per_second * (QUEUE_SECONDS + (p.rtt_seconds or 0)) for p in paths if p.bytes_per_second]
        return max([LEAST_NBYTES, *moments])

    async def _send_all(self, lane: Lane, outbox: asyncio.Queue[Frame]) -> None:
        """A lane's life: dials when there is something to send, and again after a channel that ended at rest.

        What cannot be sent ends it with a fault of that frame's generation; one that is over has no faults any more.
        """
        peer, load = lane
        channel: Channel | None = None
        ended: asyncio.Task[Frame] | None = None
        generation = 0  # of what was sent last
        waiting = asyncio.ensure_future(outbox.get())
        try:
            while True:
                await asyncio.wait({waiting, *([ended] if ended else [])}, return_when=asyncio.FIRST_COMPLETED)
                try:
                    if channel is not None and ended is not None and ended.done():
                        ended.exception()
                        await channel.drain()  # raises if something we sent was never acknowledged
                        channel = ended = None
                    if not waiting.done():
                        continue
                    frame = waiting.result()
                    waiting = asyncio.ensure_future(outbox.get())
                    if self._is_current(lane, frame):
                        generation = frame.header.generation
                        if channel is None:
                            channel = self._channels[lane] = await self._dial(peer)
                            channel.tell(self._arrived_there)
                            if load is not Load.BOUNDARY:
                                channel.gate = functools.partial(self._give_way, load)
                            ended = asyncio.create_task(channel.recv())  # nobody answers: it ends with the channel
                        if load is Load.STATE:
                            await failpoint_async("worker.link.state.send", UnreachableError)
                        else:
                            await failpoint_async("worker.link.send", UnreachableError)
                        await channel.send(frame)
                except PotluckError as error:
                    if load is Load.STATE or self.plan is None or generation == self.plan.generation:
                        raise
                    log.info("what was left for %s is of a generation that is over: %s", peer[:8], error)
                    if channel is not None:
                        channel.abort(error)
                    channel = ended = None
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, PotluckError):
                log.exception("the way to %s broke", peer[:8])
            if load is Load.STATE:
                log.info("no state goes to %s or is asked for there: %s", peer[:8], error)
            else:
                self.on_fault(generation, peer, f"cannot send to {peer[:8]}: {error}")
        finally:
            waiting.cancel()
            if self._channels.get(lane) is channel:
                self._channels.pop(lane, None)
            if ended is not None:
                ended.cancel()
                await asyncio.gather(ended, return_exceptions=True)
            if channel is not None:
                await channel.hang_up()

    async def _dial(self, peer: str) -> Channel:
        assert self._transport is not None
        deadline = asyncio.get_running_loop().time() + DIAL_SECONDS
        while True:
            try:
                return await self._transport.dial(peer, self._addresses[peer])
            except UnreachableError as error:
                if error.code not in ("admission", "silent", "absent") or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def _accepted(self, channel: Channel) -> None:
        self._keep(asyncio.create_task(self._receive(channel)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def _receive(self, channel: Channel) -> None:
        """What comes in on a channel. A frame that is refused comes to nobody: that is a fault, told at once."""
        header: Header | None = None
        try:
            while True:
                header = None
                frame = await channel.recv()
                header = frame.header
                if header.kind in STATES:
                    await failpoint_async("worker.link.state.receive", WireError)
                    self.on_state(channel.peer_id, frame)
                    continue
                await failpoint_async("worker.link.receive", WireError)
                if not self.mailbox.put(Address.of(header, channel.peer_id), frame):
                    raise WireError("it sends more than anybody asked for")
        except WireError as error:
            channel.abort(error)
            generation = header.generation if header else self.plan.generation if self.plan else 0
            if self.admit(channel.peer_id) and not (header and header.kind in STATES):  # who asked will ask again
                self.on_fault(generation, channel.peer_id, f"refused what {channel.peer_id[:8]} sends: {error}")
        except PotluckError:
            pass  # the other side dials again if it has more to say
        except asyncio.CancelledError:
            await channel.hang_up()
            raise


def frame_check(
    run: bytes, boundary: Callable[[Header], None], weights_nbytes: Callable[[int], int], most: int, state_nbytes: int
) -> Callable[[Header], None]:
    """What may come in at all: this run's frames, of sizes that its shapes and codecs allow.

    ``weights_nbytes(n)`` is the longest payload of a round's piece for n weights; ``most`` the weights of the largest
    piece, ``state_nbytes`` the longest payload of a state's piece.
    """

    def check(header: Header) -> None:
        if header.run != run:
            raise WireError("a frame of another run")
        if header.kind in BOUNDARY:
            boundary(header)
            return
        if header.kind == Kind.STATE_REQUEST:
            if header.tensors:
                raise WireError("a request with a payload")
            return
        if len(header.tensors) != 1 or len(header.tensors[0].shape) != 1:
            raise WireError(f"{header.kind.name.lower()} with a strange payload")
        tensor, n = header.tensors[0], header.tensors[0].shape[0]
        if header.kind == Kind.STATE:
            if tensor.codec != RAW or tensor.nbytes != n or n > state_nbytes:
                raise WireError(f"a piece of a state of {tensor.nbytes} bytes")
            return
        codec = tensor.codec.removesuffix(SUFFIX)
        longest = weights_nbytes(n) if codec == WEIGHTS else 4 * n if codec in LONE and header.kind == Kind.REDO else 0
        if n > most or tensor.nbytes > longest:
            raise WireError(f"a round's piece for {n} weights in {tensor.nbytes} bytes")

    return check
