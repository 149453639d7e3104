"""Headers and messages: sizes, bounds, and any bytes at all."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from potluck.protocol.errors import WireError
from potluck.protocol.frames import (
    MESSAGE_NBYTES,
    Ack,
    Bye,
    Header,
    Hello,
    Kind,
    More,
    Purpose,
    Reason,
    Start,
    TensorSpec,
    Trouble,
    encode_header,
    encode_message,
    frame_messages,
    parse_header,
    parse_message,
    purpose,
)

pytestmark = pytest.mark.timeout(30)

TENSOR = TensorSpec(codec="hadamard-tile-4bit/64", shape=(4, 2048, 4096), nbytes=17_000_000)
FIELDS: dict[str, Any] = {
    "kind": Kind.ACTIVATION,
    "run": b"8 bytes.",
    "generation": 12,
    "step": 123_456,
    "stage": 13,
    "microbatch": 987_654,
    "part": 3,
    "attempt": 2,
    "tensors": (TENSOR,),
    "targets": 8192,
    "checksum": 0xDEADBEEF,
    "dense_nbytes": 67_108_864,
}


def header(**changes: Any) -> Header:
    return Header(**(FIELDS | changes))


def test_a_header_is_small_and_comes_back() -> None:
    encoded = encode_header(header())
    assert len(encoded) < 100
    assert parse_header(encoded + b"payload") == (header(), len(encoded))
    assert header(tensors=(TENSOR, TENSOR)).nbytes == 34_000_000


@pytest.mark.parametrize(
    "changes",
    [
        {"run": b"short"},
        {"step": -1},
        {"step": 2**63},
        {"stage": 2**32},
        {"kind": 9},
        {"tensors": (TENSOR,) * 17},
        {"tensors": (TensorSpec(codec="x" * 65, shape=(1,), nbytes=1),)},
        {"tensors": (TensorSpec(codec="x", shape=(1,) * 5, nbytes=1),)},
        {"tensors": (TensorSpec(codec="x", shape=(-1,), nbytes=1),)},
        {"tensors": (TensorSpec(codec="line\nbreak", shape=(1,), nbytes=1),)},
        {"tensors": (TensorSpec(codec="x", shape=(1,), nbytes=-1),)},
    ],
)
def test_a_header_out_of_bounds_is_not_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        encode_header(header(**changes))


def test_a_header_with_more_fields_is_refused() -> None:
    body = msgspec.msgpack.encode([*msgspec.to_builtins(header(), builtin_types=(bytes,)), 1])
    with pytest.raises(WireError):
        parse_header(len(body).to_bytes(2, "big") + body)


def test_every_kind_has_a_purpose() -> None:
    assert {purpose(kind) for kind in Kind} == set(Purpose) - {
        Purpose.CONTROL,
        Purpose.RETRANSMIT,
        Purpose.DATA,
    }


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 1_000_000])
@pytest.mark.parametrize("skip", [0, 0.5])
def test_a_frame_is_cut_into_messages_and_put_together(size: int, skip: float) -> None:
    payload = bytes(i % 251 for i in range(size))
    made = header(tensors=(TensorSpec(codec="x", shape=(size,), nbytes=size),))
    offset = int(size * skip)
    joined, at = payload[:offset], offset
    for end, message in frame_messages(5, encode_header(made), payload, offset):
        assert len(message) <= MESSAGE_NBYTES
        parsed = parse_message(message)
        assert isinstance(parsed, Start | More)
        assert parsed.sequence == 5
        if isinstance(parsed, More):
            assert parsed.offset == at
        joined += parsed.chunk
        at = end
        assert len(joined) == end
    assert joined == payload


counts = st.integers(0, 2**64 - 1)


@given(
    st.one_of(
        st.builds(Hello, st.binary(min_size=16, max_size=16), st.booleans(), counts, counts, counts, counts),
        st.builds(Ack, counts, counts),
        st.just(Bye()),
        st.builds(Trouble, st.sampled_from(Reason), st.text("abc é", max_size=50)),
    )
)
def test_messages_come_back(message: Hello | Ack | Bye | Trouble) -> None:
    assert parse_message(encode_message(message)) == message


VALID = [
    next(frame_messages(1, encode_header(header()), bytes(60), 0))[1],
    encode_message(Hello(b"c" * 16, True, 1, 2, 3, 4)),
    encode_message(Ack(1, 2)),
    encode_message(Trouble(Reason.FAILED, "no")),
]


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.builds(lambda k, b: bytes((k,)) + b, st.integers(0, 7), st.binary())))
@example(b"")
@example(bytes(MESSAGE_NBYTES + 1))
@example(b"\x03" + bytes(8) + b"\x00\x03\xa2\xff\xff")
@example(b"\x03" + bytes(8) + b"\x08\x00" + b"\x91" * 2048)
def test_any_bytes_give_a_message_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        parse_message(data)


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_damaged_messages_give_a_message_or_a_wire_error(message: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(message)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    with contextlib.suppress(WireError):
        parse_message(bytes(damaged))
