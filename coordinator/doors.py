"""The coordinator's gRPC methods: the control stream, the run's files, and uploads of published stages."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from ..protocol import control_pb2 as pb
from ..protocol.errors import PotluckError, RefusedError, StateError, WireError
from ..protocol.failpoints import failpoint, failpoint_async
from ..protocol.hello import BLOB, PROTOCOL, STREAM, UPLOAD, secret_proof, signed_part
from ..protocol.identity import peer_id_of, verify
from ..protocol.multiaddr import ANYWHERE, encode_id
from ..protocol.plan import Plan, SavePoint
from .addresses import confirmed, seen_from
from .hub import Hub, Line
from .masking import masked
from .publish import Publisher, unwritten
from .state import Caps, Member, Unpublished
from .turn import BANNED_HINT, banned
from .weights import Span

log = logging.getLogger(__name__)
PIECE_NBYTES = 256 * 1024
HELLO_SECONDS = 15.0
MAX_SAVEPOINTS = 64
MAX_ADDRESSES = 8
MAX_LINES = 10_000
MAX_MBPS = 1e6
MAX_THREADS = 4096
ADDRESS = re.compile(r"^(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$")


class Doors:
    """Who may come in, and what they get. ``blobs``: where the bytes of each SHA-256 lie."""

    def __init__(
        self,
        hub: Hub,
        *,
        run_id: str,
        secret: str,
        fingerprint: str,
        welcome: pb.Welcome,
        blobs: dict[str, Span],
        publisher: Publisher,
        lan: bool = True,
    ) -> None:
        self.hub, self.run_id, self.secret, self.fingerprint = hub, run_id, secret, fingerprint
        self.welcome, self.blobs, self.publisher = welcome, blobs, publisher
        self.lan = lan
        self._tokens: dict[bytes, str] = {}
        self._reached: dict[bytes, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # by session: named, and reached

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """For the server; messages are protobuf."""

        def split(path: str) -> tuple[str, str]:
            _, service, method = path.split("/")
            return service, method

        service = split(STREAM)[0]
        methods = {
            split(STREAM)[1]: grpc.stream_stream_rpc_method_handler(
                self.control, pb.Up.FromString, pb.Down.SerializeToString
            ),
            split(BLOB)[1]: grpc.unary_stream_rpc_method_handler(
                self.blob, pb.BlobRequest.FromString, pb.Piece.SerializeToString
            ),
            split(UPLOAD)[1]: grpc.stream_unary_rpc_method_handler(
                self.upload, pb.UploadPiece.FromString, pb.UploadResult.SerializeToString
            ),
        }
        return [grpc.method_handlers_generic_handler(service, methods)]

    async def control(
        self, requests: AsyncIterator[pb.Up], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Down]:
        """One worker's stream, from its hello to its end."""
        nonce = os.urandom(32)
        yield pb.Down(challenge=pb.Challenge(nonce=nonce))
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(aiter(requests), None)
            member = self.check(first, nonce)
            assert first is not None
        except PotluckError as error:
            yield pb.Down(refuse=pb.Refuse(code=error.code, text=str(error), hint=error.hint))
            return
        except (TimeoutError, DecodeError):
            return
        found = await self.reached(first.hello, member, context.peer())
        # An id says nothing of where: nobody can point others at a third machine with it.
        anywhere = (ANYWHERE + first.hello.p2p,) if first.hello.p2p and self.welcome.p2p_relays else ()
        member = replace(member, addresses=found + anywhere)
        await failpoint_async("coordinator.hello.accepted")
        line = Line(member.peer, member.session)
        token = os.urandom(16)
        self._tokens[token] = member.peer
        welcome = pb.Welcome()
        welcome.CopyFrom(self.welcome)
        welcome.peer_id, welcome.token = member.peer, token
        welcome.acked = self.hub.acked.get(member.session, 0)
        welcome.addresses.extend(found)
        line.send(pb.Down(welcome=welcome))
        self.hub.connect(line)
        listening = asyncio.create_task(self._listen(requests, line, member))
        try:
            while (message := await line.outbox.get()) is not None:
                yield message
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await listening
            self._tokens.pop(token, None)
            self.hub.hang_up(line)

    async def _listen(self, requests: AsyncIterator[pb.Up], line: Line, member: Member) -> None:
        try:
            await self.hub.enter(line, member)
            async for up in requests:
                await self.hub.report(line, up)
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        finally:
            line.close()

    def check(self, first: pb.Up | None, nonce: bytes) -> Member:
        """The member a hello describes; ``RefusedError`` if it proves too little, ``WireError`` if it is nonsense."""
        if first is None or first.WhichOneof("body") != "hello":
            raise WireError("the first message must be a hello")
        hello = first.hello
        if hello.protocol != PROTOCOL:
            raise RefusedError(
                f"this coordinator speaks protocol {PROTOCOL}, the worker {hello.protocol}",
                hint="Install the same version of potluck on both.",
                code="version",
            )
        if hello.run != self.run_id:
            raise RefusedError("the ticket is for another run", hint="Ask the operator for a new ticket.", code="run")
        signed = signed_part(nonce, self.fingerprint, self.run_id)
        if len(hello.public_key) != 32 or not verify(hello.public_key, hello.signature, signed):
            raise RefusedError("the worker's key does not match its signature", code="signature")
        if not hmac.compare_digest(secret_proof(self.secret, nonce, hello.public_key), hello.secret_proof):
            raise RefusedError(
                "the ticket's secret is not this run's",
                hint="Ask the operator for a new ticket.",
                code="secret",
            )
        if len(hello.savepoints) > MAX_SAVEPOINTS or len(hello.addresses) > MAX_ADDRESSES:
            raise WireError("the hello is too long")
        if not all(ADDRESS.match(a) for a in hello.addresses):
            raise WireError("the hello names an address that is none")
        if hello.p2p:
            try:
                encode_id(hello.p2p)
            except ValueError:
                raise WireError("the hello names a libp2p daemon that is none") from None
        if not 8 <= len(hello.session) <= 32:
            raise WireError("the hello has no session")
        for number in (hello.memory_gb, hello.speed):
            if not (math.isfinite(number) and 0 < number < 1e6):
                raise WireError("the hello offers an impossible machine")
        if not all(math.isfinite(cap) and 0 <= cap < MAX_MBPS for cap in (hello.upload_mbps, hello.state_mbps)):
            raise WireError("the hello names an impossible limit")
        if hello.threads > MAX_THREADS:
            raise WireError("the hello names an impossible number of cores")
        if len(self.hub.lines) >= MAX_LINES:
            raise RefusedError("the coordinator is full", hint="Try again later.", code="full")
        peer = peer_id_of(hello.public_key)
        if (ban := self.hub.state.bans.get(peer)) is not None:
            raise RefusedError(banned(ban), hint=BANNED_HINT, code="banned")
        return Member(
            peer=peer,
            name=plain(hello.name) or f"worker-{peer[:6]}",
            device=plain(hello.device) or "cpu",
            memory_gb=hello.memory_gb,
            speed=hello.speed,
            region=plain(hello.region),
            caps=Caps(
                upload_mbps=hello.upload_mbps or None,
                state_mbps=hello.state_mbps or None,
                threads=hello.threads or None,
            ),
            addresses=tuple(hello.addresses),
            session=bytes(hello.session),
            savepoints=frozenset(SavePoint.from_proto(s) for s in hello.savepoints),
        )

    async def reached(self, hello: pb.Hello, member: Member, source: str) -> tuple[str, ...]:
        """Where others can dial a worker, of what it names and where its stream comes from: tried once for each
        session, as long as it names the same."""
        known = self._reached.get(member.session)
        if known is None or known[0] != member.addresses:
            named = (*member.addresses, *seen_from(source, member.addresses))
            found = await confirmed(named, hello.public_key, self.run_id, lan=self.lan)
            known = self._reached[member.session] = member.addresses, found
            while len(self._reached) > MAX_LINES:
                self._reached.pop(next(iter(self._reached)))
        return known[1]

    async def blob(self, request: pb.BlobRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Piece]:
        """A file of the run by its hash, from ``offset``."""
        span = self.blobs.get(request.name)
        if request.token not in self._tokens or span is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no such file for you")
            return
        loop = asyncio.get_running_loop()
        with span.path.open("rb") as file:
            file.seek(span.start + request.offset)
            left = span.nbytes - request.offset
            while left > 0 and (data := await loop.run_in_executor(None, file.read, min(PIECE_NBYTES, left))):
                left -= len(data)
                await failpoint_async("coordinator.blob.piece")
                yield pb.Piece(data=data)

    async def upload(self, pieces: AsyncIterator[pb.UploadPiece], context: grpc.aio.ServicerContext) -> pb.UploadResult:
        """A stage of the round being published, in pieces, checked against its length and hash."""
        first = await anext(aiter(pieces), None)
        try:
            if first is None or first.token not in self._tokens:
                raise WireError("an upload without a session")
            peer, state = self._tokens[first.token], self.hub.state
            plan = state.plan
            if plan is None or plan.places.get(peer) != (first.stage, 0) or state.publish != first.step:
                raise WireError("nobody asked for this upload")
            self.publisher.begin(first.step, plan.generation, plan.layers)
            limit = self.publisher.stage_nbytes(first.stage)
            if not 0 < first.nbytes <= limit:
                raise WireError(f"an upload of {first.nbytes} bytes, at most {limit} fit the stage")
            await self.receive(first, pieces, plan)
        except (WireError, StateError) as error:
            return pb.UploadResult(ok=False, text=error.one_line())
        return pb.UploadResult(ok=True)

    async def receive(self, first: pb.UploadPiece, pieces: AsyncIterator[pb.UploadPiece], plan: Plan) -> None:
        """Writes an upload that is wanted; what is left of one that fails is removed, and its space with it."""
        part: Path | None = None
        try:
            part = self.publisher.part(first.step, first.stage)
            digest, size = hashlib.sha256(), 0
            with part.open("wb") as file:
                piece: pb.UploadPiece | None = first
                while piece is not None:
                    size += len(piece.data)
                    if size > first.nbytes:
                        raise WireError("an upload longer than announced")
                    digest.update(piece.data)
                    failpoint("coordinator.upload.piece")
                    file.write(piece.data)
                    piece = await anext(aiter(pieces), None)
                await failpoint_async("coordinator.upload.written")
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            if size != first.nbytes or digest.digest() != first.sha256:
                raise WireError("an upload that does not match its hash")
            if self.hub.state.plan is not plan:
                raise WireError("an upload of a generation that is over")
            await self.publisher.arrived(first.step, first.stage)
        except (OSError, StateError) as problem:
            error = unwritten(problem) if isinstance(problem, OSError) else problem
            if self.hub.state.phase != "finishing":  # given up: see the state machine
                self.publisher.drop()
            if self.publisher.trouble != (first.step, str(error)):  # its worker may try again and again: said once
                self.publisher.trouble = (first.step, str(error))
                self.hub.put(Unpublished(step=first.step, why=str(error)))
            raise error from None
        finally:
            if part is not None:
                part.unlink(missing_ok=True)


def plain(text: str) -> str:
    """A peer's text as a name: letters, digits and ``_.-`` only, at most 32; an address is none, as all see it."""
    text = text[:200]
    return "" if masked(text) != text else re.sub(r"[^A-Za-z0-9 _.-]", "", text)[:32].strip()
