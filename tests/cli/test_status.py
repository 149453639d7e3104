"""``potluck status``, ``top``, an owner's commands: readable at 80 columns, harmless whatever is said."""

from __future__ import annotations

import http.server
import io
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from potluck.cli import main
from potluck.coordinator.dashboard import shapes
from potluck.page_client import Seen, local, page_of, understood
from potluck.protocol.errors import ConfigError, UnreachableError
from potluck.screen_live import clean, duration, nbytes
from potluck.screen_run import block
from potluck.screen_worker import block as worker_block
from potluck.worker.contribution import Totals
from potluck.worker.local_socket import Ended, note_end
from potluck.worker.status import Limits, Status, Way

NOW = 1_795_000_000.0
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n[bold red]evil[/]" + "x" * 500


def peer(name: str, stage: int | None = 0, **more: Any) -> shapes.PeerRow:
    made = {
        "id": name[:8] * 3,
        "name": name,
        "region": "",
        "stage": stage,
        "state": "training",
        "samples": 123_456,
        "work": 61_728.0,
        "sent": 49_600_000,
        "received": 1,
        "last_seen": NOW,
        "seconds_per_step": 0.94,
        "tokens_per_second": 4357.0,
        "device": "cuda",
    }
    return shapes.PeerRow(**{**made, **more})


def state(**more: Any) -> shapes.State:
    time = shapes.StepTime(
        compute=0.5, codec=0.05, update=0.05, wire=0.1, waits=(shapes.Wait(peer="ben" * 3, seconds=0.25),), other=0.01
    )
    made = {
        "version": 1,
        "now": NOW,
        "at": None,
        "run": shapes.RunRow(name="supper", id="r", model="GPT-J", stages=2, preset="potluck", codec="int4"),
        "phase": "training",
        "note": "",
        "is_paused": False,
        "started": NOW - 60,
        "step": 229,
        "steps": 2000,
        "generation": 3,
        "train_loss": 4.825,
        "heldout_loss": 4.688,
        "heldout_first": 7.697,
        "tokens": 447_488,
        "tokens_per_second": 2168.4,
        "eta_seconds": 1440.0,
        "eta": shapes.Eta(low=1200.0, high=7300.0),
        "goodput": shapes.Goodput(committed=95.0, computed=100.0),
        "round": 46,
        "bytes_per_token": 511.0,
        "dense_bytes_per_token": 9555.0,
        "traffic": (),
        "stages": (
            shapes.StageRow(stage=0, first_layer=0, last_layer=1, parameters=9, replicas=("a",), is_thin=True),
            shapes.StageRow(stage=1, first_layer=2, last_layer=3, parameters=9, replicas=("b", "c"), is_thin=False),
        ),
        "peers": (peer("anna", 1, time=time), peer("ben", 0), peer("carl", None, state="waiting", region="North")),
        "rounds": (),
        "events": (
            shapes.EventRow(id=2, time=NOW, step=229, kind="RoundCommitted", text="Round 46 committed"),
            shapes.EventRow(id=1, time=NOW, step=200, kind="PeerJoined", text="carl joined (cuda)"),
        ),
        "alerts": (shapes.Alert(name="thin", text="one replica left of stage 0", since=NOW - 300),),
        "published": None,
        "evaluations": 0,
    }
    return shapes.State(**{**made, **more})


def drawn(what: Any, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def seen(made: shapes.State) -> Seen:
    return understood("http://page/", msgspec.json.encode(made))


def test_a_run_at_80_columns() -> None:
    text = "\n".join(drawn(block(seen(state()), "http://127.0.0.1:7701/")))
    for part in (
        "supper  training",
        "229 of 2,000, 20 min to 2 h 1 min left",
        "4.825 training, 4.688 held-out (from 7.697)",
        "2,168 tokens/s, 447,488 tokens so far",
        "511 bytes a token, 18.7 times fewer than uncompressed",
        "95.0% of what was computed counts",
        "one replica left of stage 0",
        "(for 5 min)",
        "62% compute, 26% for ben",
        "carl joined (cuda)",
    ):
        assert part in text, text
    assert "Round 46 committed" not in text  # the plan's row says it
    order = [
        line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in ("anna", "ben", "carl")
    ]
    assert order == ["ben", "anna", "carl"]  # by stage, then who waits for a place


@pytest.mark.parametrize("width", [60, 80, 200])
def test_whatever_peers_say_the_terminal_is_safe_and_lines_fit(width: int) -> None:
    crowd = tuple(peer(f"{HOSTILE}{i}", i % 3, state=HOSTILE, region=HOSTILE) for i in range(50))
    events = (shapes.EventRow(id=1, time=1e300, step=1, kind=HOSTILE, text=HOSTILE),)
    run = shapes.RunRow(name=HOSTILE, id="", model=HOSTILE, stages=1, preset="", codec="")
    made = state(peers=crowd, events=events, run=run, note=HOSTILE, phase=HOSTILE, steps=0)
    lines = drawn(block(seen(made), "http://page/"), width)
    assert all(len(line) <= width for line in lines)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for line in lines for c in line)
    assert any("[bold red]evil" in line for line in lines) and any("and 20 more" in line for line in lines)


