"""What an order of the operator would do, in words with numbers: pure functions of rules, state and measured rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..protocol.plan import Shape
from ..protocol.schedule import is_round
from .operating import Objection, checkpoint_from, is_round_near, objection, open_steps, outlook, publishable
from .planning import Wait, is_ready
from .state import Mark, Member, Order, Rules, RunState

WEIGHT_NBYTES = 4  # of the reference, in fp32
MOMENTS_NBYTES = 8  # of AdamW's, as they are sent
STATE_BYTES_PER_SECOND = 50e6 / 8  # that a worker takes or gives of states, unless its owner says otherwise
LOOKED_AHEAD = 10_000  # steps in which the next round is looked for


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large things are. ``rates``: bytes per second from one peer to another, where they are measured."""

    shape: Shape
    rates: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def state_nbytes(self, rules: Rules, layers: tuple[int, int]) -> int:
        """What a newcomer of a stage fetches: reference, moments, and the outer optimizer's momentum if it has one."""
        momentum = WEIGHT_NBYTES if rules.sync.outer_momentum else 0
        return self.shape.size(*layers) * (WEIGHT_NBYTES + MOMENTS_NBYTES + momentum)

    def model_nbytes(self) -> int:
        """What is uploaded for a published model."""
        return self.shape.size(0, self.shape.layers) * WEIGHT_NBYTES

    def seconds(self, peer: str, donors: list[str], nbytes: int) -> float:
        """To fetch so much from all donors at once: as fast as their lines are known to be, the usual limit at most."""
        known = [rate for donor in donors if (rate := self.rates.get((donor, peer))) is not None]
        return nbytes / (min(sum(known), STATE_BYTES_PER_SECOND) if known else STATE_BYTES_PER_SECOND)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """``objection``: why it cannot be done, or not without insisting; ``text`` is then what insisting would do."""

    text: str
    objection: Objection | None = None


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A peer takes a stage over that it does not hold."""

    peer: str
    stage: int
    nbytes: int
    seconds: float


def preview(rules: Rules, state: RunState, scale: Scale, order: Order) -> Preview:
    """What would happen. Changes nothing."""
    against = objection(rules, state, order)
    if against is not None and not against.forcible:
        return Preview(text="", objection=against)
    match order.action:
        case "pause":
            text = _pause(rules, state)
        case "resume":
            text = f"New steps are leased again, from step {state.until or state.committed.step}."
        case "drain":
            text = _drain(rules, state, scale, state.members[order.peer])
        case "ban":
            text = _ban(rules, state, scale, order)
        case "unban":
            text = f"{state.bans[order.peer].name} may join again."
        case "checkpoint":
            text = _checkpoint(rules, state, scale)
    if against is not None:
        text = f"{against.text[:1].upper()}{against.text[1:]}. {text}"
    return Preview(text=text, objection=against)


def _pause(rules: Rules, state: RunState) -> str:
    steps = open_steps(state)
    rest = "Everybody keeps its seat and its line; joining, leaving and stopping work as ever."
    if state.phase != "training":
        return f"No step is leased. Plans are still made, nothing is trained. {rest}"
    if not steps:
        return f"Nothing is in the air: the run stands still at once, at step {state.until}. {rest}"
    done = min((m.step for p, m in state.members.items() if state.plan and p in state.plan.peers), default=0)
    left = max(0, state.until - max(done, state.committed.step))
    samples = (state.plan.samples_per_step if state.plan else 0) * steps
    time = f", in about {spell_seconds(left * state.pace.mean_seconds)}" if state.pace.count else ""
    return (
        f"{some(left, 'leased step')} {'is' if left == 1 else 'are'} still done, then a round closes over"
        f" {some(samples, 'sample')}: the run stands still at step {state.until}{time}. {rest}"
    )


def _drain(rules: Rules, state: RunState, scale: Scale, member: Member) -> str:
    name = member.name
    if state.plan is None or member.peer not in state.plan.peers:
        return f"{name} has no stage: it is let go at once."
    stage, _ = state.plan.places[member.peer]
    if state.phase != "training":
        begins = f"A new plan is made without {name}, of stage {stage}."
    elif open_steps(state):
        begins = f"{name} finishes its step and hands stage {stage} over; a round closes at step {state.until}."
    else:
        begins = f"{name} hands stage {stage} over at once: nothing is in the air."
    after = outlook(rules, state, member, at_once=False)
    if isinstance(after, Wait):
        return f"{begins} Then the run waits: {after.why}."
    return " ".join([begins, *_seats(rules, state, scale, member, after)])


def _ban(rules: Rules, state: RunState, scale: Scale, order: Order) -> str:
    member, plan = state.members.get(order.peer), state.plan
    if member is None:
        return f"The key of {order.name or order.peer} is not let in any more. It is not here."
    name = member.name
    begins = f"{name} is cut off at once, and its key is not let in any more."
    if plan is None or member.peer not in plan.peers:
        return f"{begins} It has no stage."
    stage, _ = plan.places[member.peer]
    left = len(plan.replicas[stage]) - 1
    fresh = open_steps(state) * plan.samples_per_step
    begun_here = plan.origin != "step" or state.committed.generation == plan.generation
    if state.phase == "training" and rules.reroutes and left and begun_here and state.closing != "save":
        others = "The other replica" if left == 1 else f"The other {left} replicas"
        takes = "takes" if left == 1 else "take"
        redo = f"{others} of stage {stage} {takes} its part over, and of {some(fresh, 'sample')} do it again."
        return " ".join([begins, redo, "Nothing has to be fetched.", *_thin(rules, stage, left)])
    back = f"Everybody goes back to step {state.committed.step}: {some(fresh, 'sample')} are trained again."
    after = outlook(rules, state, member, at_once=True)
    if isinstance(after, Wait):
        return f"{begins} {back} Then the run waits: {after.why}."
    return " ".join([begins, back, *_seats(rules, state, scale, member, after)])


def _seats(rules: Rules, state: RunState, scale: Scale, gone: Member, seats: list[list[str]]) -> list[str]:
    """What the next plan costs without a peer, one sentence each."""
    last = state.committed
    layers = rules.division(len(seats)).layers
    found = [
        fetch for i, peers in enumerate(seats) for p in peers if (fetch := _fetch(rules, state, scale, p, i, layers))
    ]
    said = []
    if last.kind == "round" and len(seats) != last.stages:
        said.append(f"The layers are divided anew, into {len(seats)} stages instead of {last.stages}.")
    if found:
        stages = ", ".join(sorted({str(fetch.stage) for fetch in found}))
        nbytes, seconds = sum(fetch.nbytes for fetch in found), max(fetch.seconds for fetch in found)
        said.append(
            f"{some(len(found), 'worker')} take{'s' if len(found) == 1 else ''} over a stage ({stages}):"
            f" {spell_bytes(nbytes)} to fetch, about {spell_seconds(seconds)}."
        )
    else:
        said.append("No stage has to be fetched.")
    before = state.plan.replicas if state.plan and len(state.plan.stages) == len(seats) else None
    for i, peers in enumerate(seats):
        if before is None or len(peers) < len(before[i]):
            said += _thin(rules, i, len(peers))
    return said


def _fetch(
    rules: Rules, state: RunState, scale: Scale, peer: str, stage: int, layers: tuple[tuple[int, int], ...]
) -> Fetch | None:
    """What a peer has to fetch for its seat; None if it holds it, or has got ready for it."""
    last, member = state.committed, state.members[peer]
    if last.kind != "round":
        return None  # made from the seed
    own = rules.division(last.stages).layers
    first, end = layers[stage]
    parts = [i for i, (a, b) in enumerate(own) if a < end and first < b and not _holds(member, last, i, own[i])]
    if not parts or (layers == own and is_ready(member, last.savepoint(stage, own[stage]))):
        return None
    nbytes = sum(scale.state_nbytes(rules, own[i]) for i in parts)
    donors = [p for i in parts for p, m in state.members.items() if _holds(m, last, i, own[i])]
    return Fetch(peer=peer, stage=stage, nbytes=nbytes, seconds=scale.seconds(peer, donors, nbytes))


def _holds(member: Member, mark: Mark, stage: int, layers: tuple[int, int]) -> bool:
    return mark.savepoint(stage, layers) in member.savepoints


def _thin(rules: Rules, stage: int, left: int) -> list[str]:
    """What few replicas mean for a stage."""
    if left < rules.quorum:
        waits = f"nothing is leased for up to {spell_seconds(rules.patience_seconds)}, then it goes on degraded"
        return [f"Stage {stage} is left with {left} of the {rules.quorum} replicas that a round needs: {waits}."]
    return [f"Stage {stage} is left with one replica."] if left == 1 else []


def _checkpoint(rules: Rules, state: RunState, scale: Scale) -> str:
    size, last = spell_bytes(scale.model_nbytes()), state.committed.step
    first = f"The model of step {state.publish} is on its way; then: " if state.publish is not None else ""
    if checkpoint_from(state) == last and publishable(state):
        return f"{first}The model of step {last}, the last committed round, is published: {size} to upload."
    if not open_steps(state):
        return f"{first}The next round that is committed is published: {size} to upload."
    if state.publish is None and not is_round_near(rules, state):
        return f"A round is closed at step {state.until}, and its model published: {size} to upload."
    soon = range(last, last + LOOKED_AHEAD)
    at = next((step + 1 for step in soon if is_round(rules.sync, rules.seed, step)), None)
    where = "the next round" if at is None else f"the round at step {min(at, rules.steps)}"
    return f"{first}The model of {where} is published: {size} to upload."


def some(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def spell_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.2g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def spell_seconds(seconds: float) -> str:
    if seconds < 100:
        return some(max(1, round(seconds)), "second")
    return some(round(seconds / 60), "minute") if seconds < 6000 else some(round(seconds / 3600), "hour")
