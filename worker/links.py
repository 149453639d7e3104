"""The way to other peers: what we send goes over channels we dial, everything that arrives into the mailbox.

Each side dials those it sends to, so nobody has to agree on who dials. A channel keeps its order, so rounds and
states have one of their own beside that of the boundary tensors: a long transfer never holds up a microbatch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from ..protocol.channel import Channel
from ..protocol.errors import PotluckError, UnreachableError, WireError
from ..protocol.failpoints import failpoint_async
from ..protocol.frames import Frame, Header, Kind, TensorSpec, make_frame
from ..protocol.plan import Plan, Replica
from ..protocol.transport import Transport
from .mailbox import Address, Mailbox
from .shards import WEIGHTS
from .squeeze import SUFFIX

log = logging.getLogger(__name__)
STATE_PART_NBYTES = 4 << 20
RAW = "raw"
BOUNDARY = (Kind.ACTIVATION, Kind.GRADIENT, Kind.MISS)
ADMISSION_SECONDS = 30.0  # for a peer to hear of the plan that we already know
Lane = tuple[str, bool]  # peer, and whether it carries boundary tensors
StateProvider = Callable[[Header], bytes | None]


class OnFault(Protocol):
    def __call__(self, generation: int, peer: str, text: str) -> None: ...


class Links:
    """Owned by the event loop; ``post`` and ``take`` are for the computing threads."""

    def __init__(self, mailbox: Mailbox, provide: StateProvider, on_fault: OnFault) -> None:
        self.mailbox, self.provide, self.on_fault = mailbox, provide, on_fault
        self.plan: Plan | None = None
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._outboxes: dict[Lane, asyncio.Queue[Frame]] = {}
        self._tasks: dict[Lane, asyncio.Task[None]] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._early: dict[str, Header] = {}  # asked for a state by a plan that has not reached us yet
        self._served: set[tuple[str, int]] = set()  # who got its state in which generation

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

    def follow(self, plan: Plan) -> None:
        """Takes over a plan: who may come in, where to dial, what is over. It may be of the same generation, which goes
        on without somebody."""
        same = self.plan is not None and plan.generation == self.plan.generation
        self.plan = plan
        donors = () if same else tuple(d for stage in plan.stages for d in stage.donors)
        self._reach([*(r for replicas in plan.replicas for r in replicas), *donors])
        if plan.lost:
            self.mailbox.reroute(plan)
        if same:
            return
        self.mailbox.fence(plan.generation)
        early, self._early = self._early, {}
        self._served = {(p, g) for p, g in self._served if g >= plan.generation}
        for peer, request in early.items():
            self._keep(asyncio.create_task(self._serve(peer, request)))

    def _reach(self, replicas: Sequence[Replica]) -> None:
        """Who may come in, and where to dial them; the ways to all others end."""
        moved = {r.peer for r in replicas if self._addresses.get(r.peer, r.addresses) != r.addresses}
        self._addresses = {r.peer: r.addresses for r in replicas}
        for lane in [x for x in self._tasks if x[0] not in self._addresses or x[0] in moved]:
            self._tasks.pop(lane).cancel()
            self._outboxes.pop(lane, None)

    # For the computing threads.

    def post(self, peer: str, frame: Frame) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
            self._loop.call_soon_threadsafe(self._enqueue, peer, frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        return self.mailbox.take(wanted, attempt)

    def holds(self, address: Address) -> bool:
        return self.mailbox.holds(address)

    # In the loop.

    def _enqueue(self, peer: str, frame: Frame) -> None:
        if self.plan is None or frame.header.generation != self.plan.generation or peer not in self._addresses:
            return
        lane = peer, frame.header.kind in BOUNDARY
        task = self._tasks.get(lane)
        if task is None or task.done():
            self._outboxes[lane] = asyncio.Queue()
            self._tasks[lane] = asyncio.create_task(self._send_all(peer, self._outboxes[lane]))
        self._outboxes[lane].put_nowait(frame)

    async def _send_all(self, peer: str, outbox: asyncio.Queue[Frame]) -> None:
        """A lane's life: dials when there is something to send, and again after a channel that ended at rest."""
        channel: Channel | None = None
        ended: asyncio.Task[Frame] | None = None
        waiting = asyncio.ensure_future(outbox.get())
        try:
            while True:
                await asyncio.wait({waiting, *([ended] if ended else [])}, return_when=asyncio.FIRST_COMPLETED)
                if channel is not None and ended is not None and ended.done():
                    ended.exception()
                    await channel.drain()  # raises if something we sent was never acknowledged
                    channel = ended = None
                if not waiting.done():
                    continue
                frame = waiting.result()
                waiting = asyncio.ensure_future(outbox.get())
                if self.plan is not None and frame.header.generation == self.plan.generation:
                    if channel is None:
                        channel = await self._dial(peer)
                        ended = asyncio.create_task(channel.recv())  # nobody answers here: it ends with the channel
                    await failpoint_async("worker.link.send", UnreachableError)
                    await channel.send(frame)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, PotluckError):
                log.exception("the way to %s broke", peer[:8])
            if self.plan is not None:
                self.on_fault(self.plan.generation, peer, f"cannot send to {peer[:8]}: {error}")
        finally:
            waiting.cancel()
            if ended is not None:
                ended.cancel()
                await asyncio.gather(ended, return_exceptions=True)
            if channel is not None:
                channel.abort(UnreachableError("not needed any more"))

    async def _dial(self, peer: str) -> Channel:
        assert self._transport is not None
        deadline = asyncio.get_running_loop().time() + ADMISSION_SECONDS
        while True:
            try:
                return await self._transport.dial(peer, self._addresses[peer])
            except UnreachableError as error:
                if error.code != "admission" or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def _accepted(self, channel: Channel) -> None:
        self._keep(asyncio.create_task(self._receive(channel)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def _receive(self, channel: Channel) -> None:
        try:
            while True:
                frame = await channel.recv()
                await failpoint_async("worker.link.receive", WireError)
                header = frame.header
                if header.kind == Kind.STATE_REQUEST:
                    await self._serve(channel.peer_id, header)
                else:
                    if not self.mailbox.put(Address.of(header, channel.peer_id), frame):
                        raise WireError(f"{channel.peer_id[:8]} sends more than anybody asked for")
        except WireError as error:
            log.warning("%s", error)
            channel.abort(error)
        except PotluckError:
            pass  # the other side dials again if it has more to say

    async def _serve(self, peer: str, request: Header) -> None:
        """Sends a newcomer the state it asks for, in parts; one empty part if it is not here."""
        if self.plan is None or request.generation > self.plan.generation:
            self._early[peer] = request
            return
        if (peer, request.generation) in self._served or request.generation < self.plan.generation:
            return
        self._served.add((peer, request.generation))
        data = await asyncio.to_thread(self.provide, request) or b""
        for frame in state_frames(request, data):
            self._enqueue(peer, frame)


def request_frame(run: bytes, generation: int, stage: int, step: int) -> Frame:
    """Asks a donor for the state that a plan starts from."""
    return make_frame(
        payload=b"",
        kind=Kind.STATE_REQUEST,
        run=run,
        generation=generation,
        step=step,
        stage=stage,
        microbatch=0,
        part=0,
        attempt=0,
        tensors=(),
        targets=0,
        dense_nbytes=0,
    )


def state_frames(request: Header, data: bytes) -> list[Frame]:
    """``data`` cut into frames; ``targets`` of each says how many bytes there are in all."""
    cuts = range(0, max(1, len(data)), STATE_PART_NBYTES)
    return [
        make_frame(
            payload=(piece := data[start : start + STATE_PART_NBYTES]),
            kind=Kind.STATE,
            run=request.run,
            generation=request.generation,
            step=request.step,
            stage=request.stage,
            microbatch=0,
            part=part,
            attempt=0,
            tensors=(TensorSpec(codec=RAW, shape=(len(piece),), nbytes=len(piece)),),
            targets=len(data),
            dense_nbytes=0,
        )
        for part, start in enumerate(cuts)
    ]


def fetch_state(
    links: Links, run: bytes, generation: int, stage: int, step: int, donor: str, most_nbytes: int
) -> bytes | None:
    """A stage's state from one donor, as bytes; None if it has none. Blocks; for a computing thread."""
    links.post(donor, request_frame(run, generation, stage, step))
    data, part, total = bytearray(), 0, 1
    while len(data) < total:
        _, frame = links.take([Address(generation, Kind.STATE, step, part, 0, donor)])
        total = frame.header.targets
        if total > most_nbytes:
            raise WireError(f"a state of {total} bytes, at most {most_nbytes} fit the stage")
        if not frame.payload:
            return None
        data += frame.payload
        part += 1
    return bytes(data)


def frame_check(
    run: bytes, boundary: Callable[[Header], None], weights_nbytes: Callable[[int], int], most: int
) -> Callable[[Header], None]:
    """What may come in at all: this run's frames, of sizes that its shapes and codecs allow.

    ``weights_nbytes(n)`` is the longest payload of a round's piece for n weights; ``most`` the weights of the largest
    piece.
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
            if tensor.codec != RAW or tensor.nbytes != n or n > STATE_PART_NBYTES:
                raise WireError(f"a part of a state of {tensor.nbytes} bytes")
        elif n > most or tensor.codec not in (WEIGHTS, WEIGHTS + SUFFIX) or tensor.nbytes > weights_nbytes(n):
            raise WireError(f"a round's piece for {n} weights in {tensor.nbytes} bytes")

    return check
