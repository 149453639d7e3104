"""The lines between workers and their coordinator break, and are dialled again."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from potluck.protocol.ticket import Ticket

ENDLESS = 10**6


class Switchboard:
    """Passes every connection on to ``target``, and cuts them all on demand."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.lines = target, list[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.server.accept()[0]
                try:
                    far = socket.create_connection(self.target)
                except OSError:
                    near.close()
                    continue
                self.lines += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        lines, self.lines = self.lines, []
        for line in lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()


@pytest.fixture
def switched(network: Any) -> Iterator[tuple[Any, Switchboard]]:
    """A network whose workers reach the coordinator through a switchboard."""
    network.configure(steps=ENDLESS)
    network.coordinator()
    ticket = Ticket.decode(network._ticket, 0.0)
    host, _, port = ticket.url.rpartition(":")
    board = Switchboard((host, int(port)))
    network._ticket = msgspec.structs.replace(ticket, url=board.address).encode()
    yield network, board
    board.server.close()
    board.cut()


@pytest.mark.timeout(120)
def test_lines_that_break_cost_nothing(switched: tuple[Any, Switchboard]) -> None:
    network, board = switched
    crew = [network.worker(name) for name in ("anna", "ben")]
    rounds = network.until(lambda s: s["round"] > 1 and s["phase"] == "training", 60.0)["round"]
    for _ in range(3):
        board.cut()
        rounds = network.until(lambda s, rounds=rounds: s["round"] > rounds + 30)["round"]
    network.processes[0].interrupt()
    assert [p.wait(30.0) for p in (network.processes[0], *crew)] == [0, 0, 0], network.story([])
    told = [kind for (kind,) in network.rows("SELECT kind FROM events")]
    assert told.count("PeerJoined") == 2 and not {"RolledBack", "Faulted"} & set(told), network.story([])
    assert sum(p.output.count("the stream broke") for p in crew) >= 3, "no line was cut"
    assert network.rows("SELECT * FROM ledger WHERE state = 'returned'") == []
    assert network.committed_samples() > 0
