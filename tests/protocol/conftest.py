"""Two transports joined by a line that can be cut: in memory, over gRPC either way round, or over libp2p."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest

from potluck.coordinator.relay import Relay
from potluck.protocol.channel import Channel
from potluck.protocol.errors import WireError
from potluck.protocol.frames import Frame, Kind, TensorSpec, make_frame
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.memory import MemoryNetwork
from potluck.protocol.meter import Meter
from potluck.protocol.p2pd import Daemon, DaemonConfig
from potluck.protocol.pipe import ChannelConfig
from potluck.protocol.relay import Spot
from potluck.protocol.tls import Certificate, split_address, start_server
from potluck.protocol.transport import Transport, TransportConfig

SECOND = timedelta(seconds=1)
SECRET = "a secret of the run"
TCP = DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",))
needs_hivemind = pytest.mark.skipif(
    importlib.util.find_spec("hivemind") is None, reason='hivemind is not installed: pip install -e ".[p2p]"'
)


def frame_of(
    payload: bytes,
    microbatch: int,
    dense_nbytes: int = 0,
    kind: Kind = Kind.ACTIVATION,
    tensors: tuple[TensorSpec, ...] = (),
) -> Frame:
    """A frame, whatever is in it: one tensor, if no others are named."""
    return make_frame(
        payload,
        kind=kind,
        run=b"testrun.",
        generation=1,
        step=2,
        stage=1,
        microbatch=microbatch,
        part=0,
        attempt=0,
        tensors=tensors or (TensorSpec(codec="tile4", shape=(len(payload),), nbytes=len(payload)),),
        targets=0,
        dense_nbytes=dense_nbytes,
    )


class Proxy:
    """A line between two peers that can be cut."""

    def __init__(self, host: str, port: int, *, backward: bool = False) -> None:
        """``budget`` counts what who dials says; ``backward``: what it hears."""
        self._target, self._backward = (host, port), backward
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.budget: int | None = None
        self.refusing = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        for source, sink, counted in ((reader, far_writer, not self._backward), (far_reader, writer, self._backward)):
            task = asyncio.create_task(self._pump(source, sink, counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if counted and self.budget is not None:
                    self.budget -= len(data)
                    if self.budget < 0:
                        self.budget = None
                        self.cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  (what is looked at has no event)
            await asyncio.sleep(0.01)


class Rig:
    """Two transports, ``a`` dialling ``b`` over a line that can be cut: that to the relay, if there is one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.accepted: asyncio.Queue[Channel] = asyncio.Queue()
        self.errors: list[WireError] = []
        self.network = MemoryNetwork()
        self.proxy: Proxy | None = None
        self._beside: Proxy | None = None  # to the relay, where the line is another one
        self.relay: Relay | None = None
        self.closing: list[Transport | Daemon] = []
        self.told: dict[str, list[str]] = {}  # where peers are, as every plan says

    def config(self, admit: Callable[[str], bool] | None = None, **fields: Any) -> TransportConfig:
        channel = {"give_up": 10 * SECOND, "close_timeout": 10 * SECOND, "first_backoff": SECOND / 50}
        channel |= {"meter": Meter(), "on_error": lambda _, error: self.errors.append(error)} | fields
        return TransportConfig(
            run="r",
            admit=admit or (lambda _: True),
            addresses=lambda peer: self.told.get(peer, ()),
            channel=ChannelConfig(**channel),
        )

    def transport(self, name: str, config: TransportConfig) -> Any:
        if self.kind == "memory":
            made: Any = self.network.join(name, config)
        else:
            connections = (4, 4) if self.kind == "striped" else (1, 1)
            made = GrpcTransport(Identity.generate(), Certificate.generate(), config, connections=connections)
        self.closing.append(made)
        return made

    async def start(self, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> None:
        self.config_a, self.config_b = self.config(**a or {}), self.config(**b or {})
        self.a, self.b = self.transport("a", self.config_a), self.transport("b", self.config_b)
        self.addresses = await self.b.listen(self.accepted.put_nowait)
        if self.kind in ("grpc", "striped"):
            self.proxy = Proxy(*split_address(self.addresses[0]))
            self.addresses = [await self.proxy.start()]
        if self.kind == "p2p":
            port = free_port()
            self.proxy = Proxy("127.0.0.1", port)
            line = f"/ip4/127.0.0.1/tcp/{split_address(await self.proxy.start())[1]}"
            await self.a.use_p2p(TCP)
            # Daemons tell each other where else they are, and would go round the line.
            told = DaemonConfig(listen=(f"/ip4/127.0.0.1/tcp/{port}",), announce=(line,))
            self.addresses = await self.b.use_p2p(told)
            assert [line] == [address.partition("/p2p/")[0] for address in self.addresses]
        if self.kind == "relayed":
            spot = await self.start_relay()
            self.addresses = []
            self.a.use_relays([spot], SECRET)
            self.b.use_relays([spot], SECRET)
            await until(lambda: self.relay is not None and self.relay.attached == 2)
        if self.kind == "returned":
            await self.start_returned()

    async def start_returned(self) -> None:
        """Nobody can dial ``b``: ``a`` asks it at the relay to dial, over the line that can be cut."""
        spot = await self.start_relay()
        assert self.proxy
        self._beside = self.proxy
        own = split_address((await self.a.listen(lambda channel: None))[0])
        self.proxy = Proxy(*own, backward=True)
        self.addresses, self.told = [], {self.a.peer_id: [await self.proxy.start()]}
        self.a.use_relays([spot], SECRET, dialable=True)
        self.b.use_relays([spot], SECRET)
        await until(lambda: self.relay is not None and self.relay.attached == 2)

    async def start_relay(self, **limits: Any) -> Spot:
        certificate = Certificate.generate()
        self.relay = Relay("r", SECRET, certificate.fingerprint, **limits)
        self._server, port = await start_server("127.0.0.1", 0, self.relay.handlers(), certificate)
        self.proxy = Proxy("127.0.0.1", port)
        return Spot(await self.proxy.start(), certificate.fingerprint)

    async def connect(self, **sides: dict[str, Any]) -> tuple[Channel, Channel]:
        await self.start(**sides)
        near = await self.a.dial(self.b.peer_id, self.addresses)
        return near, await self.accepted.get()

    def cut(self) -> None:
        self.network.cut("a", "b")
        if self.proxy:
            self.proxy.cut()

    def cut_after(self, nbytes: int) -> None:
        self.network.cut_after("a", "b", nbytes)
        if self.proxy:
            self.proxy.budget = nbytes

    def refuse(self) -> None:
        self.network.refuse("a", "b")
        for proxy in (self.proxy, self._beside):
            if proxy:
                proxy.refusing = True
                proxy.cut()

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self.closing))
        if self.relay:
            await self._server.stop(None)
        for proxy in (self.proxy, self._beside):
            if proxy:
                await proxy.close()


@pytest.fixture(params=["memory", "grpc", "striped", "relayed", "returned", pytest.param("p2p", marks=needs_hivemind)])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    made = Rig(request.param)
    yield made
    await made.close()
