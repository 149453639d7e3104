"""The page's state of what the fold and the totals say: a pure function of them and of the moment that it is shown."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from functools import cache

from ...protocol.architecture import TITLES, tensors, weights
from ...protocol.config import RunConfig
from ...protocol.plan import Shape
from .fold import SMOOTHED, Fold, Person, Reached
from .rollups import NONE, Book, Totals
from .shapes import Eta, Goodput, PeerRow, RunRow, StageRow, Standing, State

COMPRESSED = ("activation", "gradient", "weights")  # purposes with an uncompressed counterfactual of their own
RATE_SECONDS = 20.0  # window of the shown speed
STRETCHES = 8  # that the newest steps are cut into, for the pace
SHOWN_ROUNDS, SHOWN_EVENTS = 30, 40


class Frame:
    """What the configuration fixes for every picture of a run."""

    def __init__(self, config: RunConfig, run_id: str, vocab_size: int) -> None:
        self.config, self.run_id, self.vocab_size = config, run_id, vocab_size
        self.shape = Shape.of(config.model, vocab_size)
        self.seq_len, self.steps = config.model.seq_len, config.steps
        self.division = cache(self._division)

    def _division(self, stages: int) -> tuple[tuple[int, int], ...]:
        counts = self.config.pipeline.counts(self.config.model.layers)
        return tuple(self.shape.split(stages if stages in counts else counts[0]))

    def row(self, layers: Sequence[tuple[int, int]]) -> RunRow:
        model, activations = self.config.model, self.config.activations
        parameters = weights(tensors(model, self.vocab_size, 0, model.layers))
        size = f"{model.layers} layers, d = {model.d_model}"
        if model.train == "lora":
            size += f", adapters of rank {model.lora.rank}"
        forward, backward = activations.forward, activations.backward
        return RunRow(
            name=self.config.name,
            id=self.run_id,
            model=f"{TITLES[model.architecture]} shape, {amount(parameters)} parameters, {size}",
            stages=len(layers),
            preset=self.config.sync.preset,
            codec=f"{forward} both ways" if forward == backward else f"{forward} forward, {backward} backward",
        )


def picture(frame: Frame, fold: Fold, book: Book, now: float, *, at: float | None, version: int, scores: int) -> State:
    """``now``: when it is shown; ``at``: the moment that it shows, None: the newest there is. ``scores``: the
    evaluations' version."""
    moment = now if at is None else at
    tokens = fold.sample * frame.seq_len
    traffic = book.by_purpose(COMPRESSED)
    trains = fold.phase == "training"
    losses = list(fold.reached)[-SMOOTHED:]
    left = frame.steps - fold.step
    ahead = eta(list(fold.reached), left) if trains else None
    stages = stages_of(frame, fold)
    return State(
        version=version,
        now=now,
        at=at,
        run=frame.row([(stage.first_layer, stage.last_layer + 1) for stage in stages]),
        phase=fold.phase,
        note=fold.note,
        is_paused=fold.is_paused,
        started=moment if fold.started is None else fold.started,
        step=fold.step,
        steps=frame.steps,
        generation=fold.generation,
        train_loss=smoothed([reached.loss for reached in losses]),
        heldout_loss=fold.heldout[1] if fold.heldout else None,
        heldout_first=fold.heldout[0] if fold.heldout else None,
        tokens=tokens,
        tokens_per_second=speed(losses, moment) if trains else None,
        eta_seconds=min(max(left * mean_pace(losses), ahead.low), ahead.high) if ahead else None,
        eta=ahead,
        goodput=goodput(float(fold.sample), book.decided),
        round=fold.round,
        bytes_per_token=sum(t.nbytes for t in traffic) / tokens if tokens else None,
        dense_bytes_per_token=sum(t.dense_nbytes for t in traffic) / tokens if tokens else None,
        traffic=traffic,
        stages=stages,
        peers=tuple(peer_row(frame, fold, book, peer) for peer in fold.members),
        rounds=fold.newest_rounds(SHOWN_ROUNDS),
        events=fold.newest_events(SHOWN_EVENTS),
        alerts=(),
        published=fold.published,
        evaluations=scores,
    )


def stages_of(frame: Frame, fold: Fold) -> tuple[StageRow, ...]:
    layers = fold.layers or frame.division(len(fold.seats)) if fold.seats else fold.divided or frame.division(0)
    return tuple(
        stage_row(frame, i, stage, fold.seats[i] if i < len(fold.seats) else ()) for i, stage in enumerate(layers)
    )


def stage_row(frame: Frame, number: int, layers: tuple[int, int], replicas: Sequence[str]) -> StageRow:
    return StageRow(
        stage=number,
        first_layer=layers[0],
        last_layer=layers[1] - 1,
        parameters=frame.shape.size(*layers),
        replicas=tuple(replicas),
        is_thin=len(replicas) == 1,
    )


