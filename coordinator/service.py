"""``potluck coordinator up``: the corpus, the store, the servers and the hub, from start to an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from ..protocol import control_pb2 as pb
from ..protocol.config import RunConfig, encoded, told
from ..protocol.errors import ConfigError, IdentityError, StateError
from ..protocol.evaluation import CHECKPOINTS
from ..protocol.footprint import footprints
from ..protocol.identity import lock
from ..protocol.manifest import SHARDS_FOLDER, Manifest
from ..protocol.multiaddr import check_relay
from ..protocol.own_address import advertised
from ..protocol.plan import Shape
from ..protocol.relay import Spot
from ..protocol.ticket import Ticket
from ..protocol.tls import Certificate, join_address, split_address, start_server
from ..protocol.weights import Weights
from . import corpus
from .access import everybody, kept_token
from .addresses import is_local
from .assignment import StageNeed
from .card import Facts, gathered
from .dashboard import server as web
from .dashboard.actions import Desk
from .dashboard.board import Board
from .dashboard.manual import SERVED
from .doors import Doors
from .evaluations import Evaluations, recorded
from .events import RunOpened
from .hub import Hub
from .observe import sinks
from .observe.metrics import route as metrics_route
from .observe.watch import Watch
from .publish import Publisher
from .relay import Relay
from .resume import resumed
from .state import Division, Journal, Mark, Noted, Rules, RunState, Unpublished, Uploaded
from .store import Store
from .weights import Span, open_checkpoint, shaped

log = logging.getLogger(__name__)
GIGABYTE = 1e9
STOP_SECONDS = 60.0
STUCK_SECONDS = 10.0  # that a disk may refuse while the run is to stop
FAREWELL_SECONDS = 10.0  # for workers to hear of the end and hang up
LAST_LOOK_SECONDS = 1.0  # that the page shows how it ended


def rules_of(config: RunConfig, manifest: Manifest) -> Rules:
    """What the state machine needs to know of a run."""
    model = config.model
    shape = Shape.of(model, manifest.vocab_size)

    def needs(layers: Sequence[tuple[int, int]]) -> tuple[StageNeed, ...]:
        on_cpus, on_gpus = (footprints(config, manifest.vocab_size, layers, device) for device in ("cpu", "cuda"))
        return tuple(
            StageNeed(work=shape.work(*stage), memory_gb=cpu.on_cpu / GIGABYTE, gpu_gb=gpu.on_gpu / GIGABYTE)
            for stage, cpu, gpu in zip(layers, on_cpus, on_gpus, strict=True)
        )

    divisions = (
        Division(layers=tuple(layers), needs=needs(layers))
        for layers in shape.splits(config.pipeline.counts(model.layers))
    )
    return Rules(
        name=config.name,
        seed=config.seed,
        steps=config.steps,
        divisions=tuple(divisions),
        microbatches=config.pipeline.microbatches,
        microbatch_size=config.pipeline.microbatch_size,
        sync=config.sync.resolved(),
        eval=config.eval,
        publish_rounds=config.checkpoint.publish_rounds,
        prepare_seconds=config.coordinator.prepare_seconds,
        keepers=config.checkpoint.keepers,
        wait_for=config.coordinator.wait_for,
        lease_seconds=config.coordinator.lease_seconds,
        patience_seconds=config.coordinator.patience_seconds,
        quorum=config.pipeline.quorum,
        reroutes=not config.activations.reuse,  # a delta is of use to the replica that keeps the value, no other
    )


@dataclass(frozen=True, kw_only=True)
class Running:
    """A coordinator that is up."""

    hub: Hub
    board: Board
    ticket: str
    page: str
    address: str
    token: str = field(default="", repr=False)  # the operator's
    is_new_token: bool = False


@asynccontextmanager
async def running(
    config: RunConfig, data_dir: Path, progress: Callable[[str, float], None] | None = None
) -> AsyncIterator[Running]:
    """Everything a coordinator is, on its addresses. Leaving the block stops it at once: ask the hub first."""
    with alone(data_dir):
        async with _running(config, data_dir, progress) as up:
            yield up


@contextlib.contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Holds the data directory: a second coordinator on the same ledger would hand out the same samples."""
    try:
        with lock(data_dir / "run"):
            yield
    except IdentityError as error:
        if error.code != "in-use":
            raise
        raise StateError(
            f"another coordinator is running on {data_dir}",
            hint="Stop it, or give this one its own --data-dir.",
            code="in-use",
        ) from None


