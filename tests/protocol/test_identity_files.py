"""Key files: who may read them, and that only one worker uses one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from potluck.protocol.errors import IdentityError
from potluck.protocol.identity import PEER_ID_LENGTH, Identity, lock, peer_id_of, verify

pytestmark = pytest.mark.timeout(30)

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


def test_an_identity_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "data" / "identity.pem"
    first, second = Identity.load_or_create(path), Identity.load_or_create(path)
    assert first.peer_id == second.peer_id == peer_id_of(second.public_bytes)
    assert len(first.peer_id) == PEER_ID_LENGTH
    assert first.peer_id == first.peer_id.lower()
    assert [p.name for p in path.parent.iterdir()] == ["identity.pem"]


@posix
def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "identity.pem"
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_open_to_others_is_refused_with_the_mend(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError) as caught:
        Identity.load_or_create(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="does not hold"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_places_that_cannot_hold_a_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError) as caught:
        Identity.load_or_create(tmp_path / "file" / "identity.pem")
    assert "--data-dir" in caught.value.hint
    with pytest.raises(IdentityError, match="cannot read"):
        Identity.load_or_create(tmp_path)


def test_signatures() -> None:
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"dish")
    assert verify(identity.public_bytes, signature, b"dish")
    assert not verify(identity.public_bytes, signature, b"dash")
    assert not verify(other.public_bytes, signature, b"dish")
    assert not verify(b"short", signature, b"dish")
    assert not verify(identity.public_bytes, b"", b"dish")


def test_one_worker_per_key(tmp_path: Path) -> None:
    path = tmp_path / "data" / "identity.pem"
    with lock(path):
        with pytest.raises(IdentityError) as caught, lock(path):
            pass
        assert "--data-dir" in caught.value.hint
    with lock(path):
        pass
