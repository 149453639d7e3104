"""Rounds by themselves: real synchronizers of one stage, joined by memory, whose weights drift as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from potluck.protocol.config import RunConfig
from potluck.protocol.errors import DivergedError, WireError
from potluck.protocol.frames import Frame
from potluck.protocol.plan import Plan, Replica, SavePoint, StagePlan
from potluck.worker.boundary import Seat
from potluck.worker.mailbox import Address, Fenced, Mailbox
from potluck.worker.shards import cut, most_nbytes
from potluck.worker.stage import Stage
from potluck.worker.sync import Outcome, Synchronizer, apply


class Box:
    """A wire to mailboxes in memory; remembers the longest payload per weight count."""

    def __init__(self, peer: str, boxes: dict[str, Mailbox], seen: list[Frame]) -> None:
        self.peer, self.boxes, self.seen = peer, boxes, seen

    def post(self, peer: str, frame: Frame) -> None:
        self.seen.append(frame)
        self.boxes[peer].put(Address.of(frame.header, self.peer), frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        return self.boxes[self.peer].take(wanted, attempt, timeout_seconds=20.0)


class Crew:
    """All replicas of one stage."""

    def __init__(self, config: RunConfig, replicas: int) -> None:
        self.config, self.rule = config, config.sync.resolved()
        peers = [f"peer{i}" for i in range(replicas)]
        stage = StagePlan(first_layer=0, last_layer=config.model.layers, replicas=tuple(Replica(peer=p) for p in peers))
        plan = Plan(
            generation=1,
            first_step=0,
            first_sample=0,
            origin="init",
            origin_generation=0,
            stages=(stage,),
            microbatches=1,
            microbatch_size=1,
        )
        boxes, self.seen = {p: Mailbox() for p in peers}, list[Frame]()
        self.stages = [Stage(config, 300, 0, config.model.layers) for _ in peers]
        point = SavePoint(kind="round", generation=0, step=0, first_layer=0, last_layer=config.model.layers)
        self.synchronizers = [
            Synchronizer(
                config,
                Seat(plan=plan, stage=0, replica=i, run=b"crewtest"),
                self.stages[i],
                self.stages[i].state(point),
                Box(p, boxes, self.seen),
            )
            for i, p in enumerate(peers)
        ]
        self.rounds = 0
        self.generator = torch.Generator().manual_seed(7)

    def drift(self, size: float = 1e-3) -> list[torch.Tensor]:
        """Lets every replica learn something of its own; what it learned."""
        steps = [size * torch.randn(s.size, generator=self.generator) for s in self.stages]
        for stage, step in zip(self.stages, steps, strict=True):
            stage.x.add_(step)
        return steps

    def exchange(self, weights: list[int], fragments: range | None = None, *, full: bool = False) -> list[Outcome]:
        self.rounds += 1
        turn = range(self.rule.fragments) if fragments is None else fragments
        for synchronizer in self.synchronizers:
            synchronizer.counted_from = None  # any weights will do here
        captures = [
            s.capture(stage, self.rounds, w, turn, full=full)
            for s, stage, w in zip(self.synchronizers, self.stages, weights, strict=True)
        ]
        outcomes: dict[int, Outcome] = {}
        threads = [
            threading.Thread(target=lambda i=i, s=s: outcomes.update({i: s.exchange(captures[i])}))
            for i, s in enumerate(self.synchronizers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        return [outcomes[i] for i in range(len(threads))]

    def round(self, weights: list[int] | None = None, fragments: range | None = None, *, late: bool = False) -> None:
        outcomes = self.exchange(weights or [1] * len(self.stages), fragments)
        for stage, outcome in zip(self.stages, outcomes, strict=True):
            apply(stage, outcome, late=late)
        assert len({o.state.point.digest for o in outcomes}) == 1


@pytest.fixture
def make_crew(make_config: Callable[..., RunConfig]) -> Callable[..., Crew]:
    torch.set_num_threads(1)

    def make(replicas: int = 3, **sync: object) -> Crew:
        model = {"layers": 1, "d_model": 16, "heads": 2, "rotary_dim": 8}
        return Crew(make_config(sync=sync, model=model, pipeline={"stages": 1}), replicas)

    return make


RULES = [
    {"preset": "dense"},
    {"preset": "gptjt"},
    {"preset": "cocktail"},
    {"preset": "potluck"},
    {"preset": "cocktail", "density": 0.25, "topk": 1.0},
    {"preset": "diloco", "fragments": 4},
    {"preset": "sparseloco", "chunk": 512},
    {"preset": "sparseloco", "chunk": 0, "density": 0.5, "topk": 0.1, "outer_momentum": 0.5},
    {"preset": "cocktail", "density": 0.25, "topk": 1.0, "feedback": "explicit", "decay": 0.5},
    {"preset": "cocktail", "density": 0.25, "topk": 1.0, "decay": 0.0, "bits": 2},
]


@pytest.mark.parametrize("sync", RULES, ids=str)
def test_replicas_stay_bit_equal_and_payloads_within_their_bound(make_crew, sync):
    """Unequal weights, every fragment in turn: the digests of g agree after every round (checked in ``round``)."""
    crew = make_crew(3, **sync)
    before = crew.stages[0].g.clone()
    for i in range(6):
        crew.drift()
        turn = range(i % crew.rule.fragments, i % crew.rule.fragments + 1)
        crew.round([5, 0, 2], turn)
    for stage in crew.stages[1:]:
        assert torch.equal(stage.g, crew.stages[0].g)
    assert not torch.equal(before, crew.stages[0].g)
    for frame in crew.seen:
        (spec,) = frame.header.tensors
        assert len(frame.payload) <= most_nbytes(crew.rule, spec.shape[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_outer_step_is_dilocos(make_crew, momentum):
    """Against the rule written out: g += lr * (delta + mu * m) with m = mu * m + delta, delta the weighted mean."""
    crew = make_crew(3, preset="dense", outer_lr=0.7, outer_momentum=momentum)
    g = crew.stages[0].g.double()
    m, weights = torch.zeros_like(g), [3, 1, 2]
    for _ in range(5):
        steps = crew.drift()
        crew.round(weights)
        delta = sum(w * s.double() for w, s in zip(weights, steps, strict=True)) / sum(weights)
        m = momentum * m + delta
        g = g + 0.7 * (delta + momentum * m)
        for stage in crew.stages:
            assert torch.equal(stage.x, stage.g)
            torch.testing.assert_close(stage.g.double(), g, rtol=0, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_outer_step_has_the_same_bits_on_every_cpu(make_crew, momentum):
    """Each product is rounded, then each sum, as numpy does: a CPU that fused the two would be on its own."""
    crew = make_crew(1, preset="diloco", outer_lr=0.7, outer_momentum=momentum)
    g, m = crew.stages[0].g.numpy().copy(), 0.0
    for _ in range(3):
        crew.drift(0.3)
        mean = crew.stages[0].x.numpy() - g
        m = np.float32(momentum) * m + mean
        direction = mean + np.float32(momentum) * m if momentum else mean
        g = g + np.float32(0.7) * direction
        crew.round()
        assert crew.stages[0].g.numpy().tobytes() == g.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    "sync",
    [{"preset": "cocktail"}, {"preset": "potluck"}, {"preset": "potluck", "density": 0.25, "topk": 0.03, "chunk": 512}],
    ids=str,
)
def test_nothing_learned_is_lost(make_crew, sync):
    """Sent plus kept is total: mean of the replicas' weights + what the owners owe = start + mean of all drifts."""
    crew = make_crew(4, **sync)
    total = crew.stages[0].x.double()
    for _ in range(30):
        total += torch.stack(crew.drift()).double().mean(0)
        crew.round()
    owed = torch.zeros(total.numel())
    for j, one in enumerate(crew.synchronizers):
        for piece in (piece for pieces in one.pieces for piece in pieces):
            owed[slice(*piece.shards[j])] = one.feedback[piece.number].state()
    have = torch.stack([s.x for s in crew.stages]).double().mean(0) + owed.double()
    torch.testing.assert_close(have, total, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("mixed", torch.float32)])
