"""What the page and programs are told: every answer of the HTTP API as a type. Times are seconds, moments Unix time,
sizes bytes, rates bytes per second; None is what nobody knows. Nobody's network address is in any of them."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ...protocol.evaluation import Score, TaskSummary


class Wait(Struct, frozen=True, kw_only=True):
    """Waiting for what ``peer`` had yet to send."""

    peer: str
    seconds: float


class StepTime(Struct, frozen=True, kw_only=True):
    """Where a peer's time goes in one step, as a mean over its newest ones. ``wire``: its input was under way;
    ``waits``: nobody had sent it yet, by whom it was waited for, longest first."""

    compute: float
    codec: float
    update: float
    wire: float
    waits: tuple[Wait, ...] = ()
    other: float = 0.0  # rounds, leases, evaluation


class LinkRow(Struct, frozen=True, kw_only=True):
    """How ``sender`` reaches ``receiver``, as it last said. ``cap``: what the sender's owner allows; ``share``: of that
    cap, or of the fastest this link has been, that is in use."""

    sender: str
    receiver: str
    path: Literal["direct", "punched", "relayed"] | None
    rtt_seconds: float | None
    bytes_per_second: float | None
    cap: float | None = None
    share: float | None = None
    time: float | None = None  # when it was said


class LinkPoint(Struct, frozen=True, kw_only=True):
    time: float
    bytes_per_second: float | None
    rtt_seconds: float | None


class Caps(Struct, frozen=True, kw_only=True):
    """What a machine's owner allows. None: no limit."""

    memory_gb: float | None = None
    threads: int | None = None
    upload_mbps: float | None = None
    state_mbps: float | None = None


class PeerRow(Struct, frozen=True, kw_only=True):
    """``state``: training, loading, waiting, leaving, away, or gone in the past. ``work``: committed samples times the
    share of the model that was done for each, so a whole sample is 1 summed over stages. ``tokens_per_second``: that it
    takes through its stage, over its newest steps."""

    id: str
    name: str
    region: str
    stage: int | None
    state: str
    samples: int
    work: float
    sent: int
    received: int
    last_seen: float
    seconds_per_step: float | None
    tokens_per_second: float | None = None
    device: str
    time: StepTime | None = None
    links: tuple[LinkRow, ...] = ()


class StageRow(Struct, frozen=True, kw_only=True):
    """``is_thin``: one replica is left, and nobody else could go on with it at once."""

    stage: int
    first_layer: int
    last_layer: int
    parameters: int
    replicas: tuple[str, ...]
    is_thin: bool


class Traffic(Struct, frozen=True, kw_only=True):
    purpose: str
    nbytes: int
    dense_nbytes: int  # the same uncompressed


class TrafficPoint(Struct, frozen=True, kw_only=True):
    """All bytes sent until then."""

    time: float
    step: int
    tokens: int
    traffic: tuple[Traffic, ...]


class Point(Struct, frozen=True, kw_only=True):
    """Of the loss curve; where it stands for several steps, ``low`` and ``high`` are the extremes of ``train``."""

    id: int
    step: int
    tokens: int
    time: float
    train: float | None
    heldout: float | None
    low: float | None = None
    high: float | None = None


class EventRow(Struct, frozen=True, kw_only=True):
    id: int
    time: float
    step: int  # steps done when it happened
    kind: str
    text: str
    peer: str | None = None  # whom it is about


class Incident(Struct, frozen=True, kw_only=True):
    """An event that explains a curve: who died, came, moved; a new division; a round that is degraded or taken back.
    ``group``: lost, joined, left, divided, degraded, back, fault, paused or disk."""

    id: int
    time: float
    step: int
    group: str
    text: str
    peer: str | None = None


class RoundRow(Struct, frozen=True, kw_only=True):
    """``agree``: replicas that differ are refused, so a committed round says yes."""

    round: int
    step: int
    replicas: int
    samples: int
    agree: bool
    nbytes: int
    seconds: float
    committed: float
    degraded: bool


class RoundPart(Struct, frozen=True, kw_only=True):
    """What one replica brought into a round. ``digest``: of the reference after it, first 16 hex digits."""

    peer: str
    name: str
    stage: int
    samples: int
    nbytes: int
    seconds: float
    digest: str


class RoundPage(Struct, frozen=True, kw_only=True):
    row: RoundRow
    parts: tuple[RoundPart, ...]
    before: int | None  # steps of the rounds beside it
    after: int | None


