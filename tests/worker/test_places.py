from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from potluck.protocol.errors import UnreachableError
from potluck.protocol.meter import Meter
from potluck.worker import files, places
from potluck.worker.files import Files
from potluck.worker.places import download, is_near, is_public

DATA = bytes(range(256)) * 5000
NAME = hashlib.sha256(DATA).hexdigest()
fetch = partial(download, name=NAME, nbytes=len(DATA), lan=True, record=lambda n: None)


@dataclass
class Server:
    """What is at which path, whether parts can be asked for, and what was."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append((self.path, wanted))
            if self.path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[self.path])
                self.end_headers()
                return
            data = state.files.get(self.path)
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if data is None or (begin and begin >= len(data)):
                self.send_error(404 if data is None else 416)
                return
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[begin:])

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("there", [0, 1000, len(DATA) - 1])
def test_a_download_goes_on_where_it_stopped(server: Server, tmp_path: Path, there: int, ranges: bool) -> None:
    server.files["/a"], server.ranges = DATA, ranges
    part = tmp_path / "part"
    part.write_bytes(DATA[:there])
    fetch(f"{server.url}/a", part=part)
    assert part.read_bytes() == DATA
    assert server.asked == [("/a", f"bytes={there}-" if there else "")]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (DATA[:-1] + b"x", "not the file"),
        (DATA + b"x", "longer than"),
        (b"", "ended after 0"),
        (DATA[:5], "after 5 of"),
    ],
)
def test_what_is_wrong_is_refused(server: Server, tmp_path: Path, data: bytes, what: str) -> None:
    server.files["/a"] = data
    part = tmp_path / "part"
    with pytest.raises(UnreachableError, match=what):
        fetch(f"{server.url}/a", part=part)
    if what.startswith(("not", "longer")):
        assert not part.exists()


def test_a_part_that_is_longer_than_the_file_there_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = DATA
    part = tmp_path / "part"
    part.write_bytes(DATA + b"of something else")
    with pytest.raises(UnreachableError, match="has no byte"):
        fetch(f"{server.url}/a", part=part)
    fetch(f"{server.url}/a", part=part)
    assert part.read_bytes() == DATA


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/a", "data:,a", "memory://a", "http:///a", "x"]
)
def test_other_schemes_are_not_opened(tmp_path: Path, url: str) -> None:
    with pytest.raises(UnreachableError):
        fetch(url, part=tmp_path / "part")
    assert not (tmp_path / "part").exists() or not (tmp_path / "part").read_bytes()


def test_a_host_that_is_not_public_is_asked_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = DATA
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        with pytest.raises(UnreachableError, match="not a public address"):
            download(f"{url}/a", NAME, len(DATA), tmp_path / "part", lan=False, record=lambda n: None)
    assert server.asked == []


def test_nor_one_that_a_public_host_sends_to(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/a"], server.redirects["/b"] = DATA, f"{server.url.replace('127.0.0.1', 'localhost')}/a"
    monkeypatch.setattr(places, "is_public", lambda address: len(server.asked) == 0)  # only the first host is
    with pytest.raises(UnreachableError, match="not a public address"):
        download(f"{server.url}/b", NAME, len(DATA), tmp_path / "part", lan=False, record=lambda n: None)
    assert [path for path, _ in server.asked] == ["/b"]
    server.redirects["/c"] = "file:///etc/passwd"
    with pytest.raises(UnreachableError):
        fetch(f"{server.url}/c", part=tmp_path / "part")


def test_which_addresses_are_public() -> None:
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8")))
    near = (
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:192.168.0.1",
        "0.0.0.0",
    )
    assert not any(map(is_public, (*near, "224.0.0.1", "100.64.0.1")))
    assert is_near("127.0.0.1")
    assert not is_near("8.8.8.8")


class Coordinators(Files):
    """What the coordinator would have sent."""

    def __init__(self, *, host: str, locations: tuple[str, ...]) -> None:
        super().__init__(lambda: pytest.fail("no line"), Meter(), lambda: False)
        self.coordinator, self.locations = host, locations
        self.sent: list[str] = []

    async def _fetch(self, name: str, target: Path, nbytes: int) -> None:
        self.sent.append(name)
        self.write(target)

    def write(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(DATA)


def test_locations_are_tried_in_order_before_the_coordinator(server: Server, tmp_path: Path) -> None:
    server.files |= {f"/wrong/{NAME}": DATA[:-1] + b"x", f"/right/{NAME}": DATA}
    locations = tuple(f"{server.url}/{folder}" for folder in ("none", "wrong", "right/"))
    run = Coordinators(host="127.0.0.1", locations=locations)
    asyncio.run(run.fetch(NAME, tmp_path / "shards" / NAME, len(DATA)))
    assert [path.split("/")[1] for path, _ in server.asked] == ["none", "wrong", "right"]
    assert (tmp_path / "shards" / NAME).read_bytes() == DATA
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [NAME]
    assert run.sent == []
    booked = sum(traffic.nbytes for traffic in run._meter.snapshot() if traffic.direction == "in")
    assert 2 * len(DATA) < booked < 2.2 * len(DATA)


def test_the_coordinator_has_what_no_location_has(server: Server, tmp_path: Path) -> None:
    run = Coordinators(host="127.0.0.1", locations=(f"{server.url}/none",))
    for number in range(files.PLACE_TRIES + 3):
        asyncio.run(run.fetch(NAME, tmp_path / str(number), len(DATA)))
    assert len(run.sent) == files.PLACE_TRIES + 3
    assert len(server.asked) == files.PLACE_TRIES  # then it is not asked any more


def test_a_public_coordinator_points_nobody_at_a_private_host(server: Server, tmp_path: Path) -> None:
    server.files[f"/{NAME}"] = DATA
    run = Coordinators(host="8.8.8.8", locations=(server.url,))
    asyncio.run(run.fetch(NAME, tmp_path / NAME, len(DATA)))
    assert server.asked == []
    assert run.sent == [NAME]


def test_file_systems_get_nothing_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec: Any = pytest.importorskip("fsspec")
    opened: list[tuple[str, dict[str, Any]]] = []
    (tmp_path / "there").write_bytes(DATA)

    def fake(url: str, mode: str, **options: Any) -> Any:
        opened.append((url, options))
        return fsspec.core.OpenFile(fsspec.filesystem("file"), str(tmp_path / "there"), mode)

    monkeypatch.setattr(fsspec, "open", fake)
    for url in ("s3://bucket/a", "hf://datasets/somebody/corpus/a"):
        part = tmp_path / "part"
        part.write_bytes(DATA[:77])
        fetch(url, part=part)
        assert part.read_bytes() == DATA
    assert [options for _, options in opened] == [{"anon": True}, {"token": False}]
