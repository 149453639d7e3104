"""An operator's hand on real processes: pause, a worker and the coordinator die meanwhile, resume, ban, checkpoint."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from potluck.coordinator.access import place_of

STEPS = 600


def order(network: Any, action: str, **body: Any) -> str:
    """As the page does it."""
    headers = {"Authorization": f"Bearer {place_of(network.data_dir).token}"}
    address = f"{network.page}api/actions/{action}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        return str(json.load(answer)["text"])


def command(network: Any, *arguments: str) -> str:
    """As an operator does it in a shell on the coordinator's machine."""
    action, *rest = arguments
    process = network.start(f"operator-{len(network.processes)}", "coordinator", action, *rest, network.data_dir)
    assert process.wait(60.0) == 0, process.output
    return str(process.output)


@pytest.mark.timeout(420)
def test_a_run_is_paused_outlives_deaths_goes_on_and_loses_who_is_banned(network: Any) -> None:
    network.configure(steps=STEPS)
    coordinator = network.coordinator()
    crew = {name: network.worker(name) for name in ("anna", "ben", "carl", "dora")}
    network.until(lambda s: s["round"] > 0 and s["phase"] == "training" and seats(s) == [2, 2], 120.0)
    token = command(network, "token").strip()
    assert coordinator.output.count(f"Token:   {token}\n") == 1

    said = command(network, "pause", "--yes", "--why", "power cut")
    assert "stands still at step" in said and "Paused by the operator after step" in said
    state = network.until(stands, 90.0)
    assert state["note"] == "paused by the operator: power cut" and seats(state) == [2, 2]
    leased = network.rows("SELECT MAX(id) FROM ledger")

    victim = state["stages"][0]["replicas"][0]
    crew.pop(name_of(state, victim)).kill()
    network.event(f"{name_of(state, victim)} is lost")
    coordinator.kill()
    coordinator = network.coordinator()
    state = network.until(lambda s: stands(s) and seats(s) == [1, 2] and not away(s), 90.0)
    assert state["note"].startswith("paused by the operator: power cut")
    assert network.rows("SELECT MAX(id) FROM ledger") == leased, "something was leased while it was paused"

    outcast = state["stages"][1]["replicas"][1]
    name = name_of(state, outcast)
    assert "Resumed by the operator after" in order(network, "resume")
    assert f"{name} is banned by the operator: noise" in order(network, "ban", peer=name, why="noise")
    assert "A checkpoint is asked for" in order(network, "checkpoint")
    assert crew[name].wait(30.0) == 1
    assert "this worker is banned from the run: noise" in crew.pop(name).output
    again = network.worker(name)
    assert again.wait(60.0) == 1 and "banned from the run: noise. Ask the operator" in again.output, again.output

    assert [p.wait(90.0) for p in (coordinator, *crew.values())] == [0, 0, 0], network.story([])
    asked = network.rows("SELECT id, data FROM events WHERE kind = 'CheckpointAsked'")
    published = network.rows("SELECT id, data FROM events WHERE kind = 'Published'")
    steps = [json.loads(data)["step"] for number, data in published if number > asked[0][0]]
    assert json.loads(asked[0][1])["step"] <= steps[0] < STEPS == steps[-1]
    assert network.committed_samples() == network.rows("SELECT MAX(sample) FROM rounds")[0][0]
    assert network.rows("SELECT COUNT(*) FROM events WHERE kind = 'RolledBack'") == [(0,)]
    kept = (network.data_dir / "run.sqlite").stat().st_mode & 0o777
    told = [p.output for p in network.processes if not p.name.startswith(("operator", "coordinator"))]
    assert coordinator.output.count("Token: ") == 1, "it is shown at the run's first start, not at others"
    assert kept == 0o600 and token not in "".join(told) + str(network.rows("SELECT data, text FROM events"))


def seats(state: dict[str, Any]) -> list[int]:
    return [len(stage["replicas"]) for stage in state["stages"]]


def stands(state: dict[str, Any]) -> bool:
    """Paused, and nothing is in the air."""
    rounds = state["rounds"]
    still = bool(rounds) and rounds[0]["step"] == state["step"]
    return state["note"].startswith("paused by") and state["phase"] == "training" and still


def away(state: dict[str, Any]) -> bool:
    return any(p["state"] == "away" for p in state["peers"])


def name_of(state: dict[str, Any], peer: str) -> str:
    return next(str(p["name"]) for p in state["peers"] if p["id"] == peer)
