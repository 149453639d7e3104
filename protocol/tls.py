"""TLS without a certificate authority: self-signed certificates, known by their fingerprint."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import re
import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from .errors import IdentityError, UnreachableError
from .identity import read_private, write_private

SERVER_NAME = "potluck"
_LIFETIME = datetime.timedelta(days=3650)
_MAX_MESSAGE_NBYTES = 1024 * 1024 + 64 * 1024

GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    # Else a second server binds the same port without an error and takes half of the clients.
    ("grpc.so_reuseport", 0),
    # Peers are dialled straight; and every channel gets a connection of its own.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_NBYTES),
    # Home routers forget quiet connections and dead machines say nothing: ask every 15 s, from both ends,
    # and never punish the other end for asking.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%a-z]{2,64}\]")
_PORT = re.compile(r"[0-9]{1,5}")


def fingerprint_of(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()


class Certificate:
    """A self-signed certificate (ECDSA P-256, 10 years) and its key, as one PEM text."""

    def __init__(self, pem: bytes) -> None:
        self._pem = pem
        self._key = load_pem_private_key(pem, password=None)
        self._certificate = x509.load_pem_x509_certificate(pem)
        self.der: bytes = self._certificate.public_bytes(Encoding.DER)
        self.fingerprint = fingerprint_of(self.der)

    @classmethod
    def generate(cls) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # A volunteer's clock may be a day behind.
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return cls(private + certificate.public_bytes(Encoding.PEM))

    @classmethod
    def load_or_create(cls, directory: Path) -> Certificate:
        """The certificate kept in ``directory``, made on first use: the fingerprint outlives a restart."""
        path = directory / "tls.pem"
        if not path.exists():
            write_private(path, cls.generate()._pem)
        pem = read_private(path)
        try:
            return cls(pem)
        except (ValueError, TypeError):
            raise IdentityError(
                f"{path} does not hold a certificate and its key",
                hint="restore it from a backup, or delete it: tickets given out before then stop working",
            ) from None

    def server_credentials(self) -> grpc.ServerCredentials:
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return grpc.ssl_server_credentials([(key, self._certificate.public_bytes(Encoding.PEM))])

    def server_context(self) -> ssl.SSLContext:
        """For TLS inside another connection (``tunnel.py``)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # nobody resumes
        with tempfile.TemporaryDirectory() as folder:  # the ssl module reads files only
            path = Path(folder) / "tls.pem"
            write_private(path, self._pem)
            context.load_cert_chain(path)
        return context


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``, apart; ``UnreachableError`` if it is neither."""
    host, _, port = address.rpartition(":")
    if not _HOST.fullmatch(host) or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise UnreachableError(f"{address!r} is not an address", hint="write it as host:port", code="address")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def fetch_certificate(host: str, port: int, timeout: datetime.timedelta) -> bytes:
    """The certificate, as DER, that whoever answers at ``host:port`` shows. Nothing is verified here."""
    address = join_address(host, port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=SERVER_NAME)
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            # abort, not close: an orderly TLS goodbye would wait for the other side's.
            writer.transport.abort()
    except ssl.SSLError:
        raise UnreachableError(
            f"what answers at {address} does not speak TLS", hint="check host and port", code="not-tls"
        ) from None
    except TimeoutError:
        raise UnreachableError(
            f"no answer from {address} within {timeout.total_seconds():g} s",
            hint="check the address and the firewall on the way",
            code="silent",
        ) from None
    except UnicodeError:
        raise UnreachableError(f"{address!r} is not an address", hint="write it as host:port", code="address") from None
    except OSError as error:
        raise UnreachableError(
            f"nobody listens at {address} ({os.strerror(error.errno) if error.errno else 'the connection broke'})",
            hint="check that it is running and that the address is right",
        ) from None
    if not der:
        raise UnreachableError(f"{address} shows no certificate", hint="check host and port", code="not-tls")
    return bytes(der)


def pinned_channel(address: str, cert_der: bytes, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
    """A channel that talks to the holder of this very certificate and to nobody else."""
    pem = ssl.DER_cert_to_PEM_cert(cert_der).encode()
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(root_certificates=pem),
        options=[*GRPC_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME), *options],
    )


async def dial_pinned(
    address: str, fingerprint: str, timeout: datetime.timedelta = datetime.timedelta(seconds=10)
) -> grpc.aio.Channel:
    """A ready channel to the server at ``address`` if its certificate has this fingerprint."""
    host, port = split_address(address)
    der = await fetch_certificate(host, port, timeout)
    if fingerprint_of(der) != fingerprint.lower():
        raise UnreachableError(
            f"another server answers at {address}: its certificate is not the one in the ticket",
            hint="ask the operator for a new ticket, and do not go on if the address should be right",
            code="certificate",
        )
    channel = pinned_channel(address, der)
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            await channel.channel_ready()
    except BaseException as error:
        await channel.close(None)
        if not isinstance(error, TimeoutError):
            raise
        raise UnreachableError(f"{address} stopped answering", hint="check that it is running and try again") from None
    return channel


async def start_server(
    host: str, port: int, generic_handlers: Sequence[grpc.GenericRpcHandler], certificate: Certificate
) -> tuple[grpc.aio.Server, int]:
    """A running TLS server and the port it got (``port`` 0 takes any free one)."""
    server = grpc.aio.server(options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers(tuple(generic_handlers))
    try:
        bound = server.add_secure_port(join_address(host, port), certificate.server_credentials())
    except RuntimeError:
        bound = 0
    if bound == 0:
        await server.stop(None)
        raise UnreachableError(
            f"cannot listen on {join_address(host, port)}: the port is taken or not allowed",
            hint="choose another --port (0 takes any free one), or check --host",
            code="port",
        )
    await server.start()
    return server, bound
