"""What is wrong with a run, as pure rules over what is seen of it, the moment, and what is remembered.

A rule says whether something is wrong, is not, or is neither (between its two thresholds: then it stays as it was). An
alert is raised once that has held for the rule's ``wait_seconds``, and resolved once the contrary has for its
``calm_seconds``, so that nothing flaps.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...protocol.observe_config import ObserveConfig
from ..dashboard.shapes import Alert, Point, State

ENDED = ("finished", "stopped")
KEPT_LOSSES = 50  # that a newer one is compared with
LEAST_LOSSES = 20  # before anything is called a spike
SPIKED = 3  # newest losses whose median must be that high
SPREADS = 8.0  # median absolute deviations above the median
LEAST_RISE, MOST_REST = 0.2, 0.1  # of the usual loss, above it: a spike; none
KEPT_HELDOUT = 5
USUAL_ROUNDS = 3.0  # times what rounds usually take
DISK_MARGIN = 1.25  # times the least free space: enough again
CLOCK_MARGIN = 0.5
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is seen at a moment: ``points`` are those since the last look, ``refusing`` what the store says if it takes
    no writes, ``clock_offset`` seconds that the machine's clock is ahead of the run's; None: not known."""

    state: State
    points: Sequence[Point] = ()
    disk_free_nbytes: int | None = None
    refusing: str | None = None
    clock_offset: float | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``is_wrong``: None between the two thresholds."""

    is_wrong: bool | None
    text: str = ""


FINE = Finding(is_wrong=False)


@dataclass(frozen=True, kw_only=True)
class Mood:
    """Of one rule: since when it has said something else than what stands, and the alert that stands."""

    turning: float | None = None
    alert: Alert | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the rules keep between two looks."""

    moods: Mapping[str, Mood] = field(default_factory=dict)
    trains_since: float | None = None
    losses: tuple[float, ...] = ()  # usual ones, to compare with
    newest: tuple[float, ...] = ()
    heldout: tuple[float, ...] = ()
    last_heldout: float | None = None
    had_replicas: bool = False  # some stage has had two

    def is_raised(self, name: str) -> bool:
        return (mood := self.moods.get(name)) is not None and mood.alert is not None


@dataclass(frozen=True, kw_only=True)
class Judged:
    alerts: tuple[Alert, ...]
    raised: tuple[Alert, ...]
    resolved: tuple[Alert, ...]
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Rule:
    name: str
    find: Callable[[Look, float, Memory, ObserveConfig], Finding]
    wait_seconds: float = 0.0
    calm_seconds: float = 0.0


