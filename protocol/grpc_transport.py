"""Straight to a reachable peer: byte streams of gRPC over TLS, both ends proven by their Ed25519 keys.

Certificates are self-signed, so TLS alone proves nothing. The dialler trusts whatever certificate answers,
and then each side signs the fingerprint of the certificate *it* sees or holds, both nonces and the other's
name. Somebody in the middle has a certificate of his own, so neither signature can be passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Annotated, Any, TypeVar

import grpc
import msgspec
from msgspec import Meta, Struct

from .channel import Channel
from .errors import UnreachableError, WireError
from .frames import one_line
from .identity import Identity, peer_id_of, verify
from .pipe import PathKind, Pipe, PipeClosed
from .tls import (
    Certificate,
    fetch_certificate,
    fingerprint_of,
    join_address,
    pinned_channel,
    split_address,
    start_server,
)
from .transport import Channels, OnChannel, TransportConfig

SERVICE, METHOD = "potluck.Peer", "Pipe"
STRANGERS = "strangers"  # in the meter: dialled us and were turned away
_NONCE_NBYTES = 32
_CLOSE_SECONDS = 1.0
_GRPC_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

_Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
_Text = Annotated[str, Meta(max_length=200)]


class _Challenge(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    nonce: _Bytes32


class _Claim(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    public: _Bytes32
    nonce: _Bytes32
    target: _Text
    signature: _Bytes64


class _Answer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``refusal`` is empty, or the code of the error the dialler shall raise."""

    refusal: _Text
    public: _Bytes32 = bytes(32)
    signature: _Bytes64 = bytes(64)


_T = TypeVar("_T", _Challenge, _Claim, _Answer)


def _transcript(role: bytes, *fields: bytes) -> bytes:
    """What is signed: fields behind their lengths, so that none can run into the next."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in (b"potluck peer handshake 1", role, *fields))


def _decode(data: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"the handshake is not valid: {one_line(str(error))}") from None


async def prove_to_listener(pipe: Pipe, identity: Identity, peer_id: str, fingerprint: str, run: str) -> None:
    """The dialler's part: say who we are to ``peer_id`` and nobody else, and hear proof that it is it."""
    challenge = _decode(await pipe.recv(), _Challenge)
    nonce = secrets.token_bytes(_NONCE_NBYTES)
    seen = (fingerprint.encode(), challenge.nonce, nonce, run.encode())
    signature = identity.sign(_transcript(b"dialler", *seen, peer_id.encode()))
    await pipe.send(msgspec.msgpack.encode(_Claim(identity.public_bytes, nonce, peer_id, signature)))
    answer = _decode(await pipe.recv(), _Answer)
    if answer.refusal == "admission":
        raise UnreachableError(
            f"{peer_id} does not admit this peer", hint="wait until both know the same plan", code="admission"
        )
    expected = _transcript(b"listener", *seen, identity.peer_id.encode())
    if answer.refusal or peer_id_of(answer.public) != peer_id or not verify(answer.public, answer.signature, expected):
        raise UnreachableError(
            f"what answers is not peer {peer_id}", hint="ask the coordinator for its address", code="identity"
        )


async def prove_to_dialler(pipe: Pipe, identity: Identity, fingerprint: str, config: TransportConfig) -> str | None:
    """The listener's part: the dialler's peer id once it is proven and admitted, else None."""
    challenge = _Challenge(secrets.token_bytes(_NONCE_NBYTES))
    await pipe.send(msgspec.msgpack.encode(challenge))
    claim = _decode(await pipe.recv(), _Claim)
    seen = (fingerprint.encode(), challenge.nonce, claim.nonce, config.run.encode())
    peer_id = peer_id_of(claim.public)
    refusal = ""
    if claim.target != identity.peer_id or not verify(
        claim.public, claim.signature, _transcript(b"dialler", *seen, claim.target.encode())
    ):
        refusal = "identity"
    elif not config.admit(peer_id):
        refusal = "admission"
    if refusal:
        await pipe.send(msgspec.msgpack.encode(_Answer(refusal)))
        return None
    signature = identity.sign(_transcript(b"listener", *seen, peer_id.encode()))
    await pipe.send(msgspec.msgpack.encode(_Answer("", identity.public_bytes, signature)))
    return peer_id