def test_a_page_of_another_version_is_shown_as_far_as_it_goes() -> None:
    found = understood(
        "http://page/", b'{"run": {"name": "old", "new": 1}, "phase": "waiting", "peers": [{"id": "abc"}]}'
    )
    assert drawn(block(found, "http://page/"))[0] == "old  waiting"


@pytest.mark.parametrize("data", [b"", b"[]", b"<html>", b'{"phase": 5, "run": {}}', b'{"error": "no"}', b"\xff"])
def test_what_is_no_run_is_refused(data: bytes) -> None:
    with pytest.raises(UnreachableError, match="does not answer with a run"):
        understood("http://page/", data)


def status_of(**more: Any) -> Status:
    limits = {
        "memory_gb": 12.6,
        "threads": 4,
        "upload_mbps": 5.0,
        "state_mbps": 0.0,
        "hours": ("22:00-08:00", "sat,sun 00:00-24:00"),
        "on_battery": False,
        "yield_to": ("game",),
    }
    made: dict[str, Any] = dict.fromkeys(Status.__struct_fields__)
    made |= {
        "word": "running",
        "why": "step 12 of 100",
        "text": "running: step 12 of 100, stage 1 (layers 2-5)",
        "name": "worker-62dp7t",
        "peer": "62dp7tsha77jbswzujjavfs3zs",
        "run": "supper",
        "coordinator": "198.51.100.7:7700",
        "pid": 1856,
        "now": NOW,
        "started": NOW - 90_000,
        "phase": "training",
        "stage": 1,
        "layers": (2, 6),
        "stages": 2,
        "replicas": 2,
        "peers": 4,
        "step": 12,
        "steps": 100,
        "committed": 8,
        "device": "cuda",
        "ram": 886_000_000,
        "gpu": 7_300_000_000,
        "up": 191_250.0,
        "down": 198_750.0,
        "limits": Limits(**limits),
        "totals": Totals(
            computed=264, committed=240, work=119.9, sent=14_700_000, received=10**12, seconds=4e5, joules=3.6e6
        ),
        "ways": (Way(peer="e5e5r6kp", path="relayed", rtt_seconds=0.0148, bytes_per_second=None),),
    }
    return Status(**{**made, **more})


def test_a_worker_at_80_columns() -> None:
    lines = drawn(worker_block(status_of()))
    assert lines[0] == "running: step 12 of 100, stage 1 (layers 2-5)"
    text = " ".join(" ".join(lines).split())
    for part in (
        "worker worker-62dp7t (62dp7tsh), process 1856, up for 25 h 0 min",
        "supper at 198.51.100.7:7700, training, 4 workers, stage 1 of 2 (layers 2-5), beside 1 other",
        "cuda, holds 886 MB of memory, 7.3 GB of the GPU's",
        "1.53 Mbit/s up, 1.59 Mbit/s down",
        "to e5e5r6kp relayed, 14.8 ms",
        "5 Mbit/s up, stages at any speed, at 22:00-08:00; sat,sun 00:00-24:00, not on battery, room for game",
        "240 samples that count (119.9 whole ones), 264 computed",
        "2 d",
        "1 kWh, 14.7 MB up, 1 TB down",
    ):
        assert part in text or part == "2 d", text
    assert all(len(line) <= 80 for line in lines)


