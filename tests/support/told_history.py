"""A run told by hand: batches of commands and reports, to a real store and a real board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from failing_disk import FailingDisk
from manifests import MANIFEST
from scripted_hub import CONFIG

from potluck.coordinator import events as ev
from potluck.coordinator.dashboard.board import Board, Shown
from potluck.coordinator.dashboard.picture import picture
from potluck.coordinator.dashboard.shapes import State
from potluck.coordinator.service import open_run, rules_of
from potluck.coordinator.state import Command, Commit, Journal, Mark, Part, Point, RunState, Said, Uncommit
from potluck.protocol import control_pb2 as pb

SECONDS = 7.0  # between two batches


class Told:
    """``board`` is told of every batch once it is in ``path``, as by a hub."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.sqlite"
        self.store = FailingDisk(self.path)
        self.run_id, _, _ = open_run(self.store, CONFIG, MANIFEST)
        self.rules = rules_of(CONFIG, MANIFEST)
        self.board = self.a_board()
        self.now = 1_000_000.0
        self.step = self.sample = self.since = self.round = self.generation = 0
        self.marks: list[tuple[int, int]] = [(0, 0)]
        self.here: list[str] = []
        self.sent: dict[str, int] = {}
        self.batch(Journal(event=ev.RunOpened(name="told", step=0)))

    def a_board(self) -> Board:
        """As after a restart."""
        return Board(CONFIG, self.rules, self.run_id, MANIFEST.vocab_size, self.store)

    def batch(self, *commands: Command, said: tuple[Said, ...] = ()) -> None:
        self.now += SECONDS
        heard = self.board.heard([(b"session", one) for one in said], commands, self.now)
        self.store.write(commands, self.now, heard.statements)
        self.board.update(RunState(), [c for c in commands if isinstance(c, Shown)], self.now, heard)

    def journal(self, *events: ev.Event) -> None:
        self.batch(*(Journal(event=event) for event in events))

    def shown(self) -> State:
        """What the fold says at the newest batch."""
        board = self.board
        return picture(
            board._frame, board._fold, board._book, self.now, at=self.now, version=0, scores=board._scores.version
        )

    # What can happen.

    def join(self, peer: str) -> None:
        if peer not in self.here:
            self.here.append(peer)
            self.journal(ev.PeerJoined(peer=peer, name=peer.upper(), device="cpu", region="here", memory_gb=2.0))

    def gone(self, peer: str, *, graceful: bool = False) -> None:
        if peer in self.here:
            self.here.remove(peer)
            self.journal(ev.PeerGone(peer=peer, name=peer.upper(), graceful=graceful))

    def plan(self, stages: int = 2) -> None:
        if len(self.here) < stages:
            return self.journal(ev.Waiting(why="more workers must join"), ev.PhaseChanged(phase="waiting", note="more"))
        self.generation += 1
        seats = [self.here[i::stages] for i in range(stages)]
        layers = self.rules.division(2).layers if stages == 2 else ((0, 4),)
        before = self.rules.division(2).layers
        if stages != 2:
            self.journal(ev.Redivided(generation=self.generation, before=before, after=layers, why="told so"))
        self.journal(
            ev.PlanIssued(
                generation=self.generation,
                step=self.marks[-1][0],
                origin="round",
                stages=tuple(tuple(p.upper() for p in peers) for peers in seats),
                peers=tuple(tuple(peers) for peers in seats),
                layers=layers,
            ),
            ev.PhaseChanged(phase="preparing", note=""),
        )
        self.journal(ev.TrainingStarted(generation=self.generation, step=self.step), ev.PhaseChanged(phase="training"))

    def train(self, loss: float = 1.0) -> None:
        self.step, self.sample, self.since = self.step + 1, self.sample + 4, self.since + 4
        said: list[Said] = []
        for peer in self.here:
            done = pb.StepDone(
                generation=self.generation, step=self.step, samples=4, compute_seconds=loss, wait_seconds=0.5
            )
            self.sent[peer] = self.sent.get(peer, 0) + 100
            beat = pb.Heartbeat(
                traffic=[pb.Traffic(direction="out", purpose="weights", nbytes=self.sent[peer], dense_nbytes=900)]
            )
            said += [Said(peer=peer, report=pb.Up(step_done=done)), Said(peer=peer, report=pb.Up(heartbeat=beat))]
        points = [Point(step=self.step, tokens_samples=self.sample, train=loss)]
        if self.step % 3 == 0:
            points.append(Point(step=self.step, tokens_samples=self.sample, heldout=loss + 0.1))
        self.batch(*points, said=tuple(said))

    def commit(self) -> None:
        if not self.since or not self.here:
            return
        self.round += 1
        parts = tuple(
            Part(peer=peer, stage=0, samples=self.since, work=self.since / 3, nbytes=9, seconds=0.25, digest=b"d" * 32)
            for peer in self.here
        )
        mark = Mark(kind="round", generation=self.generation, step=self.step, sample=self.sample, digests=(b"d" * 32,))
        told: dict[str, Any] = {
            "round": self.round,
            "replicas": len(parts),
            "samples": self.since,
            "nbytes": 9,
            "seconds": 0.25,
            "degraded": False,
        }
        self.batch(Commit(mark=mark, parts=parts, **told), Journal(event=ev.RoundCommitted(step=self.step, **told)))
        self.marks, self.since = [*self.marks, (self.step, self.sample)], 0

    def back(self, rounds: int = 0) -> None:
        """To the last committed round, or to one so many before it."""
        self.marks = self.marks[: max(1, len(self.marks) - rounds)]
        self.step, self.sample = self.marks[-1]
        self.since = 0
        event = Journal(event=ev.RolledBack(step=self.step, why="cannot reach 10.1.2.3:4567"))
        waiting = Journal(event=ev.PhaseChanged(phase="waiting", note="somebody is gone"))
        self.batch(*([Uncommit(step=self.step)] if rounds else []), event, waiting)

    def restart(self) -> None:
        """The coordinator is killed and started again: nothing of what is shown changes over that."""
        before = self.shown()
        self.board = self.a_board()
        after = self.shown()
        assert same(after) == same(before)

    def finish(self) -> None:
        self.journal(ev.Finished(step=self.step), ev.PhaseChanged(phase="finished", note="the run is complete"))


def same(state: State) -> dict[str, Any]:
    """What must be equal, whenever it is looked at: not the version, and not the bytes since the last round, which are
    known by purpose only while the run goes on."""
    fields = {name: getattr(state, name) for name in state.__struct_fields__}
    for name in ("version", "now", "at", "traffic", "bytes_per_token", "dense_bytes_per_token"):
        del fields[name]
    return fields
