"""Servers are known by the fingerprint of their certificate, and by nothing else."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from potluck.protocol.errors import IdentityError, UnreachableError
from potluck.protocol.tls import Certificate, dial_pinned, fetch_certificate, split_address, start_server

pytestmark = pytest.mark.timeout(30)

TIMEOUT = timedelta(seconds=5)


async def echo(request: bytes, context: Any) -> bytes:
    return request


HANDLER = grpc.method_handlers_generic_handler("t.T", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, Certificate]]:
    certificate = Certificate.generate()
    running, port = await start_server("127.0.0.1", 0, [HANDLER], certificate)
    yield f"127.0.0.1:{port}", certificate
    await running.stop(None)


async def test_the_right_fingerprint_opens_a_channel(server: tuple[str, Certificate]) -> None:
    address, certificate = server
    channel = await dial_pinned(address, certificate.fingerprint, TIMEOUT)
    assert await channel.unary_unary("/t.T/Echo", None, None)(b"dish") == b"dish"
    await channel.close(None)


async def test_another_certificate_is_refused(server: tuple[str, Certificate]) -> None:
    address, _ = server
    with pytest.raises(UnreachableError, match="another server answers") as caught:
        await dial_pinned(address, Certificate.generate().fingerprint, TIMEOUT)
    assert caught.value.code == "certificate"


async def test_nobody_listens(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    with pytest.raises(UnreachableError, match=address):
        await dial_pinned(address, "0" * 64, TIMEOUT)


async def test_something_else_listens() -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    for answer, code in ((shout, "not-tls"), (silent, "silent")):
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(UnreachableError) as caught:
            await fetch_certificate("127.0.0.1", port, timedelta(seconds=0.3))
        assert caught.value.code == code
        listener.close()
        await listener.wait_closed()


async def test_a_taken_port_is_an_error(server: tuple[str, Certificate]) -> None:
    address, certificate = server
    _, port = split_address(address)
    with pytest.raises(UnreachableError, match="cannot listen") as caught:
        await start_server("127.0.0.1", port, [HANDLER], certificate)
    assert caught.value.code == "port"
    assert "0 takes any free one" in caught.value.hint


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:99999", "unix:/x:1", "a b:1", "h:x"])
def test_what_is_not_an_address(address: str) -> None:
    with pytest.raises(UnreachableError) as caught:
        split_address(address)
    assert caught.value.code == "address"


def test_addresses() -> None:
    assert split_address("potluck.example:70") == ("potluck.example", 70)
    assert split_address("[::1]:70") == ("::1", 70)


def test_the_fingerprint_outlives_a_restart(tmp_path: Path) -> None:
    first, second = (Certificate.load_or_create(tmp_path / "tls") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert stat.S_IMODE((tmp_path / "tls" / "tls.pem").stat().st_mode) & 0o077 == 0
    assert Certificate.generate().fingerprint != first.fingerprint


def test_a_damaged_certificate_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tls.pem").touch(0o600)
    with pytest.raises(IdentityError):
        Certificate.load_or_create(tmp_path)
