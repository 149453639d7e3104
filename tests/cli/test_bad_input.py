"""Every error a user can make is one line on stderr that says what to do; nothing on disk is changed by it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import grpc
import msgspec
import pytest
from click.testing import CliRunner

from potluck.cli import main
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import convert, dump
from potluck.protocol.errors import ConfigError
from potluck.protocol.hello import STREAM
from potluck.protocol.identity import Identity
from potluck.protocol.meter import Meter
from potluck.protocol.ticket import Ticket
from potluck.protocol.tls import dial_pinned, split_address
from potluck.worker.control import Control, Offer
from potluck.worker.daemon import _prepare_torch

SEED = 7
TINY: dict[str, Any] = {
    "name": "tiny",
    "steps": 10,
    "model": {"d_model": 32, "layers": 2, "heads": 2, "rotary_dim": 8, "seq_len": 16},
    "data": {"source": "corpus.txt", "vocab_size": 300, "heldout_share": 0.1},
    "pipeline": {"stages": 1, "microbatch_size": 2, "microbatches": 2},
}
COMMAND = [sys.executable, "-m", "potluck"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line a user error is, without our name before it."""
        lines = [line for line in self.err.splitlines() if not line.endswith("%")]  # progress
        assert self.code == 1 and len(lines) == 1 and lines[0].startswith("potluck: "), self
        assert re.search(r"[.`] \S", lines[0]), f"no hint: {lines[0]}"
        return lines[0].removeprefix("potluck: ")


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, text=True, **pipes)


def end(process: subprocess.Popen[str], seconds: float = 60.0) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds:g} s: {process.communicate()}") from None
    return Ended(process.returncode, out, err)


def potluck(folder: Path, *arguments: object) -> Ended:
    return end(start(folder, *arguments))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder``."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def write_run(folder: Path, **sections: Any) -> None:
    lines = [f"Dish {i} came with {i * 7} spoons and left with {i * 13 % 97} crumbs.\n" for i in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "run.yaml").write_text(dump(convert(TINY | sections)), encoding="utf-8")


