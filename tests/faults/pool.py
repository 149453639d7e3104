"""Scenarios over some zygotes at a time, each a process of its own that is asked by name and answers in JSON."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from .judge import Result
from .zygote import QUIET

ROOT = Path(__file__).parent.parent.parent
ANSWER = "answer "


class Pool:
    """``results`` has a future for each name; a zygote that dies fails the scenario it was at."""

    def __init__(self, folder: Path, names: Sequence[str], width: int = 2) -> None:
        self.results: dict[str, Future[Result]] = {name: Future() for name in names}
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            self._names.put(name)
        width = min(width, len(names))
        self._threads = [threading.Thread(target=self._work, args=(folder / f"zygote-{i}",)) for i in range(width)]
        self._closed = False
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed = True
        for thread in self._threads:
            thread.join()

    def _work(self, folder: Path) -> None:
        zygote: subprocess.Popen[str] | None = None
        try:
            while not self._closed:
                try:
                    name = self._names.get_nowait()
                except queue.Empty:
                    return
                zygote = zygote or start(folder)
                try:
                    self.results[name].set_result(ask(zygote, name))
                except Exception as error:
                    self.results[name].set_exception(error)
                    zygote.kill()
                    zygote.wait()
                    zygote = None
        finally:
            if zygote is not None:
                assert zygote.stdin is not None
                zygote.stdin.close()
                zygote.wait()


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--serve", str(folder)],
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(zygote: subprocess.Popen[str], name: str) -> Result:
    assert zygote.stdin is not None and zygote.stdout is not None
    zygote.stdin.write(name + "\n")
    zygote.stdin.flush()
    for text in zygote.stdout:
        if text.startswith(ANSWER):
            return Result(**json.loads(text.removeprefix(ANSWER)))
    raise RuntimeError(f"the zygote ended with {zygote.wait()}")


def serve(folder: Path) -> None:
    """A zygote's life: a name in, a result out, until there are no more."""
    from . import zygote

    zygote.prepare()
    from .catalogue import every, proofs
    from .judge import Place

    scenarios, place = {s.name: s for s in (*every(), *proofs())}, Place(folder)
    while text := sys.stdin.readline():
        result = place.run(scenarios[text.strip()])
        print(ANSWER + result.to_json(), flush=True)
