"""The command line as a user meets it: real processes, their one line on stderr, what they leave on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import msgspec
import pytest

from potluck.protocol.config import convert, dump
from potluck.protocol.ticket import Ticket
from potluck.protocol.tls import split_address

TINY: dict[str, Any] = {
    "name": "tiny",
    "steps": 10,
    "model": {"d_model": 32, "layers": 2, "heads": 2, "rotary_dim": 8, "seq_len": 16},
    "data": {"source": "corpus.txt", "vocab_size": 300, "heldout_share": 0.1},
    "pipeline": {"stages": 1, "microbatch_size": 2, "microbatches": 2},
}
COMMAND = [sys.executable, "-m", "potluck"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line a user error is, without our name before it."""
        lines = [line for line in self.err.splitlines() if not line.endswith("%")]  # progress
        assert self.code == 1 and len(lines) == 1 and lines[0].startswith("potluck: "), self
        assert re.search(r"[.`] \S", lines[0]), f"no hint: {lines[0]}"
        return lines[0].removeprefix("potluck: ")


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, text=True, **pipes)


def end(process: subprocess.Popen[str], seconds: float = 60.0) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds:g} s: {process.communicate()}") from None
    return Ended(process.returncode, out, err)


def potluck(folder: Path, *arguments: object) -> Ended:
    return end(start(folder, *arguments))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def write_run(folder: Path, **sections: Any) -> None:
    lines = [f"Dish {i} came with {i * 7} spoons and left with {i * 13 % 97} crumbs.\n" for i in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "run.yaml").write_text(dump(convert(TINY | sections)), encoding="utf-8")


class Coordinator:
    """A live one, in ``folder``."""

    def __init__(self, folder: Path, *options: object, data_dir: str | Path = "data") -> None:
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        place = ["--data-dir", data_dir, "--ready-file", ready]
        self.process = start(folder, "coordinator", "up", "run.yaml", *place, *options)
        deadline = time.monotonic() + 30.0
        while not ready.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, end(self.process, 1.0)
            time.sleep(0.05)
        up = json.loads(ready.read_text(encoding="utf-8"))
        self.page: str = up["page"]
        self.host, self.port = split_address(up["address"])
        self.text: str = up["ticket"]
        self.ticket = Ticket.decode(self.text, time.time())

    def other_ticket(self, **changes: Any) -> str:
        return msgspec.structs.replace(self.ticket, **changes).encode()

    def peers(self) -> list[str]:
        with urlopen(f"{self.page}api/state", timeout=10.0) as answer:
            return [peer["name"] for peer in json.load(answer)["peers"]]

    def until_peers(self, names: list[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (here := self.peers()) != names:
            assert time.monotonic() < deadline, f"{here} instead of {names} after {seconds:g} s"
            time.sleep(0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Coordinator]:
    write_run(tmp_path)
    up = Coordinator(tmp_path)
    yield up
    up.close()


@pytest.fixture
def cli() -> SimpleNamespace:
    """The helpers of this file, for the tests beside it."""
    return SimpleNamespace(
        start=start,
        end=end,
        potluck=potluck,
        tree=tree,
        write_run=write_run,
        Coordinator=Coordinator,
        Ended=Ended,
        tiny=TINY,
    )
