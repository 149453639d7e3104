"""What replicas brought into a round, packed: column by column, so that many alike take few bytes.

A row of SQLite for each would be most of a large run's file: 500 peers in 20,000 rounds are ten million. So it is one
value a round, of about 5 bytes a replica.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from .state import Part

DIGEST_NBYTES = 8  # of a digest, that are kept: the whole one is in the round's row
MOST_NBYTES = 2**26  # of a round's parts, unpacked


class Columns(Struct, frozen=True, array_like=True):
    peers: tuple[int, ...]  # their keys
    stages: tuple[int, ...]
    samples: tuple[int, ...]
    work: tuple[float, ...]  # of one sample, by stage
    nbytes: tuple[int, ...]
    milliseconds: tuple[int, ...]
    digests: tuple[bytes, ...]  # each once
    which: tuple[int, ...]


_DECODER = msgspec.msgpack.Decoder(Columns)


def pack(parts: Sequence[Part], keys: Mapping[str, int]) -> bytes:
    """What :func:`unpack` gives back, with seconds rounded to milliseconds and digests cut to 8 bytes."""
    digests = list(dict.fromkeys(part.digest[:DIGEST_NBYTES] for part in parts))
    stages = 1 + max((part.stage for part in parts), default=-1)
    work = [0.0] * stages
    for part in parts:
        if part.samples:
            work[part.stage] = part.work / part.samples
    columns = Columns(
        peers=tuple(keys[part.peer] for part in parts),
        stages=tuple(part.stage for part in parts),
        samples=tuple(part.samples for part in parts),
        work=tuple(work),
        nbytes=tuple(part.nbytes for part in parts),
        milliseconds=tuple(min(2**63 - 1, max(0, round(part.seconds * 1000))) for part in parts),
        digests=tuple(digests),
        which=tuple(digests.index(part.digest[:DIGEST_NBYTES]) for part in parts),
    )
    return zlib.compress(msgspec.msgpack.encode(columns), 6)


def unpack(data: bytes, peers: Mapping[int, str]) -> tuple[Part, ...]:
    """By the peers' ids of their keys. Nothing, if it cannot be read."""
    try:
        inflate = zlib.decompressobj()
        columns = _DECODER.decode(inflate.decompress(data, MOST_NBYTES))
        rows = zip(
            *(columns.peers, columns.stages, columns.samples, columns.nbytes, columns.milliseconds, columns.which),
            strict=True,
        )
        return tuple(
            Part(
                peer=peers[peer],
                stage=stage,
                samples=samples,
                work=samples * columns.work[stage],
                nbytes=nbytes,
                seconds=milliseconds / 1000,
                digest=columns.digests[which],
            )
            for peer, stage, samples, nbytes, milliseconds, which in rows
        )
    except (zlib.error, msgspec.DecodeError, ValueError, LookupError):
        return ()
