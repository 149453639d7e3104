"""What became of a run that was struck: what must be true of it, what was seen, and how long it stood still."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from potluck.coordinator.verify import verify
from potluck.protocol.config import convert
from potluck.protocol.identity import Identity

from .crew import Crew, Stuck
from .scenario import Scenario
from .zygote import spawn

DISTURBED = ("Rerouted", "RolledBack", "RunOpened", "StoodStill")
GAPS = 6  # between steps, that are looked at for the one that a fault made
SENTENCES = 500
KEYS = 6


@dataclass(kw_only=True)
class Result:
    """``recovery``: seconds from the fault until the run moves again; None if there was nothing left to do."""

    name: str
    what: str
    layout: str
    expect: str
    observed: str = ""
    seconds: float = 0.0
    recovery: float | None = None
    detected: float | None = None  # from a death to when the coordinator knows of it
    redispatched: float | None = None  # from there to the next step's loss
    reopened: float | None = None  # from a coordinator's new start to the next lease or step
    problems: list[str] = field(default_factory=list)
    story: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Place:
    """A folder for scenarios: the text, the keys, and what undisturbed runs came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.text = folder / "corpus.txt"
        lines = (
            f"Guest {i} of the evening brought {i * 7} plums and took home {i * 13 % 97} jars.\n"
            for i in range(SENTENCES)
        )
        self.text.write_text("\n".join(lines), encoding="utf-8")
        made = [folder / f"key{i}.pem" for i in range(KEYS)]
        self.keys = sorted(made, key=lambda path: Identity.load_or_create(path).peer_id)
        self._calm: dict[tuple[str, int, str], str] = {}
        self._count = 0

    def run(self, scenario: Scenario) -> Result:
        """One scenario from start to verdict; its folder stays if it failed."""
        self._count += 1
        folder = self.folder / f"scenario-{self._count}"
        result = Result(name=scenario.name, what=scenario.what, layout=scenario.layout.name, expect=scenario.expect)
        started = time.monotonic()
        crew = Crew(scenario, folder, self.text, self.keys)
        try:
            crew.run()
        except (Stuck, AssertionError) as error:
            result.problems.append(str(error) or repr(error))
        result.seconds = time.monotonic() - started
        self._judge(scenario, crew, result)
        if result.problems:
            result.story = story(crew)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _judge(self, scenario: Scenario, crew: Crew, result: Result) -> None:
        wrong = result.problems.append
        try:
            events = [
                (at, kind, json.loads(data)) for at, kind, data in crew.rows("SELECT time, kind, data FROM events")
            ]
            points = [at for (at,) in crew.rows("SELECT time FROM points WHERE train IS NOT NULL ORDER BY time")]
            report = verify(crew.folder / "coordinator" / "run.sqlite")
        except Exception as error:
            wrong(f"the run's file: {error!r}")
            return
        for finding in report.lines() if report.problems else []:
            wrong(finding)
        fired = crew.all_fired()
        if len(fired) < len(scenario.faults) + len(scenario.troubles):
            wrong(f"only {len(fired)} faults happened")
        kinds = [kind for _, kind, _ in events]
        result.observed = observed(kinds, crew)
        result.recovery = recovery(fired, events, points)
        lost = [at for at, kind, _ in events if kind == "Rerouted"]
        deaths = [f["time"] for f in fired if f["do"] in ("kill", "stop")]
        if lost and deaths and deaths[0] < lost[0]:
            result.detected = lost[0] - deaths[0]
        if lost:
            result.redispatched = min((at - lost[-1] for at in points if at > lost[-1]), default=None)
        if scenario.expect == "again" and kinds.count("RunOpened") > 1:
            opened = [at for at, kind, _ in events if kind == "RunOpened"][1]
            result.reopened = min((at - opened for at in points if at > opened), default=None)
        if not expected(scenario, kinds):
            wrong(f"expected: {scenario.expect}; observed: {result.observed}")
        if result.problems:
            return
        if scenario.layout.name == "2x1" and report.samples != scenario.steps * 4:
            wrong(f"{report.samples} samples, not {scenario.steps * 4}")
        for name, process in crew.processes.items():
            if "Traceback" in process.output:
                wrong(f"{name} shows a traceback")
        model = model_of(crew, scenario.steps)
        if model is None:
            wrong("no model is published")
            return
        self._weights(scenario, crew, model, result)

    def _weights(self, scenario: Scenario, crew: Crew, model: str, result: Result) -> None:
        """Bit for bit those of the oracle and, with one replica, of a run that nothing happened to."""
        answer = crew.folder / "oracle.json"
        child = spawn("oracle", crew.folder / "oracle.log", partial(ask, scenario, crew, answer))
        while child.poll() is None:
            time.sleep(0.005)
        if child.code:
            result.problems.append(f"the oracle failed: {child.output}")
            return
        told = json.loads(answer.read_text())
        result.problems += told["problems"]
        if told["model"] != model:
            result.problems.append("the published model is not what the oracle comes to")
        struck = scenario.faults or scenario.troubles
        if scenario.layout.name == "2x1" and struck and not told["moments_lost"]:
            key = scenario.layout.name, scenario.steps, repr(scenario.changes.get("sync"))
            if key not in self._calm:
                calm = replace(scenario, faults=(), troubles=(), expect="on")
                self._calm[key] = self._model_of_calm(calm)
            if self._calm[key] != model:
                result.problems.append("the weights are not those of an undisturbed run")

    def _model_of_calm(self, calm: Scenario) -> str:
        folder = self.folder / f"calm-{self._count}"
        crew = Crew(calm, folder, self.text, self.keys)
        crew.run()
        model = model_of(crew, calm.steps)
        assert model is not None, "the undisturbed run has no model"
        shutil.rmtree(folder, ignore_errors=True)
        return model