def judge(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Judged:
    """The alerts that stand at ``now`` (on the run's clock), those that are new, and those that stand no more."""
    memory = remembered(look, now, memory)
    alerts, raised, resolved = list[Alert](), list[Alert](), list[Alert]()
    moods = dict[str, Mood]()
    for rule in RULES:
        before = memory.moods.get(rule.name, Mood())
        mood = turned(rule, before, rule.find(look, now, memory, config), now)
        moods[rule.name] = mood
        if mood.alert:
            alerts.append(mood.alert)
            if not before.alert:
                raised.append(mood.alert)
        elif before.alert:
            resolved.append(before.alert)
    return Judged(
        alerts=tuple(alerts), raised=tuple(raised), resolved=tuple(resolved), memory=replace(memory, moods=moods)
    )


def turned(rule: Rule, mood: Mood, finding: Finding, now: float) -> Mood:
    stands = mood.alert is not None
    if finding.is_wrong is None or finding.is_wrong == stands:
        if mood.alert and finding.text:
            return Mood(alert=Alert(name=rule.name, text=finding.text, since=mood.alert.since))
        return Mood(alert=mood.alert)
    since = now if mood.turning is None else min(mood.turning, now)
    if now - since < (rule.calm_seconds if stands else rule.wait_seconds):
        return Mood(turning=since, alert=mood.alert)
    return Mood() if stands else Mood(alert=Alert(name=rule.name, text=finding.text, since=since))


def remembered(look: Look, now: float, memory: Memory) -> Memory:
    """The memory with what this look adds. While a loss is too high, it is no measure of what is usual."""
    trains = look.state.phase == "training" and not look.state.is_paused
    losses, newest, heldout, last = memory.losses, memory.newest, memory.heldout, memory.last_heldout
    for point in look.points:
        if point.train is not None:
            newest = (*newest, point.train)
            if len(newest) > SPIKED:
                if not (memory.is_raised("loss") or is_spike(newest[:SPIKED], losses)) and math.isfinite(newest[0]):
                    losses = (*losses, newest[0])[-KEPT_LOSSES:]
                newest = newest[-SPIKED:]
        if point.heldout is not None:
            if last is not None and math.isfinite(last) and not memory.is_raised("heldout_loss"):
                heldout = (*heldout, last)[-KEPT_HELDOUT:]
            last = point.heldout
    return replace(
        memory,
        trains_since=(now if memory.trains_since is None else memory.trains_since) if trains else None,
        losses=losses,
        newest=newest,
        heldout=heldout,
        last_heldout=last,
        had_replicas=memory.had_replicas or any(len(stage.replicas) > 1 for stage in look.state.stages),
    )


def is_spike(newest: Sequence[float], usual: Sequence[float]) -> bool:
    """Whether the newest losses are far above what they were, on the median: one high step is none."""
    if len(usual) < LEAST_LOSSES or len(newest) < SPIKED:
        return False
    middle = statistics.median(usual)
    spread = statistics.median(abs(loss - middle) for loss in usual)
    return statistics.median(newest) > middle + max(LEAST_RISE * abs(middle), SPREADS * spread)


def _no_commit(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    s = look.state
    if not config.no_commit_minutes or memory.trains_since is None:
        return FINE
    times = [row.committed for row in s.rounds]  # newest first
    gaps = [later - earlier for later, earlier in itertools.pairwise(times) if later > earlier]
    most = max(60.0 * config.no_commit_minutes, USUAL_ROUNDS * statistics.median(gaps) if gaps else 0.0)
    quiet = now - max([memory.trains_since, *times[:1]])
    if quiet < most:
        return FINE
    return Finding(is_wrong=True, text=f"No round has been committed for {duration(quiet)}, though the run trains")


def _loss(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    if memory.newest and not math.isfinite(memory.newest[-1]):
        return Finding(is_wrong=True, text=f"The training loss is {memory.newest[-1]}: the run has diverged")
    if look.state.phase in ENDED:
        return FINE
    if not all(map(math.isfinite, memory.newest)):
        return Finding(is_wrong=None)
    if len(memory.newest) < SPIKED or len(memory.losses) < LEAST_LOSSES:
        return FINE
    recent, usual = statistics.median(memory.newest), statistics.median(memory.losses)
    text = f"The training loss has risen to {recent:.3f} from {usual:.3f}"
    if is_spike(memory.newest, memory.losses):
        return Finding(is_wrong=True, text=text)
    return FINE if recent <= usual + MOST_REST * abs(usual) else Finding(is_wrong=None, text=text)


def _heldout_loss(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    last = memory.last_heldout
    if last is None:
        return FINE
    if not math.isfinite(last):
        return Finding(is_wrong=True, text=f"The held-out loss is {last}: the run has diverged")
    if not memory.heldout or look.state.phase in ENDED:
        return FINE
    best = min(memory.heldout)
    text = f"The held-out loss has risen to {last:.3f} from {best:.3f}"
    if last > best + LEAST_RISE * abs(best):
        return Finding(is_wrong=True, text=text)
    return FINE if last <= best + MOST_REST * abs(best) else Finding(is_wrong=None, text=text)


def _thin_stage(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    if not memory.had_replicas or look.state.phase in ENDED:  # a run that never had two knows
        return FINE
    thin = [str(stage.stage) for stage in look.state.stages if stage.is_thin]
    if not thin:
        return FINE
    which = f"Stage {thin[0]} has" if len(thin) == 1 else f"Stages {', '.join(thin[:8])} have"
    return Finding(is_wrong=True, text=f"{which} one replica left, and nobody is ready to go on with it")


def _disk_low(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    free, least = look.disk_free_nbytes, config.disk_free_gb * GIGABYTE
    if not least or free is None:
        return FINE if not least else Finding(is_wrong=None)
    text = f"{free / GIGABYTE:.2f} GB are free on the disk that holds the run"
    if free < least:
        return Finding(is_wrong=True, text=text)
    return FINE if free >= DISK_MARGIN * least else Finding(is_wrong=None, text=text)


def _disk_refuses(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    return FINE if look.refusing is None else Finding(is_wrong=True, text=look.refusing)


def _clock(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    offset, most = look.clock_offset, config.clock_seconds
    if not most or offset is None:
        return FINE
    way = "ahead of" if offset > 0 else "behind"
    text = (
        f"The machine's clock is {duration(abs(offset))} {way} the run's: it was set, or the machine slept. "
        "The run's times stay as they are until the coordinator is started again"
    )
    if abs(offset) > most:
        return Finding(is_wrong=True, text=text)
    return FINE if abs(offset) <= CLOCK_MARGIN * most else Finding(is_wrong=None, text=text)


def _degraded(look: Look, now: float, memory: Memory, config: ObserveConfig) -> Finding:
    s = look.state
    if s.phase in ENDED or not s.rounds or not s.rounds[0].degraded:
        return FINE
    return Finding(is_wrong=True, text=f"The run is degraded: round {s.rounds[0].round} was below quorum")


RULES = (
    Rule(name="no_commit", find=_no_commit),
    Rule(name="loss", find=_loss, calm_seconds=30.0),
    Rule(name="heldout_loss", find=_heldout_loss),
    Rule(name="thin_stage", find=_thin_stage, wait_seconds=30.0, calm_seconds=30.0),
    Rule(name="disk_low", find=_disk_low, calm_seconds=60.0),
    Rule(name="disk_refuses", find=_disk_refuses, wait_seconds=10.0, calm_seconds=30.0),
    Rule(name="clock", find=_clock, wait_seconds=10.0, calm_seconds=60.0),
    Rule(name="degraded", find=_degraded),
)
NAMES = tuple(rule.name for rule in RULES)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
