"""What every contestant shares: the samples, the pace, the lines it writes."""

from __future__ import annotations

import json
import time

import msgspec
import pytest

from potluck.benchmarks.rivals.pace import Pace, busy_seconds
from potluck.benchmarks.rivals.record import Progress, interface_bytes, interface_of, lines
from potluck.benchmarks.rivals.rounds import averaged_share, judged, places
from potluck.benchmarks.rivals.task import Task, arrive, read, write
from potluck.protocol.config import RunConfig
from potluck.protocol.plan import Plan, Replica, StagePlan


def make_task(workers=4, stages=2, microbatches=4, size=3, **more):
    raw = {"pipeline": {"stages": stages, "microbatches": microbatches, "microbatch_size": size}}
    return Task(run=msgspec.convert(raw, RunConfig), corpus="c", workers=workers, steps=5, **more)


def plan(task):
    """potluck's own division of the task's steps."""
    stages = tuple(
        StagePlan(
            first_layer=s,
            last_layer=s + 1,
            replicas=tuple(Replica(peer=f"{s}/{r}") for r in range(task.replicas)),
        )
        for s in range(task.run.pipeline.stages)
    )
    return Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=stages,
        microbatches=task.run.pipeline.microbatches,
        microbatch_size=task.run.pipeline.microbatch_size,
    )


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("workers", "stages"), [(4, 2), (4, 1), (2, 2), (6, 3)])
def test_a_steps_samples_are_potlucks(workers, stages, step):
    task = make_task(workers, stages, microbatches=6)
    theirs = plan(task)
    wanted = [theirs.samples(step, m) for m in range(theirs.microbatches_per_step)]
    assert task.microbatches(step) == wanted
    for parts in {workers, task.replicas}:
        assert [x for part in range(parts) for x in task.share(step, part, parts)] == wanted
    for replica in range(task.replicas):  # and each pipeline has what potluck's has
        mine = [theirs.samples(step, m) for m in theirs.served(0, replica)]
        assert task.share(step, replica, task.replicas) == mine


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="cannot be shared by 4"):
        make_task(workers=4, stages=2, microbatches=3).share(0, 0, 4)
    with pytest.raises(ValueError, match="3 workers"):
        make_task(workers=3)


def test_a_task_goes_through_its_file(tmp_path):
    task = make_task(target=3.5, pace=0.25)
    write(task, tmp_path / "task.json")
    assert read(tmp_path / "task.json") == task
    (tmp_path / "task.json").write_bytes(b'{"run": {}, "corpus": "c", "workers": 2, "steps": 1, "pase": 1}')
    with pytest.raises(msgspec.ValidationError, match="pase"):
        read(tmp_path / "task.json")


def test_a_host_must_fit_its_task(tmp_path, capsys):
    write(make_task(workers=2), tmp_path / "task.json")
    line = ["--task", str(tmp_path / "task.json"), "--rank", "2", "--world", "2", "--address", "a", "--peers", "a,b"]
    with pytest.raises(SystemExit):
        arrive("ddp", argv=[*line, "--out", str(tmp_path / "out")])
    assert "do not go together" in capsys.readouterr().err


class Clock:
    """Time that goes on when somebody sleeps, works or waits."""

    def __init__(self):
        self.now = 100.0
        self.busy = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    wait = sleep

    def work(self, seconds):
        self.now += seconds
        self.busy += seconds

    def pace(self, seconds):
        return Pace(seconds, self, lambda: self.busy, self.sleep)


def test_pace_makes_up_for_late_pieces_within_a_computation():
    clock = Clock()
    pace = clock.pace(8.0)
    pace.start()
    clock.work(1.0)
    pace.finish(0.25)
    assert clock.now == 102.0
    clock.work(3.0)  # a second more than a quarter takes
    pace.finish(0.25)
    assert clock.now == 105.0
    clock.work(0.5)
    pace.finish(0.25)
    assert clock.now == 106.0
    assert (pace.played, pace.late) == (6.0, 0.0)
    clock.wait(50.0)
    pace.start()
    pace.finish(0.25)
    assert clock.now == 158.0
    clock.work(5.0)
    pace.finish(0.5)
    assert (clock.now, pace.late) == (163.0, 1.0)  # the end: nobody makes up for it


def test_waiting_amid_a_computation_is_none_of_it():
    clock = Clock()
    pace = clock.pace(8.0)
    pace.start()
    clock.work(1.0)
    clock.wait(10.0)
    pace.finish(0.25)
    assert (clock.now, pace.late) == (112.0, 0.0)


def test_no_pace_sleeps_never():
    clock = Clock()
    pace = clock.pace(0.0)
    pace.start()
    pace.finish(1.0)
    assert clock.now == 100.0


def test_busy_is_not_asleep():
    before, since = busy_seconds(), time.monotonic()
    time.sleep(0.05)
    assert busy_seconds() - before < time.monotonic() - since


def test_progress_stands_still_while_paused(tmp_path):
    clock = Clock()
    progress = Progress(tmp_path / "p.jsonl", clock=clock)
    assert progress.time == 0.0
    progress.begin()
    clock.now += 3.0
    with progress.paused():
        clock.now += 10.0
    progress.step(1, 24, 7.5)
    got, offset = lines(tmp_path / "p.jsonl")
    assert [line["event"] for line in got] == ["begin", "step"]
    assert got[1] == {"event": "step", "at": 113.0, "time": 3.0, "step": 1, "samples": 24, "loss": 7.5}
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"event": "end"}\n{"ev')
    more, _ = lines(tmp_path / "p.jsonl", offset)
    assert more == [{"event": "end"}]


def test_interfaces_have_counters(tmp_path):
    name = interface_of("127.0.0.1")
    assert interface_bytes(name) >= 0
    with pytest.raises(OSError, match="nothing0"):
        interface_bytes("nothing0")
    progress = Progress(tmp_path / "p.jsonl", name)
    progress.begin()
    assert json.loads((tmp_path / "p.jsonl").read_text())["bytes"] >= 0


def test_places_are_everybodys():
    assert list(places(10_000)) == list(places(10_000))
    assert len(set(places(10_000))) == 256
    assert list(places(3)) == [0, 1, 2]


def rounds(*steps, **fields):
    return [{"event": "round", "step": i, "values": values, **fields} for i, values in enumerate(steps)]


def test_equal_weights_were_averaged_and_lone_ones_not():
    same = {rank: rounds([0.0, 0.0], [1.0, -1.0], [2.0, 1.0]) for rank in range(2)}
    assert [r.spread for r in judged(same)] == [0.0, 0.0]
    alone = {0: rounds([0.0, 0.0], [1.0, -1.0]), 1: rounds([0.0, 0.0], [-1.0, 2.0])}
    assert averaged_share(judged(alone)) == 0.0
    assert averaged_share([]) is None


def test_gradients_are_compared_with_what_they_were():
    before = [[1.0, 0.0], [0.0, 1.0]]
    nearly = [[0.6, 0.5], [0.5, 0.3]]
    for after, tolerance, share in ((before, 0.75, 0.0), (nearly, 0.75, 1.0), (nearly, 0.1, 0.0)):
        records = {rank: rounds(after[rank], own=before[rank], tolerance=tolerance) for rank in range(2)}
        assert averaged_share(judged(records)) == share


def test_a_round_that_somebody_missed_does_not_count():
    records = {0: rounds([0.0], [1.0], [2.0], [3.0]), 1: rounds([0.0], [1.0], [2.0])}
    del records[1][1]
    assert [r.spread for r in judged(records)] == [1.0, 0.0]  # and the last one was not everybody's yet
