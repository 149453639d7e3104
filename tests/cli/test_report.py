"""``potluck report``: as a command, on a run's file."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

from potluck.benchmarks.dashboard_run import write_run
from potluck.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.sqlite"
    write_run(path, 4, 200, 0)
    return path


def test_it_writes_one_file_and_changes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = run.read_bytes()
    for named in (run, run.parent):
        result = CliRunner().invoke(main, ["report", str(named)])
        assert result.exit_code == 0, result.output
        [found] = tmp_path.glob("potluck-*.html")
        assert f"Wrote {found.name} (0." in result.output and "MB" in result.output
        assert found.read_bytes().startswith(b"<!doctype html>")
    assert run.read_bytes() == before and [path.name for path in run.parent.iterdir()] == [run.name]
    assert [path.name for path in tmp_path.iterdir()] == [found.name]


def test_what_cannot_be_says_what_to_do(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.html"
    precious.write_text("mine")
    bad = {
        (str(tmp_path / "nothing"),): "data folder",
        (str(run), "-o", str(precious)): "no report",
        (str(run), "-o", str(tmp_path / "none" / "x.html")): "writable folder",
        (str(run), "--serve", "-o", "x.html"): "exclude each other",
        (str(run), "--port", "1"): "--serve",
    }
    for arguments, said in bad.items():
        result = CliRunner().invoke(main, ["report", *arguments])
        assert result.exit_code == 1 and said in result.output, result.output
        assert len(result.output.strip().splitlines()) == 1
    assert precious.read_text() == "mine"


def test_it_serves_until_it_is_stopped(run: Path) -> None:
    command = [sys.executable, "-m", "potluck", "report", str(run), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, contextlib.ExitStack() as last:
        last.callback(process.kill)
        assert process.stdout
        line = process.stdout.readline()
        address = line.split("http://")[1].split("/")[0]
        assert address.startswith("127.0.0.1:")
        with urlopen(f"http://{address}/api/state", timeout=10) as answer:
            assert b'"step":' in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
