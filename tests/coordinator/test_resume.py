"""A coordinator that was killed and is started again goes on with the generation."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import scripted_hub
from failing_disk import FailingDisk
from kept_run import CONFIG, KeptRun
from manifests import MANIFEST
from msgspec.structs import replace as changed
from scripted_hub import CONFIG as HUB_CONFIG
from scripted_hub import Hand, a_hub, disk
from scripted_run import journaled, leases, point, saved

from potluck.coordinator import events as ev
from potluck.coordinator import hub as shell
from potluck.coordinator.hub import Hub
from potluck.coordinator.resume import going_on
from potluck.coordinator.service import open_run
from potluck.coordinator.state import Commit, Dismiss, Input, StopAsked, Tick, Uploaded
from potluck.coordinator.verify import verify
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError


def begun(folder: Path, *peers: str, **rules: Any) -> KeptRun:
    """In training, a round committed at step 4; one step more is done by all, another one by the first peer."""
    run = KeptRun(folder, len(peers), **rules)
    run.store.rows("PRAGMA synchronous=OFF")
    run.join(*peers)
    run.ready()
    run.to(4)
    run.train(5)
    run.say(peers[0], step_done=pb.StepDone(generation=1, step=5, loss_sum=2.0, targets=1))
    return run


# Any moment.


class Unlucky(KeptRun):
    """Its coordinator is killed after the inputs with these numbers (all of them, if there are none)."""

    number, unlucky, busy = 0, frozenset[int](), False

    def do(self, what: Input, later: float = 0.0) -> list[Any]:
        commands = super().do(what, later)
        if not self.busy:
            self.number += 1
            if not self.unlucky or self.number in self.unlucky:
                self.busy = True
                commands += self.restart(*sorted(self.state.members)) if going_on(self.state) else []
                self.busy = False
        return commands


def whole_life(folder: Path, *unlucky: int) -> Unlucky:
    """Three peers, a fourth joins, one leaves, and the run ends: three generations."""
    folder.mkdir()
    run = Unlucky(folder, 3, steps=14)
    run.unlucky = frozenset(unlucky)
    run.store.rows("PRAGMA synchronous=OFF")
    run.join("a", "b", "c")
    run.ready()
    run.to(4)
    run.train(5)
    run.join("d")
    for _ in range(2):
        assert run.state.closing == "round" and run.state.end
        run.to_end()
        if run.plan.generation == 2:
            run.say("d", leaving=pb.Leaving())
    run.train(10)
    for peer in run.seats[1]:
        run.say(peer, eval_done=pb.EvalDone(generation=run.plan.generation, step=10, loss_sum=1.0, targets=1))
    run.to(12)
    run.train(14)
    run.round(14)
    assert run.state.phase == "finishing"
    for peer in run.seats[1]:
        run.say(peer, eval_done=pb.EvalDone(generation=run.plan.generation, step=14, loss_sum=1.0, targets=1))
    run.do(Uploaded(step=14, path="memory"))
    assert run.state.phase == "finished"
    return run


def accounts(run: KeptRun) -> list[Any]:
    return [
        run.store.rows("SELECT generation, step, peer, first, count, state, round, reason FROM ledger ORDER BY id"),
        run.store.rows("SELECT step, round, generation, sample, digests FROM rounds ORDER BY step"),
        run.store.rows("SELECT step, samples, train, heldout FROM points ORDER BY id"),
        run.store.rows("SELECT data FROM events ORDER BY id"),
    ]


def test_whenever_it_is_killed_the_run_is_the_same(tmp_path: Path) -> None:
    calm = whole_life(tmp_path / "calm", -1)
    told = accounts(calm)
    assert calm.state.generation == 3 and len(told[2]) == 14 + 2
    assert accounts(whole_life(tmp_path / "every")) == told
    for number in range(1, calm.number + 1, 5):
        assert accounts(whole_life(tmp_path / str(number), number)) == told, f"killed after input {number}"


# Training.


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    before, granted = run.state, len(leases(run.commands))
    assert run.restart("b", "a") == []
    after = run.state
    assert (after.phase, after.plan, after.until, after.committed) == ("training", before.plan, 7, before.committed)
    assert {p: m.step for p, m in after.members.items()} == {"a": 6, "b": 5} and after.leased_at.keys() == {5, 6}
    assert {p: (m.away, m.savepoints) for p, m in after.members.items()} == {
        p: (None, m.savepoints) for p, m in before.members.items()
    }
    run.train(8)
    commits = [c for c in run.round(8) if isinstance(c, Commit)]
    assert [(c.mark.step, c.samples, c.round) for c in commits] == [(8, 24, 2)]
    assert [x.step for x in leases(run.commands)[granted:]] == [7, 8, 9]
    run.store.close()
    report = verify(tmp_path / "run.sqlite")
    assert not report.problems and not report.returned and report.generations == 1


def test_a_round_is_made_of_reports_from_before_and_after(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.train(8)
    run.round(8, b=None)  # type: ignore[arg-type]
    run.restart("a", "b")
    assert run.state.rounds_done[8].keys() == {"a"} and run.state.committed.step == 4
    run.round(8, a=None)  # type: ignore[arg-type]
    assert run.state.committed.step == 8


def test_nothing_is_leased_before_everybody_has_said_where_it_is(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.restart()
    assert all(m.away for m in run.state.members.values())
    assert run.do(Tick(), later=1.0) == [] and run.state.until == 7
    run.join("a", "b")
    assert run.do(Tick()) == [] and run.state.until == 7
    run.say("a", step_done=pb.StepDone(generation=1, step=6))
    run.say("b", step_done=pb.StepDone(generation=1, step=6))
    assert run.state.until == 9


def test_leases_are_measured_anew(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.now += 10_000.0
    run.restart("a", "b")
    assert min(run.state.leased_at.values()) > run.now + 50.0
    assert run.do(Tick()) == []


def test_a_loss_whose_other_half_is_never_said_again_leaks_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b", "c", "d")
    one, other = run.seats[1]
    run.say(one, step_done=pb.StepDone(generation=1, step=5, loss_sum=2.0, targets=1))
    run.restart("a", "b", "c", "d")
    run.say(one, step_done=pb.StepDone(generation=1, step=6, loss_sum=2.0, targets=1))
    run.say(other, step_done=pb.StepDone(generation=1, step=6, loss_sum=4.0, targets=1))  # its step 5 is left out
    assert run.state.losses == {} and run.state.charted == 7
    assert run.store.rows("SELECT step, train FROM points ORDER BY id DESC LIMIT 2") == [(7, 3.0), (5, 2.0)]


# Other phases.


def test_preparing_goes_on(tmp_path: Path) -> None:
    run = KeptRun(tmp_path, 2)
    run.join("a", "b")
    run.say("a", ready=pb.Ready(generation=1))
    run.restart("a", "b")
    assert run.state.phase == "preparing" and [run.state.members[p].ready for p in "ab"] == [1, 0]
    run.say("b", ready=pb.Ready(generation=1))
    assert run.state.phase == "training" and run.plan.generation == 1


def test_a_stop_that_was_not_complete_is_forgotten(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.do(StopAsked())
    run.train(7)
    saved(run, "a")
    assert (run.state.closing, run.state.end) == ("save", 7)
    run.restart("a", "b")
    assert (run.state.closing, run.state.end, run.state.until) == ("", None, 9)
    run.to(8)
    assert run.plan.generation == 1


def test_a_run_that_was_stopped_or_waits_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.do(StopAsked())
    run.train(7)
    saved(run, "a", "b")
    assert run.state.phase == "stopped"
    run.restart()
    assert run.state.phase == "waiting" and run.state.plan is None and not run.state.members


def test_what_was_published_meanwhile_is_not_asked_for(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.restart("a", "b")
    assert run.state.publish == 0
    (tmp_path / "checkpoints" / "step-00000000").mkdir(parents=True)
    run.restart("a", "b")
    assert run.state.publish is None and run.state.published == 0


# Not everybody comes back.


def test_who_does_not_dial_again_is_lost(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b", "c", "d")
    held = tuple(run.state.members["d"].savepoints)
    assert run.restart("a", "b", "c") == []
    assert run.do(Tick(), later=29.5) == []
    commands = run.do(Tick(), later=1.0)
    assert [e.name for e in journaled(commands, ev.PeerGone)] == ["D"] and journaled(commands, ev.Rerouted)
    assert run.plan.peers == {"a", "b", "c"}
    run.join("d", points=held)
    assert run.state.members["d"].away is None


def test_another_process_of_a_peer_takes_no_part_in_its_generation(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b", "c", "d")
    run.restart("a", "b", "c")
    commands = run.join("d", session=b"another")
    assert not [c for c in commands if isinstance(c, Dismiss)]
    assert [e.name for e in journaled(commands, ev.PeerGone)] == ["D"] and "d" not in run.plan.peers


# The record itself.


def test_other_settings_for_the_workers_begin_a_new_generation(tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    own = changed(CONFIG, coordinator=changed(CONFIG.coordinator, lease_seconds=77.0))
    assert open_run(run.store, own, MANIFEST)[2].plan == run.plan
    for _ in range(2):
        longer = open_run(run.store, changed(CONFIG, steps=99), MANIFEST)[2]
        assert longer.plan is None and longer.phase == "waiting" and longer.committed == run.state.committed


@pytest.mark.parametrize("key", ["crew", "course"])
def test_a_record_that_cannot_be_read_is_left_alone(key: str, tmp_path: Path) -> None:
    run = begun(tmp_path, "a", "b")
    run.store.set_meta(**{key: {"phase": "training", "of": "another version"}})
    run.restart()
    assert run.state.phase == "waiting" and run.state.generation == 1
    assert run.state.committed.savepoint(0, (0, 2)) == point(run.state.committed, 0)


# The shell around it.


class DyingDisk(FailingDisk):
    """The coordinator is killed at a commit: before it, or when it is done and nobody has heard of it."""

    last, done = 10**9, False

    def _commit(self) -> None:
        dying = self.committed >= self.last
        if self.done or not dying:
            super()._commit()
        if dying:
            error = sqlite3.DatabaseError("killed by the test")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error


async def lives(hub: Hub, hands: list[Hand]) -> bool:
    """Whether the run was finished before the coordinator was killed."""
    await hub.start()
    working = [asyncio.create_task(hand.live()) for hand in hands]
    try:
        async with asyncio.timeout(10.0):
            await hub.until_phase("finished")
            await asyncio.gather(*working)
    except StateError:
        return False
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await hub.close()
    return True


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_a_hub_that_is_killed_at_every_turn(done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "BATCH", 2)
    monkeypatch.setattr(scripted_hub, "FailingDisk", DyingDisk)
    hub, uploads, deaths = a_hub(HUB_CONFIG, tmp_path), set[tuple[int, int]](), 0
    hands = [Hand(peer, hub, HUB_CONFIG, uploads) for peer in ("a", "b")]
    while True:
        store = disk(hub)
        assert isinstance(store, DyingDisk)
        store.last, store.done = store.committed + deaths % 4, done
        if await lives(hub, hands):
            break
        deaths += 1
        hub = a_hub(HUB_CONFIG, tmp_path)
        for hand in hands:
            hand.dial_again(hub)
    assert deaths > 5
    report = verify(tmp_path / "run.sqlite")
    assert not report.problems and not report.returned and report.generations == 1 and report.samples == 8 * 2
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        kinds = [kind for (kind,) in db.execute("SELECT kind FROM events ORDER BY id")]
        points = db.execute("SELECT step FROM points WHERE train IS NOT NULL ORDER BY id").fetchall()
    assert points == [(at,) for at in range(1, 9)]
    assert "PeerJoined" not in kinds[kinds.index("PlanIssued") :]
    assert not {"PeerGone", "RolledBack", "RoundRefused"} & set(kinds[: kinds.index("Finished")])
