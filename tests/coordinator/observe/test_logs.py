"""The structured log: every event, typed, on a line of its own; nobody's address; a bounded size."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator import events as ev
from potluck.coordinator.dashboard.shapes import Alert, EventRow
from potluck.coordinator.observe import logs
from potluck.coordinator.observe.logs import JsonLog, Rotating
from potluck.protocol.errors import ConfigError

PEER = "ab" * 32


def row_of(event: ev.Event, peer: str | None = None, step: int = 7) -> EventRow:
    return EventRow(id=1, time=1.7e9, step=step, kind=event.kind, text=event.text, peer=peer)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[JsonLog]:
    made = JsonLog(tmp_path / "run.jsonl", 10**6)
    yield made
    made.close()


def lines(log: JsonLog, path: Path) -> list[dict[str, Any]]:
    log.close()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_event_is_one_object_with_its_own_fields(log: JsonLog, tmp_path: Path) -> None:
    events: list[ev.Event] = [
        ev.HeldOut(step=7, loss=3.5),
        ev.RoundCommitted(round=3, step=7, replicas=2, samples=4, nbytes=99, seconds=0.5),
        ev.PeerJoined(peer=PEER, name="line\nbreak\u2028", device="cpu"),
        ev.PhaseChanged(phase="training"),
    ]
    for event in events:
        log.event(row_of(event, PEER), event)
    found = lines(log, tmp_path / "run.jsonl")
    assert [line["kind"] for line in found] == ["HeldOut", "RoundCommitted", "PeerJoined", "PhaseChanged"]
    assert found[0] == {
        **{"time": 1.7e9, "kind": "HeldOut", "step": 7, "peer": PEER},
        **{"text": "Held-out loss 3.5000 at step 7", "fields": {"step": 7, "loss": 3.5}},
    }
    assert found[1]["fields"]["nbytes"] == 99 and found[2]["fields"]["name"] == "line\nbreak\u2028"


def test_no_address_gets_in(log: JsonLog, tmp_path: Path) -> None:
    quote = "no route to 198.51.100.23:7701 or [2001:db8::77]:7702 or anna.dyn.example.org:7704"
    event = ev.Faulted(peer=PEER, name="10.0.0.7", what=quote)
    log.event(row_of(event, PEER), event)
    plan = ev.PlanIssued(generation=1, step=0, origin="init", stages=(("198.51.100.23:7701", "b"),))
    log.event(row_of(plan), plan)
    logging.getLogger("potluck.coordinator.doors").warning("refused %s", quote)
    log.alert(Alert(name="clock", text=quote, since=1.0), 2.0, is_raised=True)
    text = json.dumps(lines(log, tmp_path / "run.jsonl"))
    assert text.count(logs.masked("10.0.0.7")) >= 9 and PEER in text
    for part in ("198.51", "2001:db8", "anna.dyn", "10.0.0.7"):
        assert part not in text


def test_warnings_and_alerts_are_in_it_and_what_is_less_is_not(log: JsonLog, tmp_path: Path) -> None:
    event = ev.HeldOut(step=9, loss=1.0)
    log.event(row_of(event, step=9), event)
    logging.getLogger("potluck.coordinator.hub").info("said already, as an event")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("potluck.x").exception("it failed")
    log.alert(Alert(name="clock", text="late", since=1.0), 2.0, is_raised=True)
    log.alert(Alert(name="clock", text="late", since=1.0), 3.0, is_raised=False)
    found = lines(log, tmp_path / "run.jsonl")[1:]
    assert [line["kind"] for line in found] == ["Log", "AlertRaised", "AlertResolved"]
    assert found[0]["text"] == "it failed (ValueError: broken)" and found[0]["fields"]["level"] == "ERROR"
    assert found[0]["step"] == 9 and found[1]["fields"] == {"name": "clock", "since": 1.0}
    logging.getLogger("potluck.x").warning("after the end")
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 4


def test_it_is_rotated_by_size_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    for start in range(0, 200, 50):
        log = JsonLog(path, 5000)
        for number in range(start, start + 50):
            event = ev.HeldOut(step=number, loss=1.0)
            log.event(row_of(event), event)
        log.close()
    files = [path, *(path.with_name(f"run.jsonl.{i}") for i in (1, 2, 3))]
    assert {file.name for file in path.parent.iterdir()} == {file.name for file in files}
    assert all(file.stat().st_size <= 5000 for file in files)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    steps = [json.loads(line)["fields"]["step"] for file in files[::-1] for line in file.read_text().splitlines()]
    assert steps == list(range(200 - len(steps), 200)) and len(steps) > 90


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"time": 1, "ki')
    log = JsonLog(path, 10**6)
    event = ev.HeldOut(step=1, loss=1.0)
    log.event(row_of(event), event)
    log.close()
    cut, whole = path.read_bytes().splitlines()
    assert cut == b'{"time": 1, "ki' and json.loads(whole)["kind"] == "HeldOut"


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), Rotating.write

    def slow(self: Rotating, line: bytes) -> None:
        gate.wait(20.0)
        write(self, line)

    monkeypatch.setattr(Rotating, "write", slow)
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    log = JsonLog(tmp_path / "run.jsonl", 10**6)
    event = ev.HeldOut(step=1, loss=1.0)
    for _ in range(100):
        log.event(row_of(event), event)
    assert log.left_out >= 89
    gate.set()
    while not log._queue.empty():
        gate.wait(0.001)
    log.event(row_of(event), event)
    found = lines(log, tmp_path / "run.jsonl")
    assert found[-1]["left_out"] >= 89 and log.left_out == 0


def test_a_disk_that_refuses_is_said_once_and_tried_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, tries = Rotating.write, iter([True, True, False])

    def full(self: Rotating, line: bytes) -> None:
        if next(tries):
            raise OSError(28, "No space left on device")
        write(self, line)

    monkeypatch.setattr(Rotating, "write", full)
    log = JsonLog(tmp_path / "run.jsonl", 10**6)
    for step in range(3):
        event = ev.HeldOut(step=step, loss=1.0)
        log.event(row_of(event), event)
    assert [line["fields"]["step"] for line in lines(log, tmp_path / "run.jsonl")] == [2]
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(ConfigError, match=r"observe\.log"):
            JsonLog(path, 10**6)
