"""What the dashboard costs: a coordinator's time and memory while many pages are open, and what each page receives.

    python -m potluck.benchmarks.dashboard [--peers 6 500] [--steps 100000] [--pages 50] [--seconds 20]

A synthetic run's file (:mod:`.dashboard_run`) is served by a process of its own that changes twice a second as a run
does: a step is done, a point comes, half of the peers say what they did. The readers are in this process. What the hub
and the fold of what is written down cost is not in it; the server, its threads and its answers are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib import request as http
from urllib.parse import urlsplit

import psutil
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from potluck.benchmarks.dashboard_run import write_run
from potluck.coordinator.dashboard import server
from potluck.coordinator.dashboard.archive import Archive
from potluck.coordinator.dashboard.shapes import EventRow, Point, State

EVERY_SECONDS = 0.5
WARM_SECONDS = 3.0
QUESTIONS = ("api/state", "api/curve?most=2000", "api/leaderboard", "api/incidents", "api/state?at={at}", "")


class Moving(Archive):
    """The file's run, going on in memory; the past is asked of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._state, self._points = super().state(), super().points(0)
        self._number, self._news, self._chance = 1, asyncio.Event(), random.Random(0)
        self._happened = list(reversed(self._state.events))

    @property
    def version(self) -> int:
        return self._number

    def state(self) -> State:
        return self._state

    def points(self, after: int) -> list[Point]:
        return self._points[max(0, after - self._points[0].id + 1) :] if self._points else []

    def news(self, after: int) -> list[EventRow]:
        return [row for row in self._happened if row.id > after]

    async def changed(self, version: int) -> int:
        while self._number == version:
            await self._news.wait()
        return self._number

    async def go_on(self) -> None:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            last, now = self._points[-1], time.time()
            point = replace(last, id=last.id + 1, step=last.step + 1, tokens=last.tokens + 1000, time=now, heldout=None)
            self._points.append(point)
            peers = tuple(
                replace(row, samples=row.samples + 1, sent=row.sent + 10_000, last_seen=now)
                if self._chance.random() < 0.5
                else row
                for row in self._state.peers
            )
            self._number += 1
            known = {"step": point.step, "tokens": point.tokens, "train_loss": point.train, "version": self._number}
            self._state = replace(self._state, peers=peers, now=now, **known)
            self._news.set()
            self._news = asyncio.Event()


async def serving(path: Path) -> None:
    source = Moving(path)

    async def spent(request: Request) -> Response:
        return Response(str(time.process_time()))

    page, port = await server.serve(server.app(source, [Route("/spent", spent)]), "127.0.0.1", 0)
    print(f"{port} {source.points(0)[-1].id}.{max((row.id for row in source.news(0)), default=0)}", flush=True)
    try:
        await source.go_on()
    finally:
        await page.close()


@dataclass
class Reader:
    """One open page."""

    nbytes: int = 0
    first_seconds: float | None = None  # to its first whole state
    first_nbytes: int = 0

    async def read(self, port: int, place: str) -> None:
        began, seen = time.perf_counter(), b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        after = f"?after={place}" if place else ""
        writer.write(f"GET /api/stream{after} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        try:
            while piece := await reader.read(1 << 16):
                self.nbytes += len(piece)
                if self.first_seconds is None and b"event: peers" in (seen := seen + piece):
                    self.first_seconds, self.first_nbytes, seen = time.perf_counter() - began, self.nbytes, b""
        finally:
            writer.close()


@dataclass(frozen=True)
class Cost:
    cpu: float  # share of one core
    rss: float  # bytes
    per_page_minute: float
    first_seconds: float
    first_nbytes: float


async def measured(process: psutil.Process, port: int, place: str, pages: int, seconds: float) -> Cost:
    readers = [Reader() for _ in range(pages)]
    tasks = [asyncio.create_task(reader.read(port, place)) for reader in readers]
    await asyncio.sleep(WARM_SECONDS)
    before, began = await asyncio.to_thread(cpu_seconds, port), time.perf_counter()
    received = sum(reader.nbytes for reader in readers)
    await asyncio.sleep(seconds)
    after, spent = await asyncio.to_thread(cpu_seconds, port), time.perf_counter() - began
    received = sum(reader.nbytes for reader in readers) - received
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    cpu = (after - before) / spent
    firsts = [reader.first_seconds for reader in readers if reader.first_seconds is not None]
    return Cost(
        cpu=cpu,
        rss=process.memory_info().rss,
        per_page_minute=received / max(1, pages) / spent * 60,
        first_seconds=max(firsts, default=float("nan")),
        first_nbytes=max((reader.first_nbytes for reader in readers), default=0),
    )


def cpu_seconds(port: int) -> float:
    """That the server's process has used."""
    with http.urlopen(f"http://127.0.0.1:{port}/spent", timeout=60) as answer:
        return float(answer.read())


def asked(port: int, path: str) -> tuple[float, int]:
    """Seconds and bytes on the wire of one answer."""
    began = time.perf_counter()
    question = http.Request(f"http://127.0.0.1:{port}/{path}", headers={"Accept-Encoding": "gzip"})
    with http.urlopen(question, timeout=120) as answer:
        nbytes = len(answer.read())
    return time.perf_counter() - began, nbytes


def one(peers: int, steps: int, pages: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sqlite"
        write_run(path, peers, steps, 0)
        show(path, pages, seconds)


def show(path: Path, pages: int, seconds: float) -> None:
    """Measures and prints."""
    archive = Archive(path)
    known, points = archive.state(), archive.points(0)
    size = f"the run's file: {path.stat().st_size / 1e6:.1f} MB"
    print(f"\n{len(known.peers)} peers, {len(points)} points; {size}")
    command = [sys.executable, "-m", "potluck.benchmarks.dashboard", "--serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            port_text, place = child.stdout.readline().split()
            port, process = int(port_text), psutil.Process(child.pid)
            at = known.started + 1000
            for question in QUESTIONS:
                name = question.format(at=at)
                (cold, nbytes), (warm, _) = asked(port, name), asked(port, name)
                shown = urlsplit(name).path + ("?at=" if "at=" in name else "")
                print(f"  /{shown:22} {nbytes / 1e3:8.1f} kB, {cold * 1e3:7.1f} ms, again {warm * 1e3:6.1f} ms")
            print("  pages    CPU   memory   kB per page and minute   first state (slowest page)")
            for count in (0, 1, pages):
                cost = asyncio.run(measured(process, port, place, count, seconds))
                first = f"{cost.first_seconds * 1e3:6.0f} ms, {cost.first_nbytes / 1e3:.1f} kB" if count else ""
                line = f"  {count:5} {cost.cpu:6.1%} {cost.rss / 1e6:5.0f} MB"
                print(f"{line} {cost.per_page_minute / 1e3:24.0f}   {first}", flush=True)
        finally:
            child.terminate()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[6, 500])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--run", type=Path, help="Instead of made-up runs, this one's file.")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(serving(options.serve))
        return
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"starlette {version('starlette')}, uvicorn {version('uvicorn')}, msgspec {version('msgspec')}; "
        f"one change each {EVERY_SECONDS} s, {options.seconds:.0f} s each"
    )
    if options.run:
        show(options.run, options.pages, options.seconds)
        return
    for peers in options.peers:
        one(peers, options.steps, options.pages, options.seconds)


if __name__ == "__main__":
    main()