@asynccontextmanager
async def _running(
    config: RunConfig, data_dir: Path, progress: Callable[[str, float], None] | None
) -> AsyncIterator[Running]:
    if config.observe.track != "off":
        sinks.check(config.observe.track)
    config = msgspec.structs.replace(config, model=await asyncio.to_thread(shaped, config.model))
    folder, path = corpus_folder(data_dir), data_dir / "run.sqlite"
    if path.exists():  # before the corpus: preparing another one would replace this run's
        with contextlib.closing(Store(path)) as store:
            check_fixed(store, config)
    folder, manifest = await asyncio.to_thread(corpus.of_run, config, folder, progress)
    checkpoint = await asyncio.to_thread(open_checkpoint, config.model, manifest.vocab_size, data_dir, progress)
    weights = checkpoint.weights if checkpoint else None
    rules = rules_of(config, manifest)
    store = Store(path)
    run_id, secret, state = open_run(store, config, manifest, weights)
    token, is_new = kept_token(store)
    certificate = Certificate.load_or_create(data_dir)
    board = Board(config, rules, run_id, manifest.vocab_size, store)
    hub, begun = Hub(rules, state, store, board), asyncio.Event()

    shape = Shape.of(config.model, manifest.vocab_size)
    desk = Desk(hub=hub, token=token, shape=shape, everybody=partial(hub.read, everybody, store))
    watch = Watch(config, run_id, data_dir, board, partial(refusing, hub))
    routes = [*desk.routes(), metrics_route(watch.seen)]

    async def published(step: int, path: Path) -> None:
        board.publish(path.name)
        hub.put(Uploaded(step=step, path=str(path)))

    async def facts() -> Facts:
        found: Facts = await hub.read(gathered, store, config.model.seq_len, run_id)
        return replace(found, base=f"{weights.source} (license: {weights.license})") if weights else found

    publisher = Publisher(data_dir / CHECKPOINTS, folder, config, manifest, published, card=facts, base=weights)
    doors = Doors(
        hub,
        run_id=run_id,
        secret=secret,
        fingerprint=certificate.fingerprint,
        welcome=pb.Welcome(
            config=encoded(config),
            manifest=msgspec.json.encode(manifest).decode(),
            weights=weights.encode() if weights else "",
        ),
        blobs={
            **(checkpoint.spans if checkpoint else {}),
            **{name: Span(folder / SHARDS_FOLDER / name, 0, n) for name, n in manifest.shards.items()},
        },
        publisher=publisher,
    )
    place = config.coordinator
    others = [str(Spot.parse(text)) for text in place.relays]
    for text in place.p2p_relays:
        check_relay(text)
    relay = Relay(
        *(run_id, secret, certificate.fingerprint),
        peer_mbps=place.relay_peer_mbps,
        is_banned=lambda peer: peer in hub.state.bans,
    )
    handlers = [*doors.handlers(), *(relay.handlers() if place.relay else ())]
    port = place.port or store.meta("port", 0)
    try:
        server, port = await start_server(place.host, port, handlers, certificate)
    except Exception:
        if place.port or not port:
            store.close()
            raise
        server, port = await start_server(place.host, 0, handlers, certificate)
    address = advertised(place.advertise, place.host, port)
    own = [str(Spot(address, certificate.fingerprint))] if place.relay else []
    doors.welcome.relays.extend(own + others)
    doors.welcome.p2p_relays.extend(place.p2p_relays)
    doors.lan = is_local(split_address(address)[0]) if place.lan is None else place.lan
    known = place.http_port or store.meta("http_port", 0)  # who has the page open finds it again
    try:
        try:
            page, http_port = await web.serve(page_of(board, hub, begun, routes), place.host, known)
        except StateError:
            if place.http_port or not known:
                raise
            page, http_port = await web.serve(page_of(board, hub, begun, routes), place.host, 0)
        url = f"http://{join_address(shown(place.host), http_port)}/"
        store.set_meta(port=port, http_port=http_port, page=url)
    except Exception:
        await server.stop(None)
        store.close()
        raise
    opened = RunOpened(
        name=config.name, step=state.committed.step, generation=state.plan.generation if state.plan else 0
    )
    now, opening = hub.clock(), [Journal(event=opened)]
    await hub.read(store.write, opening, now)
    board.update(state, opening, now)
    if state.plan and state.publish is not None:
        try:
            await publisher.resume(state.publish, state.plan.generation, state.plan.layers)
        except StateError as error:
            hub.put(Unpublished(step=state.publish, why=str(error)))
    evaluations = Evaluations(data_dir / CHECKPOINTS, await hub.read(recorded, store))
    for event in await asyncio.to_thread(evaluations.look):  # that came while nobody looked
        hub.put(Noted(event))
    await hub.start()
    begun.set()
    following = asyncio.create_task(evaluations.follow(hub.put), name="evaluations")
    ticket = Ticket(
        url=address,
        fingerprint=certificate.fingerprint,
        run=run_id,
        secret=secret,
        expires=int(time.time() + place.ticket_hours * 3600),
    )
    try:
        async with watch.running():
            yield Running(
                hub=hub,
                board=board,
                ticket=ticket.encode(),
                page=url,
                address=address,
                token=token,
                is_new_token=is_new,
            )
    finally:
        following.cancel()
        with contextlib.suppress(Exception):
            await page.close()
        for line in list(hub.lines.values()):
            line.close()
        await server.stop(1.0)
        await hub.close()