def test_what_is_kept_of_a_round_is_what_trains_on(make_config, name, dtype):
    """Who goes back to it goes on like those who did not have to."""
    model = {"layers": 1, "d_model": 16, "heads": 2, "rotary_dim": 8, "dtype": name}
    crew = Crew(make_config(sync={"preset": "potluck"}, model=model, pipeline={"stages": 1}), 2)
    crew.drift(1e-2)
    outcomes = crew.exchange([1, 1])
    for stage, outcome in zip(crew.stages, outcomes, strict=True):
        apply(stage, outcome, late=False)
        kept = outcome.state.x
        assert kept is not None and kept.dtype == dtype and not torch.equal(kept, outcome.state.g.to(dtype))
        assert torch.equal(stage.x, kept)
        stage.load(outcome.state)
        assert torch.equal(stage.x, kept)


def test_explicit_feedback_keeps_a_decayed_buffer_and_returns_the_weights(make_crew):
    """SparseLoCo's rule, written out for one replica against what it really sent."""
    crew = make_crew(2, preset="sparseloco", chunk=512, outer_lr=1.0)
    kept = torch.zeros(crew.stages[0].size)
    for _ in range(4):
        steps = crew.drift()
        before = crew.stages[0].g.clone()
        crew.round()
        first = crew.stages[0]
        assert torch.equal(first.x, first.g)
        sent = 0.95 * kept + steps[0] - first.unsent
        # What was sent differs from nothing at about topk of the positions.
        share = (sent.abs() > 1e-5).float().mean().item()
        assert 0.5 / 64 < share < 2 / 64
        assert not torch.equal(before, first.g)
        kept = first.unsent.clone()
    assert kept.abs().max() > 1e-3


