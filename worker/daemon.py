"""The worker's only long-running loop: control stream, links and heartbeats here, torch in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from ..protocol.config import RunConfig
from ..protocol.errors import ConfigError, PotluckError, RefusedError, StateError
from ..protocol.frames import Header, Purpose
from ..protocol.grpc_transport import GrpcTransport
from ..protocol.identity import Identity, lock
from ..protocol.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from ..protocol.meter import Meter
from ..protocol.pipe import ChannelConfig
from ..protocol.ticket import Ticket
from ..protocol.tls import Certificate
from ..protocol.transport import TransportConfig
from .control import COORDINATOR, Control, Offer

if TYPE_CHECKING:
    from .plan import View

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a volunteer decides about this machine."""

    data_dir: Path
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    memory_gb: float = 0.0  # 0: half of the machine's memory
    threads: int = 0  # 0: half of the cores
    speed: float = 1.0
    device: str = "cpu"


class _Coordinator:
    """The control stream, as the computing thread sees it: calls that block until the loop has done them."""

    def __init__(self, control: Control, folder: Path, manifest: Manifest) -> None:
        self._control, self._folder, self._manifest = control, folder, manifest
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
        tokens = self._folder / TOKENS_FILE
        if not tokens.exists():
            asyncio.run_coroutine_threadsafe(
                self._control.fetch(self._manifest.tokens_sha256, tokens), self._loop
            ).result()
        try:
            (self._folder / MANIFEST_FILE).write_bytes(self._manifest.encode())
        except OSError as error:
            raise StateError(f"{self._folder}: {error}", hint="Free some space, or mend its rights.") from None
        return self._folder

    def publish(self, step: int, stage: int, data: bytes) -> None:
        asyncio.run_coroutine_threadsafe(self._control.upload(step, stage, data), self._loop).result()


async def join(ticket: Ticket, config: WorkerConfig, leave: asyncio.Event, say: Callable[[str], None]) -> str:
    """Works for a run until it is finished, stopped, or ``leave`` is set and the stage is handed over.

    Returns one line that says how it ended. Raises what a person must mend, as a ``PotluckError``.
    """
    identity = Identity.load_or_create(config.data_dir / "identity.pem")
    with lock(config.data_dir / "identity.pem"):
        return await _Worker(ticket, config, identity, say).run(leave)


