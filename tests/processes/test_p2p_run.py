"""A run whose workers cannot dial each other and have no relay but one of libp2p."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potluck.protocol.config import convert, dump

from .conftest import TINY, write_text

STEPS = 8
SAMPLES_PER_STEP = 4  # 2 microbatches of 2


@pytest.mark.timeout(120)
@pytest.mark.skipif(importlib.util.find_spec("hivemind") is None, reason="hivemind is not installed")
def test_a_run_over_libp2p_alone(network: Any, tmp_path: Path) -> None:
    """``lan: false`` makes loopback no address that others are told of."""
    command = [sys.executable, "-m", "potluck.protocol.p2p_relay", "--key", str(tmp_path / "relay.key")]
    relay = subprocess.Popen([*command, "--listen", "/ip4/127.0.0.1/tcp/0"], stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout
        meeting = relay.stdout.readline().strip()
        coordinator = {**TINY["coordinator"], "relay": False, "lan": False, "p2p_relays": [meeting]}
        data = {**TINY["data"], "source": str(write_text(tmp_path / "corpus.txt"))}
        raw = {**TINY, "steps": STEPS, "data": data, "coordinator": coordinator}
        (tmp_path / "run.yaml").write_text(dump(convert(raw)), encoding="utf-8")
        up = network.coordinator()
        crew = [network.worker(name) for name in ("anna", "ben")]
        assert [p.wait(90.0) for p in (up, *crew)] == [0, 0, 0], network.story([])
        assert network.committed_samples() == STEPS * SAMPLES_PER_STEP
    finally:
        relay.terminate()
        relay.wait(10)
