"""A machine's owner takes it back from a run of real processes, and lends it again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck.protocol.config import dump, load
from potluck.protocol.errors import UnreachableError
from potluck.worker.local_socket import ask
from potluck.worker.status import Ask, Status

ENDLESS = 10**6
MB = 10**6


def cli(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "potluck", "worker", *map(str, arguments)], capture_output=True, text=True, timeout=30
    )
    return done.stdout + done.stderr


def status(folder: Path) -> Status:
    found = ask(folder, Ask(what="status")).status
    assert found is not None
    return found


def answers(folder: Path, pid: int) -> bool:
    try:
        return status(folder).pid == pid
    except UnreachableError:
        return False


@pytest.mark.timeout(240)
def test_a_pause_frees_the_machine_and_the_others_go_on(network: Any, until: Callable[..., None]) -> None:
    network.configure(steps=ENDLESS)
    path = network.folder / "run.yaml"
    config = load(path)
    model = msgspec.structs.replace(config.model, d_model=256)  # that there is something to free
    path.write_text(dump(msgspec.structs.replace(config, model=model)), encoding="utf-8")
    network.coordinator()
    for name in ("anna", "ben", "carl"):
        network.worker(name)
    busy = network.until(lambda s: s["round"] > 0 and len([p for p in s["peers"] if p["samples"] > 8]) == 3, 90.0)
    thick = next(stage["replicas"] for stage in busy["stages"] if len(stage["replicas"]) == 2)
    names = {p["id"]: p["name"] for p in busy["peers"]}
    mine = names[thick[0]]
    other = next(name for peer, name in names.items() if peer not in thick)
    folder = network.folder / mine

    before = status(folder)
    assert before.word == "running" and before.stage is not None and before.totals.committed > 0
    said = cli("pause", "2h", "--data-dir", folder)
    assert said.startswith(f"{mine}: paused until ") and said.endswith(", by you\n")
    until(lambda: status(folder).freed_seconds is not None)
    paused = status(folder)
    assert (paused.word, paused.why, paused.stage) == ("paused", "by you", None)
    assert paused.ram < before.ram - 60 * MB
    at = network.until(lambda s: len(s["peers"]) == 2)["step"]
    network.until(lambda s: s["step"] > at + 6 and len(s["peers"]) == 2)

    # The pause outlives the process; the next one does not even load torch.
    process = next(p for p in network.processes if p.name == mine)
    process.kill()
    told = len(process.output)
    again = network.worker(mine)
    until(lambda: answers(folder, again.popen.pid))
    until(lambda: "paused until" in again.output[told:])
    assert status(folder).word == "paused" and "loading torch" not in again.output[told:]
    assert status(folder).totals.committed >= paused.totals.committed

    cli("resume", "--data-dir", folder)
    network.until(lambda s: any(p["name"] == mine and p["stage"] is not None for p in s["peers"]), 90.0)
    until(lambda: status(folder).totals.committed > paused.totals.committed)
    until(lambda: status(folder).word == "running")

    # Leaving in order takes for ever while a neighbour hangs: the machine is free all the same.
    hung = next(p for p in network.processes if p.name == other)
    hung.popen.send_signal(signal.SIGSTOP)
    try:
        cli("pause", "--data-dir", folder)
        until(lambda: status(folder).freed_seconds is not None)
    finally:
        hung.popen.send_signal(signal.SIGCONT)
    assert status(folder).text == "paused, by you"
    at = network.until(lambda s: len(s["peers"]) == 2)["step"]
    network.until(lambda s: s["step"] > at + 6)
    assert cli("finish", "--data-dir", folder).startswith(f"{mine} finishes")
    assert again.wait(20.0) == 0 and "left; nothing was under way" in again.output
    assert "The last one ended" in cli("status", "--data-dir", folder)
    assert network.committed_samples() > 0