class PeerPoint(Struct, frozen=True, kw_only=True):
    """One piece of a peer's history, ``seconds`` long until ``time``: what it did in it."""

    time: float
    seconds: float
    samples: int
    sent: int
    received: int
    compute_seconds: float
    wait_seconds: float


class PeerPage(Struct, frozen=True, kw_only=True):
    row: PeerRow
    caps: Caps
    first_seen: float
    layers: tuple[int, int] | None  # [first, last)
    rounds: int  # committed ones that it brought something into
    rank: int | None
    history: tuple[PeerPoint, ...]
    events: tuple[EventRow, ...]


class Standing(Struct, frozen=True, kw_only=True):
    """A line of the leaderboard."""

    rank: int
    peer: str
    name: str
    region: str
    work: float
    tokens: float
    share: float
    rounds: int
    first_seen: float
    is_here: bool


class Op(Struct, frozen=True, kw_only=True):
    """Something a peer did in a step. ``start`` and ``end``: since the step's beginning."""

    kind: Literal["forward", "backward", "update"]
    microbatch: int | None
    start: float
    end: float


class Lane(Struct, frozen=True, kw_only=True):
    peer: str
    name: str
    stage: int
    ops: tuple[Op, ...]


class Segment(Struct, frozen=True, kw_only=True):
    """A piece of a step's critical path. For the wire, ``peer`` sends and ``receiver`` waits."""

    what: Literal["compute", "codec", "wire", "update", "round"]
    peer: str
    start: float
    end: float
    receiver: str | None = None
    microbatch: int | None = None


class Counterfactual(Struct, frozen=True, kw_only=True):
    """How long the step would have taken. ``text`` says under which condition."""

    text: str
    seconds: float
    peer: str | None = None
    receiver: str | None = None


class StepRow(Struct, frozen=True, kw_only=True):
    step: int  # steps done with it, as on the curve: the first is 1
    time: float
    seconds: float
    usual: float  # the median of the steps around it


class StepPage(Struct, frozen=True, kw_only=True):
    row: StepRow
    words: tuple[str, ...]  # why it took so long, one sentence each
    path: tuple[Segment, ...]
    lanes: tuple[Lane, ...]
    counterfactuals: tuple[Counterfactual, ...]
    before: int | None  # steps beside it that are on record
    after: int | None


class Goodput(Struct, frozen=True, kw_only=True):
    """``computed``: samples that were trained, again or in vain too, without those whose round is not over;
    ``committed``: those of them that count. In whole samples, summed over stages by their share of the work."""

    committed: float
    computed: float


class Eta(Struct, frozen=True, kw_only=True):
    """Seconds until the run is finished: by the pace of its faster and of its slower stretches."""

    low: float
    high: float


class Evaluation(Struct, frozen=True, kw_only=True):
    """What a published model scored in a suite. ``label``: what ``score`` is of, the best summary there is."""

    step: int
    suite: str
    time: float
    label: str
    score: Score | None
    tasks: tuple[TaskSummary, ...]


class Refusal(Struct, frozen=True, kw_only=True):
    """An answer that is an error. ``hint`` says what would be right."""

    error: str
    hint: str


class Alert(Struct, frozen=True, kw_only=True):
    name: str
    text: str
    since: float


class RunRow(Struct, frozen=True, kw_only=True):
    name: str
    id: str
    model: str
    stages: int
    preset: str
    codec: str


class State(Struct, frozen=True, kw_only=True):
    """Everything but the curve, now or ``at`` a moment. ``evaluations`` differs whenever those do."""

    version: int
    now: float
    at: float | None
    run: RunRow
    phase: str
    note: str
    is_paused: bool
    started: float
    step: int
    steps: int
    generation: int
    train_loss: float | None
    heldout_loss: float | None
    heldout_first: float | None
    tokens: int
    tokens_per_second: float | None
    eta_seconds: float | None
    eta: Eta | None
    goodput: Goodput
    round: int
    bytes_per_token: float | None
    dense_bytes_per_token: float | None
    traffic: tuple[Traffic, ...]
    stages: tuple[StageRow, ...]
    peers: tuple[PeerRow, ...]
    rounds: tuple[RoundRow, ...]  # the newest 30, newest first
    events: tuple[EventRow, ...]  # the newest 40, newest first
    alerts: tuple[Alert, ...]
    published: str | None
    evaluations: int