def page_of(board: Board, hub: Hub, begun: asyncio.Event, routes: Sequence[BaseRoute]) -> Starlette:
    """The page of a run, and whether it can go on."""

    def ready() -> str | None:
        return refusing(hub) or (None if begun.is_set() else "The run is being opened")

    return web.app(board, ready=ready, routes=routes, operations=SERVED)


def refusing(hub: Hub) -> str | None:
    """Why the disk takes no writes; None while it does."""
    if hub.failed:
        return "The disk refuses to write, for good"
    return hub.standing.note if hub.standing else None


def check_fixed(store: Store, config: RunConfig) -> None:
    """``ConfigError`` if a section that a run keeps for life differs from what it was started with. What an older
    version did not know of counts as its default."""
    stored = store.meta("config")
    if stored is None:
        return
    try:
        known = msgspec.convert(stored, RunConfig)
    except (msgspec.ValidationError, ConfigError) as error:
        raise StateError(
            f"what this run was started with is not understood ({error})",
            hint=f"Go on with the version of potluck that started it ({store.path.parent}).",
        ) from None
    for key in ("name", "seed", "model", "data", "pipeline", "activations", "optimizer", "sync"):
        if getattr(known, key) != getattr(config, key):
            raise ConfigError(
                f"run.yaml's `{key}` is not what this run was started with",
                hint=f"Put it back, or start a new run with another --data-dir (this one: {store.path.parent}).",
            )


def open_run(
    store: Store, config: RunConfig, manifest: Manifest, weights: Weights | None = None
) -> tuple[str, str, RunState]:
    """The run in this data directory: a new one, or the one that was there, from where it stood."""
    check_fixed(store, config)
    mine, begins = msgspec.to_builtins(told(config)), weights.sha256 if weights else ""
    if store.meta("config") is None:
        run_id, secret = secrets.token_hex(8), secrets.token_urlsafe(24)
        fixed = {"corpus": manifest.sha256, "weights": begins, "vocab_size": manifest.vocab_size}
        store.set_meta(config=mine, run_id=run_id, secret=secret, **fixed)
        return run_id, secret, RunState(since=time.time())
    if store.meta("corpus") != manifest.sha256:
        raise StateError(
            "the corpus is not the one this run was started with",
            hint="Restore its text, or start a new run with another --data-dir.",
        )
    if store.meta("weights") != begins:
        raise StateError(
            "the checkpoint is not the one this run began from",
            hint="Restore it, or start a new run with another --data-dir.",
        )
    if for_workers(store.meta("config")) != for_workers(mine):  # every worker begins anew
        store.set_meta(crew=None, course=None)
    store.set_meta(config=mine, vocab_size=manifest.vocab_size)
    marks = store.marks()
    rounds = store.rows("SELECT COALESCE(MAX(round), 0) FROM ledger")[0][0]  # lost ones, too: no number is used twice
    evaluated = store.rows("SELECT COALESCE(MAX(step), -1) FROM points WHERE heldout IS NOT NULL")[0][0]
    committed = marks[0] if marks else Mark(kind="init", generation=0, step=0, sample=0)
    published = sorted((store.path.parent / CHECKPOINTS).glob("step-" + "[0-9]" * 8))
    state = RunState(
        since=time.time(),
        generation=store.meta("generation", 0),
        committed=committed,
        marks=tuple(marks[1:]),
        stop=store.stop_mark(),
        rounds=rounds,
        evaluated=evaluated,
        published=int(published[-1].name.removeprefix("step-")) if published else -1,
    )
    return store.meta("run_id"), store.meta("secret"), resumed(rules_of(config, manifest), state, store)


def for_workers(config: dict[str, Any]) -> dict[str, Any]:
    """What workers do their work by: all but the coordinator's own settings."""
    own = ("coordinator", "observe")
    return {key: value for key, value in json.loads(json.dumps(config)).items() if key not in own}


async def stop(up: Running, seconds: float = STOP_SECONDS) -> str:
    """Asks for an orderly stop and waits for it; returns the phase reached. ``StateError`` if the disk refuses it."""
    up.hub.stop()
    ending = asyncio.create_task(up.hub.until_phase("stopped", "finished"))
    stuck = asyncio.create_task(up.hub.until_stuck(STUCK_SECONDS))
    await asyncio.wait({ending, stuck}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    stuck.cancel()
    if ending.done():
        phase = ending.result()
        await up.hub.until_alone(FAREWELL_SECONDS)
        return phase
    ending.cancel()
    if standing := up.hub.standing:
        raise StateError(
            f"{standing.error}; the run is not stopped in order, but nothing acknowledged is lost",
            hint="Mend that: the same command goes on from the last committed round.",
            code=standing.error.code,
        )
    return up.hub.state.phase


def corpus_folder(data_dir: Path) -> Path:
    return data_dir / "corpus"


def shown(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