class _DiallerPipe:
    kind: PathKind = "direct"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._call = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)(None)
        self._broken = False

    async def send(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except _GRPC_ERRORS as error:
            raise self._closed(error) from None

    async def recv(self) -> bytes:
        try:
            message = await self._call.read()
        except _GRPC_ERRORS as error:
            raise self._closed(error) from None
        if not isinstance(message, bytes):  # EOF
            raise self._closed(None)
        return message

    async def close(self) -> None:
        """Orderly while the stream lives: what was written arrives, then the other side ends it."""
        try:
            if not self._broken and not self._call.done():
                with contextlib.suppress(*_GRPC_ERRORS, TimeoutError):
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        await self._call.done_writing()
                        while isinstance(await self._call.read(), bytes):
                            pass
        finally:
            self._call.cancel()
            await self._channel.close(None)

    def _closed(self, error: Exception | None) -> PipeClosed:
        self._broken = True
        detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else ""
        return PipeClosed(f"the connection broke: {one_line(detail or 'the stream ended')}")


class _ListenerPipe:
    kind: PathKind = "direct"

    def __init__(self, context: Any) -> None:
        self._context = context

    async def send(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except _GRPC_ERRORS:
            raise PipeClosed("the connection broke") from None

    async def recv(self) -> bytes:
        try:
            message = await self._context.read()
        except _GRPC_ERRORS:
            raise PipeClosed("the connection broke") from None
        if not isinstance(message, bytes):  # EOF
            raise PipeClosed("the dialler ended the stream")
        return message

    async def close(self) -> None:
        """The stream ends when its handler returns."""


class GrpcTransport:
    """A ``Transport`` for peers whose address can be dialled. ``port`` 0 takes any free one."""

    def __init__(
        self,
        identity: Identity,
        certificate: Certificate,
        config: TransportConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.peer_id = identity.peer_id
        self._identity = identity
        self._certificate = certificate
        self._config = config
        self._host, self._port = host, port
        self._channels = Channels(config)
        self._server: grpc.aio.Server | None = None

    async def listen(self, on_channel: OnChannel) -> list[str]:
        async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
            pipe = _ListenerPipe(context)
            try:
                async with asyncio.timeout(self._config.channel.dial_timeout.total_seconds()):
                    peer_id = await prove_to_dialler(pipe, self._identity, self._certificate.fingerprint, self._config)
            except (WireError, PipeClosed, TimeoutError):
                return
            self._config.channel.meter.record_connection(peer_id or STRANGERS, dialled=False, proof=True)
            if peer_id is not None:
                await self._channels.serve(peer_id, pipe, on_channel)

        handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(serve)})
        self._server, port = await start_server(self._host, self._port, [handler], self._certificate)
        return [join_address(_dialable(self._host), port)]

    async def dial(self, peer_id: str, addresses: Sequence[str]) -> Channel:
        async def connect() -> Pipe:
            failures: list[UnreachableError] = []
            # A dead address must not use up the time of the next.
            each = self._config.channel.dial_timeout / max(1, len(addresses))
            for address in addresses:
                try:
                    return await self._connect(peer_id, address, each)
                except UnreachableError as error:
                    failures.append(error)
            if not failures:
                raise UnreachableError(f"peer {peer_id} has no address", hint="wait until it is reachable")
            # That the right peer says no tells more than that an old address is dead.
            order = {"admission": 0, "identity": 1}
            raise min(failures, key=lambda error: order.get(error.code, 2))

        return await self._channels.open(peer_id, connect)

    async def _connect(self, peer_id: str, address: str, timeout: timedelta) -> Pipe:
        host, port = split_address(address)
        der = await fetch_certificate(host, port, timeout)
        # Here, for one that is turned away costs as much.
        self._config.channel.meter.record_connection(peer_id, dialled=True, proof=True)
        pipe = _DiallerPipe(pinned_channel(join_address(host, port), der))
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await prove_to_listener(pipe, self._identity, peer_id, fingerprint_of(der), self._config.run)
        except (WireError, TimeoutError):
            await pipe.close()
            raise UnreachableError(
                f"what answers at {address} is not a peer", hint="check the address", code="identity"
            ) from None
        except BaseException:
            await pipe.close()
            raise
        return pipe

    async def close(self) -> None:
        await self._channels.close()
        if self._server is not None:
            await self._server.stop(_CLOSE_SECONDS)
            self._server = None


def _dialable(host: str) -> str:
    """The address to dial for a server bound to ``host``: for a wildcard, that of the way out."""
    if host not in ("0.0.0.0", "::"):
        return host
    v6 = host == "::"
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; the addresses are reserved for documentation.
            probe.connect(("2001:db8::1" if v6 else "192.0.2.1", 9))
        except OSError:
            return "::1" if v6 else "127.0.0.1"
        return str(probe.getsockname()[0])
