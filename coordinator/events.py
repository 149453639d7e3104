"""Everything that happens to a run, as typed events, each with its one line for people.

Log, dashboard and history are folds of these; nothing parses text back.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import msgspec

from ..protocol.evaluation import Score, TaskSummary
from .event import Event as Event
from .orders import Banned as Banned
from .orders import CheckpointAsked as CheckpointAsked
from .orders import Drained as Drained
from .orders import Paused as Paused
from .orders import Resumed as Resumed
from .orders import Unbanned as Unbanned


class RunOpened(Event, frozen=True, kw_only=True):
    name: str
    step: int
    generation: int = 0  # that goes on

    @property
    def text(self) -> str:
        again = f" again at step {self.step}" if self.step or self.generation else ""
        return f"Run {self.name} opened{again}" + (f": plan {self.generation} goes on" if self.generation else "")


class PeerJoined(Event, frozen=True, kw_only=True):
    """What a peer says of itself, and what its owner allows (None: no limit, or nobody said)."""

    peer: str
    name: str
    device: str
    region: str = ""
    memory_gb: float | None = None
    threads: int | None = None
    upload_mbps: float | None = None
    state_mbps: float | None = None

    @property
    def text(self) -> str:
        return f"{self.name} joined ({self.device})"


class PeerLeaving(Event, frozen=True, kw_only=True):
    peer: str
    name: str

    @property
    def text(self) -> str:
        return f"{self.name} wants to leave: it finishes its step and hands over"


class PathChanged(Event, frozen=True, kw_only=True):
    """How a peer reaches another from now on: ``path`` is ``relayed``, or ``direct`` again."""

    peer: str
    name: str
    other: str
    other_name: str
    path: str

    @property
    def text(self) -> str:
        how = "through a relay" if self.path == "relayed" else "directly now"
        return f"{self.name} reaches {self.other_name} {how}"


class PeerGone(Event, frozen=True, kw_only=True):
    peer: str
    name: str
    graceful: bool

    @property
    def text(self) -> str:
        return f"{self.name} left" if self.graceful else f"{self.name} is lost: no word from it"


class PlanIssued(Event, frozen=True, kw_only=True):
    generation: int
    step: int
    origin: str
    stages: tuple[tuple[str, ...], ...]  # names of the replicas
    shares: tuple[tuple[int, ...], ...] = ()  # of each stage, the microbatches of each replica; none: even
    peers: tuple[tuple[str, ...], ...] = ()  # ids of the replicas; none: nobody wrote them down yet
    layers: tuple[tuple[int, int], ...] = ()  # [first, last) of each stage

    @property
    def text(self) -> str:
        rows = "; ".join(f"stage {i}: {self._row(i)}" for i in range(len(self.stages)))
        return f"Plan {self.generation} from step {self.step}: {rows}"

    def _row(self, stage: int) -> str:
        names, shares = self.stages[stage], self.shares[stage] if stage < len(self.shares) else ()
        if len(shares) != len(names):
            return ", ".join(names)
        return ", ".join(f"{name} ({share} of {sum(shares)})" for name, share in zip(names, shares, strict=True))


class Moving(Event, frozen=True, kw_only=True):
    """A seated peer gets ready for a thin stage, beside its work."""

    peer: str
    name: str
    origin: int
    stage: int

    @property
    def text(self) -> str:
        return (
            f"{self.name} gets ready for stage {self.stage}, which is the slowest, and trains on at stage {self.origin}"
        )


class Moved(Event, frozen=True, kw_only=True):
    """A new plan seats a peer at a stage that it got ready for while it trained another one."""

    peer: str
    name: str
    origin: int
    stage: int

    @property
    def text(self) -> str:
        return f"{self.name} moves from stage {self.origin} to stage {self.stage}"


class Redivided(Event, frozen=True, kw_only=True):
    """A new plan divides the layers into other stages than the round was committed in that it starts from."""

    generation: int
    before: tuple[tuple[int, int], ...]  # layers [first, last) of each stage
    after: tuple[tuple[int, int], ...]
    why: str

    @property
    def text(self) -> str:
        cut = ", ".join(f"{first}-{last - 1}" for first, last in self.after)
        how = f"into {len(self.after)} stages" if len(self.after) > 1 else "into one stage"
        return f"The layers are divided anew, {how} where there were {len(self.before)} ({cut}): {self.why}"


class DivisionFailed(Event, frozen=True, kw_only=True):
    """Not everybody could take over its new stage: the round stays as it was committed, nothing is lost."""

    generation: int
    why: str

    @property
    def text(self) -> str:
        return f"The new division has not come about ({self.why}): going on from the stages before it"


class Waiting(Event, frozen=True, kw_only=True):
    why: str

    @property
    def text(self) -> str:
        return f"Waiting: {self.why}"


class Rerouted(Event, frozen=True, kw_only=True):
    """A generation goes on without a replica: the others of its stage do what it had not brought into a round."""

    generation: int
    peer: str
    name: str
    stage: int
    since: int  # steps done in the last committed round
    void: int  # rounds up to here are left out
    left: int  # replicas of the stage

    @property
    def text(self) -> str:
        others = "the other replica takes" if self.left == 1 else f"the other {self.left} replicas take"
        return f"Going on without {self.name}: {others} over its part of stage {self.stage} from step {self.since}"


class Held(Event, frozen=True, kw_only=True):
    """Nothing new is leased: a stage has too few replicas."""

    why: str

    @property
    def text(self) -> str:
        return f"Held: {self.why}"


class Degraded(Event, frozen=True, kw_only=True):
    why: str

    @property
    def text(self) -> str:
        return f"Nobody came: going on degraded, {self.why}"


class PhaseChanged(Event, frozen=True, kw_only=True):
    """What a batch of inputs has made of the run's phase. Other events tell people why: lists leave this one out."""

    phase: str
    note: str = ""

    @property
    def text(self) -> str:
        return f"Now {self.phase}: {self.note}" if self.note else f"Now {self.phase}"


