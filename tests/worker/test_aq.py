"""Runs of several epochs with values kept for reuse: second visits are deltas, and no disagreement ends a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from manifests import write_corpus

from potluck.compression.aq import Mode, parse_marks
from potluck.coordinator import events
from potluck.protocol.config import RunConfig
from potluck.protocol.frames import Frame, Kind
from potluck.protocol.manifest import Manifest
from potluck.worker.boundary import Boundary
from potluck.worker.data import Dataset
from potluck.worker.mixture import Mixture
from potluck.worker.pipeline import Pipeline

AQ = {"forward": "int4:tile=64", "backward": "int8:tile=64", "reuse": True, "cache_gb": 0.01}
STEPS_PER_EPOCH = 4  # of the corpus below, with one chain


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """In place of the one that other tests use: 24 samples, so that epochs are short."""
    folder = tmp_path_factory.mktemp("small")
    n_train, n_heldout = 24, 4
    n_tokens = (n_train + n_heldout) * 16 + 2
    places = np.arange(n_tokens)
    tokens = 3 + places * (1 + places // 64) % 37
    split = n_train * 16 + 1
    return folder, write_corpus(folder, tokens[:split], tokens[split:], 16)


@dataclass
class Seen:
    """Modes of what was sent in each step, misses, and how far what arrived was from what was true."""

    modes: Counter[tuple[int, Mode]] = field(default_factory=Counter)
    misses: list[int] = field(default_factory=list)
    again: int = 0
    errors: dict[int, list[float]] = field(default_factory=dict)

    def post(self, sender: str, frame: Frame) -> None:
        header = frame.header
        if header.kind == Kind.MISS:
            self.misses.append(header.step)
        elif header.kind == Kind.ACTIVATION and header.part == 0 and len(header.tensors) == 3:
            self.again += header.attempt
            for mark in parse_marks(frame.payload[-header.tensors[2].nbytes :]):
                self.modes[header.step, mark.mode] += 1

    def deltas(self, step: int) -> int:
        return self.modes[step, Mode.DELTA]


@pytest.fixture
def watched(local_run, monkeypatch: pytest.MonkeyPatch):
    """Runs a config to its end with these peers; what came of it, and what was seen of its frames."""
    sent: dict[tuple[str, int, int], torch.Tensor] = {}
    seen: list[Seen] = []
    activation, received = Boundary.activation, Boundary.received

    def watch_activation(self, step, part, m, batch, attempt=0):
        if part == 0:
            sent[self.seat.plan.peer_of(self.seat.stage + 1, m), step, m] = batch.x.detach().clone()
        return activation(self, step, part, m, batch, attempt)

    def watch_received(self, frame, attempt=0):
        found, header = received(self, frame, attempt), frame.header
        if found is not None and header.part == 0:
            true = sent[self.seat.peer, header.step, header.microbatch]
            error = float((found.x - true).norm() / true.norm())
            seen[-1].errors.setdefault(header.step, []).append(error)
        return found

    monkeypatch.setattr(Boundary, "activation", watch_activation)
    monkeypatch.setattr(Boundary, "received", watch_received)

    def run(config: RunConfig, *peers: str, on_event: Callable[[object], Callable] | None = None):
        seen.append(Seen())
        ours = local_run(config, home=f"run{len(seen)}")
        ours.on_post = seen[-1].post
        if on_event is not None:
            ours.on_event = on_event(ours)
        ours.join(*peers)
        return ours.finish(), seen[-1]

    return run


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_later_epochs_are_deltas_that_arrive_nearer_at_the_same_bits(watched, make_config):
    config = make_config(steps=4 * STEPS_PER_EPOCH, activations=AQ)
    ours, seen = watched(config, "a", "b")
    plain, unmarked = watched(make_config(steps=config.steps, activations={**AQ, "reuse": False}), "a", "b")
    assert not unmarked.modes and not unmarked.misses

    per_step = config.pipeline.microbatches * config.pipeline.microbatch_size
    for step in range(config.steps):
        assert seen.modes[step, Mode.KEPT] + seen.deltas(step) == per_step
        assert seen.deltas(step) == 0 if step < STEPS_PER_EPOCH else seen.deltas(step) > 0
    later = range(2 * STEPS_PER_EPOCH, config.steps)
    assert sum(seen.deltas(step) for step in later) > 0.9 * per_step * len(later)
    assert not seen.misses

    losses = ours.losses()
    assert losses[:STEPS_PER_EPOCH] == plain.losses()[:STEPS_PER_EPOCH]  # first visits are what a plain run sends
    assert all(torch.isfinite(torch.tensor(losses)))
    assert mean(losses[-4:]) < mean(losses[:4]) - 0.1
    ours_later, theirs_later = (mean([mean(one.errors[step]) for step in later]) for one in (seen, unmarked))
    assert ours_later < 0.6 * theirs_later


def test_with_many_bits_it_is_the_plain_run(watched, make_config):
    """An exact codec never needs a delta and changes nothing; eight bits are close to it."""

    def run(forward: str, reuse: bool):
        activations = {**AQ, "forward": forward, "backward": "fp32", "reuse": reuse}
        ours, seen = watched(make_config(steps=10, activations=activations), "a", "b")
        return ours.losses(), sum(seen.deltas(step) for step in range(10))

    exact, _ = run("fp32", False)
    assert run("fp32", True) == (exact, 0)
    losses, deltas = run("int8:tile=64", True)
    assert deltas >= 18
    assert losses == pytest.approx(exact, abs=3e-3)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_worker_that_loses_its_values_ends_nothing(watched, make_config, monkeypatch, recompute):
    """The stage in the middle forgets as a receiver and as a sender, and the last one has a value that is wrong."""
    config = make_config(
        steps=5 * STEPS_PER_EPOCH,
        activations=AQ,
        pipeline={"stages": 3, "recompute": recompute},
        coordinator={"wait_for": 3},
    )
    step, hurt = Pipeline.step, []

    def hurting(self, number):
        memory = self.boundary.memory
        if number == 9 and self.seat.stage == 1:
            for buffer in memory.buffers.values():
                hurt.append(len(buffer))
                buffer.drop_before(2**62)
        if number == 11 and self.seat.is_last:
            (buffer,) = memory.buffers.values()
            for sample in range(24):
                value = buffer.find(sample)
                buffer.keep(sample, value.version, value.value_TD + 1)
        return step(self, number)

    monkeypatch.setattr(Pipeline, "step", hurting)
    ours, seen = watched(config, "a", "b", "c")
    assert hurt == [24, 24]
    assert {9, 11} <= set(seen.misses)
    assert seen.again == len(seen.misses)
    assert len(ours.seen(events.TrainingStarted)) == 1 and not ours.seen(events.RolledBack)
    assert ours.machine.committed.step == config.steps
    assert not [s for s in seen.misses if s >= 4 * STEPS_PER_EPOCH], (
        "every sample has come back since: all are deltas again"
    )
    assert max(mean(errors) for errors in seen.errors.values()) < 0.2  # nobody ever computed with another's value


def test_a_lost_replica_leaves_nothing_wrong_behind(watched, make_config):
    """A generation ends in the middle of steps that are done again, by other routes."""

    def losing(ours):
        def lose(event: object) -> None:
            if isinstance(event, events.RoundCommitted) and event.round == 8:
                ours.on_event = lambda event: None
                ours.kill("d")

        return lose

    config = make_config(steps=16, activations=AQ, coordinator={"wait_for": 4})
    ours, seen = watched(config, "a", "b", "c", "d", on_event=losing)
    assert ours.seen(events.RolledBack)
    assert ours.machine.committed.step == config.steps
    assert seen.deltas(15)
    assert max(mean(errors) for errors in seen.errors.values()) < 0.2


def test_a_peer_that_misses_again_and_again_is_at_fault(watched, make_config, monkeypatch):
    again, hits = Pipeline._send_again, []

    def twice(self, miss):
        again(self, miss)
        if not hits:
            hits.append(miss.header.step)
            flight = self._flights[miss.header.step, miss.header.microbatch]
            self.wire.mailbox.put(flight.miss, miss)

    def forgetting(self, number):
        if number == 9 and self.seat.is_last and not hits:
            for buffer in self.boundary.memory.buffers.values():
                buffer.drop_before(2**62)
        return step(self, number)

    step = Pipeline.step
    monkeypatch.setattr(Pipeline, "step", forgetting)
    monkeypatch.setattr(Pipeline, "_send_again", twice)
    config = make_config(steps=12, activations=AQ)
    ours, _ = watched(config, "a", "b")
    assert hits == [9]
    assert "again and again" in ours.seen(events.Faulted)[0].what
    assert ours.machine.committed.step == config.steps


def test_a_sample_has_the_same_number_in_every_epoch(corpus_folder):
    folder, manifest = corpus_folder
    data, n, mixture = Dataset(folder), manifest.n_train, Mixture(manifest, 5)
    numbers = [[mixture.place(index).number for index in range(e * n, (e + 1) * n)] for e in range(2)]
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(n))
    by_number = {number: data.sample(index, 5) for index, number in enumerate(numbers[0])}
    for index, number in enumerate(numbers[1], start=n):
        assert (data.sample(index, 5) == by_number[number]).all()
