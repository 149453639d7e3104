"""One worker in one run: the event loop's side (control stream, links) and the thread that computes, joined."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import msgspec
import torch

from ..protocol import control_pb2 as pb
from ..protocol.config import RunConfig
from ..protocol.errors import CapacityError, PotluckError, RefusedError, StateError, UnreachableError
from ..protocol.failpoints import failpoint
from ..protocol.frames import Frame, Header, Purpose
from ..protocol.grpc_transport import GrpcTransport
from ..protocol.identity import Identity
from ..protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest
from ..protocol.meter import Meter
from ..protocol.multiaddr import check_relay
from ..protocol.p2pd import DaemonConfig, is_installed, listen_at, name_of, preload
from ..protocol.pipe import ChannelConfig
from ..protocol.plan import Shape
from ..protocol.relay import Spot
from ..protocol.ticket import Ticket
from ..protocol.tls import Certificate, split_address
from ..protocol.transport import TransportConfig
from . import inventory
from .boundary import boundary_check
from .checkpoint import SavePoints
from .control import Control
from .engine import Engine
from .files import Files
from .keeper import Keeper
from .links import Links, frame_check
from .mailbox import Mailbox
from .offer import Say, WorkerConfig
from .outside import EngineConfig, Views
from .plan import View
from .shards import MOST_WEIGHTS, most_nbytes
from .states import States
from .warm import warm

log = logging.getLogger(__name__)
GIVE_UP = timedelta(seconds=10)  # a path to a peer that stays broken for so long is a fault
LOOK_SECONDS = 0.5  # between two looks whether an upload is still wanted
JOIN_SECONDS = 30.0  # for the computing thread to end


class Session:
    """Lives as long as the worker takes part."""

    def __init__(self, ticket: Ticket, config: WorkerConfig, identity: Identity, meter: Meter, say: Say) -> None:
        self.ticket, self.config, self.identity, self.meter, self.say = ticket, config, identity, meter, say
        self.folder = config.data_dir / "runs" / ticket.run
        self.run_name = hashlib.sha256(ticket.run.encode()).digest()[:8]
        self.points, self.views, self.mailbox = SavePoints(self.folder), Views(), Mailbox()
        self.links = Links(self.mailbox, self.on_state, self.fault)
        self.states = States(self.run_name, self.points, self.links.post, config.state_mbps)
        self.control = Control(ticket, identity, meter, self.points.points, self.follow, config.patience_minutes)
        self.control.paths = self.links.paths
        self.files = Files(self.control.line, meter, self.control.ended.done)
        self.files.give_way = self.links.give_way
        self._checks: list[Callable[[Header], None]] = []
        self._told = ""

    async def run(self, leave: asyncio.Event) -> str:
        """See :func:`.daemon.join`."""
        channel = ChannelConfig(check=self.check, meter=self.meter, give_up=GIVE_UP)
        transport = GrpcTransport(
            self.identity,
            Certificate.generate(),
            TransportConfig(run=self.ticket.run, admit=self.links.admit, channel=channel),
            host=self.config.host,
            port=self.config.port,
        )
        thread: threading.Thread | None = None
        engine: Engine | None = None
        p2p: asyncio.Task[None] | None = None
        computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            addresses = await self.links.start(transport)
            self.control.start(self.config.offer(addresses, name_of(self.identity) if is_installed() else ""))
            welcome = await self.control.welcome
            failpoint("worker.joined")
            transport.use_relays(self.relays(welcome), self.ticket.secret)
            if welcome.p2p_relays and is_installed():
                await asyncio.to_thread(preload)  # before other threads import anything: two at a time can go wrong
            p2p = asyncio.create_task(self.use_p2p(transport, welcome))
            if not welcome.addresses:
                self.say(not_dialled(welcome))
            engine = self.engine(welcome)
            await asyncio.to_thread(warm, engine.config.run)
            thread = threading.Thread(target=compute, args=(engine, computed), name="engine", daemon=True)
            thread.start()
            self.control.idle = lambda: self.views.idle or self.mailbox.waits(thread.ident)
            asking = asyncio.create_task(self.ask_to_leave(leave))
            try:
                await asyncio.wait({computed, self.control.ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asking.cancel()
            view, _ = self.views.newest
            if computed.done():
                computed.result()
            elif not view.released:
                error = self.control.ended.exception()
                assert error is not None
                if isinstance(error, RefusedError) and error.code in ("finished", "stopped"):
                    return f"the run is {error.code}"
                raise error
            return farewell(view)
        finally:
            self.views.close()
            self.mailbox.close()
            if p2p is not None:
                p2p.cancel()
                await asyncio.wait({p2p})
            if thread is not None:
                await asyncio.to_thread(thread.join, JOIN_SECONDS)
            if engine is not None and self.control.is_gone:
                await asyncio.to_thread(engine.save_committed)
            await asyncio.to_thread(self.states.close)
            await self.links.close()
            await self.control.close()  # last: what the links cost to the end is in its last totals

    async def use_p2p(self, transport: GrpcTransport, welcome: pb.Welcome) -> None:
        """One more way to peers behind routers, if the run has libp2p relays. Nothing depends on it."""
        if not welcome.p2p_relays:
            return
        try:
            for text in welcome.p2p_relays:
                check_relay(text)
            host = listen_at(self.config.host)
            await transport.use_p2p(DaemonConfig(listen=host, relays=tuple(welcome.p2p_relays)))
        except PotluckError as error:
            self.say(error.one_line())

    def relays(self, welcome: pb.Welcome) -> list[Spot]:
        """Of the run; the coordinator's own where we have dialled it ourselves."""
        spots = [Spot.parse(text) for text in welcome.relays]
        own = self.ticket.fingerprint
        return [Spot(self.ticket.url, own) if spot.fingerprint == own else spot for spot in spots]

    def engine(self, welcome: pb.Welcome) -> Engine:
        """The computing side, for the run that the coordinator describes."""
        run = msgspec.json.decode(welcome.config, type=RunConfig)
        manifest = Manifest.decode(welcome.manifest.encode(), "the coordinator's manifest")
        shape = Shape.of(run.model, manifest.vocab_size)
        divisions = shape.splits(run.pipeline.counts(run.model.layers))
        most = max(shape.size(*layers) for division in divisions for layers in division)
        boundary = boundary_check(run, manifest)
        weights = partial(most_nbytes, run.sync.resolved())
        states = inventory.most_nbytes(most)
        self._checks.append(frame_check(self.run_name, boundary, weights, min(most, MOST_WEIGHTS), states))
        self.say(f"joined run {run.name} as {self.config.name} ({self.identity.peer_id[:8]})")
        config = EngineConfig(
            run=run,
            manifest=manifest,
            run_name=self.run_name,
            peer=self.identity.peer_id,
            device=self.config.device,
        )
        self.states.prepare(run, shape, self.control.report)
        if run.checkpoint.keepers:
            self.states.keep(Keeper(run, shape, self.folder, self.control.report))
        self.files.locations = manifest.locations
        self.files.coordinator = split_address(self.ticket.url)[0]
        coordinator = Coordinator(self.control, self.files, self.folder / "corpus", manifest)
        return Engine(config, self.views, self.links, self.mailbox, self.states, coordinator)

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
        if line and line != self._told:
            self._told = line
            self.say(line)

    def wording(self, view: View) -> str:
        plan = view.plan
        if view.phase == "preparing" and plan and (place := plan.places.get(self.identity.peer_id)):
            stage = plan.stages[place[0]]
            layers = f"layers {stage.first_layer}-{stage.last_layer - 1}"
            return f"taking over stage {place[0]} ({layers}) from step {plan.first_step}"
        return "training" if view.phase == "training" and not view.closing else view.note

    async def ask_to_leave(self, leave: asyncio.Event) -> None:
        await leave.wait()
        self.say("leaving: finishing the step and handing over (Ctrl-C again to leave at once)")
        self.control.leave()
        failpoint("worker.leaving")