def test_a_paused_worker_says_how_soon_the_machine_was_free() -> None:
    paused = status_of(
        word="paused", text="paused until 18:00, by you", run="", stage=None, up=None, freed_seconds=1.24
    )
    lines = drawn(worker_block(paused))
    assert lines[0] == "paused until 18:00, by you"
    assert "free 1.2 s after it was asked" in " ".join(" ".join(lines).split())


def test_sizes_and_durations() -> None:
    assert [nbytes(n) for n in (None, 0, 999, 1000, 123_456, 999_999, 5e12)] == [
        "-",
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "1 MB",
        "5 TB",
    ]
    assert [duration(s) for s in (None, 0, 89, 90, 5399, 5400, 172_799, 172_800)] == [
        "-",
        "0 s",
        "89 s",
        "2 min",
        "1 h 29 min",
        "1 h 30 min",
        "47 h 59 min",
        "2 d 0 h",
    ]
    assert clean("a\x1b\n\x9bb", 10) == "a b" and clean("x" * 20, 10) == "x" * 9 + "…"


# Which page.


@pytest.fixture
def page() -> Iterator[str]:
    data = msgspec.json.encode(state(now=time.time()))

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/api/state"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(data if found else b"{}")

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def note(file: Path, **meta: object) -> None:
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
        db.commit()


def test_a_run_by_name_folder_address_or_because_it_is_the_only_one(tmp_path: Path, page: str) -> None:
    note(tmp_path / "coordinator" / "supper" / "run.sqlite", page=page)
    note(tmp_path / "coordinator" / "over" / "run.sqlite", http_port=9)
    note(tmp_path / "kept" / "coordinator" / "run.sqlite", http_port=7)
    assert local(tmp_path) == {"supper": page, "over": "http://127.0.0.1:9/"}
    assert page_of("supper", tmp_path) == page_of(None, tmp_path) == page
    assert page_of(str(tmp_path / "coordinator" / "supper"), tmp_path) == page
    assert page_of(str(tmp_path / "kept"), tmp_path) == "http://127.0.0.1:7/"
    assert page_of("http://host:1/#/peer/x", tmp_path) == "http://host:1/"
    with pytest.raises(ConfigError, match=r"no run lunch is known here \(known: over, supper\)"):
        page_of("lunch", tmp_path)
    note(tmp_path / "coordinator" / "second" / "run.sqlite", page=page)
    with pytest.raises(ConfigError, match="several runs answer here: second, supper"):
        page_of(None, tmp_path)
    for other in ("file:///etc/passwd", "ftp://host/"):
        with pytest.raises(ConfigError, match="no page's address"):
            page_of(other, tmp_path)
    with pytest.raises(ConfigError, match="no run answers"):
        page_of(None, tmp_path / "empty")


def said(*words: object) -> tuple[int, str]:
    """Exit code, and everything that the command prints."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.output


def test_the_commands(tmp_path: Path, page: str, cli: SimpleNamespace) -> None:
    told = cli.potluck(tmp_path, "status", page)
    assert told.code == 0 and told.out.startswith("supper  training\n") and max(map(len, told.out.splitlines())) <= 80
    assert said("top", page) == (0, told.out)  # no terminal: once
    code, out = said("status", "--json", page)
    assert (code, json.loads(out)["steps"]) == (0, 2000)
    code, out = said("status", f"{page}nothing")
    assert code == 1 and "answers 404" in out


@pytest.mark.parametrize("words", ["status", "status --json", "top", "pause 2h", "resume", "finish"])
def test_an_owner_without_a_worker_is_told_so(tmp_path: Path, words: str) -> None:
    code, out = said("worker", *words.split(), "--data-dir", tmp_path)
    assert code == 1 and len(out.splitlines()) == 1
    assert out.startswith(f"potluck: no worker runs in {tmp_path}. Start one: potluck worker join TICKET.")
    note_end(tmp_path, Ended(at=NOW, text="the disk is full. Free some space.", error=True))
    code, out = said("worker", *words.split(), "--data-dir", tmp_path)
    assert code == 1 and "The last one needs you (" in out and "): the disk is full. Free some space. Start" in out


@pytest.mark.parametrize("words", [("2 weeks",), ("--until", "teatime"), ("2h", "--until", "18:00")])
def test_a_pause_that_has_no_length(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out = said("worker", "pause", *words, "--data-dir", tmp_path)
    assert code == 1 and out.startswith("potluck: ") and "no worker runs" not in out
