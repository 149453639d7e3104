"""Full disks, workers that the coordinator refuses, and rubbish in everybody's ears."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from potluck.protocol import control_pb2 as pb
from potluck.protocol.hello import STREAM
from potluck.protocol.identity import Identity
from potluck.protocol.meter import Meter
from potluck.protocol.ticket import Ticket
from potluck.protocol.tls import dial_pinned, split_address
from potluck.worker.control import Control, Offer

SEED = 7


@asynccontextmanager
async def member(ticket: Ticket, identity: Identity) -> AsyncIterator[pb.Welcome]:
    """A valid worker, as far as its control stream goes."""
    control = Control(ticket, identity, Meter(), list, lambda view: None)
    control.start(Offer(name="valid", device="cpu", memory_gb=8.0, speed=1.0, addresses=("127.0.0.1:1",)))
    try:
        async with asyncio.timeout(20.0):
            yield await control.welcome
    finally:
        await control.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "small-disk", str(place)]
    if (done := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no small disk here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all room on ``disk`` but ``leave`` bytes."""
    place = disk / "filler"
    with place.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return place


@pytest.mark.timeout(60)
async def test_a_disk_is_too_small_for_the_coordinator(cli: Any, tmp_path: Path, small_disk: Path) -> None:
    """What happens to a run when it fills up later is in tests/processes/test_disk_full.py."""
    cli.write_run(tmp_path)
    filler = fill(small_disk, leave=8192)
    up = ("coordinator", "up", "run.yaml", "--data-dir", small_disk / "data")
    ended = await asyncio.to_thread(cli.potluck, tmp_path, *up)
    assert re.match(r"cannot write the corpus in .*: No space left on device. Free some space there", ended.error)

    filler.unlink()
    again = await asyncio.to_thread(cli.Coordinator, tmp_path, data_dir=small_disk / "data")
    async with member(again.ticket, Identity.generate()) as welcome:
        assert welcome.peer_id
    again.close()


@pytest.mark.timeout(60)
def test_a_disk_fills_under_a_worker(cli: Any, tmp_path: Path, small_disk: Path) -> None:
    cli.write_run(tmp_path)
    up = cli.Coordinator(tmp_path)
    try:
        fill(small_disk, leave=16384)
        ended = cli.end(cli.start(tmp_path, "worker", "join", up.text, "--data-dir", small_disk / "data"))
        assert re.search(r"No space left on device.*\. Free some space", ended.error)
        assert up.process.poll() is None
    finally:
        up.close()


# Workers that the coordinator refuses, and rubbish in everybody's ears.


@pytest.mark.timeout(90)
async def test_a_worker_stays_while_others_are_refused(cli: Any, tmp_path: Path) -> None:
    cli.write_run(tmp_path, coordinator={"wait_for": 9})
    live = await asyncio.to_thread(cli.Coordinator, tmp_path)
    port = free_port()
    own = ("--name", "first", "--data-dir", "first", "--port", port)
    first = cli.start(tmp_path, "worker", "join", live.text, *own)
    try:
        await asyncio.to_thread(live.until_peers, ["first"], 40.0)
        before = cli.tree(tmp_path / "first")
        before.pop("control.sock", None)  # goes with the process
        refused = {
            "secret": ("data-1", live.other_ticket(secret="other")),
            "run": ("data-2", live.other_ticket(run="other")),
            "memory": ("data-3", live.text, "--memory-gb", "0.0001"),
            "certificate": ("data-4", live.other_ticket(fingerprint="0" * 64)),
            "lock": ("first", live.text),
            "key": ("copy", live.text),
        }
        (tmp_path / "copy").mkdir()
        shutil.copy(tmp_path / "first" / "identity.pem", tmp_path / "copy")
        processes = {
            name: cli.start(tmp_path, "worker", "join", ticket, "--data-dir", folder, *options)
            for name, (folder, ticket, *options) in refused.items()
        }
        said = {name: (await asyncio.to_thread(cli.end, process)).error for name, process in processes.items()}
        ask = "Ask the operator for a new ticket"
        assert said.pop("memory").startswith("the smallest stage of this run needs ")
        assert said == {
            "secret": f"the ticket's secret is not this run's. {ask}.",
            "run": f"the ticket is for another run. {ask}.",
            "certificate": f"another server answers at {live.host}:{live.port}: its certificate is not the one in the"
            f" ticket. {ask}, and do not go on if the address should be right",
            "lock": "another worker on this machine uses the key first/identity.pem."
            " Stop it, or give this one its own --data-dir",
            "key": "another worker with this key is connected. Give this one a key of its own: --data-dir",
        }
        await asyncio.to_thread(shout, live.host, port)
        assert first.poll() is None and live.peers() == ["first"]
        first.send_signal(signal.SIGINT)
        ended = await asyncio.to_thread(cli.end, first, 20.0)
        assert ended.code == 0 and ended.err == "", ended
        assert cli.tree(tmp_path / "first").keys() >= before.keys()
    finally:
        first.kill()
        live.close()


@pytest.mark.timeout(60)
async def test_rubbish_does_not_stop_the_coordinator(cli: Any, live: Any) -> None:
    ticket = live.ticket
    page = split_address(live.page.removeprefix("http://").rstrip("/"))
    await asyncio.to_thread(shout, live.host, live.port)
    await asyncio.to_thread(shout, *page)

    hello = pb.Hello(protocol=10**6, run="x" * 1000, addresses=["no address"] * 1000, memory_gb=float("nan"))
    chance = random.Random(SEED)
    for first in (
        *(chance.randbytes(n) for n in (1, 64, 4096)),
        bytes(2 << 20),
        pb.Up(heartbeat=pb.Heartbeat(state="training")).SerializeToString(),
        pb.Up(hello=hello).SerializeToString(),
        b"",
    ):
        answers = await answers_to(ticket, first)
        assert [a.WhichOneof("body") for a in answers] in (["challenge"], ["challenge", "refuse"]), (SEED, first[:80])

    identity = Identity.generate()
    async with member(ticket, identity) as welcome:
        assert welcome.peer_id == identity.peer_id
        await asyncio.to_thread(live.until_peers, ["valid"], 10.0)
    assert live.process.poll() is None


async def answers_to(ticket: Ticket, first: bytes) -> list[pb.Down]:
    """What the coordinator says to a control stream that begins with these bytes."""
    channel = await dial_pinned(ticket.url, ticket.fingerprint)
    stream = channel.stream_stream(STREAM, response_deserializer=pb.Down.FromString)()
    answers = []
    try:
        async with asyncio.timeout(5.0):
            answers.append(await stream.read())
            await stream.write(first)
            while (answer := await stream.read()) is not grpc.aio.EOF:
                answers.append(answer)
    except grpc.RpcError:
        pass
    finally:
        await channel.close()
    return answers


def shout(host: str, port: int) -> None:
    """Random bytes at a port: bare, and inside TLS."""
    chance = random.Random(SEED)
    for n in (1, 100, 100_000):
        with suppress(OSError), socket.create_connection((host, port), timeout=5.0) as line:
            line.sendall(chance.randbytes(n))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    for n in (1, 100, 100_000):
        with (
            suppress(OSError),
            socket.create_connection((host, port), timeout=5.0) as line,
            context.wrap_socket(line) as secured,
        ):
            secured.sendall(chance.randbytes(n))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
