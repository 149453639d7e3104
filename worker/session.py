"""One worker in one run: the event loop's side (control stream, links) and the thread that computes, joined."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import msgspec
import torch

from ..protocol import control_pb2 as pb
from ..protocol.config import RunConfig
from ..protocol.errors import CapacityError, PotluckError, RefusedError, StateError
from ..protocol.failpoints import failpoint
from ..protocol.frames import Frame, Header
from ..protocol.grpc_transport import GrpcTransport
from ..protocol.hello import DRAINED
from ..protocol.identity import Identity
from ..protocol.manifest import Manifest
from ..protocol.meter import Meter
from ..protocol.multiaddr import check_relay
from ..protocol.p2pd import DaemonConfig, is_installed, listen_at, name_of, preload
from ..protocol.pipe import ChannelConfig
from ..protocol.plan import Shape
from ..protocol.relay import Spot
from ..protocol.throttle import Pace
from ..protocol.ticket import Ticket
from ..protocol.tls import Certificate, split_address
from ..protocol.transport import TransportConfig
from ..protocol.weights import Weights
from . import inventory
from .boundary import boundary_check
from .checkpoint import SavePoints
from .contribution import Contribution
from .control import Control
from .engine import Engine
from .files import Files
from .headquarters import Coordinator
from .keeper import Keeper
from .links import Links, frame_check
from .mailbox import Mailbox
from .memory import release
from .offer import Say, WorkerConfig
from .outside import EngineConfig, Views
from .plan import View
from .shards import MOST_WEIGHTS, most_nbytes
from .states import States
from .warm import warm
from .weights import Beginning

log = logging.getLogger(__name__)
T = TypeVar("T")
GIVE_UP = timedelta(seconds=10)  # a path to a peer that stays broken for so long is a fault
JOIN_SECONDS = 30.0  # for the computing thread to end


class Notice:
    """How a session is asked to end: ``leave`` in order, ``at_once`` without waiting for anything. ``words`` say so."""

    def __init__(self) -> None:
        self.leave, self.at_once = asyncio.Event(), asyncio.Event()
        self.words = "leaving: finishing the step and handing over (Ctrl-C again to leave at once)"


class Session:
    """Lives as long as the worker takes part."""

    def __init__(self, ticket: Ticket, config: WorkerConfig, identity: Identity, meter: Meter, say: Say) -> None:
        self.ticket, self.config, self.identity, self.meter, self.say = ticket, config, identity, meter, say
        self.folder = config.data_dir / "runs" / ticket.run
        self.run_name = hashlib.sha256(ticket.run.encode()).digest()[:8]
        self.points, self.views, self.mailbox = SavePoints(self.folder), Views(), Mailbox()
        self.links = Links(self.mailbox, self.on_state, self.fault)
        self.states = States(self.run_name, self.points, self.links.post, config.state_mbps)
        self.control = Control(ticket, identity, meter, self.points.points, self.heard, config.patience_minutes)
        self.control.paths = self.links.paths
        self.files = Files(self.control.line, meter, self.control.ended.done)
        self.files.give_way = self.links.give_way
        self.shape: Shape | None = None
        self.engine: Engine | None = None
        self.freed: float | None = None  # by time.monotonic, when nothing was computed any more and its memory was free
        self.contribution: Contribution | None = None
        self._checks: list[Callable[[Header], None]] = []
        self._told: str | None = ""
        self._p2p: asyncio.Task[None] | None = None

    async def run(self, notice: Notice) -> str:
        """See :func:`.daemon.join`."""
        thread: threading.Thread | None = None
        engine: Engine | None = None
        computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gone = asyncio.create_task(notice.at_once.wait())
        ends: tuple[asyncio.Future[Any], ...] = (computed, self.control.ended, gone)
        try:
            engine = await unless(notice.leave, self.begin())
            if engine is None:
                return "left before it had a part in the run"
            self.engine, engine.vacated = engine, partial(self.vacate, engine)
            thread = threading.Thread(target=compute, args=(engine, computed), name="engine", daemon=True)
            thread.start()
            self.control.idle = lambda: self.views.idle or self.mailbox.waits(thread.ident)
            asking = asyncio.create_task(self.ask_to_leave(notice))
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asking.cancel()
            view, _ = self.views.newest
            if computed.done():
                computed.result()
            elif gone.done():
                return "left at once; what was not committed is done by others"
            elif not view.released:
                error = self.control.ended.exception()
                assert error is not None
                if isinstance(error, RefusedError) and error.code in ("finished", "stopped"):
                    return f"the run is {error.code}"
                raise error
            return farewell(view)
        finally:
            early = gone.done() or engine is None
            gone.cancel()
            await self.end(thread, engine, computed, early=early)

    def vacate(self, engine: Engine) -> None:
        """The computing thread is done: what it held on the GPU is free, whatever else is to be done yet."""
        if self.freed is not None:
            return
        engine.let_go()
        release()
        self.freed = time.monotonic()

    async def begin(self) -> Engine:
        """Joins the run: until there is something to compute with."""
        pace = Pace(self.config.upload_mbps) if self.config.upload_mbps else None
        self.files.pace = pace
        channel = ChannelConfig(check=self.check, meter=self.meter, pace=pace, give_up=GIVE_UP)
        transport = GrpcTransport(
            self.identity,
            Certificate.generate(),
            TransportConfig(
                run=self.ticket.run, admit=self.links.admit, addresses=self.links.addresses, channel=channel
            ),
            host=self.config.host,
            port=self.config.port,
        )
        addresses = await self.links.start(transport)
        self.control.start(self.config.offer(addresses, name_of(self.identity) if is_installed() else ""))
        welcome = await asyncio.shield(self.control.welcome)
        failpoint("worker.joined")
        transport.use_relays(self.relays(welcome), self.ticket.secret, dialable=bool(welcome.addresses))
        if welcome.p2p_relays and is_installed():
            await asyncio.to_thread(preload)  # before other threads import anything: two at a time can go wrong
        self._p2p = asyncio.create_task(self.use_p2p(transport, welcome))
        if not welcome.addresses:
            self.say(not_dialled(welcome))
        engine = self.prepare(welcome)
        await asyncio.to_thread(warm, engine.config.run)
        return engine

    async def end(
        self, thread: threading.Thread | None, engine: Engine | None, computed: asyncio.Future[None], *, early: bool
    ) -> None:
        """Frees the machine first, then ends in order what is left. ``early``: the coordinator does not expect it."""
        if early and self.control.connected:
            self.control.leave(at_once=True)
        self.views.close()
        self.mailbox.close()
        if thread is not None:
            await asyncio.to_thread(thread.join, JOIN_SECONDS)
        if computed.done() and not computed.cancelled():
            computed.exception()
        if engine is not None and (early or self.control.is_gone):
            await asyncio.to_thread(engine.save_committed)
        if self._p2p is not None:
            self._p2p.cancel()
            await asyncio.wait({self._p2p})
        await asyncio.to_thread(self.states.close)
        await self.links.close()
        await self.control.close()  # last: what the links cost to the end is in its last totals

    async def use_p2p(self, transport: GrpcTransport, welcome: pb.Welcome) -> None:
        """One more way to peers behind routers, if the run has libp2p relays. Nothing depends on it.

        The hello has named our daemon, so that the first plan has it; if there is none, that is taken back.
        """
        if not welcome.p2p_relays:
            if self.config.map_port:
                self.say("no port is asked for: the run has no relay of libp2p, so no worker dials one")
            return
        try:
            for text in welcome.p2p_relays:
                check_relay(text)
            await transport.use_p2p(
                DaemonConfig(
                    listen=listen_at(self.config.host),
                    relays=tuple(welcome.p2p_relays),
                    map_port=self.config.map_port,
                )
            )
        except PotluckError as error:
            self.say(error.one_line())
            self.control.withdraw_p2p()

    def relays(self, welcome: pb.Welcome) -> list[Spot]:
        """Of the run; the coordinator's own where we have dialled it ourselves."""
        spots = [Spot.parse(text) for text in welcome.relays]
        own = self.ticket.fingerprint
        return [Spot(self.ticket.url, own) if spot.fingerprint == own else spot for spot in spots]

    def prepare(self, welcome: pb.Welcome) -> Engine:
        """The computing side, for the run that the coordinator describes."""
        run = msgspec.json.decode(welcome.config, type=RunConfig)
        manifest = Manifest.decode(welcome.manifest.encode(), "the coordinator's manifest")
        shape = self.shape = Shape.of(run.model, manifest.vocab_size)
        divisions = shape.splits(run.pipeline.counts(run.model.layers))
        most = max(shape.size(*layers) for division in divisions for layers in division)
        boundary = boundary_check(run, manifest)
        weights = partial(most_nbytes, run.sync.resolved())
        states = inventory.most_nbytes(most)
        self._checks.append(frame_check(self.run_name, boundary, weights, min(most, MOST_WEIGHTS), states))
        self.say(f"joined run {run.name} as {self.config.name} ({self.identity.peer_id[:8]})")
        coordinator = Coordinator(self.control, self.files, self.folder / "corpus", manifest)
        coordinator.reported = self.reported
        beginning = None
        if welcome.weights:
            checkpoint = Weights.decode(welcome.weights)
            fetch = partial(coordinator.fetch_weights, checkpoint.locations)
            beginning = Beginning(checkpoint, self.folder / "weights", fetch)
        elif run.model.train == "lora":
            raise StateError("the coordinator names no checkpoint for the run's base", hint="Tell its operator.")
        config = EngineConfig(
            run=run,
            manifest=manifest,
            run_name=self.run_name,
            peer=self.identity.peer_id,
            device=self.config.device,
            beginning=beginning,
        )
        self.states.prepare(run, shape, self.control.report, beginning)
        if run.checkpoint.keepers:
            self.states.keep(Keeper(run, shape, self.folder, self.control.report, beginning))
        self.files.locations = manifest.locations
        self.files.coordinator = split_address(self.ticket.url)[0]
        return Engine(config, self.views, self.links, self.mailbox, self.states, coordinator)

    def reported(self, body: dict[str, object]) -> None:
        """A step or a round was done here."""
        if self.contribution is not None and self.shape is not None and self.engine is not None and self.engine.layers:
            share = self.shape.size(*self.engine.layers) / self.shape.size(0, self.shape.layers)
            self.contribution.reported(body, share)

    # What the network calls.

    def check(self, header: Header) -> None:
        """Before a frame's payload is kept. Until the run is known, nobody is admitted."""
        for check in self._checks:
            check(header)

    def on_state(self, peer: str, frame: Frame) -> None:
        self.states.put(peer, frame)

    def fault(self, generation: int, peer: str, text: str) -> None:
        log.warning("%s", text)
        self.control.report(fault=pb.Fault(generation=generation, text=text, peer=peer))

    def heard(self, view: View) -> None:
        self.follow(view)
        if self.contribution is not None:
            self.contribution.follow(view)

    def follow(self, view: View) -> None:
        """A new view: the links first, so that nothing of an older generation comes in any more."""
        plan, known = view.plan, self.links.plan
        if plan is not None and any(lost.peer == self.identity.peer_id for lost in plan.lost):
            self.mailbox.fence(plan.generation + 1)  # they go on without us: nothing that we are at counts
            self.links.watch(plan)
        elif plan is not None and plan != known:
            self.links.follow(plan)
        elif plan is None and known is not None:
            self.mailbox.fence(known.generation + 1)
        if view.released and plan is not None:
            self.mailbox.fence(plan.generation + 1)  # whatever it waits for: others who are released do not send it
        self.links.host(view.guests)
        self.states.follow(view)
        self.views.put(view)
        line = self.wording(view)
        if line and self._told is not None and line != self._told:
            self._told = line
            self.say(line)

    def wording(self, view: View) -> str:
        plan = view.plan
        if view.phase == "preparing" and plan and (place := plan.places.get(self.identity.peer_id)):
            stage = plan.stages[place[0]]
            layers = f"layers {stage.first_layer}-{stage.last_layer - 1}"
            return f"taking over stage {place[0]} ({layers}) from step {plan.first_step}"
        return view.note or ("training" if view.phase == "training" and not view.closing else "")

    async def ask_to_leave(self, notice: Notice) -> None:
        await notice.leave.wait()
        self.say(notice.words)
        self._told = None  # of the run nothing more is said: it is about to go
        self.control.leave()
        failpoint("worker.leaving")


