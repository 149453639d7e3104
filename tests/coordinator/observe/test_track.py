"""The curves in a tracker's own log, read back with its own reader; no step twice, over restarts and lost rounds."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_source import FakeSource

from potluck.coordinator.dashboard.shapes import Point
from potluck.coordinator.observe import sinks, track
from potluck.coordinator.observe.track import HELDOUT, TRAIN, Place, Row, Tracker
from potluck.protocol.config import RunConfig
from potluck.protocol.errors import ConfigError

CONFIG = RunConfig(name="tiny")


class Board(FakeSource):
    """With a curve that tests write; ids go on, whatever the steps do."""

    def __init__(self) -> None:
        super().__init__(points=0)

    def train(self, *steps: int, loss: float = 4.0) -> None:
        self._add(steps, "train", loss)

    def heldout(self, *steps: int, loss: float = 5.0) -> None:
        self._add(steps, "heldout", loss)

    def _add(self, steps: Sequence[int], which: str, loss: float) -> None:
        for step in steps:
            number = len(self.curve_points) + 1
            values = {"train": None, "heldout": None, which: loss}
            point = Point(id=number, step=step, tokens=step * 10, time=1.7e9 + number, **values)  # type: ignore[arg-type]
            self.curve_points.append(point)


class Memory:
    """A log in memory, as its readers see it. ``fails``: how many batches are cut off after their first row."""

    def __init__(self, can_take_back: bool) -> None:
        self.can_take_back, self.fails, self.closed = can_take_back, 0, 0
        self.rows: list[tuple[str, int, float]] = []

    def write(self, rows: Sequence[Row]) -> None:
        for number, row in enumerate(rows):
            if self.fails and number:
                self.fails -= 1
                raise OSError("full")
            if row.takes_back:
                assert self.can_take_back
                self.rows = [known for known in self.rows if known[1] < row.step]
            self.rows += [(name, row.step, value) for name, value in row.values.items()]

    def close(self) -> None:
        self.closed += 1

    def steps(self, name: str) -> list[int]:
        return [step for known, step, _ in self.rows if known == name]


@pytest.fixture(params=[True, False], ids=["can take back", "cannot"])
def log(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory(request.param)
    monkeypatch.setattr(sinks, "check", lambda kind: None)
    monkeypatch.setattr(sinks, "made", lambda *_: made)
    return made


def feed(tracker: Tracker, board: Board) -> None:
    tracker.feed(board)  # type: ignore[arg-type]
    if tracker._thread:
        tracker._thread.join(20.0)


def a_tracker(folder: Path) -> Tracker:
    return Tracker("tensorboard", folder, CONFIG, "ab12")


def test_all_points_and_the_newest_rates(log: Memory, tmp_path: Path) -> None:
    board, tracker = Board(), a_tracker(tmp_path)
    feed(tracker, board)
    assert log.rows == []
    board.heldout(0)
    board.train(1, 2, 3)
    feed(tracker, board)
    board.train(4)
    feed(tracker, board)
    feed(tracker, board)
    assert log.steps(TRAIN) == [1, 2, 3, 4] and log.steps(HELDOUT) == [0] and log.steps("tokens") == [1, 2, 3, 4]
    assert log.steps("rate/tokens_per_second") == log.steps("rate/goodput") == log.steps("peers") == [3, 4]
    assert ("rate/goodput", 4, 0.9) in log.rows and ("peers", 4, 2.0) in log.rows


def test_it_goes_on_after_a_restart(log: Memory, tmp_path: Path) -> None:
    board = Board()
    board.train(*range(1, 6))
    board.heldout(3)
    feed(a_tracker(tmp_path), board)
    board.heldout(5)
    board.train(6, 7)
    for _ in range(3):
        feed(a_tracker(tmp_path), board)
    assert log.steps(TRAIN) == list(range(1, 8)) and log.steps(HELDOUT) == [3, 5]


def test_steps_that_are_done_again_are_there_once(log: Memory, tmp_path: Path) -> None:
    board, tracker = Board(), a_tracker(tmp_path)
    board.train(*range(1, 9), loss=4.0)
    board.heldout(4, 8)
    feed(tracker, board)
    board.train(5, 6, loss=3.0)  # back to step 4
    feed(tracker, board)
    wanted = [1, 2, 3, 4, 5, 6] if log.can_take_back else list(range(1, 9))
    assert log.steps(TRAIN) == wanted and log.steps(HELDOUT) == ([4] if log.can_take_back else [4, 8])
    again = a_tracker(tmp_path)
    board.train(7, 8, 9, loss=3.0)
    feed(again, board)
    assert log.steps(TRAIN) == list(range(1, 10))
    losses = {step: value for name, step, value in log.rows if name == TRAIN}
    assert (losses[4], losses[5], losses[9]) == (4.0, 3.0 if log.can_take_back else 4.0, 3.0)


def test_what_a_crash_left_is_not_there_twice(log: Memory, tmp_path: Path) -> None:
    """The process dies with rows in the log that its place does not know; or with the place before the rows."""
    board = Board()
    board.train(*range(1, 6))
    feed(a_tracker(tmp_path), board)
    place = (tmp_path / "tensorboard.json").read_bytes()
    board.heldout(5)
    board.train(6, 7, 8)
    feed(a_tracker(tmp_path), board)
    if log.can_take_back:
        (tmp_path / "tensorboard.json").write_bytes(place)
    board.train(9)
    feed(a_tracker(tmp_path), board)
    assert log.steps(TRAIN) == list(range(1, 10)) and log.steps(HELDOUT) == [5]


def test_a_log_that_fails_is_tried_again(log: Memory, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, tracker = Board(), a_tracker(tmp_path)
    board.train(*range(1, 5))
    log.fails = 2
    for _ in range(3):
        feed(tracker, board)
    board.train(5)
    feed(tracker, board)
    steps = log.steps(TRAIN)
    assert len(set(steps)) == len(steps) and steps[-1] == 5
    if log.can_take_back:
        assert steps == [1, 2, 3, 4, 5]
    assert caplog.text.count("takes nothing") == 1


@pytest.mark.parametrize(
    "junk", ["", "null", "[]", '{"id": -1, "steps": {}}', '{"id": true, "steps": {}}', "[" * 10**5]
)
def test_a_spoilt_place(junk: str, log: Memory, tmp_path: Path) -> None:
    board = Board()
    board.train(1, 2, 3)
    first = a_tracker(tmp_path)
    feed(first, board)
    (tmp_path / "tensorboard.json").write_text(junk)
    tracker = a_tracker(tmp_path)
    tracker.kind = "tensorboard" if log.can_take_back else "wandb"
    feed(tracker, board)
    board.train(4, 5)
    feed(tracker, board)
    assert log.steps(TRAIN) == [1, 2, 3, 4, 5]


async def test_one_that_hangs_holds_nobody_up(log: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), Memory.write

    def slow(self: Memory, rows: Sequence[Row]) -> None:
        gate.wait(20.0)
        write(self, rows)

    monkeypatch.setattr(Memory, "write", slow)
    board, tracker = Board(), a_tracker(tmp_path)
    board.train(1)
    for _ in range(5):
        tracker.feed(board)  # type: ignore[arg-type]
    board.train(2)
    await tracker.close(board, 0.05)  # type: ignore[arg-type]
    assert log.rows == [] and log.closed == 0
    gate.set()
    await tracker.close(board, 20.0)  # type: ignore[arg-type]
    assert log.steps(TRAIN) == [1, 2] and log.closed == 1


def test_large_logs_go_in_pieces(log: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "MOST_ROWS", 7)
    board, tracker = Board(), a_tracker(tmp_path)
    board.train(*range(1, 51))
    feed(tracker, board)
    assert log.steps(TRAIN) == list(range(1, 51)) and Place.read(tmp_path / "tensorboard.json").id == 50


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_an_error_with_its_fix(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=kind) as caught:
        Tracker(kind, tmp_path, CONFIG, "ab12")
    assert f"pip install -e '.[{kind}]'" in caught.value.hint


# The real ones.


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board()
    board.heldout(0, loss=7.0)
    board.train(*range(1, 6))
    feed(a_tracker(tmp_path), board)
    board.train(3, 4, 5, 6, loss=2.0)  # back to step 2
    board.train(7, loss=math.nan)
    tracker = a_tracker(tmp_path)
    feed(tracker, board)
    board.train(8, loss=1.0)
    feed(tracker, board)
    read = EventAccumulator(str(tmp_path / "tensorboard" / "tiny-ab12"))
    read.Reload()
    train = read.Scalars(TRAIN)
    assert [one.step for one in train] == list(range(1, 9))
    assert [one.value for one in train][:6] == [4.0, 4.0, 2.0, 2.0, 2.0, 2.0] and math.isnan(train[6].value)
    assert train[-1].wall_time == board.curve_points[-1].time
    assert [(one.step, one.value) for one in read.Scalars(HELDOUT)] == [(0, 7.0)]
    (text,) = read.Tensors("config/text_summary")[-1].tensor_proto.string_val
    assert json.loads(text)["seed"] == 1 and "observe" not in json.loads(text)


PROGRAM = """
import sys
sys.path.insert(0, {support!r}); sys.path.insert(0, {here!r})
from pathlib import Path
from test_track import Board, CONFIG, feed
from potluck.coordinator.observe.track import Tracker
import asyncio
board = Board()
board.heldout(0, loss=7.0)
board.train(*range(1, 6))
if {again}:
    board.train(4, 5, 6, 7)