def ask(scenario: Scenario, crew: Crew, answer: Path) -> None:
    """In a process of its own: torch computes here."""
    from .oracle import Oracle, Round, read_record

    oracle = Oracle(convert(scenario.config(str(crew.folder))), crew.folder / "coordinator" / "corpus")
    rows = crew.rows("SELECT generation, step, sample, digests FROM rounds ORDER BY step")
    rounds = [
        Round(generation=g, step=s, sample=n, digests=tuple(map(bytes.fromhex, json.loads(d)))) for g, s, n, d in rows
    ]
    oracle.replay({peer: read_record(crew.folder / f"{n}.record") for peer, n in crew.peers.items()}, rounds)
    tensors = {name: (list(t.shape), t.contiguous().numpy().tobytes()) for name, t in oracle.weights.items()}
    answer.write_text(
        json.dumps({"problems": oracle.problems, "moments_lost": oracle.moments_lost, "model": fingerprint(tensors)})
    )


def fingerprint(tensors: dict[str, tuple[list[int], bytes]]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        shape, data = tensors[name]
        total.update(f"{name}{shape}".encode())
        total.update(data)
    return total.hexdigest()


def model_of(crew: Crew, step: int) -> str | None:
    """A fingerprint of the published model's tensors: read as bytes, so that the zygote does without torch."""
    folder = crew.folder / "coordinator" / "checkpoints" / f"step-{step:08d}"
    if not (folder / "model.safetensors.index.json").exists():
        return None
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:end]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                tensors[name] = (entry["shape"], data[end + start : end + stop])
    return fingerprint(tensors)


def expected(scenario: Scenario, kinds: list[str]) -> bool:
    back, plans, opened = kinds.count("RolledBack"), kinds.count("PlanIssued"), kinds.count("RunOpened")
    match scenario.expect:
        case "on":
            return not back and opened == 1
        case "without":
            return "Rerouted" in kinds and not back and opened == 1
        case "held":
            return {"Rerouted", "Held"} <= set(kinds) and not back
        case "back":
            return back > 0 and opened == 1
        case "anew":
            return plans > 1
        case "again":
            return opened > 1
        case "still":
            return "StoodStill" in kinds and not back
        case "divided":
            return "Redivided" in kinds
    return True


def observed(kinds: list[str], crew: Crew) -> str:
    """What the journal tells, in a few words."""
    words = {
        "Rerouted": "went on without one",
        "Held": "held",
        "Degraded": "degraded",
        "RolledBack": "back to the last round",
        "StoodStill": "stood still",
        "RoundRefused": "round refused",
        "PublishFailed": "publishing failed",
        "Redivided": "layers divided anew",
        "DivisionFailed": "a division failed",
        "Faulted": "fault reported",
    }
    said = [f"{text} {n}x" if (n := kinds.count(kind)) > 1 else text for kind, text in words.items() if kind in kinds]
    if (plans := kinds.count("PlanIssued")) > 1:
        said.append(f"{plans} plans")
    if (opened := kinds.count("RunOpened")) > 1:
        said.append(f"opened {opened}x")
    said += [f"{name} started {n}x" for name, n in crew.starts.items() if n > 1 and name != "coordinator"]
    said += [f"{name} left dialling" for name in crew.left_dialling]
    return ", ".join(said) or "nothing"


def recovery(fired: list[dict[str, Any]], events: list[tuple[float, str, Any]], points: list[float]) -> float | None:
    """Seconds until the run moves again: see the report's conditions."""
    if not fired:
        return None
    since: float = fired[0]["time"]
    rounds = [at for at, kind, _ in events if kind == "RoundCommitted"]
    marks = sorted((*points, *rounds))
    led_to = next((at for at, kind, _ in events if at > since and kind in DISTURBED), None)
    if led_to is not None:
        return min((at - since for at in marks if at > led_to), default=None)
    gaps = [(end - begin, end) for begin, end in itertools.pairwise([since, *(at for at in marks if at > since)])]
    return max(gaps[:GAPS])[1] - since if gaps else None


def story(crew: Crew) -> str:
    """For a failure's message."""
    try:
        said = [text for (text,) in crew.rows("SELECT text FROM events ORDER BY id")]
    except Exception as error:
        said = [repr(error)]
    logs = [f"--- {name} ({p.code}):\n{p.output}" for name, p in crew.processes.items()]
    return "\n".join([str(crew.folder), *said, *logs])