class _Worker:
    def __init__(self, ticket: Ticket, config: WorkerConfig, identity: Identity, say: Callable[[str], None]) -> None:
        self.ticket, self.config, self.identity, self.say = ticket, config, identity, say
        self.folder = config.data_dir / "runs" / ticket.run
        self.meter = Meter()
        self.run_name = hashlib.sha256(ticket.run.encode()).digest()[:8]
        self.plan_generation = -1

    async def run(self, leave: asyncio.Event) -> str:
        # The first connection costs no torch, so a wrong ticket is refused in a moment.
        from ..protocol.tls import dial_pinned

        probe = await dial_pinned(self.ticket.url, self.ticket.fingerprint)
        self.meter.record_connection(COORDINATOR, dialled=True)
        await probe.close()
        self.say("found the coordinator; loading torch")
        await asyncio.to_thread(_prepare_torch, self._threads(), self.config.device)

        from .checkpoint import SavePoints, to_bytes
        from .engine import Engine, EngineConfig, Views
        from .links import Links
        from .mailbox import Mailbox

        points, views, mailbox = SavePoints(self.folder), Views(), Mailbox()
        checks: list[Callable[[Header], None]] = []

        def check(header: Header) -> None:
            for one in checks:
                one(header)

        def provide(request: Header) -> bytes | None:
            plan = links.plan
            if plan is None or request.stage >= len(plan.stages) or request.step != plan.first_step:
                return None
            stage = plan.stages[request.stage]
            state = points.find("round", plan.origin_generation, request.step, (stage.first_layer, stage.last_layer))
            return None if state is None else to_bytes(state.shared())

        def on_fault(generation: int, peer: str, text: str) -> None:
            from ..protocol import control_pb2 as pb

            log.warning("%s", text)
            control.report(fault=pb.Fault(generation=generation, text=text, peer=peer))

        def on_view(view: View) -> None:
            if view.plan is not None and view.plan.generation != self.plan_generation:
                self.plan_generation = view.plan.generation
                links.follow(view.plan)
            elif view.plan is None:
                mailbox.fence(self.plan_generation + 1)
            views.put(view)
            self._tell(view)

        links = Links(mailbox, provide, on_fault)
        control = Control(self.ticket, self.identity, self.meter, points.points, on_view)
        transport = GrpcTransport(
            self.identity,
            Certificate.generate(),
            TransportConfig(
                run=self.ticket.run,
                admit=links.admit,
                channel=ChannelConfig(check=check, meter=self.meter, give_up=timedelta(seconds=10)),
            ),
            host=self.config.host,
            port=self.config.port,
        )
        thread: threading.Thread | None = None
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            addresses = await links.start(transport)
            control.start(self._offer(addresses))
            welcome = await control.welcome
            run = msgspec.json.decode(welcome.config, type=RunConfig)
            manifest = Manifest.decode(welcome.manifest.encode(), "the coordinator's manifest")
            checks.append(self._frame_check(run, manifest))
            self.say(f"joined run {run.name} as {self._name()} ({self.identity.peer_id[:8]})")
            engine = Engine(
                EngineConfig(
                    run=run,
                    manifest=manifest,
                    run_name=self.run_name,
                    peer=self.identity.peer_id,
                    device=self.config.device,
                ),
                views,
                links,
                mailbox,
                points,
                _Coordinator(control, self.folder / "corpus", manifest),
            )
            thread = threading.Thread(target=_run_engine, args=(engine, outcome), name="engine", daemon=True)
            thread.start()
            asking = asyncio.create_task(self._ask_to_leave(leave, control))
            try:
                await asyncio.wait({outcome, control.ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asking.cancel()
            view, _ = views.newest
            if outcome.done():
                outcome.result()
            elif not view.released:
                error = control.ended.exception()
                assert error is not None
                if isinstance(error, RefusedError) and error.code in ("finished", "stopped"):
                    return f"the run is {error.code}"
                raise error
            return self._farewell(view)
        finally:
            views.close()
            mailbox.close()
            if thread is not None:
                await asyncio.to_thread(thread.join, 30.0)
            await links.close()
            await control.close()  # last: what the links cost to the end is in its last totals

    async def _ask_to_leave(self, leave: asyncio.Event, control: Control) -> None:
        await leave.wait()
        self.say("leaving: finishing the step and handing over (Ctrl-C again to leave at once)")
        control.leave()

    def _tell(self, view: View) -> None:
        plan = view.plan
        line = view.note
        if view.phase == "preparing" and plan and (place := plan.places.get(self.identity.peer_id)):
            stage = plan.stages[place[0]]
            layers = f"layers {stage.first_layer}-{stage.last_layer - 1}"
            line = f"taking over stage {place[0]} ({layers}) from step {plan.first_step}"
        elif view.phase == "training" and not view.closing:
            line = "training"
        if line and line != getattr(self, "_told", ""):
            self._told = line
            self.say(line)

    def _farewell(self, view: View) -> str:
        if view.phase == "finished":
            return "the run is finished; thank you"
        if view.phase == "stopped":
            return "the operator stopped the run; this worker's part is saved. Run the same command to go on"
        return "left in good order; this worker's part is handed over or saved"

    def _frame_check(self, run: RunConfig, manifest: Manifest) -> Callable[[Header], None]:
        from ..protocol.plan import split_layers, stage_parameters
        from .links import frame_check
        from .pipeline import boundary_check
        from .sync import codec_of

        model = run.model
        shape = {"d_model": model.d_model, "vocab_size": manifest.vocab_size}
        layers = split_layers(model.layers, run.pipeline.stages, **shape)
        most = max(stage_parameters(a, b, model.layers, **shape) for a, b in layers)
        boundary = boundary_check(run, manifest.vocab_size)
        return frame_check(self.run_name, boundary, codec_of(run).nbytes, most)

    def _name(self) -> str:
        return self.config.name or f"worker-{self.identity.peer_id[:6]}"

    def _offer(self, addresses: list[str]) -> Offer:
        memory = self.config.memory_gb or psutil.virtual_memory().total / 2e9
        return Offer(
            name=self._name(),
            device=self.config.device,
            memory_gb=memory,
            speed=self.config.speed,
            addresses=tuple(addresses),
        )

    def _threads(self) -> int:
        return self.config.threads or max(1, (os.cpu_count() or 2) // 2)


def _prepare_torch(threads: int, device: str) -> None:
    import torch

    from .engine import use_threads

    use_threads(threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"this machine cannot compute on {device!r}", hint="Use --device cpu, or cuda where torch finds a GPU."
        ) from None


def _run_engine(engine: object, outcome: asyncio.Future[None]) -> None:
    from .engine import Engine

    assert isinstance(engine, Engine)
    loop = outcome.get_loop()

    def settle(error: BaseException | None) -> None:
        if not outcome.done():
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(error)

    problem: BaseException | None = None
    try:
        engine.run()
    except PotluckError as error:
        problem = error
    except BaseException as error:
        log.exception("the computing thread failed")
        problem = error
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle, problem)
