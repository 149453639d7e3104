"""What a relay and those who use it say to each other, before the relay only moves bytes.

Both sides dial the relay, so a router that lets connections out is enough. Who can be called stays attached, and says
so every two seconds: if its router was restarted, the line breaks by that, and another is made before anybody misses
it. A caller names a peer, that peer is told (``Ring``) and dials back with the call's number, and from then on every
message of one stream goes out on the other. A caller that can be dialled itself asks for that first (``RETURN``): the
peer is told who it is, and dials it; only if it does not, it comes back with the number and says why. Admission is by
the run's ticket: a signature of the peer's key and proof of the secret, both bound to the relay's certificate and to
its nonce.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError, UnreachableError
from .handshake import NONCE_NBYTES, Bytes32, Bytes64, Challenge, Text, decode, transcript
from .hello import secret_proof
from .identity import Identity, peer_id_of, verify
from .pipe import Pipe
from .tls import FINGERPRINT, split_address

ATTACH, CALL, ANSWER = "/potluck.Relay/Attach", "/potluck.Relay/Call", "/potluck.Relay/Answer"
RETURN = "/potluck.Relay/Return"
CALL_NBYTES = 16
BEAT, BEAT_SECONDS = b"", 2.0  # what an attached peer says, and how often
_RELAY = b"potluck relay 1"


class Spot(NamedTuple):
    """Where a relay is (``host:port``), and the fingerprint by which it is known."""

    address: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.address}/{self.fingerprint}"

    @classmethod
    def parse(cls, text: str) -> Spot:
        """``host:port/fingerprint``; ``ConfigError`` for anything else."""
        address, _, fingerprint = text.rpartition("/")
        try:
            split_address(address)
        except UnreachableError:
            fingerprint = ""
        if not FINGERPRINT.fullmatch(fingerprint):
            raise ConfigError(
                f"{text[:200]!r} is not a relay",
                hint="Copy the line that `potluck relay up` prints: HOST:PORT/FINGERPRINT.",
            )
        return cls(address, fingerprint)


class _Admission(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    public: Bytes32
    target: Text
    signature: Bytes64
    proof: Bytes32


class _Verdict(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``code`` is empty for who may come in, and is connected if it called."""

    code: Text


class Ring(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Somebody calls: answer with the number; or, where it is said who, dial that peer."""

    call: Annotated[bytes, Meta(min_length=CALL_NBYTES, max_length=CALL_NBYTES)]
    caller: Text


class Asked(NamedTuple):
    """Who has proven itself to the relay, and whom it calls (nobody, if it attaches)."""

    peer: str
    target: str


REFUSALS = {
    "admission": "the relay does not know this run, or the ticket is another's",
    "absent": "the peer is not attached to the relay",
    "silent": "the peer does not answer through the relay",
    "busy": "the relay has as many calls from here as it allows",
    "oneway": "the peer cannot dial this one",
}


async def enter(
    pipe: Pipe, identity: Identity, secret: str, spot: Spot, run: str, method: str, target: str = ""
) -> None:
    """The peer's part: ``UnreachableError`` with a code of ``REFUSALS`` if it may not, or nobody answers."""
    nonce = decode(await pipe.recv(), Challenge).nonce
    signed = _signed(method, nonce, spot.fingerprint, run, target)
    proof = secret_proof(secret, nonce, identity.public_bytes)
    await pipe.send(msgspec.msgpack.encode(_Admission(identity.public_bytes, target, identity.sign(signed), proof)))
    if code := decode(await pipe.recv(), _Verdict).code:
        why = REFUSALS.get(code, "the relay refused")
        raise UnreachableError(
            f"{why} ({spot.address})", hint="see the relay's log", code=code if code in REFUSALS else ""
        )


async def admit(pipe: Pipe, secret: str, fingerprint: str, run: str, method: str) -> Asked | None:
    """The relay's part: who asks, once that is proven, else None (and it is told). Say ``verdict`` next."""
    nonce = secrets.token_bytes(NONCE_NBYTES)
    await pipe.send(msgspec.msgpack.encode(Challenge(nonce)))
    asked = decode(await pipe.recv(), _Admission)
    signed = _signed(method, nonce, fingerprint, run, asked.target)
    known = hmac.compare_digest(secret_proof(secret, nonce, asked.public), asked.proof)
    if not known or not verify(asked.public, asked.signature, signed):
        await verdict(pipe, "admission")
        return None
    return Asked(peer_id_of(asked.public), asked.target)


async def verdict(pipe: Pipe, code: str = "") -> None:
    await pipe.send(msgspec.msgpack.encode(_Verdict(code)))


def refusal(data: bytes) -> str:
    """What a peer says that does not dial back: a code of ``REFUSALS``."""
    code = decode(data, _Verdict).code
    return code if code in REFUSALS else "oneway"


def ring(call: bytes, caller: str = "") -> bytes:
    return msgspec.msgpack.encode(Ring(call, caller))


def rung(data: bytes) -> Ring:
    """What a peer is told of a call."""
    return decode(data, Ring)


def _signed(method: str, nonce: bytes, fingerprint: str, run: str, target: str) -> bytes:
    return transcript(_RELAY, method.encode(), nonce, fingerprint.encode(), run.encode(), target.encode())
