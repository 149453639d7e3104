"""Targets and layouts on the wire: what was sent comes out, and what nobody sends is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.protocol.errors import WireError
from potluck.protocol.frames import TensorSpec
from potluck.worker.layout import Layout
from potluck.worker.packing import IGNORED
from potluck.worker.side_inputs import decode_ids, decode_layout, encode_ids, encode_layout, layout_nbytes

LENGTH = 12
Documents = Sequence[tuple[int, int]]  # of each document: its prefix, the rest


def a_layout(*rows: Documents) -> Layout:
    segments = torch.zeros(len(rows), LENGTH, dtype=torch.int16)
    is_prefix = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = 0
        for number, (prefix, rest) in enumerate(row, 1):
            segments[b, at : at + prefix + rest] = number
            is_prefix[b, at : at + prefix] = True
            at += prefix + rest
    return Layout(segments, is_prefix)


@st.composite
def documents(draw: st.DrawFn) -> Documents:
    found, left = [], LENGTH
    while left and draw(st.booleans()):
        size = draw(st.integers(1, left))
        found.append((prefix := draw(st.integers(0, size)), size - prefix))
        left -= size
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(documents(), min_size=1, max_size=4))
def test_layouts_come_out_as_they_went_in(rows):
    layout = a_layout(*rows)
    payload = encode_layout(layout)
    assert len(payload) == sum(4 + 8 * len(row) for row in rows) <= layout_nbytes((len(rows), LENGTH))
    found = decode_layout(memoryview(payload), (len(rows), LENGTH))
    assert torch.equal(found.segments, layout.segments) and torch.equal(found.is_prefix, layout.is_prefix)


def words(*numbers: int) -> memoryview:
    return memoryview(b"".join(n.to_bytes(4, "little") for n in numbers))


@pytest.mark.parametrize(
    "payload",
    {
        "nothing": words(),
        "fewer documents than it says": words(2, 1, 1),
        "an empty document": words(2, 0, 0, 3, 3),
        "too long": words(1, 6, 7),
        "far too long": words(1, 2**32 - 1, 2**32 - 1),
        "countless": words(2**32 - 1, 1, 1),
        "more than one sequence": words(1, 2, 3, 0),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_layout_is_refused(payload):
    with pytest.raises(WireError):
        decode_layout(payload[1], (1, LENGTH))


def test_a_layout_says_who_looks_at_whom():
    """Two documents, the first with a prefix of two, and padding: by hand."""
    layout = a_layout([(2, 1), (0, 2)])
    mask, positions = layout.mask()[0, 0], layout.positions()[0]
    looks = {q: [k for k in range(LENGTH) if mask[q, k]] for q in range(LENGTH)}
    assert [looks[q] for q in range(5)] == [[0, 1], [0, 1], [0, 1, 2], [3], [3, 4]]
    assert all(q in looks[q] for q in range(LENGTH))
    assert all(k >= 5 for q in range(5, LENGTH) for k in looks[q])
    assert positions.tolist()[:5] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("vocab_size", [300, 2**16 - 1, 2**16, 100_000])
def test_targets_come_out_as_they_went_in(vocab_size):
    targets = torch.tensor([[0, IGNORED, vocab_size - 1], [IGNORED, 5, 7]])
    codec, payload = encode_ids(targets, vocab_size)
    spec = TensorSpec(codec=codec, shape=(2, 3), nbytes=len(payload))
    assert torch.equal(decode_ids(memoryview(payload), spec, vocab_size), targets)
    with pytest.raises(WireError, match="a token"):
        decode_ids(memoryview(payload), spec, vocab_size - 1)