class TrainingStarted(Event, frozen=True, kw_only=True):
    generation: int
    step: int

    @property
    def text(self) -> str:
        return f"Training goes on from step {self.step}" if self.step else "Training starts"


class RoundCommitted(Event, frozen=True, kw_only=True):
    round: int
    step: int
    replicas: int
    samples: int
    nbytes: int
    seconds: float
    degraded: bool = False  # a stage had fewer replicas than the run's quorum

    @property
    def text(self) -> str:
        how = "below quorum, those left agree" if self.degraded else "all replicas agree"
        return f"Round {self.round} committed at step {self.step}: {self.samples} samples, {how}"


class RoundRefused(Event, frozen=True, kw_only=True):
    step: int
    peers: tuple[str, ...]
    why: str

    @property
    def text(self) -> str:
        who = ", ".join(self.peers) or "nobody in particular"
        return f"Round at step {self.step} refused ({self.why}): {who} must take the state over anew"


class RolledBack(Event, frozen=True, kw_only=True):
    step: int
    why: str

    @property
    def text(self) -> str:
        return f"Back to step {self.step}, the last committed round: {self.why}"


class HeldOut(Event, frozen=True, kw_only=True):
    step: int
    loss: float

    @property
    def text(self) -> str:
        return f"Held-out loss {self.loss:.4f} at step {self.step}"


class Published(Event, frozen=True, kw_only=True):
    step: int
    path: str

    @property
    def text(self) -> str:
        return f"Model of step {self.step} published"


class PublishFailed(Event, frozen=True, kw_only=True):
    step: int
    why: str
    again: bool  # the same one; else the next that is due

    @property
    def text(self) -> str:
        later = "tried again until it is" if self.again else "the next one will be tried"
        return f"Model of step {self.step} is not published ({self.why}); {later}"


class Evaluated(Event, frozen=True, kw_only=True):
    """A file with what a published model can do has come into its folder. ``mean``: of the classification tasks'
    scores, with its interval; None where there are none."""

    step: int
    suite: str
    mean: Score | None = None
    tasks: tuple[TaskSummary, ...]
    digest: str  # SHA-256 of the file, in hex

    @property
    def headline(self) -> tuple[str, Score] | None:
        """The mean, or else the first score that there is, and what it is of."""
        if self.mean:
            return "mean macro-f1", self.mean
        return next(((f"{task.name} {task.metric}", task.score) for task in self.tasks if task.score), None)

    @property
    def text(self) -> str:
        what = f"Model of step {self.step} evaluated, {self.suite[:60]}"
        if not (head := self.headline):
            return f"{what}: no task has a score"
        label, score = head
        return f"{what}: {label} {score.value:.3f} ({score.low:.3f} … {score.high:.3f})"


class EvaluationIgnored(Event, frozen=True, kw_only=True):
    """A file that should be an evaluation is none. ``digest``: what it is told by until it changes."""

    step: int
    file: str
    why: str
    digest: str

    @property
    def text(self) -> str:
        return f"Warning: {self.file} of step {self.step} is left out: {self.why}"


class StoodStill(Event, frozen=True, kw_only=True):
    """The store took no writes. ``cause`` is the code of its error."""

    seconds: float
    cause: str

    @property
    def text(self) -> str:
        what = {"disk-full": "The disk was full", "busy": "Another program held the run's file"}
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{what.get(self.cause, 'The disk refused to write')} for {time}; nothing is lost, the run goes on"


class Faulted(Event, frozen=True, kw_only=True):
    peer: str
    name: str
    what: str

    @property
    def text(self) -> str:
        return f"{self.name} reports: {self.what}"


class Stopping(Event, frozen=True, kw_only=True):
    step: int

    @property
    def text(self) -> str:
        return f"Stopping after step {self.step}: workers save their state"


class Stopped(Event, frozen=True, kw_only=True):
    step: int

    @property
    def text(self) -> str:
        return f"Stopped at step {self.step}; start the coordinator again to go on"


class Finished(Event, frozen=True, kw_only=True):
    step: int

    @property
    def text(self) -> str:
        return f"Finished: {self.step} steps are done and published"


QUIET = ("PhaseChanged",)  # kinds that no list of events shows
DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(reduce(or_, Event.__subclasses__()))  # of stored ones
