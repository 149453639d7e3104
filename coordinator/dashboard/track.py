"""What peers say they did in a step, as tracks beside each other. A peer's own words are checked, not believed: what
makes no sense is as if nothing was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from google.protobuf.message import DecodeError

from ...protocol import control_pb2 as pb
from ...protocol.plan import MOST_MICROBATCHES

MOST_OPS = 256  # that a trace lists
MOST_NBYTES = 8192  # of a trace: as many operations with the longest times
MOST_MICROBATCH = MOST_MICROBATCHES * 4096  # first-stage replicas
LONGEST_SECONDS = 4 * 3600.0  # of a step
LATEST_SECONDS = 20 * 366 * 86400.0  # on a peer's clock
Key = tuple[int, str, int]  # stage, kind, microbatch
Place = tuple[int, int]  # a track, and what was done there


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Something that a peer did. Its output was handed to the line at its end."""

    kind: Literal["forward", "backward", "update"]
    microbatch: int | None
    start: float
    end: float
    arrived: float | None = None  # its input
    decode: float = 0.0  # seconds of it, at its beginning
    encode: float = 0.0  # and at its end
    told: float | None = None  # when the receiver had told that it has the output
    is_again: bool = False  # of an older step, left over by somebody who is lost


@dataclass(frozen=True, kw_only=True)
class Track:
    """What one peer did in one step; ``done`` ends with the update, and is empty of a peer that has not told.

    ``work``: its stage's share of the model; ``before``: seconds between its step before and this one; ``gap``: where
    operations in the middle are left out, the index of the first one after them.
    """

    peer: str
    stage: int
    work: float
    begin: float = 0.0
    before: float | None = None
    done: tuple[Done, ...] = ()
    gap: int | None = None

    @property
    def end(self) -> float:
        return self.done[-1].end if self.done else self.begin

    def later(self, seconds: float) -> Track:
        """The same on a clock that shows so much more."""

        def moved(at: float | None) -> float | None:
            return None if at is None else at + seconds

        done = tuple(
            replace(d, start=d.start + seconds, end=d.end + seconds, arrived=moved(d.arrived), told=moved(d.told))
            for d in self.done
        )
        return replace(self, begin=self.begin + seconds, done=done)


def unpacked(trace: pb.Trace, peer: str, stage: int, work: float) -> Track | None:
    """A track on the peer's own clock; None if it cannot be true."""
    lists = (trace.pause, trace.took, trace.early, trace.decode, trace.encode, trace.told)
    count = len(trace.ops)
    if count > MOST_OPS or any(len(x) != count for x in lists) or trace.began > LATEST_SECONDS * 1e6:
        return None
    at = begin = trace.began / 1e6
    done: list[Done] = []
    seen: set[tuple[str, int]] = set()
    for op, *times in zip(trace.ops, *lists, strict=True):
        pause, took, early, decode, encode, told = (t / 1e6 for t in times)
        m, is_again, kind = op >> 2, bool(op & 2), "backward" if op & 1 else "forward"
        if m >= MOST_MICROBATCH or decode + encode > took + 2e-6:
            return None
        if not is_again:
            if (kind, m) in seen or (kind == "forward" and ("backward", m) in seen):
                return None
            seen.add((kind, m))
        start, at = at + pause, at + pause + took
        done.append(
            Done(
                kind="backward" if op & 1 else "forward",
                microbatch=m,
                start=start,
                end=at,
                arrived=start - early + 1e-6 if early else None,
                decode=decode,
                encode=min(encode, took - decode),
                told=at + told - 1e-6 if told else None,
                is_again=is_again,
            )
        )
    start = at + trace.pause_update / 1e6
    done.append(Done(kind="update", microbatch=None, start=start, end=start + trace.update / 1e6))
    if done[-1].end - begin > LONGEST_SECONDS:
        return None
    before = (trace.before - 1) / 1e6 if trace.before else None
    gap = -(-count // 2) if trace.left_out else None
    return Track(peer=peer, stage=stage, work=work, begin=begin, before=before, done=tuple(done), gap=gap)


def packed(trace: pb.Trace) -> bytes:
    """What is kept of a trace: nothing but what we know of."""
    kept = pb.Trace()
    kept.CopyFrom(trace)
    kept.DiscardUnknownFields()
    return kept.SerializeToString()


def parsed(blob: bytes) -> pb.Trace | None:
    try:
        return pb.Trace.FromString(blob) if len(blob) <= MOST_NBYTES else None
    except DecodeError:
        return None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Tracks on one clock."""

    tracks: tuple[Track, ...]

    @cached_property
    def stages(self) -> int:
        return max((t.stage for t in self.tracks), default=-1) + 1

    @cached_property
    def end(self) -> float:
        return max((t.end for t in self.tracks if t.done), default=0.0)

    @cached_property
    def made(self) -> Mapping[Key, Sequence[Place]]:
        """Where each microbatch's outputs were made."""
        found: dict[Key, list[Place]] = {}
        for i, track in enumerate(self.tracks):
            for j, d in enumerate(track.done):
                if d.microbatch is not None and not d.is_again:
                    found.setdefault((track.stage, d.kind, d.microbatch), []).append((i, j))
        return found

    def source(self, place: Place) -> Place | None:
        """Who made the input of something, and by what; None if it has none or nobody has told."""
        track, d = self.tracks[place[0]], self.at(place)
        if d.arrived is None or d.microbatch is None or d.is_again:
            return None
        stage = track.stage + (1 if d.kind == "backward" else -1)
        found = self.made.get((stage, d.kind, d.microbatch), ())
        if len(found) < 2:  # more where somebody did it again in a lost one's place
            return found[0] if found else None
        return min(found, key=lambda p: abs(self.at(p).end - (d.arrived or 0.0)))

    def silent(self, place: Place) -> str | None:
        """Who may have made an input whose maker has not told."""
        stage = self.tracks[place[0]].stage + (1 if self.at(place).kind == "backward" else -1)
        return next((t.peer for t in self.tracks if t.stage == stage and not t.done), None)

    def at(self, place: Place) -> Done:
        return self.tracks[place[0]].done[place[1]]

    def free(self, place: Place) -> float:
        """When the peer was done with what it did before."""
        i, j = place
        return self.tracks[i].done[j - 1].end if j else self.tracks[i].begin
