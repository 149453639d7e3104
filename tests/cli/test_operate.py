"""``potluck coordinator pause`` and the like: which coordinator is meant, what is asked, what is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from potluck import cli_operate
from potluck.cli import main
from potluck.coordinator.store import Store

TOKEN = "the operator's, 43 letters long or so........."


class Page(ThreadingHTTPServer):
    """Answers as a coordinator's page does; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None, Any]] = []
        self.run, self.answers = "5eed", {"preview": (200, {"text": "It would stand still.", "done": False})}
        self.answers["action"] = (200, {"text": "It stands still.", "done": True})


class Handler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        self.say(200, {"run": {"id": self.server.run}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        self.say(*self.server.answers["preview" if "preview=1" in self.path else "action"])

    def say(self, status: int, what: Any) -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def page() -> Iterator[Page]:
    server = Page()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr(cli_operate, "data_home", lambda: tmp_path)
    return tmp_path / "coordinator"


def a_run(home: Path, name: str, page: Page, run: str = "5eed") -> Path:
    store = Store(home / name / "run.sqlite")
    config = {"name": name, "coordinator": {"host": "127.0.0.1"}}
    store.set_meta(config=config, run_id=run, http_port=page.server_address[1], operator_token=TOKEN)
    store.close()
    return home / name


def run(*arguments: object, **more: Any) -> Result:
    return CliRunner().invoke(main, ["coordinator", *map(str, arguments)], **more)


def test_the_only_run_that_is_up_is_found_and_only_then_told_the_token(page: Page, home: Path) -> None:
    a_run(home, "old", page, run="another")  # its page's port is somebody else's by now
    a_run(home, "mine", page)
    done = run("pause", "--why", "power cut", "--yes")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == ["It would stand still.", "It stands still."]
    body = {"why": "power cut", "force": False}
    assert page.asked == [
        ("/api/actions/pause?preview=1", f"Bearer {TOKEN}", body),
        ("/api/actions/pause", f"Bearer {TOKEN}", body),
    ]


def test_several_or_no_runs_have_to_be_named(page: Page, home: Path) -> None:
    none = run("pause", "--yes")
    assert none.exit_code == 1 and "no run is up in" in none.output
    one = a_run(home, "one", page)
    a_run(home, "two", page)
    several = run("pause", "--yes")
    assert several.exit_code == 1 and "2 runs are up on this machine: one, two" in several.output
    assert run("pause", "--yes", "one").exit_code == 0
    assert run("pause", "--yes", one).exit_code == 0
    assert not page.asked[0][0].startswith("/api/state") and len(page.asked) == 4


def test_a_run_that_is_not_up_is_not_told_its_token(page: Page, home: Path) -> None:
    a_run(home, "mine", page, run="another")
    down = run("resume", "mine", "--yes")
    assert down.exit_code == 1 and "run mine is not up on this machine" in down.output and not page.asked
    assert "there is no run in it" in run("resume", "nowhere", "--yes").output


def test_nothing_is_done_unless_it_is_confirmed(page: Page, home: Path) -> None:
    a_run(home, "mine", page)
    unasked = run("pause")  # its input is no terminal
    assert unasked.exit_code == 1 and "--yes" in unasked.output
    assert [path for path, _, _ in page.asked] == ["/api/actions/pause?preview=1"]


def test_a_person_is_asked(page: Page, home: Path, monkeypatch: Any) -> None:
    a_run(home, "mine", page)
    monkeypatch.setattr(cli_operate, "is_asked", lambda: True)
    assert run("pause", input="n\n").exit_code == 1 and len(page.asked) == 1
    assert run("pause", input="y\n").exit_code == 0 and len(page.asked) == 3


def test_what_needs_force_is_done_only_with_it(page: Page, home: Path) -> None:
    a_run(home, "mine", page)
    page.answers["preview"] = (200, {"text": "Only anna holds stage 0.", "done": False, "needs_force": True})
    refused = run("ban", "anna", "--yes")
    assert refused.exit_code == 1 and "Insist with --force" in refused.output and len(page.asked) == 1
    assert run("ban", "anna", "--yes", "--force").exit_code == 0
    assert page.asked[-1][2] == {"why": "", "peer": "anna", "force": True}


def test_a_refusal_is_told_in_the_coordinators_words(page: Page, home: Path) -> None:
    a_run(home, "mine", page)
    page.answers["preview"] = (409, {"error": "the run is paused already", "hint": "Resume it first."})
    said = run("pause", "--yes")
    assert said.exit_code == 1 and said.output == "potluck: the run is paused already. Resume it first.\n"


@pytest.mark.parametrize("answer", [(200, b"<html>"), (200, b"[1]"), (500, b"\xff"), (302, b""), (409, b"{}")])
def test_what_is_no_coordinator_is_one_line(page: Page, answer: tuple[int, bytes]) -> None:
    page.answers["preview"] = answer
    said = run("pause", "--url", f"http://127.0.0.1:{page.server_address[1]}", "--token", "x", "--yes")
    assert said.exit_code == 1 and "does not answer as a coordinator" in said.output
    assert len(said.output.splitlines()) == 1 and len(page.asked) == 1


def test_a_coordinator_elsewhere_needs_its_address_and_token(page: Page, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{page.server_address[1]}/"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert run("checkpoint", "--url", url, "--token", f"@{tmp_path / 'token'}", "--yes").exit_code == 0
    assert page.asked[-1][:2] == ("/api/actions/checkpoint", f"Bearer {TOKEN}")
    for wrong in (["--url", url], ["--token", "x"], ["mine", "--url", url, "--token", "x"]):
        assert "a coordinator elsewhere needs" in run("pause", *wrong).output
    assert "is not encrypted" not in run("pause", "--url", url, "--token", "x", "--yes").output
    assert "is not encrypted" in run("pause", "--url", "http://run.invalid", "--token", "x", "--yes").output
    assert "is not the address of a page" in run("pause", "--url", "page", "--token", "x").output
    assert "cannot be read" in run("pause", "--url", url, "--token", "@/no/such").output


def test_the_token_is_shown_again(page: Page, home: Path) -> None:
    folder = a_run(home, "mine", page)
    assert run("token").output.strip() == run("token", "mine").output.strip() == TOKEN
    page.run = "another"  # it need not be up
    assert run("token", folder).output.strip() == TOKEN
