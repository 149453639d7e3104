"""``potluck estimate`` against what a real run's meters count."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from potluck.protocol.config import convert, dump
from potluck.protocol.frames import Purpose
from potluck.worker.estimate import estimate

RUN = {
    "name": "estimated",
    "zstd": False,  # what it takes off depends on the data
    "steps": 40,
    "model": {"d_model": 64, "layers": 2, "heads": 4, "rotary_dim": 16, "seq_len": 32},
    "data": {"vocab_size": 300, "heldout_share": 0.1},
    "pipeline": {"stages": 2, "microbatch_size": 2, "microbatches": 2},
    "activations": {"forward": "int4:tile=32", "backward": "int8:tile=64"},
    "eval": {"every": 10, "samples": 7},
    "checkpoint": {"publish_rounds": 10**9},
    "coordinator": {"wait_for": 4},
}
RULES = {
    "top-k and fragments": {
        "every": 4,
        "fragments": 2,
        "density": 0.5,
        "topk": 0.1,
        "chunk": 1024,
        "bits": 4,
        "delay": 1,
    },
    "a coin": {"preset": "gptjt", "coin": 0.2},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rule", RULES)
def test_the_estimate_is_what_the_meters_count(network: Any, rule: str) -> None:
    """Activations, gradients and weights, each within 3 %."""
    raw = {**RUN, "sync": RULES[rule], "data": {**RUN["data"], "source": str(network.folder / "corpus.txt")}}
    path = network.folder / "run.yaml"
    path.write_text(dump(convert(raw)), encoding="utf-8")
    command = [sys.executable, "-m", "potluck", "estimate", str(path), "--replicas", "2", "--json"]
    estimated = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben", "carl", "dora")]
    assert [p.wait(50.0) for p in (coordinator, *crew)] == [0] * 5, network.story([])
    assert network.rows("SELECT COUNT(*) FROM events WHERE kind IN ('RolledBack', 'PlanMade')")[0][0] <= 1
    tokens = network.committed_samples() * RUN["model"]["seq_len"]
    assert tokens == RUN["steps"] * estimated["tokens"]
    sent = dict(network.rows("SELECT purpose, SUM(nbytes) FROM traffic WHERE direction = 'out' GROUP BY purpose"))
    for purpose, per_token in estimated["nbytes"].items():
        assert sent[purpose] / tokens == pytest.approx(per_token, rel=0.03), purpose


def test_one_replica_of_a_stage_exchanges_nothing_however_large_it_is() -> None:
    model = {"d_model": 4096, "layers": 28, "heads": 16, "rotary_dim": 64, "seq_len": 2048}
    raw = {"model": model, "pipeline": {"stages": 2}, "sync": {"preset": "diloco"}}
    found = estimate(convert({**raw, "checkpoint": {"keepers": 0}}), 50400, 1)
    assert found.nbytes[Purpose.WEIGHTS] == 0
    assert estimate(convert(raw), 50400, 1).nbytes[Purpose.WEIGHTS] > 0  # its keepers must hear what it did
    assert max(m.parameters for m in found.machines) > 2**31