def peer_row(frame: Frame, fold: Fold, book: Book, peer: str) -> PeerRow:
    """Of anybody who was ever there."""
    person = fold.persons.get(peer) or Person(peer=peer, name=peer[:6], device="", first_seen=0.0)
    stage = next((i for i, peers in enumerate(fold.seats) if peer in peers), None)
    totals = book.peers.get(peer, NONE)
    if peer not in fold.members:
        state, stage = "gone", None
    elif stage is None:
        state = "waiting"
    else:
        state = fold.members[peer] or ("loading" if fold.phase == "preparing" else "training")
    return PeerRow(
        id=peer,
        name=person.name,
        region=person.region,
        stage=stage,
        state=state,
        samples=totals.samples,
        work=totals.work,
        sent=totals.sent,
        received=totals.received,
        last_seen=max(totals.time, person.first_seen),
        seconds_per_step=totals.pace,
        tokens_per_second=tokens_per_second(frame, totals),
        device=person.device,
    )


def tokens_per_second(frame: Frame, totals: Totals) -> float | None:
    return totals.per_step * frame.seq_len / totals.pace if totals.per_step is not None and totals.pace else None


def standings(frame: Frame, fold: Fold, book: Book) -> list[Standing]:
    """The leaderboard: who did most of what is committed, first; who has done nothing yet is not on it."""
    everybody = [(totals, peer) for peer, totals in book.peers.items() if totals.work > 0]
    everybody.sort(key=lambda pair: (-pair[0].work, pair[1]))
    whole = book.work
    found: list[Standing] = []
    for number, (totals, peer) in enumerate(everybody, start=1):
        person = fold.persons.get(peer) or Person(peer=peer, name=peer[:6], device="", first_seen=totals.time)
        is_tied = bool(found) and found[-1].work == totals.work
        found.append(
            Standing(
                rank=found[-1].rank if is_tied else number,
                peer=peer,
                name=person.name,
                region=person.region,
                work=totals.work,
                tokens=totals.work * frame.seq_len,
                share=totals.work / whole,
                rounds=totals.rounds,
                first_seen=person.first_seen,
                is_here=peer in fold.members,
            )
        )
    return found


def goodput(committed: float, decided: float) -> Goodput:
    """Nothing of a run whose coordinator was too old to keep it."""
    return (
        Goodput(committed=committed, computed=max(committed, decided))
        if decided
        else Goodput(committed=0.0, computed=0.0)
    )


def amount(parameters: int) -> str:
    """In the unit that leaves at least one digit."""
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.1f} k"


def smoothed(values: Sequence[float]) -> float | None:
    """Exponential mean of the newest values."""
    mean: float | None = None
    for value in values:
        mean = value if mean is None else 0.9 * mean + 0.1 * value
    return mean


def speed(reached: Sequence[Reached], moment: float) -> float | None:
    """Tokens per second just now."""
    recent = [r for r in reached if r.time >= moment - RATE_SECONDS]
    if len(recent) < 2 or recent[-1].time <= recent[0].time:
        return None
    return (recent[-1].tokens - recent[0].tokens) / (recent[-1].time - recent[0].time)


def mean_pace(reached: Sequence[Reached]) -> float:
    """Seconds of a step."""
    return (reached[-1].time - reached[0].time) / max(1, reached[-1].step - reached[0].step)


def eta(reached: Sequence[Reached], left: int) -> Eta | None:
    """Seconds for ``left`` steps. At best it goes on as in the faster of the newest stretches without the time in which
    the run stood still, at worst as in the slower ones, or as in all of them together with that time and with the steps
    that were done twice."""
    count = min(STRETCHES, len(reached) - 1)
    if count < 1:
        return None
    ends = [i * (len(reached) - 1) // count for i in range(count + 1)]
    pairs = [(reached[a], reached[b]) for a, b in itertools.pairwise(ends)]
    grown = [(a, b) for a, b in pairs if b.step > a.step and b.time >= a.time]
    if not grown:
        return None
    fast = sorted(max(0.0, b.time - a.time - (b.still - a.still)) / (b.step - a.step) for a, b in grown)
    slow = sorted((b.time - a.time) / (b.step - a.step) for a, b in grown)
    best, worst = quartile(fast, 1), quartile(slow, 3)
    first, last = reached[0], reached[-1]
    if last.step > first.step:
        worst = max(worst, (last.time - first.time) / (last.step - first.step))
    return Eta(low=max(0, left) * min(best, worst), high=max(0, left) * worst)


def quartile(values: list[float], which: int) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[which - 1] if len(values) > 1 else values[0]
