"""What a hello says of the machine's owner: where it is and what it allows; and what makes no sense."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.coordinator.doors import Doors
from potluck.coordinator.state import Caps, Member, RunState
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import WireError
from potluck.protocol.hello import PROTOCOL, secret_proof, signed_part
from potluck.protocol.identity import Identity

NONCE = bytes(32)
NEVER = float("nan")


def greet(**said: Any) -> Member:
    none: Any = None
    hub: Any = SimpleNamespace(lines={}, state=RunState())
    doors = Doors(hub, run_id="r", secret="s", fingerprint="ab" * 32, welcome=pb.Welcome(), blobs={}, publisher=none)
    identity = Identity.generate()
    hello = pb.Hello(
        protocol=PROTOCOL,
        run="r",
        public_key=identity.public_bytes,
        signature=identity.sign(signed_part(NONCE, "ab" * 32, "r")),
        secret_proof=secret_proof("s", NONCE, identity.public_bytes),
        session=os.urandom(16),
        **{"memory_gb": 1.0, "speed": 1.0, **said},
    )
    return doors.check(pb.Up(hello=hello), NONCE)


def test_what_an_owner_allows_is_kept_with_the_member() -> None:
    member = greet(region="Lower Saxony", upload_mbps=5.5, state_mbps=50.0, threads=4)
    assert member.region == "Lower Saxony"
    assert member.caps == Caps(upload_mbps=5.5, state_mbps=50.0, threads=4)


def test_what_is_not_said_is_no_limit() -> None:
    member = greet()
    assert member.region == "" and member.caps == Caps() == Caps(upload_mbps=None, state_mbps=None, threads=None)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("<script>alert(1)</script>", "scriptalert1script"),
        ("a\x1b[2J\nb\x00", "a2Jb"),
        ("\u202egnirts", "gnirts"),
        ("x" * 10_000, "x" * 32),
        ("  \t\n ", ""),
    ],
)
def test_a_region_is_cleaned_as_names_are(said: str, kept: str) -> None:
    assert greet(region=said).region == kept


@pytest.mark.parametrize("field", ["upload_mbps", "state_mbps"])
@pytest.mark.parametrize("value", [-1.0, -1e-300, NEVER, float("inf"), -float("inf"), 1e6, 1e308])
def test_an_impossible_limit_is_refused(field: str, value: float) -> None:
    with pytest.raises(WireError, match="limit"):
        greet(**{field: value})


@pytest.mark.parametrize("threads", [4097, 2**32 - 1])
def test_an_impossible_number_of_cores_is_refused(threads: int) -> None:
    with pytest.raises(WireError, match="cores"):
        greet(threads=threads)
