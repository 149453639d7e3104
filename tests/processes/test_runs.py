"""Whole runs of real processes: they finish, grow, shrink, lose members by violence, stop and go on."""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck.coordinator.verify import verify
from potluck.protocol.config import dump, load

SAMPLES_PER_STEP = 4  # of one first-stage replica: 2 microbatches of 2
ENDLESS = 10**6


def check_model(folder: Path, architecture: str = "gptj") -> None:
    """The published folder loads in stock transformers and says something finite."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Guest 1 of the evening", return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    assert model.config.model_type == architecture
    assert math.isfinite(loss)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_a_run_finishes(network: Any, architecture: str) -> None:
    network.configure(12, architecture)
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    assert all("the run is finished" in p.output for p in crew)
    assert "The run is finished. Model: " in coordinator.output
    assert network.committed_samples() == 12 * SAMPLES_PER_STEP
    assert network.published()[-1].name == "step-00000012"
    check_model(network.published()[-1], architecture)
    card = (network.published()[-1] / "README.md").read_text(encoding="utf-8")
    assert f"| {12 * SAMPLES_PER_STEP} |" in card and "Steps: 12," in card
    assert all(f"| {name} |" in card for name in ("anna", "ben"))


@pytest.mark.timeout(60)
def test_a_run_begins_from_a_checkpoint(network: Any, tmp_path: Path) -> None:
    """Two stages, and a keeper: what is published before the first step is the checkpoint, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 16}
    before = GPTJForCausalLM(GPTJConfig(**shape)).half()
    before.save_pretrained(tmp_path / "hub")
    network.configure(12, init=str(tmp_path / "hub"))
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    first, last = (AutoModelForCausalLM.from_pretrained(network.published()[i]).state_dict() for i in (0, -1))
    for name, tensor in before.state_dict().items():
        assert torch.equal(first[name], tensor.float()), name
    assert not torch.equal(last["lm_head.weight"], first["lm_head.weight"])
    assert "Begun from hub (license: unknown)" in (network.published()[-1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.timeout(90)
def test_workers_come_and_go_and_a_stopped_run_goes_on(network: Any) -> None:
    network.configure(steps=ENDLESS)
    coordinator = network.coordinator()
    anna, ben = (network.worker(name, gentle=True) for name in ("anna", "ben"))  # carl imports torch beside them
    network.until(lambda s: s["round"] > 0)

    carl = network.worker("carl")
    network.until(lambda s: peer(s, "carl").get("samples", 0) > 0)
    state = network.state()
    assert sorted(len(stage["replicas"]) for stage in state["stages"]) == [1, 2]
    before = peer(state, "carl")["samples"]
    network.until(lambda s: peer(s, "carl").get("samples", 0) > before)

    anna.interrupt()
    assert anna.wait(20.0) == 0, network.story([])
    assert "handed over" in anna.output
    rounds = network.until(lambda s: not peer(s, "anna"))["round"]
    network.until(lambda s: s["phase"] == "training" and s["round"] > rounds)

    assert network.committed_samples() > 0  # beside the running coordinator
    coordinator.interrupt()
    assert [p.wait(30.0) for p in (coordinator, ben, carl)] == [0, 0, 0], network.story([])
    assert "The run is stopped. The same command goes on." in coordinator.output
    assert all("this worker's part is saved" in p.output for p in (ben, carl))
    assert network.rows("SELECT COUNT(*) FROM events WHERE kind = 'RolledBack'") == [(0,)]
    network.committed_samples()
    [(stopped,)] = network.rows("SELECT data FROM events WHERE kind = 'Stopped'")
    at = msgspec.json.decode(stopped)["step"]

    network.configure(steps=at + 20)
    coordinator = network.coordinator()
    crew = [network.worker("ben"), network.worker("carl")]
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    [(issued,)] = network.rows("SELECT data FROM events WHERE kind = 'PlanIssued' ORDER BY id DESC LIMIT 1")
    assert msgspec.json.decode(issued)["step"] == at, "the run did not go on from where it was stopped"
    assert network.published()[-1].name == f"step-{at + 20:08d}"
    assert network.committed_samples() == network.rows("SELECT MAX(sample) FROM rounds")[0][0]


@pytest.mark.timeout(90)
def test_sigkill_of_a_replica_and_of_the_coordinator(network: Any) -> None:
    network.configure(steps=500)
    coordinator = network.coordinator()
    crew = {name: network.worker(name) for name in ("anna", "ben", "carl")}
    state = network.until(lambda s: s["round"] > 0 and s["phase"] == "training" and seated(s) == 3)

    pair = next(stage["replicas"] for stage in state["stages"] if len(stage["replicas"]) == 2)
    victim = next(p["name"] for p in state["peers"] if p["id"] == pair[0])
    crew.pop(victim).kill()
    network.event(f"{victim} is lost")
    rounds = network.until(lambda s: not peer(s, victim) and s["phase"] == "training")["round"]
    rounds = network.until(lambda s: s["round"] > rounds)["round"]

    coordinator.kill()
    before = network.committed_samples()
    assert before < 500 * SAMPLES_PER_STEP, "the run was over before the coordinator was killed"
    coordinator = network.coordinator()
    assert [p.wait(45.0) for p in (coordinator, *crew.values())] == [0, 0, 0], network.story([])
    assert network.published()[-1].name == "step-00000500"
    assert network.committed_samples() == network.rows("SELECT MAX(sample) FROM rounds")[0][0] > before


@pytest.mark.timeout(90)
def test_a_worker_that_was_killed_is_seated_again_beside_training(network: Any) -> None:
    network.configure(steps=100_000)
    network.coordinator()
    crew = {name: network.worker(name) for name in ("anna", "ben", "carl")}
    state = network.until(lambda s: s["round"] > 0 and s["phase"] == "training" and seated(s) == 3)
    pair = next(stage["replicas"] for stage in state["stages"] if len(stage["replicas"]) == 2)
    victim = next(p["name"] for p in state["peers"] if p["id"] == pair[0])
    crew[victim].kill()
    network.event(f"{victim} is lost")
    network.worker(victim)
    network.until(lambda s: s["phase"] == "training" and seated(s) == 3)


@pytest.mark.timeout(150)
def test_a_coordinator_killed_in_mid_training_goes_on_with_the_generation(network: Any) -> None:
    network.configure(steps=ENDLESS)
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben", "carl")]
    network.until(lambda s: s["round"] > 1 and s["phase"] == "training" and seated(s) == 3, 60.0)
    for _ in range(2):
        coordinator.kill()
        before = network.committed_samples()
        generation, leased = network.rows("SELECT MAX(generation), MAX(id) FROM ledger")[0]
        coordinator = network.coordinator()
        rounds = network.rows("SELECT MAX(round) FROM rounds")[0][0]
        network.until(lambda s, rounds=rounds: s["round"] > rounds + 1)
        [(first,)] = network.rows(f"SELECT changed FROM ledger WHERE id = {leased + 1}")
        [(opened,)] = network.rows("SELECT MAX(time) FROM events WHERE kind = 'RunOpened'")
        assert first - opened < 10.0, "the workers took too long to dial again"
        assert network.rows(f"SELECT DISTINCT generation FROM ledger WHERE id > {leased}") == [(generation,)]
    coordinator.interrupt()
    assert [p.wait(30.0) for p in (coordinator, *crew)] == [0, 0, 0, 0], network.story([])
    told = [kind for (kind,) in network.rows("SELECT kind FROM events")]
    assert told.count("RunOpened") == 3 and told.count("PeerJoined") == 3
    assert not {"RolledBack", "RoundRefused", "Faulted"} & set(told), network.story([])
    assert network.rows("SELECT * FROM ledger WHERE state = 'returned'") == []
    steps = [step for (step,) in network.rows("SELECT step FROM points WHERE train IS NOT NULL ORDER BY id")]
    assert steps == list(range(1, len(steps) + 1)), "a loss is missing or there twice"
    assert network.committed_samples() > before


@pytest.mark.timeout(120)
def test_the_demo_finishes(demo: Callable[..., Any], left_over: Callable[[Path], list[str]], tmp_path: Path) -> None:
    process = demo("--steps", "6")
    assert process.wait(80.0) == 0, process.output
    first, last = re.findall(r"Held-out loss ([0-9.]+) -> ([0-9.]+)", process.output)[0]
    assert float(last) < float(first)
    assert re.search(r"^Before: The ", process.output, re.MULTILINE)
    assert re.search(r"^After:  The ", process.output, re.MULTILINE)
    assert left_over(tmp_path / "demo") == []
    model = re.search(r"^The model: (.*)$", process.output, re.MULTILINE)
    assert model
    check_model(Path(model[1]))


@pytest.mark.timeout(120)
def test_an_interrupted_demo_is_resumed(
    demo: Callable[..., Any],
    left_over: Callable[[Path], list[str]],
    page_state: Callable[[str], dict[str, Any] | None],
    tmp_path: Path,
) -> None:
    process, folder = demo("--steps", str(ENDLESS)), tmp_path / "demo"
    deadline = time.monotonic() + 40.0
    while not ((page := re.search(r"Dashboard: (\S+)", process.output)) and (page_state(page[1]) or {}).get("step")):
        assert process.popen.poll() is None and time.monotonic() < deadline, process.output
        time.sleep(0.1)
    process.interrupt()
    assert process.wait(30.0) == 130, process.output
    assert process.output.splitlines()[-1] == f"Stopped. Go on with: potluck demo --resume --keep {folder}"
    assert left_over(folder) == []

    with closing(sqlite3.connect(folder / "coordinator" / "run.sqlite")) as db:
        [(stopped,)] = db.execute("SELECT data FROM events WHERE kind = 'Stopped'").fetchall()
    assert not verify(folder / "coordinator" / "run.sqlite").problems
    steps = msgspec.json.decode(stopped)["step"] + 3
    path = folder / "run.yaml"
    path.write_text(dump(msgspec.structs.replace(load(path), steps=steps)), encoding="utf-8")
    process = demo("--resume")
    assert process.wait(60.0) == 0, process.output
    assert f"The model: {folder / 'coordinator' / 'checkpoints'}/step-{steps:08d}" in process.output
    report = verify(folder / "coordinator" / "run.sqlite")
    assert not report.problems and not report.leased.samples, "\n".join(report.lines())
    assert left_over(folder) == []


def peer(state: dict[str, Any], name: str) -> dict[str, Any]:
    return next((p for p in state["peers"] if p["name"] == name), {})


def seated(state: dict[str, Any]) -> int:
    return sum(p["stage"] is not None for p in state["peers"])