@pytest.mark.parametrize("sync", [{"preset": "potluck"}, {"preset": "sparseloco", "chunk": 512}], ids=str)
def test_a_late_round_adds_what_was_learned_meanwhile(make_crew, sync):
    early, late = make_crew(2, **sync), make_crew(2, **sync)
    for crew in (early, late):
        crew.drift()
    early.round()
    outcomes = late.exchange([1, 1])
    for crew in (early, late):
        crew.generator.manual_seed(99)
    late.drift()
    for stage, outcome in zip(late.stages, outcomes, strict=True):
        apply(stage, outcome, late=True)
    early.drift()
    for a, b in zip(early.stages, late.stages, strict=True):
        assert torch.equal(a.g, b.g)
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-6)


def test_a_fragments_round_touches_nothing_else(make_crew):
    crew = make_crew(2, preset="diloco", fragments=4)
    crew.drift()
    g, x = crew.stages[0].g.clone(), crew.stages[0].x.clone()
    crew.round(fragments=range(2, 3))
    inside = slice(*cut(g.numel(), 4)[2])
    outside = torch.ones(g.numel(), dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(crew.stages[0].g[outside], g[outside])
    assert torch.equal(crew.stages[0].x[outside], x[outside])
    assert not torch.equal(crew.stages[0].g[inside], g[inside])


@pytest.mark.parametrize(
    "sync",
    [{"preset": "cocktail"}, {"preset": "potluck", "density": 0.25}, {"preset": "cocktail", "density": 1.0}],
    ids=str,
)
def test_the_last_round_leaves_nothing_out(make_crew, sync):
    """What sparse rounds left in the replicas' weights, in buffers and with the owners is in the model at the end."""
    crew = make_crew(3, **sync)
    total = crew.stages[0].x.double()
    for i in range(5):
        total += torch.stack(crew.drift()).double().mean(0)
        crew.round(fragments=range(i % crew.rule.fragments, i % crew.rule.fragments + 1))
    before = (crew.stages[0].g - total).abs().max()
    for stage, outcome in zip(crew.stages, crew.exchange([1, 1, 1], full=True), strict=True):
        apply(stage, outcome, late=False)
    after = (crew.stages[0].g - total).abs().max()
    assert after < 1e-4 < 1e-3 < before  # 8 bits of what is left


def test_the_last_round_of_explicit_feedback_is_like_any_other(make_crew):
    """Its buffer is no progress that the model lacks: weights that return to the reference learn the same again."""
    crew = make_crew(2, preset="sparseloco", chunk=512)
    crew.drift()
    outcomes = crew.exchange([1, 1], full=True)
    assert outcomes[0].nbytes < crew.stages[0].size / 8
    assert outcomes[0].state.unsent.abs().max() > 1e-4


def test_a_weight_that_is_not_the_plans_is_refused(make_crew):
    """A replica that says it has trained on more samples than it was given would own the mean."""
    crew = make_crew(2, preset="dense")
    crew.drift()
    crew.round([1, 1])
    crew.synchronizers[1].counted_from = crew.rounds
    capture = [
        s.capture(stage, crew.rounds + 1, weight, range(1))
        for s, stage, weight in zip(crew.synchronizers, crew.stages, [1000, 1], strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        greedy = pool.submit(crew.synchronizers[0].exchange, capture[0])
        with pytest.raises(WireError, match="1000 samples"):
            crew.synchronizers[1].exchange(capture[1])
        for box in crew.synchronizers[0].wire.boxes.values():
            box.close()
        with pytest.raises(Fenced):
            greedy.result()


def test_large_stages_are_cut_into_pieces_that_fit_a_frame(make_crew, monkeypatch):
    """Smaller pieces, the same weights: what is sent together does not matter where nothing is left out."""
    results = []
    for most in (1 << 26, 1000):
        monkeypatch.setattr("potluck.worker.shards.MOST_WEIGHTS", most)
        crew = make_crew(3, preset="diloco", fragments=2, bits=32)
        for i in range(4):
            crew.drift()
            crew.round([2, 1, 1], range(i % 2, i % 2 + 1))
        results.append(crew.stages[0].g.clone())
        assert max(f.header.tensors[0].shape[0] for f in crew.seen) <= most
        assert len(crew.synchronizers[0].feedback) == sum(map(len, crew.synchronizers[0].pieces))
    assert torch.equal(*results)


def test_owners_debts_survive_a_restart_and_belong_to_their_shards(make_crew):
    crew = make_crew(2, preset="cocktail", fragments=1)
    for _ in range(3):
        crew.drift()
        crew.round()
    one = crew.synchronizers[0]
    state = one.owing(crew.stages[0].state(SavePoint(kind="step", generation=1, step=3, first_layer=0, last_layer=1)))
    again = Synchronizer(crew.config, one.seat, crew.stages[0], state, one.wire)
    assert torch.equal(again.feedback[0].state(), one.feedback[0].state())
    other = replace(one.seat, replica=1)
    assert Synchronizer(crew.config, other, crew.stages[0], state, one.wire).feedback[0].state() is None


def test_weights_that_are_not_finite_are_never_agreed_on(make_crew):
    """Alone there is no codec to refuse them; with others, pieces may be finite and what they lead to not."""
    one = make_crew(1, preset="diloco")
    one.stages[0].x[3] = torch.nan
    with pytest.raises(DivergedError):
        one.synchronizers[0].exchange(one.synchronizers[0].capture(one.stages[0], 1, 1, [0]))
    two = make_crew(2, preset="diloco", outer_lr=10.0)
    for stage in two.stages:
        stage.x[3] = 2e38
    with ThreadPoolExecutor() as pool:
        pairs = zip(two.synchronizers, two.stages, strict=True)
        rounds = [pool.submit(s.exchange, s.capture(stage, 1, 1, [0])) for s, stage in pairs]
    for done in rounds:
        with pytest.raises(WireError, match="infinite"):
            done.result()
