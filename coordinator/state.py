"""The coordinator's state, what can happen to it, and what it orders: plain frozen data for :mod:`.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..protocol import control_pb2 as pb
from ..protocol.plan import Plan, Replica, SavePoint
from .events import Event
from .pace import Pace
from .rules import Division as Division
from .rules import Rules as Rules

Phase = Literal["waiting", "preparing", "training", "finishing", "finished", "stopped"]
Action = Literal["pause", "resume", "drain", "ban", "unban", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a peer's owner allows beside ``memory_gb``, as its hello says. None: no limit."""

    upload_mbps: float | None = None
    state_mbps: float | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Member:
    """A peer with an open control stream, or one that broke just now."""

    peer: str
    name: str
    device: str = "cpu"
    memory_gb: float = 1.0
    speed: float = 1.0
    region: str = ""  # where its owner says it is
    caps: Caps = Caps()
    addresses: tuple[str, ...] = ()
    session: bytes = b""
    savepoints: frozenset[SavePoint] = frozenset()
    held: frozenset[SavePoint] = frozenset()  # of others' stages, as their keeper: without the optimizer's moments
    prepared: SavePoint | None = None  # of the stage that it is to have next
    joined: float = 0.0
    last_seen: float = 0.0
    leaving: bool = False
    drained: str = ""  # it leaves by the operator's wish: what it is told
    away: float | None = None  # its line broke: until when it is waited for
    missed: str = ""  # who could not reach it meanwhile: what was sent to it is lost
    ready: int = 0  # generation it is ready for
    digest: bytes = b""  # of the reference weights it is ready with
    step: int = 0  # steps done in the current generation
    state: str = "waiting"
    pace: float | None = None  # seconds that it computes for a microbatch, for each unit of its stage's work
    paced: int = 0  # steps that this was learned from
    relayed: frozenset[str] = frozenset()  # peers that it reaches through a relay
    busy: float | None = 0.0  # since when it waits for nobody, as of its heartbeats; None: it waits

    @property
    def replica(self) -> Replica:
        return Replica(peer=self.peer, addresses=self.addresses)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point that the whole run can start from: a committed round, or a stop between two rounds.

    ``holders``: for a stop, the peers of each stage (each holds its own part); for a round, empty (any holder does).
    """

    kind: Literal["init", "round", "step"]
    generation: int
    step: int
    sample: int
    digests: tuple[bytes, ...] = ()
    holders: tuple[tuple[str, ...], ...] = ()

    @property
    def stages(self) -> int:
        """In how many stages its layers were divided; 0 for a run's beginning, which can be divided in any way."""
        return len(self.digests or self.holders)

    def savepoints(self, division: Division) -> list[SavePoint]:
        """What peers must hold to start each stage from this committed round."""
        return [self.savepoint(i, layers) for i, layers in enumerate(division.layers)]

    def savepoint(self, stage: int, layers: tuple[int, int]) -> SavePoint:
        """What a peer must hold to start ``stage`` from this committed round."""
        first, last = layers
        return SavePoint(
            kind="round",
            generation=self.generation,
            step=self.step,
            first_layer=first,
            last_layer=last,
            digest=self.digests[stage] if self.digests else b"",
        )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """No generation is ended for this peer's sake before ``until``, and none has it that can do without it; each time
    it takes longer."""

    until: float
    times: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """A seated peer is to go to a thin stage; it gets ready for that beside its work once the move has ``begun``."""

    peer: str
    origin: int
    stage: int
    since: float  # when the stage became thin, or the move began
    begun: bool = False


