"""Nobody reads where somebody else can be reached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.coordinator.doors import plain
from potluck.coordinator.masking import MASK, masked


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot reach 192.168.1.7:4100: refused", f"cannot reach {MASK}: refused"),
        ("ipv4:10.0.0.1:80 is silent", f"ipv4:{MASK} is silent"),
        ("ipv6:[::1]:80", f"ipv6:{MASK}"),
        ("to [2001:db8::1]:443, again", f"to {MASK}, again"),
        ("fe80::1%eth0", MASK),
        ("at /ip4/1.2.3.4/tcp/9/p2p/Qm failed", f"at {MASK} failed"),
        ("host.example.org:8000 hung up", f"{MASK} hung up"),
        ("localhost:50051 hung up", f"{MASK} hung up"),
        ("it was 10.0.0.1.", f"it was {MASK}."),
    ],
)
def test_addresses_are_masked(text: str, left: str) -> None:
    assert masked(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "torch 2.13.0 has no such kernel",
        "version 1.2.3.4.5",
        "step 12: the digests differ",
        "std::bad_alloc",
        "stage:3 of 8",
        "no answer for 20 s",
    ],
)
def test_other_words_stay(text: str) -> None:
    assert masked(text) == text


@given(st.ip_addresses().map(str), st.integers(1, 65535), st.text("abc :.-", max_size=12))
def test_no_address_gets_through(address: str, port: int, around: str) -> None:
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    assert address not in masked(f"could not dial {shown} {around}")
    assert address not in masked(f"could not dial {address}, {around}")


@pytest.mark.parametrize(
    ("name", "left"), [("10.1.2.3", ""), ("box:8000", ""), ("gpu-1.lab", "gpu-1.lab"), ("x" * 99, "x" * 32)]
)
def test_no_name_is_an_address(name: str, left: str) -> None:
    assert plain(name) == left