class Coordinator:
    """The control stream, as the computing thread sees it: calls that block until the loop has done them."""

    def __init__(self, control: Control, files: Files, folder: Path, manifest: Manifest) -> None:
        self._control, self._files, self._folder, self._manifest = control, files, folder, manifest
        self._loop = asyncio.get_running_loop()

    @property
    def state(self) -> str:
        return self._control.state

    @state.setter
    def state(self, value: str) -> None:
        self._control.state = value

    def report(self, **body: object) -> None:
        self._control.report(**body)

    def counterfactual(self, dense_nbytes: int) -> None:
        self._control.meter.counterfactual(self._control.identity.peer_id, Purpose.WEIGHTS, dense_nbytes)

    def corpus(self) -> Path:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / MANIFEST_FILE).write_bytes(self._manifest.encode())
        except OSError as error:
            raise StateError(f"{self._folder}: {error}", hint="Free some space, or mend its rights.") from None
        return self._folder

    def fetch(self, name: str, nbytes: int) -> None:
        fetched = self._files.fetch(name, self._folder / SHARDS_FOLDER / name, nbytes)
        asyncio.run_coroutine_threadsafe(fetched, self._loop).result()

    def publish(self, step: int, stage: int, data: bytes, is_wanted: Callable[[], bool]) -> None:
        going = asyncio.run_coroutine_threadsafe(self._files.upload(step, stage, data), self._loop)
        while True:
            try:
                return going.result(LOOK_SECONDS)
            except TimeoutError:
                if going.done() or not is_wanted():
                    going.cancel()
                    raise UnreachableError("the upload is not wanted any more") from None


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
    return "left in good order; this worker's part is handed over or saved"


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
