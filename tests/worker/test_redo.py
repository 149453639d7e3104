"""The redo log: rounds done again give the replicas' very bits, and what is on disk survives a kill."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from rounds import Box, exchange_all

from potluck.protocol.config import RunConfig
from potluck.protocol.errors import WireError
from potluck.protocol.keepers import all_keepers, kept_by
from potluck.protocol.plan import Plan, Replica, SavePoint, StagePlan
from potluck.worker import redo
from potluck.worker.boundary import Seat
from potluck.worker.inventory import StateName
from potluck.worker.mailbox import Mailbox
from potluck.worker.redo import Entry, Kept, Recent, RedoLog, replay
from potluck.worker.reference import Rule, packed, unpacked
from potluck.worker.squeeze import squeeze
from potluck.worker.stage import Stage, State, digest
from potluck.worker.sync import Synchronizer, apply

RULES = [
    {"preset": "dense"},
    {"preset": "gptjt"},
    {"preset": "potluck", "every": 4, "delay": 1},
    {"preset": "cocktail", "density": 0.25},
    {"preset": "diloco"},
    {"preset": "sparseloco", "chunk": 256},
    {"preset": "sparseloco", "topk": 1 / 16, "chunk": 0, "bits": 1, "outer_lr": 0.5, "outer_momentum": 0.9},
]


class Crew:
    """All replicas of a stage, whose weights drift by chance; what the rounds of each left to do them again."""

    def __init__(self, config: RunConfig, replicas: int) -> None:
        self.config, self.rule = config, config.sync.resolved()
        peers = [f"peer{i}" for i in range(replicas)]
        stage = StagePlan(first_layer=0, last_layer=1, replicas=tuple(Replica(peer=p) for p in peers))
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
        boxes = {p: Mailbox() for p in peers}
        self.stages = [Stage(config, 300, 0, 1) for _ in peers]
        point = SavePoint(kind="round", generation=0, step=0, first_layer=0, last_layer=1)
        first = self.stages[0].state(point)
        self.first = redo.bare(replace(first, point=replace(point, digest=digest(first.g))))
        self.synchronizers = [
            Synchronizer(config, Seat(plan=plan, stage=0, replica=i, run=b"crewtest"), s, s.state(point), Box(p, boxes))
            for i, (p, s) in enumerate(zip(peers, self.stages, strict=True))
        ]
        self.redo_rule = Rule(sync=self.rule, seed=config.seed, stage=0)
        self.generator = torch.Generator().manual_seed(11)
        self.rounds = 0

    def round(self, *, full: bool = False) -> tuple[Entry, State]:
        """One round, applied; what doing it again needs, and where it led."""
        for stage in self.stages:
            stage.x.add_(1e-3 * torch.randn(stage.size, generator=self.generator))
        self.rounds += 1
        fragments = [self.rounds % self.rule.fragments] if not full else list(range(self.rule.fragments))
        outcomes = exchange_all(self.synchronizers, self.stages, self.rounds, fragments, full=full)
        for stage, outcome in zip(self.stages, outcomes, strict=True):
            apply(stage, outcome, late=False)
        entries = {o.entry for o in outcomes}
        assert len(entries) == 1, "replicas remember a round differently"
        return entries.pop(), outcomes[0].state


@pytest.fixture
def make_crew(make_config):
    torch.set_num_threads(1)

    def make(replicas: int = 3, **sync: object) -> Crew:
        model = {"layers": 1, "d_model": 16, "heads": 2, "rotary_dim": 8}
        config = make_config(sync=sync, model=model, pipeline={"stages": 1}, checkpoint={"keepers": 2})
        return Crew(config, replicas)

    return make


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rounds_done_again_give_the_replicas_bits(make_crew, replicas, rule):
    crew = make_crew(replicas, **rule)
    g, momentum = crew.first.g, None
    for number in range(6):
        entry, state = crew.round(full=number == 5)
        g, momentum = replay(crew.redo_rule, g, momentum, Entry.decode(entry.encode()))
        assert torch.equal(g.view(torch.int32), state.g.view(torch.int32))
        assert (momentum is None) == (state.momentum is None)
        if momentum is not None:
            assert torch.equal(momentum.view(torch.int32), state.momentum.view(torch.int32))


def test_an_entry_costs_what_a_replica_receives(make_crew):
    """Not more than a round's means; a lone replica's, the bits that it changed, shorter than the weights."""
    crew = make_crew(3, preset="potluck", every=4, delay=1)
    entry, state = crew.round()
    n = state.g.numel() // crew.rule.fragments
    assert entry.nbytes <= n * crew.rule.bits / 8 + n / 256 * 4 + 3 * 64
    lone, state = make_crew(1, preset="potluck", every=4, delay=1).round()
    assert lone.nbytes < 0.9 * 4 * n


def test_a_changed_entry_is_found_out(make_crew):
    crew = make_crew(2, preset="cocktail", density=0.25)
    entry, _ = crew.round()
    other = [(codec, data[:-1] + bytes([data[-1] ^ 1])) for codec, data in entry.payloads]
    damaged = [
        {"payloads": tuple(other)},
        {"payloads": entry.payloads[:1]},
        {"payloads": ()},
        {"replicas": 3},
        {"replicas": 0},
        {"replicas": 2**32 - 1},
        {"fragments": (1,)},
        {"fragments": (0, 0)},
        {"step": entry.step + 1},
        {"full": True},
        {"payloads": (("alone", b"x"), entry.payloads[1])},
        {"payloads": (("tile", b"x"), entry.payloads[1])},
    ]
    for change in damaged:
        with pytest.raises(WireError):
            replay(crew.redo_rule, crew.first.g, None, msgspec.structs.replace(entry, **change))


def test_any_bytes_are_an_entry_or_an_error(make_crew):
    entry, _ = make_crew(2).round()
    data, chance = entry.encode(), random.Random(3)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(min(200, len(broken)))] = chance.randrange(256)
        try:
            Entry.decode(bytes(broken[: chance.randint(0, len(broken))]))
        except WireError:
            pass


def test_words_come_back_from_their_planes():
    x, y = torch.randn(1001), torch.randn(1001)
    for codec, data in (("alone", packed(x)), squeeze("alone", packed(x, x))):
        words = unpacked(codec, data, 1001)
        expected = x if codec == "alone" else torch.zeros(1001)
        assert torch.equal(torch.from_numpy(words.view("float32")), expected)
    with pytest.raises(WireError):
        unpacked("alone", packed(y), 1000)


# On disk.


def test_a_torn_tail_is_dropped(make_crew, tmp_path):
    crew = make_crew(2)
    entries = [crew.round()[0] for _ in range(4)]
    log = RedoLog(tmp_path / "log")
    for entry in entries:
        log.append(entry)
    ends = [log.nbytes]
    log.close()
    whole = (tmp_path / "log").read_bytes()
    chance = random.Random(5)
    for cut in [chance.randrange(len(whole)) for _ in range(40)] + ends:
        (tmp_path / "log").write_bytes(whole[:cut])
        log = RedoLog(tmp_path / "log")
        assert list(log) == entries[: len(log)]
        assert len(log) == 4 or cut < len(whole)
        log.append(entries[len(log)]) if len(log) < 4 else None
        assert list(log) == entries[: len(log)]
        log.close()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (tmp_path / "log").write_bytes(damaged)
    log = RedoLog(tmp_path / "log")
    assert list(log) == entries[: len(log)]
    assert len(log) < 4
    log.close()


def kept(crew: Crew, folder: Path) -> Kept:
    return Kept(folder, crew.redo_rule, crew.stages[0].size)


def test_a_keeper_rebuilds_every_round_since_its_base(make_crew, tmp_path):
    crew = make_crew(2, preset="diloco")
    keeper = kept(crew, tmp_path)
    keeper.begin(crew.first)
    states = []
    for _ in range(3):
        entry, state = crew.round()
        assert keeper.append(entry)
        states.append(state)
    for again in (keeper, kept(crew, tmp_path)):
        assert [p.step for p in again.points] == [0, 1, 2, 3]
        for state in states:
            rebuilt = again.rebuild(state.point)
            assert torch.equal(rebuilt.g, state.g)
            assert torch.equal(rebuilt.momentum, state.momentum)
            assert (rebuilt.m, rebuilt.v, rebuilt.updates) == (None, None, 0)
        again.close()
    assert keeper.rebuild(replace(states[0].point, digest=b"x" * 32)) is None


def test_a_round_that_is_missing_is_not_built_on(make_crew, tmp_path):
    crew = make_crew(2)
    keeper = kept(crew, tmp_path)
    assert not keeper.append(crew.round()[0])  # no base yet
    keeper.begin(crew.first)
    crew.round()
    assert not keeper.append(crew.round()[0])
    assert [p.step for p in keeper.points] == [0]
    keeper.close()


def test_a_log_longer_than_its_base_becomes_one(make_crew, tmp_path, monkeypatch):
    crew = make_crew(2)  # dense: every round is as long as the base
    keeper = kept(crew, tmp_path)
    keeper.begin(crew.first)
    folds, begin = [], keeper.begin
    monkeypatch.setattr(keeper, "begin", lambda state: (folds.append(state.point.step), begin(state)))
    for _ in range(5):
        entry, state = crew.round()
        assert keeper.append(entry)
        assert keeper.log.nbytes <= 4 * keeper.size + redo._HEAD.size
    assert folds
    assert torch.equal(keeper.rebuild(state.point).g, state.g)
    keeper.close()


def test_a_kill_between_a_new_base_and_the_cleared_log_loses_nothing(make_crew, tmp_path, monkeypatch):
    crew = make_crew(2, preset="potluck", every=4, delay=1)
    keeper = kept(crew, tmp_path)
    keeper.begin(crew.first)
    for _ in range(3):
        entry, state = crew.round()
        keeper.append(entry)
    monkeypatch.setattr(keeper.log, "clear", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keeper.fold()
    again = kept(crew, tmp_path)
    assert [p.step for p in again.points] == [3]
    assert torch.equal(again.rebuild(state.point).g, state.g)
    entry, state = crew.round()
    assert again.append(entry)
    assert torch.equal(again.rebuild(state.point).g, state.g)
    again.close()


def test_an_entry_is_on_the_disk_before_anybody_is_told(make_crew, tmp_path, monkeypatch):
    crew, flushed = make_crew(2), []
    log = RedoLog(tmp_path / "log")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append((tmp_path / "log").stat().st_size), fsync(fd)))
    log.append(crew.round()[0])
    assert flushed == [log.nbytes]
    log.close()


def test_recent_rounds_lead_on_from_a_state(make_crew):
    crew, recent = make_crew(2, preset="potluck", every=4, delay=1), Recent()
    recent.most_nbytes = 1 << 20
    entries = [crew.round()[0] for _ in range(4)]
    for entry in entries[:3]:
        recent.add((2, 3), entry)
    assert Entry.decode(recent.after(StateName(1, 1, 2, 3))) == entries[1]
    assert recent.after(StateName(1, 3, 2, 3)) is None
    assert recent.after(StateName(1, 1, 0, 2)) is None
    recent.most_nbytes = len(entries[3].encode()) + 1
    recent.add((2, 3), entries[3])
    assert recent.after(StateName(1, 0, 2, 3)) == entries[3].encode()


# Who keeps what.


def plan_of(*sizes: int) -> Plan:
    stages = tuple(
        StagePlan(first_layer=i, last_layer=i + 1, replicas=tuple(Replica(peer=f"p{i}{j}") for j in range(n)))
        for i, n in enumerate(sizes)
    )
    return Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=stages,
        microbatches=1,
        microbatch_size=1,
    )


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 1), (2, 2), (1, 2, 3), (4, 4, 4, 4), (1,) * 9, (7, 1, 1)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_keepers_are_others_and_spread(sizes, count):
    plan = plan_of(*sizes)
    load = dict.fromkeys(plan.peers, 0)
    for number, keepers in enumerate(all_keepers(plan, count)):
        outside = sum(sizes) - sizes[number]
        assert len(keepers) == min(count if sizes[number] > 1 else min(count, 1), outside)
        assert all(plan.places[p][0] != number for p in keepers)
        for peer in keepers:
            load[peer] += 1
            assert number in kept_by(plan, peer, count)
    if len(set(sizes)) == 1 and len(sizes) > 2 and count <= 2:
        assert max(load.values()) <= -(-len(sizes) * count // len(load)) + 1


def test_who_comes_moves_few_bases():
    before, after = plan_of(2, 2, 2, 2, 2), plan_of(2, 2, 3, 2, 2)
    pairs = zip(all_keepers(before, 2), all_keepers(after, 2), strict=True)
    assert sum(len(set(b) - set(a)) for a, b in pairs) <= 4
