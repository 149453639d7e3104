"""Runs whose workers cannot dial each other: with no relay but one of libp2p, and with one of libp2p that is dead."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potluck.protocol.config import convert, dump
from potluck.protocol.multiaddr import id_of

from .conftest import TINY, write_text

STEPS = 8
SAMPLES_PER_STEP = 4  # 2 microbatches of 2


INSTALLED = importlib.util.find_spec("hivemind") is not None


def run(network: Any, folder: Path, **coordinator: Any) -> list[str]:
    """To its end; what each worker said. ``lan: false`` makes loopback no address that others are told of."""
    data = {**TINY["data"], "source": str(write_text(folder / "corpus.txt"))}
    place = {**TINY["coordinator"], "lan": False, **coordinator}
    raw = {**TINY, "steps": STEPS, "data": data, "coordinator": place}
    (folder / "run.yaml").write_text(dump(convert(raw)), encoding="utf-8")
    up = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    assert [p.wait(90.0) for p in (up, *crew)] == [0, 0, 0], network.story([])
    assert network.committed_samples() == STEPS * SAMPLES_PER_STEP
    return [p.output for p in crew]


@pytest.mark.timeout(120)
@pytest.mark.skipif(not INSTALLED, reason="hivemind is not installed")
def test_a_run_over_libp2p_alone(network: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "potluck", "relay", "p2p", "--data-dir", str(tmp_path / "relay")]
    relay = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout
        meeting = relay.stdout.readline().removeprefix("Relay:").strip()
        said = run(network, tmp_path, relay=False, p2p_relays=[meeting])
        assert all("reach this one through a relay of libp2p" in output for output in said)
    finally:
        relay.terminate()
        relay.wait(10)


@pytest.mark.timeout(120)
def test_a_run_goes_on_over_grpc_when_libp2p_does_not(network: Any, tmp_path: Path) -> None:
    """The relay of libp2p is dead; or, where hivemind is not installed, that is said in one line."""
    said = run(network, tmp_path, p2p_relays=[f"/ip4/127.0.0.1/tcp/9/p2p/{id_of(bytes(32))}"])
    for output in said:
        assert "reach this one through a relay\n" in output
        assert output.count("no libp2p here") == (0 if INSTALLED else 1), output
