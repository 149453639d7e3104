"""A run of real processes on loopback: started, watched through the page's own data, and always cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from potluck.coordinator.verify import verify
from potluck.protocol.config import convert, dump

POLL_SECONDS = 0.1
NICE = ("nice", "-n", "19")
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"d_model": 32, "layers": 2, "heads": 2, "rotary_dim": 8, "seq_len": 16},
    "data": {"vocab_size": 300, "heldout_share": 0.1},
    "pipeline": {"stages": 2, "microbatch_size": 2, "microbatches": 2},
    "sync": {"every": 3, "fragments": 1, "delay": 1},
    "eval": {"every": 1000, "samples": 4},
    "checkpoint": {"save_rounds": 1, "publish_rounds": 10**9},
    "coordinator": {"patience_seconds": 60.0},
}
HIDDEN = """
from potluck.cli import main
from potluck.protocol.grpc_transport import GrpcTransport

listen = GrpcTransport.listen

async def unnamed(self, on_channel):
    await listen(self, on_channel)
    return []

GrpcTransport.listen = unnamed
main()
"""
State = dict[str, Any]


def environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONUNBUFFERED": "1"}


def write_text(path: Path) -> Path:
    """A small corpus that is never the same sentence twice."""
    lines = (f"Guest {i} of the evening brought {i * 7} plums and took home {i * 13 % 97} jars.\n" for i in range(500))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Process:
    """One of our processes; everything it says is in ``log``."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def interrupt(self) -> None:
        self.popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def wait(self, seconds: float) -> int:
        """Its exit code; a failure shows what it said."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds:g} s and says:\n{self.output}") from None


class Network:
    """A coordinator and workers in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.page = folder, ""
        self.data_dir = folder / "coordinator"
        self.processes: list[Process] = []
        self._text = write_text(folder / "corpus.txt")
        self._ticket = ""

    def configure(
        self, steps: int, architecture: str = "gptj", init: str = "", lora: Mapping[str, Any] = {}, **coordinator: Any
    ) -> None:
        """``lora``: of a run that trains adapters only."""
        raw = {**TINY, "steps": steps, "data": {**TINY["data"], "source": str(self._text)}}
        raw["model"] = {**TINY["model"], "architecture": architecture, "init": init}
        if lora:
            raw["model"] |= {"train": "lora", "lora": dict(lora)}
        if architecture != "gptj":
            del raw["model"]["rotary_dim"]
        raw["coordinator"] = {**TINY["coordinator"], **coordinator}
        (self.folder / "run.yaml").write_text(dump(convert(raw)), encoding="utf-8")

    def start(
        self,
        name: str,
        *arguments: str | Path,
        gentle: bool = False,
        program: tuple[str, ...] = ("-m", "potluck"),
    ) -> Process:
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            popen = subprocess.Popen(
                [*(NICE if gentle else ()), sys.executable, *program, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        self.processes.append(Process(name, popen, log))
        return self.processes[-1]

    def coordinator(self) -> Process:
        """Up, with its ticket and page known."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        place = ["--data-dir", self.data_dir, "--ready-file", ready]
        process = self.start("coordinator", "coordinator", "up", self.folder / "run.yaml", *place)
        wait_until(lambda: ready.exists() or process.popen.poll() is not None, 30.0, lambda: process.output)
        assert ready.exists(), process.output
        data = json.loads(ready.read_text(encoding="utf-8"))
        self._ticket, self.page = data["ticket"], data["page"]
        return process

    def relay(self) -> tuple[Process, str]:
        """Another relay for the run: its process and its line for ``coordinator.relays``."""
        place = ["--host", "127.0.0.1", "--data-dir", self.folder / "relay"]
        process = self.start("relay", "relay", "up", self._ticket, *place)
        said = re.compile(r"Relay: +(\S+)")
        wait_until(lambda: bool(said.search(process.output)), 30.0, lambda: process.output)
        found = said.search(process.output)
        assert found
        return process, found[1]

    def worker(self, name: str, *, gentle: bool = False, hidden: bool = False) -> Process:
        """Joining; the same name is the same peer. A gentle one leaves the cores to the others, a hidden one names no
        address."""
        options = ["--name", name, "--data-dir", self.folder / name, "--threads", "1"]
        program = ("-c", HIDDEN) if hidden else ("-m", "potluck")
        return self.start(name, "worker", "join", self._ticket, *options, gentle=gentle, program=program)

    def state(self) -> State | None:
        return fetch(self.page)

    def until(self, what: Callable[[State], bool], seconds: float = 30.0) -> State:
        """The first state seen of which ``what`` holds."""
        seen: list[State] = []

        def holds() -> bool:
            if state := self.state():
                seen.append(state)
                return what(state)
            return False

        wait_until(holds, seconds, lambda: self.story(seen))
        return seen[-1]

    def event(self, text: str, seconds: float = 30.0) -> str:
        """Waits until an event says ``text`` (a regular expression); returns it."""
        state = self.until(lambda s: any(re.search(text, e["text"]) for e in s["events"]), seconds)
        return next(e["text"] for e in state["events"] if re.search(text, e["text"]))

    def story(self, seen: list[State]) -> str:
        """What happened, for a failure's message."""
        last = "\n".join(e["text"] for e in reversed(seen[-1]["events"])) if seen else "the page never answered"
        said = "\n".join(f"{p.name} ({p.popen.poll()}):\n{p.output}" for p in self.processes)
        return f"{last}\n{said}"

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """From the run's file."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "run.sqlite")) as db:
            return db.execute(sql).fetchall()

    def committed_samples(self) -> int:
        """N, after proving that every sample below it is committed exactly once; a coordinator may be running."""
        report = verify(self.data_dir / "run.sqlite")
        assert not report.problems, "\n".join(report.lines())
        return report.samples

    def published(self) -> list[Path]:
        return sorted((self.data_dir / "checkpoints").glob("step-*"))

    def close(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill()


def fetch(page: str) -> State | None:
    """The page's data; None while nobody answers."""
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{page}api/state", timeout=5.0) as answer:
        return json.load(answer)
    return None


def wait_until(what: Callable[[], bool], seconds: float, story: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"nothing after {seconds:g} s\n{story()}"
        time.sleep(POLL_SECONDS)


def processes_naming(folder: Path) -> list[psutil.Process]:
    """Living processes with ``folder`` in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(str(folder) in word for word in process.cmdline())
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    yield made
    made.close()


@pytest.fixture
def until(network: Network) -> Callable[..., None]:
    """Waits for what becomes true; a failure tells what everybody said."""
    return lambda what, seconds=30.0: wait_until(what, seconds, lambda: network.story([]))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts ``potluck demo`` with two workers in the folder ``tmp_path / "demo"``."""
    text = write_text(tmp_path / "corpus.txt")
    network = Network(tmp_path)
    places = tmp_path / "demo"

    def start(*arguments: str) -> Process:
        options = ["--plain", "--workers", "2", "--data", str(text), "--keep", str(places)]
        return network.start(f"demo-{len(network.processes)}", "demo", *options, *arguments)

    yield start
    network.close()
    for process in processes_naming(places):
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.fixture
def left_over() -> Callable[[Path], list[str]]:
    """The command lines of living processes that name a folder."""
    return lambda folder: [str(p) for p in processes_naming(folder)]


@pytest.fixture
def page_state() -> Callable[[str], State | None]:
    return fetch
