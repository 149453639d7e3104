"""A relay of libp2p is tried before anybody is told of it; ``potluck relay p2p``."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from potluck.protocol import p2p_relay
from potluck.protocol.identity import Identity
from potluck.protocol.multiaddr import check_relay
from potluck.protocol.p2pd import Daemon, DaemonConfig, DaemonError

from .conftest import TCP, free_port, needs_hivemind

pytestmark = [pytest.mark.timeout(90), needs_hivemind]
RELAY = DaemonConfig(listen=TCP.listen, serves=True)


async def test_a_relay_lets_more_through_than_the_small_limit() -> None:
    relay = await p2p_relay.start(Identity.generate(), RELAY)
    try:
        assert await p2p_relay.passes(relay.addresses[0])
    finally:
        await relay.close()


async def test_what_relays_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p2p_relay, "TRIAL_PATIENCE", timedelta(seconds=4))
    ordinary = Daemon(Identity.generate(), TCP, "/x", p2p_relay._refuse)
    await ordinary.start()
    try:
        assert not await p2p_relay.passes(ordinary.addresses[0])
    finally:
        await ordinary.close()


async def test_a_relay_with_the_small_limit_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def second(relay: str) -> bool:
        tried.append(relay)
        return len(tried) == 2

    monkeypatch.setattr(p2p_relay, "passes", second)
    relay = await p2p_relay.start(Identity.generate(), RELAY)
    await relay.close()
    assert len(tried) == 2

    async def never(relay: str) -> bool:
        tried.append(relay)
        return False

    monkeypatch.setattr(p2p_relay, "passes", never)
    monkeypatch.setattr(p2p_relay, "MOST_STARTS", 1)
    with pytest.raises(DaemonError, match="does not let enough through"):
        await p2p_relay.start(Identity.generate(), RELAY)


def said_by(process: subprocess.Popen[str]) -> str:
    """The first line of a relay's that a run is told of."""
    assert process.stdout
    return process.stdout.readline().removeprefix("Relay:").strip()


def test_the_command_prints_its_address_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    """Started again it is the same relay; and what cannot be is said in a line."""
    command = [sys.executable, "-m", "potluck", "relay", "p2p", "--host", "127.0.0.1", "--data-dir", str(tmp_path)]
    ids = []
    for advertise in ("", "relay.example:4242"):
        port = str(free_port()) if advertise else "0"
        process = subprocess.Popen(
            [*command, "--port", port, "--advertise", advertise], stdout=subprocess.PIPE, text=True
        )
        try:
            line = said_by(process)
            check_relay(line)
            ids.append(line.rpartition("/")[2])
            if advertise:
                assert line.startswith("/dns/relay.example/tcp/4242/p2p/")
                second = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, check=False)
                assert (second.returncode, "uses the key" in second.stderr) == (1, True)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stdout
            assert "p2p_relays: [...]" in process.stdout.read()
        finally:
            process.kill()
            process.wait()
    assert ids[0] == ids[1]
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    wrong = subprocess.run([*command, "--port", port], capture_output=True, text=True, check=False)
    taken.close()
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith(f"potluck: cannot listen on 127.0.0.1:{port} (TCP)")


async def test_a_call_that_nobody_takes_ends() -> None:
    caller = Daemon(Identity.generate(), TCP, "/x", p2p_relay._refuse)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await p2p_relay._call(caller, p2p_relay.Places(caller.peer, ()))
