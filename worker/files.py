"""The run's files, beside the control stream: the corpus comes in, stages of published rounds go out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from mmap import mmap
from pathlib import Path

import grpc

from ..protocol import control_pb2 as pb
from ..protocol.errors import StateError, UnreachableError, WireError
from ..protocol.failpoints import failpoint, failpoint_async
from ..protocol.frames import Purpose
from ..protocol.hello import BLOB, UPLOAD
from ..protocol.meter import Meter
from ..protocol.throttle import Pace
from .control import COORDINATOR, STREAM_ERRORS, reason
from .places import Place, download, is_near

log = logging.getLogger(__name__)
PIECE_NBYTES = 256 * 1024
FETCH_TRIES = 60  # at a file of the run, before the worker gives up
FETCH_PAUSE_SECONDS = 1.0
PLACE_TRIES = 3  # at a location that does not have what it should, in a row


async def at_once() -> None:
    """Gives way to nobody."""


class Files:
    """``line`` gives the connection in use and the token of its session. ``give_way`` is waited for before each piece
    that goes out; ``pace`` is the owner's cap. ``locations``: folders with shards that are asked before the
    coordinator, whose host is ``coordinator``: where that is in a network of its own, they may be, too."""

    def __init__(
        self, line: Callable[[], tuple[grpc.aio.Channel, bytes]], meter: Meter, is_over: Callable[[], bool]
    ) -> None:
        self._line, self._meter, self._is_over = line, meter, is_over
        self.give_way: Callable[[], Awaitable[None]] = at_once
        self.pace: Pace | None = None
        self.locations: tuple[str, ...] = ()
        self.coordinator = ""
        self._failures: dict[str, int] = {}  # of each location, since it last had something

    async def fetch(self, name: str, target: Path, nbytes: int, places: Sequence[Place] | None = None) -> None:
        """A file of the run by its SHA-256 and size, into ``target``: from one of ``places`` (by default those of
        shards), or from the coordinator. Goes on where it stopped, on the next connection too."""
        if places is None:
            places = [Place(root, name) for root in self.locations]
        if not await self._from_places(name, target, nbytes, places):
            await self._from_coordinator(name, target, nbytes)
        for part in target.parent.glob(f"{name}.*part"):  # what places began that it did not come from
            part.unlink(missing_ok=True)

    async def _from_coordinator(self, name: str, target: Path, nbytes: int) -> None:
        for left in reversed(range(FETCH_TRIES)):
            try:
                await self._fetch(name, target, nbytes)
                return
            except UnreachableError as error:
                if not left or self._is_over():
                    raise
                log.warning("%s; trying again", error)
            await asyncio.sleep(FETCH_PAUSE_SECONDS)

    async def _from_places(self, name: str, target: Path, nbytes: int, places: Sequence[Place]) -> bool:
        """Whether one of the places had it."""
        for number, place in enumerate(places):
            if self._failures.get(place.root, 0) >= PLACE_TRIES:
                continue
            part = target.with_name(f"{name}.{number}.part")  # of its own: what is wrong in it spoils no other's
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                lan = await asyncio.to_thread(is_near, self.coordinator)
                await asyncio.to_thread(download, place, name, nbytes, part, lan=lan, record=self._record)
                part.replace(target)
            except UnreachableError as error:
                log.warning("%s; asking elsewhere", error)
                self._failures[place.root] = self._failures.get(place.root, 0) + 1
                continue
            except OSError as error:
                raise StateError(f"{part}: {error}", hint="Free some space: --data-dir names the folder.") from None
            self._failures[place.root] = 0
            return True
        return False

    def _record(self, nbytes: int) -> None:
        self._meter.record("locations", "in", Purpose.DATA, nbytes)

    async def _fetch(self, name: str, target: Path, nbytes: int) -> None:
        channel, token = self._line()
        part = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        if part.exists():
            with part.open("rb") as known:
                while data := known.read(PIECE_NBYTES):
                    digest.update(data)
                    size += len(data)
        method = channel.unary_stream(
            BLOB,
            request_serializer=pb.BlobRequest.SerializeToString,
            response_deserializer=pb.Piece.FromString,
        )
        try:
            with part.open("ab") as file:
                async for piece in method(pb.BlobRequest(token=token, name=name, offset=size)):
                    self._meter.record(COORDINATOR, "in", Purpose.DATA, len(piece.data))
                    size += len(piece.data)
                    if size > nbytes:
                        break
                    failpoint("worker.corpus.piece")
                    file.write(piece.data)
                    digest.update(piece.data)
        except (*STREAM_ERRORS, asyncio.CancelledError) as error:  # cancelled: the connection was replaced
            raise UnreachableError(
                f"the corpus did not arrive ({reason(error)})",
                hint="Join again: it goes on from there.",
            ) from None
        except OSError as error:
            raise StateError(f"{part}: {error}", hint="Free some space: --data-dir names the folder.") from None
        if digest.hexdigest() != name:
            part.unlink()
            raise WireError("the corpus arrived damaged", hint="Join again.")
        part.replace(target)

    async def upload(self, step: int, stage: int, data: bytes | mmap) -> None:
        """A stage of a published round, piece by piece behind what training sends. ``UnreachableError`` if it did not
        arrive."""
        channel, token = self._line()
        digest = hashlib.sha256(data).digest()

        async def pieces() -> AsyncIterator[pb.UploadPiece]:
            for start in range(0, len(data), PIECE_NBYTES):
                await self.give_way()
                piece = data[start : start + PIECE_NBYTES]
                if self.pace is not None:
                    await self.pace.wait_for(len(piece))
                self._meter.record(COORDINATOR, "out", Purpose.STATE, len(piece))
                if start:
                    yield pb.UploadPiece(data=piece)
                else:
                    yield pb.UploadPiece(
                        token=token, step=step, stage=stage, nbytes=len(data), sha256=digest, data=piece
                    )

        method = channel.stream_unary(
            UPLOAD,
            request_serializer=pb.UploadPiece.SerializeToString,
            response_deserializer=pb.UploadResult.FromString,
        )
        try:
            await failpoint_async("worker.upload", UnreachableError)
            result = await method(pieces())
        except (*STREAM_ERRORS, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # it is not wanted any more, so nobody would take the error; else the connection was replaced
            raise UnreachableError(f"the upload broke ({reason(error)})") from None
        if not result.ok:
            raise UnreachableError(f"the upload was refused: {result.text}")
