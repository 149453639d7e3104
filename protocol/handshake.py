"""How two peers prove who they are to each other over a pipe, bound to the TLS certificate in between.

Certificates are self-signed, so TLS alone proves nothing. The dialler trusts whatever certificate answers,
and then each side signs the fingerprint of the certificate *it* sees or holds, both nonces and the other's
name. Somebody in the middle has a certificate of his own, so neither signature can be passed on.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import UnreachableError, WireError
from .frames import one_line
from .identity import Identity, peer_id_of, verify
from .pipe import Pipe
from .transport import TransportConfig

HANDSHAKE = b"potluck peer handshake 1"
NONCE_NBYTES = 32

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
Text = Annotated[str, Meta(max_length=200)]


class Challenge(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    nonce: Bytes32


class _Claim(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    public: Bytes32
    nonce: Bytes32
    target: Text
    signature: Bytes64


class _Answer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``refusal`` is empty, or the code of the error the dialler shall raise."""

    refusal: Text
    public: Bytes32 = bytes(32)
    signature: Bytes64 = bytes(64)


_T = TypeVar("_T", bound=Struct)


def transcript(*fields: bytes) -> bytes:
    """What is signed: fields behind their lengths, so that none can run into the next."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def decode(data: bytes, type_: type[_T]) -> _T:
    """A handshake's message; ``WireError`` for anything else."""
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"the handshake is not valid: {one_line(str(error))}") from None


@asynccontextmanager
async def proving(pipe: Pipe, where: str, timeout: timedelta) -> AsyncIterator[None]:
    """Closes a pipe whose other end does not prove itself in time, as ``UnreachableError`` with code ``identity``."""
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            yield
    except (WireError, TimeoutError):
        await pipe.close()
        raise UnreachableError(
            f"what answers {where} is not a peer", hint="check the address", code="identity"
        ) from None
    except BaseException:
        await pipe.close()
        raise


async def prove_to_listener(pipe: Pipe, identity: Identity, peer_id: str, fingerprint: str, run: str) -> None:
    """The dialler's part: say who we are to ``peer_id`` and nobody else, and hear proof that it is it."""
    challenge = decode(await pipe.recv(), Challenge)
    nonce = secrets.token_bytes(NONCE_NBYTES)
    seen = (fingerprint.encode(), challenge.nonce, nonce, run.encode())
    signature = identity.sign(transcript(HANDSHAKE, b"dialler", *seen, peer_id.encode()))
    await pipe.send(msgspec.msgpack.encode(_Claim(identity.public_bytes, nonce, peer_id, signature)))
    answer = decode(await pipe.recv(), _Answer)
    if answer.refusal == "admission":
        raise UnreachableError(
            f"{peer_id} does not admit this peer", hint="wait until both know the same plan", code="admission"
        )
    expected = transcript(HANDSHAKE, b"listener", *seen, identity.peer_id.encode())
    if answer.refusal or peer_id_of(answer.public) != peer_id or not verify(answer.public, answer.signature, expected):
        raise UnreachableError(
            f"what answers is not peer {peer_id}", hint="ask the coordinator for its address", code="identity"
        )


async def prove_to_dialler(pipe: Pipe, identity: Identity, fingerprint: str, config: TransportConfig) -> str | None:
    """The listener's part: the dialler's peer id once it is proven and admitted, else None."""
    challenge = Challenge(secrets.token_bytes(NONCE_NBYTES))
    await pipe.send(msgspec.msgpack.encode(challenge))
    claim = decode(await pipe.recv(), _Claim)
    seen = (fingerprint.encode(), challenge.nonce, claim.nonce, config.run.encode())
    peer_id = peer_id_of(claim.public)
    refusal = ""
    if claim.target != identity.peer_id or not verify(
        claim.public, claim.signature, transcript(HANDSHAKE, b"dialler", *seen, claim.target.encode())
    ):
        refusal = "identity"
    elif not config.admit(peer_id):
        refusal = "admission"
    if refusal:
        await pipe.send(msgspec.msgpack.encode(_Answer(refusal)))
        return None
    signature = identity.sign(transcript(HANDSHAKE, b"listener", *seen, peer_id.encode()))
    await pipe.send(msgspec.msgpack.encode(_Answer("", identity.public_bytes, signature)))
    return peer_id