@dataclass(frozen=True, kw_only=True)
class Redivide:
    """The layers are to be divided into so many stages: as soon as that was better for long, or (``begun``) now."""

    stages: int
    since: float
    why: str
    begun: bool = False


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Nothing new is leased until the operator says so."""

    who: str
    why: str
    since: float


@dataclass(frozen=True, kw_only=True)
class Ban:
    """A key that is not let in."""

    name: str
    who: str
    why: str


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything the coordinator decides from. Replaced, never changed."""

    phase: Phase = "waiting"
    note: str = ""
    since: float = 0.0  # when the phase began
    members: Mapping[str, Member] = field(default_factory=dict)
    generation: int = 0
    plan: Plan | None = None
    until: int = 0
    end: int | None = None
    closing: Literal["", "round", "save"] = ""
    committed: Mark = Mark(kind="init", generation=0, step=0, sample=0)
    undivided: Mark | None = None  # the same, as the stages held it whose layers were divided anew since
    marks: tuple[Mark, ...] = ()  # older committed rounds, newest first
    stop: Mark | None = None
    rounds: int = 0
    stop_asked: bool = False
    publish: int | None = None
    published: int = -1
    evaluated: int = -1
    charted: int = 0  # steps whose loss is on the curve
    last_join: float = 0.0
    pace: Pace = field(default_factory=Pace)
    held: float | None = None  # since when a stage has too few replicas
    degraded: bool = False  # nobody came, and the run goes on all the same
    barred: Mapping[str, Bar] = field(default_factory=dict)  # who was given up though it lives
    unaware: Mapping[str, float] = field(default_factory=dict)  # who may be dialling still, and since when
    broken: tuple[tuple[str, str], ...] = ()  # who and whom: faults that ended generations since the last round
    leased_at: Mapping[int, float] = field(default_factory=dict)  # step -> when its leases expire
    losses: Mapping[int, Mapping[str, pb.StepDone]] = field(default_factory=dict)
    rounds_done: Mapping[int, Mapping[str, pb.RoundDone]] = field(default_factory=dict)
    evals: Mapping[int, Mapping[str, pb.EvalDone]] = field(default_factory=dict)
    move: Move | None = None
    redivide: Redivide | None = None
    looked: float = 0.0  # when divisions were compared last
    whole_until: float = 0.0  # a division failed: until then the layers stay as they are
    uneven: float | None = None  # since when other shares would be clearly faster
    shared: float = 0.0  # when a generation last ended for that
    slow: frozenset[str] = frozenset()  # who was to move and did not get ready in time
    keeping: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # peer -> others' stages, by the newest plan
    paused: Pause | None = None
    bans: Mapping[str, Ban] = field(default_factory=dict)
    checkpoint: int | None = None  # the first committed round from this step on is published, whatever is due


# What can happen.


@dataclass(frozen=True, kw_only=True)
class Joined:
    member: Member


@dataclass(frozen=True, kw_only=True)
class Gone:
    """A peer's stream has ended."""

    peer: str
    session: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Said:
    peer: str
    report: pb.Up


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class StopAsked:
    """The operator wants to stop."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The operator's word. ``peer``: its id, for drain, ban and unban; ``name``: of a peer that is not here. ``force``:
    even if the run then lacks what only this peer has."""

    action: Action
    peer: str = ""
    name: str = ""
    who: str = "the operator"
    why: str = ""
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """Every stage of a published round is on disk, under ``path``."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Unpublished:
    """A round that is to be published could not be written."""

    step: int
    why: str


@dataclass(frozen=True)
class Noted:
    """Something to be written down that decides nothing."""

    event: Event


Input = Joined | Gone | Said | Tick | StopAsked | Order | Uploaded | Unpublished | Noted

# What to do about it. The shell carries these out in order, on disk first; views follow from the state alone.


@dataclass(frozen=True, kw_only=True)
class Journal:
    event: Event


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A range of sample indices for one first-stage replica, in one step of one generation."""

    generation: int
    step: int
    peer: str
    first: int
    count: int
    expires: float


@dataclass(frozen=True, kw_only=True)
class Relet:
    """What ``peer`` had leased and is not committed goes to those who serve it now, by each lease's seat."""

    generation: int
    peer: str
    holders: Mapping[int, str]  # first sample of a lease to its new holder


@dataclass(frozen=True, kw_only=True)
class ReturnLeases:
    """All samples leased but not committed go back to the pool."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a replica brought into a round. ``work``: whole samples, its own by its stage's share of the model's work;
    ``digest``: of the reference weights after it."""

    peer: str
    stage: int
    samples: int
    work: float
    nbytes: int
    seconds: float
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A round is in the weights of every stage."""

    mark: Mark
    round: int
    replicas: int
    samples: int
    nbytes: int
    seconds: float
    degraded: bool
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Uncommit:
    """Committed rounds after ``step`` exist nowhere any more: their samples go back to the pool."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Remember:
    """The stop mark (None: forget it) and the generation, for the next start."""

    generation: int
    stop: Mark | None


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What the next start needs to go on with the generation: JSON values by name (see :mod:`.resume`)."""

    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the loss curve."""

    step: int
    tokens_samples: int
    train: float | None = None
    heldout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Dismiss:
    """A peer is refused or cut off."""

    peer: str
    session: bytes
    code: str
    text: str
    hint: str


Command = Journal | Lease | Relet | ReturnLeases | Commit | Uncommit | Remember | Keep | Point | Dismiss
