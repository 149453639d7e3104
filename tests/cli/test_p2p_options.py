"""What the command line says of libp2p, where it is installed and where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from potluck.cli import main
from potluck.protocol import p2pd
from potluck.protocol.errors import ConfigError
from potluck.protocol.identity import Identity
from potluck.protocol.p2p_relay import best, placed
from potluck.protocol.ticket import Ticket
from potluck.worker import offer
from potluck.worker.offer import WorkerConfig

TICKET = Ticket(url="127.0.0.1:1", fingerprint="ab" * 32, run="r", secret="s", expires=2**33)


def said(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if hivemind were not installed."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'hivemind'")

    monkeypatch.setattr(p2pd, "_hivemind", missing)
    monkeypatch.setattr(offer, "is_installed", lambda: False)


def test_a_relay_without_libp2p_says_what_to_install(without: None, tmp_path: Path) -> None:
    done = said("relay", "p2p", "--port", "0", "--data-dir", str(tmp_path))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("potluck: no libp2p here")
    assert ".[p2p]" in line


def test_a_port_cannot_be_asked_for_without_libp2p(without: None, tmp_path: Path) -> None:
    """Before anything else: nobody is dialled, no torch loaded."""
    done = said("worker", "join", TICKET.encode(), "--map-port", "--data-dir", str(tmp_path))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("potluck: --map-port needs libp2p, which is not installed")
    assert ".[p2p]" in line


def test_no_port_is_asked_for_unless_the_owner_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offer, "is_installed", lambda: True)
    made = WorkerConfig(data_dir=tmp_path)
    assert not made.decided(TICKET, Identity.generate()).map_port
    assert WorkerConfig(data_dir=tmp_path, map_port=True).decided(TICKET, Identity.generate()).map_port
    assert "Ask the router" in said("worker", "join", "--help").output


@pytest.mark.parametrize(
    ("host", "port", "advertise", "word"),
    [
        ("nowhere", 4001, "", "--host"),
        ("0.0.0.0", 0, "relay.example:4001", "--advertise"),
        ("0.0.0.0", 4001, "relay.example:70000", "--advertise"),
        ("0.0.0.0", 4001, "a" * 300, "--advertise"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(host: str, port: int, advertise: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        placed(host, port, advertise)


def test_where_a_relay_is() -> None:
    made = placed("0.0.0.0", 4001, "192.0.2.7")
    assert made.listen == ("/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1")
    assert made.announce == ("/ip4/192.0.2.7/tcp/4001", "/ip4/192.0.2.7/udp/4001/quic-v1")
    assert made.serves
    assert not made.map_port
    assert placed("::", 4001, "[2001:db8::1]:9").announce[0] == "/ip6/2001:db8::1/tcp/9"
    found = ["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/192.0.2.7/tcp/1/p2p/x", "/ip6/::1/tcp/1/p2p/x"]
    assert best(found) == found[1:2]
    assert best(found[:1]) == found[:1]
