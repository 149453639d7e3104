"""The processes of one scenario: started, struck, started again, ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from potluck.protocol.config import convert, dump
from potluck.protocol.identity import Identity

from . import proxy, roles
from .scenario import Scenario, Trouble
from .zygote import Process, spawn

POLL_SECONDS = 0.01
RESTART_SECONDS = 0.3
READY_SECONDS = 30.0
RUN_SECONDS = 40.0
END_SECONDS = 15.0  # for workers to hear of the end
MOST_STARTS = 4  # of one process: more is a crash loop
LEFT = "the coordinator does not answer; dialling again"
SIGNALS = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "interrupt": signal.SIGINT}


class Stuck(AssertionError):
    """The run does not end, or a process ended that should not."""


class Crew:
    """Runs a scenario in a folder: ``run`` returns when the run is finished, everything else is ``Stuck``."""

    def __init__(self, scenario: Scenario, folder: Path, text: Path, keys: list[Path]) -> None:
        self.scenario, self.folder = scenario, folder
        folder.mkdir(parents=True)
        raw = scenario.config(str(text))
        (folder / "run.yaml").write_text(dump(convert(raw)), encoding="utf-8")
        names = [*scenario.layout.workers, *scenario.layout.late]
        for name, key in zip(names, keys, strict=False):
            (folder / name).mkdir()
            shutil.copy2(key, folder / name / "identity.pem")
        self.peers = {Identity.load_or_create(folder / n / "identity.pem").peer_id: n for n in names}
        self.processes: dict[str, Process] = {}
        self.starts: dict[str, int] = {}
        self.deaths: list[tuple[str, int]] = []
        self.left_dialling: list[str] = []
        self._again: dict[str, float] = {}  # who is to be started again, and when
        self._wake: list[tuple[float, Process]] = []
        self._pending = list(scenario.troubles)
        self._seen_fired: dict[str, int] = {}
        self._commands = -1
        self._addresses: dict[str, str] = {}

    def run(self) -> None:
        try:
            self._begin()
            self._until(lambda: self.processes["coordinator"].code == 0, RUN_SECONDS, "the run is not finished")
            self._again.clear()
            self._until(self._alone, END_SECONDS, "a worker stays")
        finally:
            if self._commands >= 0:
                os.close(self._commands)
            for process in self.processes.values():
                process.end()

    def _alone(self) -> bool:
        """Whether every worker has ended, but for who was away when the others did: that one dials for ever."""
        workers = {n: p for n, p in self.processes.items() if n not in ("coordinator", "proxy")}
        away = {n for n in workers if n in self.cut_off and LEFT in workers[n].output}
        self.left_dialling = sorted(n for n in away if workers[n].poll() is None)
        return all(p.poll() is not None for n, p in workers.items() if n not in away)

    def _begin(self) -> None:
        if lines := self.scenario.lines:
            reading, self._commands = os.pipe()
            places = {"coordinator": self.folder / "ready.json"}
            targets = {n: places.get(p, self.folder / f"{p}.address") for n, p in lines.items()}
            work = partial(proxy.run, self.folder, targets, reading)
            self.processes["proxy"] = spawn("proxy", self.folder / "proxy.log", partial(self._own, work))
            os.close(reading)
            self._until((self.folder / "proxy.addresses").exists, READY_SECONDS, "no proxy")
            self._addresses = json.loads((self.folder / "proxy.addresses").read_text())
        self._start("coordinator")
        self._until((self.folder / "ready.json").exists, READY_SECONDS, "no coordinator")
        for name in self.scenario.layout.workers:
            self._start(name)
        if late := self.scenario.layout.late:
            self._until(lambda: self.rounds() > 0, READY_SECONDS, "no round")
            for name in late:
                self._start(name)

    def _own(self, work: Callable[[], None]) -> None:
        """In the proxy: its commands end when the harness does."""
        os.close(self._commands)
        work()

    def _start(self, name: str) -> None:
        self.starts[name] = self.starts.get(name, 0) + 1
        first = self.starts[name] == 1
        faults = {f.point: f.action for f in self.scenario.faults if f.process == name} if first else {}
        work: Callable[[], None]
        if name == "coordinator":
            (self.folder / "ready.json").unlink(missing_ok=True)
            work = partial(roles.coordinator, self.folder, faults, self.scenario.times)
        else:
            dial, announce = self._addresses.get(f"{name}-coordinator", ""), self._addresses.get(f"to-{name}", "")
            who, _, what = self.scenario.sabotage.partition(":")
            work = partial(
                roles.worker,
                self.folder,
                name,
                faults,
                self.scenario.times,
                dial=dial,
                announce=announce,
                sabotage=what if who == name else "",
                speed=self.scenario.speeds.get(name, 1.0),
            )
        self.processes[name] = spawn(name, self.folder / f"{name}.log", work)

    def _until(self, what: Callable[[], bool], seconds: float, failure: str) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise Stuck(f"{failure} after {seconds:g} s")
            self._look()
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        """Everything that the harness does meanwhile."""
        now = time.monotonic()
        for name, process in self.processes.items():
            if name not in self._again and process.code is None and process.poll() not in (None, 0):
                self._died(name, process, now)
        for name in [n for n, at in self._again.items() if at <= now]:
            if name == "coordinator" or (self.folder / "ready.json").exists():
                del self._again[name]
                self._start(name)
        for at, process in [w for w in self._wake if w[0] <= now]:
            self._wake.remove((at, process))
            process.signal(signal.SIGCONT)
        self._wake_stopped(now)
        for trouble in [t for t in self._pending if self.rounds() >= t.round]:
            self._pending.remove(trouble)
            self._strike(trouble, now)

    def _died(self, name: str, process: Process, now: float) -> None:
        assert process.code is not None
        self.deaths.append((name, process.code))
        if name not in self.struck and not (process.code == 1 and self._coordinator_died()):
            raise Stuck(f"{name} ended with {process.code}")
        if self.starts[name] >= MOST_STARTS:
            raise Stuck(f"{name} ended {MOST_STARTS} times")
        if self.scenario.restart or name == "coordinator":
            self._again[name] = now + RESTART_SECONDS

    def _coordinator_died(self) -> bool:
        """Who is only just joining gives up then, and is started again as a person would."""
        return self.processes["coordinator"].poll() is not None or any(n == "coordinator" for n, _ in self.deaths)

    @property
    def struck(self) -> set[str]:
        """Who may end badly."""
        return {f.process for f in self.scenario.faults} | {t.where for t in self.scenario.troubles if t.is_signal}

    @property
    def cut_off(self) -> set[str]:
        """Who may be away when the run ends."""
        lines = {t.where.removesuffix("-coordinator") for t in self.scenario.troubles}
        return lines | {f.process for f in self.scenario.faults}

    def _wake_stopped(self, now: float) -> None:
        """A process that stopped itself goes on after its time."""
        for fault in self.scenario.faults:
            if fault.action.do == "stop" and fault.point not in self._seen_fired and self.fired(fault.process):
                self._seen_fired[fault.point] = 1
                self._wake.append((now + fault.action.seconds, self.processes[fault.process]))

    def _strike(self, trouble: Trouble, now: float) -> None:
        if not trouble.is_signal:
            command = {"line": trouble.where, "mode": trouble.mode, "seconds": trouble.seconds}
            os.write(self._commands, json.dumps(command).encode() + b"\n")
            return
        process = self.processes[trouble.where]
        with (self.folder / f"{trouble.where}.fired").open("a") as file:
            file.write(json.dumps({"name": trouble.where, "do": trouble.mode, "time": time.time()}) + "\n")
        process.signal(SIGNALS[trouble.mode])
        if trouble.mode == "stop":
            self._wake.append((now + trouble.seconds, process))

    # What can be seen.

    def fired(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.fired"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def all_fired(self) -> list[dict[str, Any]]:
        names = {*self.struck, *(["proxy"] if self.scenario.lines else [])}
        return sorted((f for name in names for f in self.fired(name)), key=lambda f: f["time"])

    def rounds(self) -> int:
        with contextlib.suppress(sqlite3.Error):
            return int(self.rows("SELECT COUNT(*) FROM rounds")[0][0])
        return 0

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """From the run's file."""
        path = self.folder / "coordinator" / "run.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchall()
