"""What a running worker says of itself to its owner: the JSON of ``potluck worker status --json``."""

from __future__ import annotations

import msgspec

from .condition import Word
from .contribution import Totals


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner wants: to ``pause`` (``until``: Unix time; None: until resumed), ``resume``, ``finish``, or to see
    the ``status``. ``token``: where the way is not the system's to guard."""

    what: str
    until: float | None = None
    token: str = ""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """To a peer that this worker sends to."""

    peer: str
    path: str
    rtt_seconds: float | None
    bytes_per_second: float | None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner allows; 0: no limit."""

    memory_gb: float
    threads: int
    upload_mbps: float
    state_mbps: float
    hours: tuple[str, ...]
    on_battery: bool
    yield_to: tuple[str, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are bytes, moments Unix time. ``why`` and ``until`` go with ``word``, ``text`` is all three in one line."""

    word: Word
    why: str
    until: float | None
    text: str
    name: str
    peer: str
    run: str
    coordinator: str  # HOST:PORT
    pid: int
    version: str
    now: float
    started: float  # the process
    joined: float | None  # the run, since when; None: not in it
    phase: str
    note: str
    generation: int | None
    stage: int | None
    layers: tuple[int, int] | None  # [first, last)
    stages: int
    replicas: int  # of its stage
    peers: int  # in the plan
    step: int
    steps: int
    committed: int
    doing: str  # what the computing thread is at, in a word
    device: str
    ram: int
    gpu: int | None
    up: float | None  # bytes a second, lately
    down: float | None
    region: str
    limits: Limits
    totals: Totals
    ways: tuple[Way, ...] = ()
    freed_seconds: float | None = None  # that the pause which holds took until the memory was free


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``error`` with its ``hint``, or the state after what was asked was noted."""

    status: Status | None = None
    error: str = ""
    hint: str = ""
