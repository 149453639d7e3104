"""How a worker proves who it is to the coordinator, bound to this connection's certificate and challenge."""

from __future__ import annotations

import hashlib
import hmac

PROTOCOL = 1  # raised when an older worker could no longer take part

STREAM = "/potluck.Coordinator/Control"
BLOB = "/potluck.Coordinator/Blob"
UPLOAD = "/potluck.Coordinator/Upload"
DRAINED = "drained"  # how a view's note begins that says why the operator lets its worker go


def signed_part(nonce: bytes, fingerprint: str, run: str) -> bytes:
    """What a worker's key signs: a forwarded hello fails, because the certificate differs."""
    return b"potluck hello 1\0" + nonce + bytes.fromhex(fingerprint) + run.encode()


def secret_proof(secret: str, nonce: bytes, public_key: bytes) -> bytes:
    """Proof that the ticket's secret is known, without sending it."""
    return hmac.new(secret.encode(), nonce + public_key, hashlib.sha256).digest()
