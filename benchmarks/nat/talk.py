"""Commands to a process and its answers: lines of JSON over its standard input and output."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A process did not do what it was asked; the text has what it said."""


class Talk:
    """``module`` as a process that ``popen`` starts; ``log`` gets what it says besides."""

    def __init__(self, popen: Callable[..., subprocess.Popen[Any]], module: str, log: Path) -> None:
        self._log = log
        with log.open("a") as file:
            self._process = popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise Failed(f"{do}: {self._log.read_text()[-3000:]}")
        return json.loads(answer)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        """The process ends as soon as nobody commands it any more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


async def obey(commands: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
    """The process's side: does what it is told, one after the other, until nobody is there to tell."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer = await commands[command.pop("do")](**command)
        print(json.dumps(answer), flush=True)
