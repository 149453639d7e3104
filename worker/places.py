"""Where shards lie beside the coordinator: web servers, S3, the Hugging Face hub. Nobody there is trusted: what arrives
is cut off at the size and compared with the hash that the manifest says.

A manifest comes from the coordinator, whom a volunteer does not know well. So an address is only opened where it cannot
be meant for somebody else: no other schemes, no credentials of this machine, and no host of a network that is not
public, unless the coordinator is in such a network itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ..protocol.errors import StateError, UnreachableError

PIECE_NBYTES = 256 * 1024
SECONDS = 30.0  # for a connection, and for each piece
# Of file systems that are opened by fsspec: nothing of this machine's user goes there.
ANONYMOUS: dict[str, dict[str, Any]] = {"s3": {"anon": True}, "hf": {"token": False}}


def download(url: str, name: str, nbytes: int, part: Path, *, lan: bool, record: Callable[[int], None]) -> None:
    """The file ``url`` into ``part``, which must then be ``nbytes`` long with the SHA-256 ``name``; goes on where
    ``part`` ends. Blocks. ``lan``: whether hosts of private networks may be asked. ``record`` hears of bytes that came.

    ``UnreachableError`` if it is not to be had there; ``part`` is then gone if what arrived is not what it should be.
    ``StateError`` if ``part`` cannot be written.
    """
    try:
        with part.open("ab") as file:
            begin = file.tell()
            with _opened(url, begin, lan) as (source, at):
                file.truncate(at)
                file.seek(at)
                size = at
                while size <= nbytes and (data := _read(source)):
                    record(len(data))
                    size += len(data)
                    if size <= nbytes:
                        _write(file, data)
        if size > nbytes:
            raise _Wrong(f"{url} is longer than {nbytes} bytes")
        if size < nbytes:
            raise UnreachableError(f"{url} ended after {size} of {nbytes} bytes")
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != name:
                raise _Wrong(f"{url} is not the file that the manifest describes")
    except _Wrong as error:
        part.unlink(missing_ok=True)
        raise UnreachableError(str(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnreachableError(f"{url}: {getattr(error, 'reason', None) or error}") from None


class _Wrong(Exception):
    """Bytes that no going on will make right."""


def _read(source: IO[bytes]) -> bytes:
    return source.read(PIECE_NBYTES)


def _write(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise StateError(f"{file.name}: {error}", hint="Free some space: --data-dir names the folder.") from None


@contextlib.contextmanager
def _opened(url: str, begin: int, lan: bool) -> Iterator[tuple[IO[bytes], int]]:
    """The file's bytes, and from where on they are: ``begin``, or 0 where a server does not know of parts."""
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        request = urllib.request.Request(url, headers={"User-Agent": "potluck"})
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        try:
            answer = _opener(lan).open(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 416:  # beyond its end: what is there already is too long, or another file's
                raise
            raise _Wrong(f"{url} has no byte {begin}") from None
        with answer:
            range_ = answer.headers.get("Content-Range", "")
            went_on = answer.status == 206 and range_.startswith(f"bytes {begin}-")
            yield answer, begin if went_on else 0
    elif scheme in ANONYMOUS:
        try:
            import fsspec
        except ImportError as error:
            raise UnreachableError(f"{url} needs the package fsspec") from error
        try:
            file = fsspec.open(url, "rb", **ANONYMOUS[scheme]).open()
        except Exception as error:  # each file system has errors of its own
            raise UnreachableError(f"{url}: {error}") from None
        with file:
            file.seek(begin)
            yield file, begin
    else:
        raise UnreachableError(f"{url}: only https, http, s3 and hf are opened")


def _opener(lan: bool) -> urllib.request.OpenerDirector:
    """Of http and https alone, without proxies; every host, also one that is redirected to, is looked at."""

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(_Http, request, lan=lan)  # type: ignore[arg-type]

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(_Https, request, lan=lan, context=ssl.create_default_context())  # type: ignore[arg-type]

    opener = urllib.request.OpenerDirector()
    for handler in (
        Plain(),
        Secure(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Http(http.client.HTTPConnection):
    def __init__(self, host: str, *, lan: bool, **rest: Any) -> None:
        super().__init__(host, **rest)
        self._lan = lan

    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self._lan)


class _Https(http.client.HTTPSConnection):
    def __init__(self, host: str, *, lan: bool, context: ssl.SSLContext, **rest: Any) -> None:
        super().__init__(host, context=context, **rest)
        self._lan, self._tls = lan, context

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(connect(self.host, self.port, self._lan), server_hostname=self.host)


def connect(host: str, port: int, lan: bool) -> socket.socket:
    """A connection to an address of ``host`` that was looked at: between a look and a dial a name may change."""
    problem: OSError = OSError(f"{host} has no address")
    for _, _, _, _, (address, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not (lan or is_public(str(address))):
            problem = OSError(f"{host} is at {address}, which is not a public address")
            continue
        try:
            return socket.create_connection((str(address), port), timeout=SECONDS)
        except OSError as error:
            problem = error
    raise problem


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's to reach, and not of a home, a company, or this machine."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or found
    return inner.is_global and not inner.is_multicast


def is_near(host: str) -> bool:
    """Whether ``host`` is in a network that is not public; False if it has no address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return bool(found) and not any(is_public(str(address)) for _, _, _, _, (address, *_) in found)