class Coordinator:
    """A live one, in ``folder``."""

    def __init__(self, folder: Path, *options: object, data_dir: str | Path = "data") -> None:
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        place = ["--data-dir", data_dir, "--ready-file", ready]
        self.process = start(folder, "coordinator", "up", "run.yaml", *place, *options)
        deadline = time.monotonic() + 30.0
        while not ready.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, end(self.process, 1.0)
            time.sleep(0.05)
        up = json.loads(ready.read_text(encoding="utf-8"))
        self.page: str = up["page"]
        self.host, self.port = split_address(up["address"])
        self.text: str = up["ticket"]
        self.ticket = Ticket.decode(self.text, time.time())

    def other_ticket(self, **changes: Any) -> str:
        return msgspec.structs.replace(self.ticket, **changes).encode()

    def peers(self) -> list[str]:
        with urlopen(f"{self.page}api/state", timeout=10.0) as answer:
            return [peer["name"] for peer in json.load(answer)["peers"]]

    def until_peers(self, names: list[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (here := self.peers()) != names:
            assert time.monotonic() < deadline, f"{here} instead of {names} after {seconds:g} s"
            time.sleep(0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


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


# The command line itself.


@pytest.mark.timeout(30)
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from potluck.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'grpc', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    asked = potluck(tmp_path, "--help")
    assert asked.code == 0 and asked.err == "" and "potluck worker join TICKET" in asked.out


def commands(command: click.Command, *path: str) -> Iterator[tuple[list[str], click.Command]]:
    yield [*path], command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *path, name)


@pytest.mark.timeout(30)
def test_every_command_explains_itself() -> None:
    for path, command in commands(main):
        shown = CliRunner().invoke(main, [*path, "--help"])
        assert shown.exit_code == 0
        assert command.help and command.help.split("\n")[0][:30] in shown.output, path
        for option in command.params:
            assert not isinstance(option, click.Option) or all(name in shown.output for name in option.opts), path


# run.yaml.

BAD_RUNS = {
    "unknown key": ("stpes: 3", "run.yaml: unknown key `stpes`. Did you mean `steps`?"),
    "unknown key below": ("model: {haeds: 4}", "run.yaml: unknown key `model.haeds`. Did you mean `model.heads`?"),
    "wrong type": ("steps: many", "run.yaml: steps: Expected `int`, got `str`. "),
    "wrong type below": ("optimizer: {lr: fast}", "run.yaml: optimizer.lr: Expected `float`, got `str`. "),
    "out of range": ("data: {vocab_size: 10}", "run.yaml: data.vocab_size: Expected `int` >= 300. "),
    "not a section": ("model: 3", "run.yaml: model must be a mapping of keys to values, not 3. "),
    "not a mapping": ("- steps", "run.yaml: the file must be a mapping of keys to values, not ['steps']. "),
    "no such preset": ("sync: {preset: potlock}", "run.yaml: sync.preset: Invalid enum value 'potlock'. "),
    "not YAML": ("steps: 3\nmodel: {d_model: 3", "run.yaml, line 2: not YAML "),
    "does not add up": ("pipeline: {stages: 9}", "pipeline.stages 9 exceeds model.layers 4. "),
    "no text": ("data: {source: nowhere.txt}", "cannot read nowhere.txt: No such file or directory. "),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_wrong_run_file_is_refused(tmp_path: Path, name: str) -> None:
    text, expected = BAD_RUNS[name]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data").error.startswith(expected)
    made = {path for path, content in tree(tmp_path).items() if content is not None}
    assert made <= {"run.yaml", "data/run.lock"}
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == text


@pytest.mark.timeout(30)
def test_missing_and_present_run_files(tmp_path: Path) -> None:
    done = potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data")
    assert done.error == "run.yaml: no such file. Write one with: potluck coordinator init run.yaml"
    assert tree(tmp_path) == {}
    assert potluck(tmp_path, "coordinator", "init", "run.yaml").code == 0
    before = tree(tmp_path)
    assert potluck(tmp_path, "coordinator", "init", "run.yaml").error == "run.yaml is there already. Name another file."
    assert tree(tmp_path) == before


@pytest.mark.timeout(60)
def test_a_run_keeps_what_it_was_started_with(tmp_path: Path) -> None:
    write_run(tmp_path)
    up = Coordinator(tmp_path)
    up.close()
    (tmp_path / "corpus.txt").unlink()
    for section, value in {"data": {**TINY["data"], "vocab_size": 301}, "optimizer": {"lr": 0.5}}.items():
        (tmp_path / "run.yaml").write_text(dump(convert(TINY | {section: value})), encoding="utf-8")
        before = tree(tmp_path / "data" / "corpus")
        error = potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data").error
        assert error.startswith(f"run.yaml's `{section}` is not what this run was started with. Put it back, or ")
        assert tree(tmp_path / "data" / "corpus") == before
    (tmp_path / "run.yaml").write_text(dump(convert(TINY | {"steps": 99})), encoding="utf-8")
    again = Coordinator(tmp_path)
    again.close()
    assert again.ticket.run == up.ticket.run


# Tickets.


@pytest.mark.timeout(30)
def test_tickets_that_are_none(tmp_path: Path) -> None:
    good = Ticket(url="127.0.0.1:9", fingerprint="0" * 64, run="run", secret="secret", expires=2**40).encode()
    old = msgspec.structs.replace(Ticket.decode(good, 0.0), expires=1000).encode()
    wrong = {
        "hello": "this is not a potluck ticket. A ticket starts with potluck1-",
        good[:-5]: "the ticket is damaged: a part is missing or mistyped. Copy the whole line again",
        old: "the ticket has expired. Ask the operator for a new ticket",
    }
    for text, expected in wrong.items():
        assert potluck(tmp_path, "worker", "join", text, "--data-dir", "data").error == expected
    assert tree(tmp_path) == {}
    # Nobody listens there: a key is made, no more.
    assert potluck(tmp_path, "worker", "join", good, "--data-dir", "data").error.startswith("nobody listens at ")
    assert set(tree(tmp_path)) == {"data", "data/identity.pem", "data/identity.pem.lock"}


# Ports, folders, disks.


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Coordinator]:
    write_run(tmp_path)
    up = Coordinator(tmp_path)
    yield up
    up.close()


@pytest.mark.timeout(60)
def test_what_is_in_use_stays_in_use(tmp_path: Path, live: Coordinator) -> None:
    def up(*options: object) -> str:
        return potluck(tmp_path, "coordinator", "up", "run.yaml", *options).error

    page_port = live.page.rstrip("/").rpartition(":")[2]
    assert up("--data-dir", "other", "--port", live.port).startswith(
        f"cannot listen on 127.0.0.1:{live.port}: the port is taken or not allowed. "
    )
    assert up("--data-dir", "other", "--http-port", page_port).endswith(
        f"port {page_port}: already in use. Choose another port with --http-port (0 takes any free one)"
    )
    assert up("--data-dir", "data") == (
        "another coordinator is running on data. Stop it, or give this one its own --data-dir."
    )
    assert live.peers() == []


@pytest.mark.timeout(60)
def test_folders_that_cannot_be_written(tmp_path: Path, live: Coordinator) -> None:
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    there = ("--data-dir", "file/data")
    key = potluck(tmp_path, "worker", "join", live.text, *there).error
    assert key == "cannot write the key file file/data/identity.pem: Not a directory. Choose a writable --data-dir"
    run = potluck(tmp_path, "coordinator", "up", "run.yaml", *there).error
    assert run == "cannot open the lock file file/data/run.lock: Not a directory. Choose a writable --data-dir"
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("data")} == {
        k: v for k, v in before.items() if not k.startswith("data")
    }
    place = ("--data-dir", "other", "--ready-file", "file/ready")
    ready = potluck(tmp_path, "coordinator", "up", "run.yaml", *place).error
    assert ready.startswith("file/ready: cannot be written (Not a directory). Name a file in a writable folder")
    empty = potluck(tmp_path, "sample", ".").error
    assert empty.startswith(". holds no published model: config.json is missing. ")


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
async def test_a_disk_fills_under_the_coordinator(tmp_path: Path, small_disk: Path) -> None:
    write_run(tmp_path)
    filler = fill(small_disk, leave=8192)
    up = ("coordinator", "up", "run.yaml", "--data-dir", small_disk / "data")
    ended = await asyncio.to_thread(potluck, tmp_path, *up)
    assert re.match(r"cannot write the corpus in .*: No space left on device. Free some space there", ended.error)
    filler.unlink()

    first = await asyncio.to_thread(Coordinator, tmp_path, data_dir=small_disk / "data")
    fill(small_disk)
    async with member(first.ticket, Identity.generate()):  # its arrival has to be written down
        ended = await asyncio.to_thread(end, first.process, 20.0)
    path = small_disk / "data" / "run.sqlite"
    hint = "Free some space and start again: nothing acknowledged is lost."
    assert ended.error == f"{path}: the disk is full. {hint}"

    filler.unlink()
    again = await asyncio.to_thread(Coordinator, tmp_path, data_dir=small_disk / "data")
    async with member(again.ticket, Identity.generate()) as welcome:
        assert welcome.peer_id
    again.close()


@pytest.mark.timeout(60)
def test_a_disk_fills_under_a_worker(tmp_path: Path, small_disk: Path) -> None:
    write_run(tmp_path)
    up = Coordinator(tmp_path)
    try:
        fill(small_disk, leave=16384)
        ended = end(start(tmp_path, "worker", "join", up.text, "--data-dir", small_disk / "data"))
        assert re.search(r"No space left on device.*\. Free some space", ended.error)
        assert up.process.poll() is None
    finally:
        up.close()


# Workers that the coordinator refuses, and rubbish in everybody's ears.


@pytest.mark.timeout(90)
async def test_a_worker_stays_while_others_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, coordinator={"wait_for": 9})
    live = await asyncio.to_thread(Coordinator, tmp_path)
    port = free_port()
    own = ("--name", "first", "--data-dir", "first", "--port", port)
    first = start(tmp_path, "worker", "join", live.text, *own)
    try:
        await asyncio.to_thread(live.until_peers, ["first"], 40.0)
        before = tree(tmp_path / "first")
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
            name: start(tmp_path, "worker", "join", ticket, "--data-dir", folder, *options)
            for name, (folder, ticket, *options) in refused.items()
        }
        said = {name: (await asyncio.to_thread(end, process)).error for name, process in processes.items()}
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
        ended = await asyncio.to_thread(end, first, 20.0)
        assert ended.code == 0 and ended.err == "", ended
        assert tree(tmp_path / "first").keys() >= before.keys()
    finally:
        first.kill()
        live.close()