tracker = Tracker({kind!r}, Path({folder!r}), CONFIG, "ab12")
feed(tracker, board)
asyncio.run(tracker.close(board, 60.0))
"""


def in_a_process(kind: str, folder: Path, again: bool) -> None:
    here = Path(__file__).parent
    support = here.parents[1] / "support"
    program = PROGRAM.format(support=str(support), here=str(here), kind=kind, folder=str(folder), again=again)
    quiet = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **quiet}, capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 0 and "takes nothing" not in found.stderr, found.stderr


def records(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format behind seven bytes of its own."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for again in (False, True):
        in_a_process("wandb", tmp_path, again)
    files = sorted((tmp_path / "wandb").rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2 and all("ab12" in path.name for path in files), "two parts of the same run"
    program = (
        "import json, sys\n"
        "from wandb.proto import wandb_internal_pb2 as pb\n"
        "for line in sys.stdin:\n"
        "    record = pb.Record(); record.ParseFromString(bytes.fromhex(line))\n"
        "    if record.WhichOneof('record_type') == 'history':\n"
        "        print(json.dumps({(i.key or '.'.join(i.nested_key)): json.loads(i.value_json)"
        " for i in record.history.item}))\n"
    )
    given = "\n".join(record.hex() for path in files for record in records(path.read_bytes()))
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], input=given, capture_output=True, text=True, check=True
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [row["step"] for row in rows if TRAIN in row] == [1, 2, 3, 4, 5, 6, 7]
    inner = [row["_step"] for row in rows]
    assert inner == sorted(set(inner)), "their own step grows"


@pytest.mark.slow
def test_trackio_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    for again in (False, True):
        in_a_process("trackio", tmp_path, again)
    program = (
        "import json\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(run,) = S.get_runs('potluck')\n"
        "print('ROWS', json.dumps(S.get_logs('potluck', run)))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    rows = json.loads(printed.stdout.split("ROWS ")[1])
    assert [row["step"] for row in rows if TRAIN in row] == [1, 2, 3, 4, 5, 6, 7]
