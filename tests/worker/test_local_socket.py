"""The way from an owner's terminal to the worker: who may, what comes back, and rubbish."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from potluck.protocol.errors import ConfigError, UnreachableError
from potluck.worker import local_socket
from potluck.worker.local_socket import PORT_FILE, SOCKET, Ended, ask, last_end, listening, note_end
from potluck.worker.status import Answer, Ask

posix = pytest.mark.skipif(os.name != "posix", reason="no Unix sockets")


class Worker:
    def __init__(self) -> None:
        self.asked: list[Ask] = []

    def serve(self, asked: Ask) -> Answer:
        self.asked.append(asked)
        if asked.what == "fail":
            raise ConfigError("no", hint="Do it otherwise.")
        if asked.what == "break":
            raise ZeroDivisionError
        return Answer()


@pytest.fixture(params=["unix", "port"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "port":
        monkeypatch.setattr(local_socket, "is_unix", lambda path: False)
    elif os.name != "posix":
        pytest.skip("no Unix sockets")
    return str(request.param)


async def test_a_question_and_its_answer(tmp_path: Path, way: str) -> None:
    worker = Worker()
    async with listening(tmp_path, worker.serve):
        assert await asyncio.to_thread(ask, tmp_path, Ask(what="pause", until=5.0)) == Answer()
        assert (worker.asked[0].what, worker.asked[0].until) == ("pause", 5.0)
        with pytest.raises(UnreachableError, match="no") as refused:
            await asyncio.to_thread(ask, tmp_path, Ask(what="fail"))
        assert refused.value.hint == "Do it otherwise."
        with pytest.raises(UnreachableError, match="failed to answer"):
            await asyncio.to_thread(ask, tmp_path, Ask(what="break"))
        file = tmp_path / (SOCKET if way == "unix" else PORT_FILE)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []


async def test_without_a_worker_or_with_a_dead_one(tmp_path: Path, way: str) -> None:
    for _ in range(2):
        with pytest.raises(UnreachableError, match="no worker runs") as error:
            ask(tmp_path, Ask(what="status"))
        assert error.value.code == "absent"
        if way == "unix":  # a worker that was killed leaves its socket behind
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(tmp_path / SOCKET)) if not (tmp_path / SOCKET).exists() else None
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                (tmp_path / PORT_FILE).write_text(json.dumps({"port": free.getsockname()[1], "token": "x"}))
    async with listening(tmp_path, Worker().serve):
        assert await asyncio.to_thread(ask, tmp_path, Ask(what="status")) == Answer()


async def test_a_port_needs_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "is_unix", lambda path: False)
    worker = Worker()
    async with listening(tmp_path, worker.serve):
        place = json.loads((tmp_path / PORT_FILE).read_text())
        for token in ("", "x" * 32, "ü"):
            (tmp_path / PORT_FILE).write_text(json.dumps({**place, "token": token}))
            with pytest.raises(UnreachableError, match="somebody else"):
                await asyncio.to_thread(ask, tmp_path, Ask(what="finish"))
    assert worker.asked == []


@posix
@pytest.mark.parametrize(
    "line",
    [b"\n", b"{}\n", b"\xff\xfe\n", b'{"what": 7}\n', b'{"what": "status", "more": 1}\n', b"x" * 300_000 + b"\n"],
)
async def test_rubbish_reaches_nobody(tmp_path: Path, line: bytes) -> None:
    worker = Worker()
    async with listening(tmp_path, worker.serve):
        reader, writer = await asyncio.open_unix_connection(tmp_path / SOCKET)
        try:
            writer.write(line)
            said = await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            said = b""
        writer.close()
        assert worker.asked == [] and (not said or b"does not understand" in said)
        assert await asyncio.to_thread(ask, tmp_path, Ask(what="status")) == Answer()


@posix
@pytest.mark.parametrize("said", [b"", b"hello\n", b'{"status": 5}\n', b"x" * 300_000])
async def test_who_answers_with_rubbish_is_no_worker(tmp_path: Path, said: bytes) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(said)
        writer.close()

    async with await asyncio.start_unix_server(converse, tmp_path / SOCKET):
        with pytest.raises(UnreachableError, match="cannot be asked"):
            await asyncio.to_thread(ask, tmp_path, Ask(what="status"))


@posix
async def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    async with listening(folder, Worker().serve):
        assert await asyncio.to_thread(ask, folder, Ask(what="status")) == Answer()
        assert (folder / PORT_FILE).exists()


def test_how_the_last_one_ended(tmp_path: Path) -> None:
    assert last_end(tmp_path) is None
    note_end(tmp_path, Ended(at=5.0, text="the disk is full", error=True))
    assert last_end(tmp_path) == Ended(at=5.0, text="the disk is full", error=True)
    note_end(tmp_path, None)
    assert last_end(tmp_path) is None
