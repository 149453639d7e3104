"""Runs of real processes that are struck: finished, verified, and the same weights as if nothing had happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import pytest

from .catalogue import every, proofs
from .judge import Result
from .pool import ROOT, Pool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")
SCENARIOS = [pytest.param(s.name, id=s.name, marks=() if s.ci else pytest.mark.slow) for s in every()]
KILLS = [pytest.param(200, id="200"), pytest.param(1000, id="1000", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Result]]]:
    """All chosen scenarios, begun at once, two at a time."""
    chosen = [
        i.callspec.params["scenario"] for i in request.session.items if "results" in getattr(i, "fixturenames", ())
    ]
    pool = Pool(tmp_path_factory.mktemp("faults"), chosen)
    yield pool.results
    pool.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_survives(scenario: str, results: Mapping[str, Future[Result]]) -> None:
    result = results[scenario].result()
    replay = f"python -m tests.faults --exactly '{scenario}'"
    assert not result.problems, "\n".join([*result.problems, f"again: {replay}", result.story])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", [s.name for s in proofs()])
def test_the_oracle_finds_training_that_is_not_what_was_said(
    scenario: str, results: Mapping[str, Future[Result]]
) -> None:
    problems = results[scenario].result().problems
    assert any("has other weights after the round" in problem for problem in problems), problems
    assert "the published model is not what the oracle comes to" in problems


def test_every_failpoint_is_in_a_scenario() -> None:
    paths = [path for name in ("coordinator", "worker") for path in (ROOT / name).rglob("*.py")]
    calls = re.compile(r'failpoint(?:_async)?\("([a-z._]+)"')
    placed = {name for path in paths for name in calls.findall(path.read_text(encoding="utf-8"))}
    assert placed == {fault.point for scenario in every() for fault in scenario.faults}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kills", KILLS)
def test_nothing_acknowledged_is_lost(kills: int) -> None:
    """SIGKILL, again and again, of a process that writes batches to a run's file."""
    command = [sys.executable, "-m", "tests.faults.kills", str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["lost"] == 0 and told["acknowledged"] > kills