@pytest.mark.timeout(60)
async def test_rubbish_does_not_stop_the_coordinator(live: Coordinator) -> None:
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


# The demo, a machine without the device asked for, and an installation without torch.


@pytest.mark.timeout(60)
def test_a_demo_that_cannot_begin(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine", encoding="utf-8")
    before = tree(tmp_path)
    few = potluck(tmp_path, "demo", "--workers", 1, "--stages", 2, "--keep", "new")
    assert few.error == "1 workers cannot hold 2 stages. Each stage needs a worker: --workers 2"
    other = potluck(tmp_path, "demo", "--keep", "foreign")
    assert other.error == f"{foreign} is not empty and not a demo's. Name another folder with --keep."
    nothing = potluck(tmp_path, "demo", "--resume", "--keep", "foreign")
    assert nothing.error == f"{foreign} holds no run to go on with. Start one: potluck demo"
    file = potluck(tmp_path, "demo", "--keep", "foreign/letter.txt")
    assert file.error == f"{foreign / 'letter.txt'}: Not a directory. Name a writable folder with --keep."
    assert tree(tmp_path) == before

    # A demo that never got up stands in nobody's way.
    for _ in range(2):
        gone = potluck(tmp_path, "demo", "--plain", "--data", "nowhere.txt", "--keep", "new")
        assert re.match("the coordinator ended: cannot read .*nowhere.txt: No such file or directory", gone.error)
        assert gone.error.endswith(f" Its log: {tmp_path / 'new' / 'logs' / 'coordinator.log'}")


@pytest.mark.timeout(60)
def test_a_device_that_is_not_there() -> None:
    import torch

    with pytest.raises(ConfigError, match="this machine cannot compute on 'abacus'") as caught:
        _prepare_torch(torch.get_num_threads(), "abacus")
    assert caught.value.hint == "Use --device cpu, or cuda where torch finds a GPU."


@pytest.mark.timeout(30)
def test_an_installation_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    code = "import sys; sys.modules['torch'] = None; from potluck.cli import main; main(['sample', '.'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    error = Ended(done.returncode, done.stdout, done.stderr).error
    assert error == "torch is not installed. Install it: pip install 'potluck[worker]'"
