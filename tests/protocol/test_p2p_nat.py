"""Two workers behind routers that let nobody in: network namespaces, real packets, public-looking addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.protocol import confined, route
from potluck.protocol.errors import UnreachableError
from potluck.protocol.identity import Identity
from potluck.protocol.p2pd import Daemon, DaemonConfig

from .conftest import Rig, needs_hivemind, until
from .test_p2p import never
from .test_relay import pass_frames

RELAYS = 4  # as many must see a peer from outside before libp2p believes that address
PREFIX = f"nat{os.getpid()}"
ROUTER = """
table ip home {
  chain out { type nat hook postrouting priority 100; oifname "wan" masquerade PORTS; }
  chain through { type filter hook forward priority 0; policy drop; ct state established,related accept;
    iifname "lan" accept; }
  chain here { type filter hook input priority 0; policy drop; ct state established,related accept;
    iifname "lan" accept; }
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    needs_hivemind,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nft")),
        reason="needs root, and the programs ip and nft",
    ),
]


class Country:
    """Hosts ``r1`` to ``r4`` at public addresses, and ``h1`` and ``h2``, each behind a router."""

    def __init__(self, ports: str) -> None:
        self._made: list[str] = []
        self._space("net")
        self._ip("net", "link add middle type bridge")
        self._ip("net", "link set middle up")
        for i in range(1, RELAYS + 1):
            self._public(f"r{i}", f"45.10.0.1{i}")
        for i in (1, 2):
            router, home = f"n{i}", f"h{i}"
            self._public(router, f"45.10.0.2{i}")
            self._space(home)
            self._ip(router, f"link add lan type veth peer name eth netns {PREFIX}{home}")
            self._ip(router, "link set lan up")
            self._ip(router, f"addr add 192.168.{i}.1/24 dev lan")
            self._ip(home, "link set eth up")
            self._ip(home, f"addr add 192.168.{i}.2/24 dev eth")
            self._ip(home, f"route add default via 192.168.{i}.1")
            inside = ["ip", "netns", "exec", PREFIX + router]
            subprocess.run(
                [*inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True, capture_output=True
            )
            subprocess.run([*inside, "nft", "-f", "-"], input=ROUTER.replace("PORTS", ports), text=True, check=True)

    def close(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=True)

    def _space(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", PREFIX + name], check=True)
        self._made.append(PREFIX + name)
        self._ip(name, "link set lo up")

    def _public(self, name: str, address: str) -> None:
        self._space(name)
        self._ip("net", f"link add {name} type veth peer name wan netns {PREFIX}{name}")
        self._ip("net", f"link set {name} master middle up")
        self._ip(name, "link set wan up")
        self._ip(name, f"addr add {address}/24 dev wan")

    def _ip(self, name: str, command: str) -> None:
        subprocess.run(["ip", "-n", PREFIX + name, *command.split()], check=True)


@pytest.fixture(params=["", "fully-random"], ids=["ports kept", "random ports"])
def ports(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How the routers choose ports. Every daemon starts in the host at whose address it shall listen."""
    country = Country(request.param)
    starter = tmp_path / "start.py"
    starter.write_text(
        f"""
import os, re, runpy, sys
listen = next(word for word in sys.argv if word.startswith("-hostAddrs="))
ip = re.search(r"/ip4/([0-9.]+)/", listen)[1]
name = f"h{{ip.split('.')[2]}}" if ip.startswith("192") else f"r{{ip[-1]}}"
os.execvp("ip", ["ip", "netns", "exec", {PREFIX!r} + name, sys.executable, {confined.__file__!r}, *sys.argv[1:]])
"""
    )
    monkeypatch.setattr(confined, "__file__", str(starter))
    monkeypatch.setattr(route, "LOOKS_SECONDS", (3.0,))
    yield request.param
    country.close()


def at(ip: str) -> tuple[str, ...]:
    return f"/ip4/{ip}/tcp/4001", f"/ip4/{ip}/udp/4001/quic-v1"


async def test_a_hole_is_punched_where_routers_keep_ports(ports: str) -> None:
    rig = Rig("p2p")
    try:
        for i in range(1, RELAYS + 1):
            config = DaemonConfig(listen=at(f"45.10.0.1{i}"), serves=True)
            rig.closing.append(Daemon(Identity.generate(), config, "/x", lambda _: never()))
        relays: Any = rig.closing[:]
        await asyncio.gather(*(relay.start() for relay in relays))
        known = tuple(relay.addresses[0] for relay in relays)
        a, b = (rig.transport(name, rig.config()) for name in "ab")
        await b.listen(rig.accepted.put_nowait)
        await a.use_p2p(DaemonConfig(listen=at("192.168.1.2"), relays=known))
        await b.use_p2p(DaemonConfig(listen=at("192.168.2.2"), relays=known))
        async with asyncio.timeout(30):
            while rig.accepted.empty():
                try:
                    near = await a.dial(b.peer_id, [f"/p2p/{b.p2p_id}"])
                except UnreachableError:
                    await asyncio.sleep(0.5)
        far = await rig.accepted.get()
        assert near.path().kind == "relayed"
        await pass_frames(near, far, 5)
        if ports:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                await pass_frames(near, far, 1)
                assert near.path().kind == "relayed"
        else:
            await until(lambda: near.path().kind == "punched")
        await pass_frames(near, far, 5)
        assert rig.errors == []
    finally:
        await rig.close()