def not_dialled(welcome: pb.Welcome) -> str:
    """How others reach a worker that they cannot dial, in one line."""
    if welcome.relays:
        return "other workers reach this one through a relay"
    if welcome.p2p_relays and is_installed():
        return "other workers reach this one through a relay of libp2p"
    return "no other worker can reach this one: it cannot be dialled, and the run has no relay"


def farewell(view: View) -> str:
    """How it ended, in one line."""
    if view.phase == "finished":
        return "the run is finished; thank you"
    if view.phase == "stopped":
        return "the operator stopped the run; this worker's part is saved. Run the same command to go on"
    if view.note.startswith(DRAINED):
        return f"{view.note}; this worker's part is handed over or saved"
    return "left in good order; this worker's part is handed over or saved"


async def unless(event: asyncio.Event, doing: Coroutine[Any, Any, T]) -> T | None:
    """What comes of ``doing``; None if ``event`` is set before it is done: then it is cancelled."""
    task, waiting = asyncio.create_task(doing), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def compute(engine: Engine, outcome: asyncio.Future[None]) -> None:
    """The computing thread's whole life; its end, good or bad, goes to ``outcome``."""
    loop = outcome.get_loop()
    problem: BaseException | None = None
    try:
        engine.run()
    except PotluckError as error:
        problem = error
    except (MemoryError, torch.OutOfMemoryError) as error:
        problem = CapacityError(
            f"the machine has too little memory for its stage ({error})",
            hint="Ask the operator for more pipeline.stages.",
        )
    except BaseException as error:
        log.exception("the computing thread failed")
        problem = error

    def settle() -> None:
        if not outcome.done():
            if problem is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(problem)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
