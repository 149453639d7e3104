"""Who a peer is: an Ed25519 key in a file only its owner can read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from .errors import IdentityError

PEER_ID_LENGTH = 26


def peer_id_of(public_bytes: bytes) -> str:
    """The name of a public key: 130 bits of its SHA-256, in lower-case base32."""
    return base64.b32encode(hashlib.sha256(public_bytes).digest()).decode().lower()[:PEER_ID_LENGTH]


def verify(public_bytes: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_bytes).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Identity:
    """A peer's key pair."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_bytes: bytes = key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_bytes)

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key at ``path``; a new one is written there first if there is none."""
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        pem = read_private(path)
        try:
            loaded = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            loaded = None
        if not isinstance(loaded, Ed25519PrivateKey):
            raise IdentityError(
                f"{path} does not hold an Ed25519 key",
                hint="restore it from a backup, or move it away to start as a new peer",
            )
        return cls(loaded)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes of a key for another program: always the same, and nobody finds this key from them."""
        return HKDF(SHA256(), 32, salt=None, info=purpose).derive(self._key.private_bytes_raw())


def write_private(path: Path, data: bytes) -> None:
    """Create ``path`` whole or not at all, for its owner only; a file already there stays as it is."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    except OSError as error:
        raise IdentityError(
            f"cannot write the key file {path}: {error.strerror}", hint="choose a writable --data-dir"
        ) from None


def read_private(path: Path) -> bytes:
    """The bytes of a key file, which nobody else may be able to read."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if os.name == "posix" and mode & 0o077:
                raise IdentityError(
                    f"{path} can be read by others (mode {mode:03o})", hint=f"chmod 600 {path}", code="mode"
                )
            return file.read(64 * 1024)
    except OSError as error:
        raise IdentityError(
            f"cannot read the key file {path}: {error.strerror}", hint=f"check who owns {path}"
        ) from None


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the key file at ``path`` for this process; ``IdentityError`` if another holds it."""
    beside = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise IdentityError(
            f"cannot open the lock file {beside}: {error.strerror}", hint="choose a writable --data-dir"
        ) from None
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            _lock_file(file.fileno())
        except OSError:
            raise IdentityError(
                f"another worker on this machine uses the key {path}",
                hint="stop it, or give this one its own --data-dir",
                code="in-use",
            ) from None
        yield


def _lock_file(descriptor: int) -> None:
    """Both kinds of lock end with the process, however it ends."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
