"""A relay of libp2p is tried before anybody is told of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from potluck.protocol import p2p_relay
from potluck.protocol.identity import Identity
from potluck.protocol.multiaddr import check_relay
from potluck.protocol.p2pd import Daemon, DaemonConfig, DaemonError

from .conftest import TCP, needs_hivemind

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


def test_the_command_prints_its_address_and_ends_on_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "potluck.protocol.p2p_relay", "--key", str(tmp_path / "key")]
    process = subprocess.Popen([*command, "--listen", TCP.listen[0]], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline().strip()
    check_relay(line)
    process.terminate()
    assert process.wait(10) == 0
    wrong = subprocess.run([*command, "--listen", "/ip4/nowhere"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith("p2p_relay: no libp2p here")


async def test_a_call_that_nobody_takes_ends() -> None:
    caller = Daemon(Identity.generate(), TCP, "/x", p2p_relay._refuse)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await p2p_relay._call(caller, p2p_relay.Places(caller.peer, ()))
