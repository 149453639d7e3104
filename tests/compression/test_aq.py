"""AQ-SGD's buffers: equal to the bit at both ends, and never used where they are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.compression.aq import (
    MARK_NBYTES,
    NEVER,
    Buffer,
    Codecs,
    Mark,
    Mode,
    Receiver,
    Sender,
    Slots,
    pack_marks,
    parse_marks,
    unbiased,
)
from potluck.compression.codec import CodecError
from potluck.compression.registry import build

SHAPE = (3, 64)
SLOT_NBYTES = 2 * SHAPE[0] * SHAPE[1]
INT4 = Codecs(build("int4:tile=64"), unbiased(build("int4:tile=64")))
FP32 = Codecs(build("fp32"), unbiased(build("fp32")))


class Pair:
    """Both ends of a route, what a plain run would have received, and what was sent."""

    def __init__(self, folder: Path, limits: tuple[int, int] = (8, 8), codecs: Codecs = INT4) -> None:
        self.folder, self.codecs, self.limits = folder, codecs, limits
        self.slots: list[Slots] = []
        self.sender = Sender(codecs, self.buffer(limits[0]))
        self.receiver = Receiver(codecs, self.buffer(limits[1]))
        self.version = self.misses = 0
        self.modes: list[Mode] = []

    def buffer(self, limit: int) -> Buffer:
        self.slots.append(Slots(self.folder, limit * SLOT_NBYTES, SLOT_NBYTES))
        return Buffer(self.slots[-1], SHAPE, limit)

    def visit(self, x_BTD: torch.Tensor, samples: list[int]) -> torch.Tensor:
        """What the receiver computes with."""
        self.version += 1
        seeds = [self.version * 100 + i for i in range(len(samples))]
        payload, marks = self.sender.encode(x_BTD, samples, self.version, seeds)
        self.modes = [m.mode for m in marks]
        got = self.receiver.decode(payload, parse_marks(pack_marks(marks)), self.version)
        if got is None:
            self.misses += 1
            self.sender.missed(self.receiver.buffer.since(self.version), self.version)
            payload, marks = self.sender.encode(x_BTD, samples, self.version, seeds, plain=True)
            assert Mode.DELTA not in {m.mode for m in marks}
            got = self.receiver.decode(payload, marks, self.version)
        assert got is not None
        return got

    def plain(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.codecs.plain.decode(self.codecs.plain.encode(x), SHAPE) for x in x_BTD])

    def assert_same_buffers(self, among: int) -> None:
        for sample in range(among):
            ours, theirs = self.sender.buffer.find(sample), self.receiver.buffer.find(sample)
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours[:2] == theirs[:2]
                assert torch.equal(ours.value_TD, theirs.value_TD)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def epoch(seed: int, n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def true_values(n: int, drift: float, seed: int = 0) -> torch.Tensor:
    """Values of ``n`` samples, ``drift`` away from those of drift 0."""
    base = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(7))
    return base + drift * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("limit", [0, 1, 5, 12])
def test_both_ends_stay_equal_over_many_visits(tmp_path, limit):
    n, epochs = 12, 6
    pair = Pair(tmp_path, (limit, limit))
    deltas = 0
    for e in range(epochs):
        order, x = epoch(e, n), true_values(n, 0.05, e)
        for start in range(0, n, 3):
            samples = order[start : start + 3]
            got = pair.visit(x[samples], samples)
            deltas += sum(mode == Mode.DELTA for mode in pair.modes)
            pair.assert_same_buffers(n)
            assert len(pair.sender.buffer) <= limit
            for row, sample, mode in zip(got, samples, pair.modes, strict=True):
                kept = pair.receiver.buffer.find(sample)
                if mode == Mode.DELTA:
                    assert kept is not None and torch.equal(kept.value_TD.float(), row)
                else:
                    assert torch.equal(row, pair.plain(x[sample][None])[0])
    assert pair.misses == 0
    assert deltas == (epochs - 1) * limit  # a full buffer keeps what it has: as many hits an epoch as it has places
    for slots in pair.slots:
        assert slots.file is not None and os.fstat(slots.file.fileno()).st_size <= limit * SLOT_NBYTES


def test_a_delta_is_nearer_than_the_value_at_the_same_bits(pair):
    samples = list(range(8))
    pair.visit(true_values(8, 0.0), samples)
    for visit in range(1, 5):
        x = true_values(8, 0.05, visit)
        got = pair.visit(x, samples)
        assert pair.modes == [Mode.DELTA] * 8
        assert (got - x).norm() < 0.3 * (pair.plain(x) - x).norm()


def test_a_value_that_changed_too_much_is_sent_as_it_is(pair):
    x = true_values(2, 0.0)
    pair.visit(x, [0, 1])
    y = torch.stack([x[0], -x[1]])
    assert torch.equal(pair.visit(y, [0, 1])[1], pair.plain(y)[1])
    assert pair.modes == [Mode.DELTA, Mode.KEPT]
    pair.assert_same_buffers(2)


def flip(slots: Slots) -> None:
    assert slots.file is not None
    slots.file.seek(0)
    byte = slots.file.read(1)[0]
    slots.file.seek(0)
    slots.file.write(bytes([byte ^ 4]))
    slots.file.flush()


def drop(pair: Pair) -> None:
    pair.receiver.buffer.drop(0)


def flip_at_the_receiver(pair: Pair) -> None:
    flip(pair.slots[1])


def flip_at_the_sender(pair: Pair) -> None:
    flip(pair.slots[0])


def older_version(pair: Pair) -> None:
    value = pair.receiver.buffer.find(0)
    assert value is not None
    pair.receiver.buffer.keep(0, value.version - 1, value.value_TD)


def other_value(pair: Pair) -> None:
    value = pair.receiver.buffer.find(0)
    assert value is not None
    pair.receiver.buffer.keep(0, value.version, value.value_TD + 1)


def receiver_restarts(pair: Pair) -> None:
    pair.receiver = Receiver(pair.codecs, pair.buffer(8))


def sender_restarts(pair: Pair) -> None:
    pair.sender = Sender(pair.codecs, pair.buffer(8))


def a_step_is_lost(pair: Pair) -> None:
    """The sender was ahead when the generation ended; the step is done again."""
    pair.sender.encode(true_values(1, 0.05, 99), [0], pair.version + 1, [1])


@pytest.mark.parametrize(
    ("what", "misses"),
    [
        (drop, 1),
        (flip_at_the_receiver, 1),
        (flip_at_the_sender, 0),
        (older_version, 1),
        (other_value, 1),
        (receiver_restarts, 1),
        (sender_restarts, 0),
        (a_step_is_lost, 1),
    ],
)
def test_ends_that_differ_fall_back_to_the_plain_value(pair, what: Callable[[Pair], None], misses):
    for visit in range(2):
        pair.visit(true_values(3, 0.05, visit), [0, 1, 2])
    assert pair.modes == [Mode.DELTA] * 3
    what(pair)
    x = true_values(3, 0.05, 2)
    got = pair.visit(x[:1], [0])
    assert torch.equal(got, pair.plain(x[:1]))
    assert pair.misses == misses
    pair.visit(x[1:], [1, 2])  # after a restart these come plain without a miss of their own
    assert pair.misses == misses
    pair.visit(true_values(3, 0.05, 3), [0, 1, 2])
    assert pair.modes == [Mode.DELTA] * 3
    assert pair.misses == misses
    pair.assert_same_buffers(3)


def test_a_smaller_receiver_lets_the_least_recently_used_go(tmp_path):
    """Plans give both ends the same limit; if they differ all the same, it costs misses and nothing else."""
    pair = Pair(tmp_path, (4, 2))
    for visit in range(4):
        for sample in range(4):
            x = true_values(4, 0.05, visit)[sample][None]
            misses = pair.misses
            got = pair.visit(x, [sample])
            if pair.misses > misses or visit == 0:
                assert torch.equal(got, pair.plain(x))
    assert pair.misses
    assert len(pair.receiver.buffer) == 2


def test_a_receiver_that_cannot_keep_anything_is_asked_to_only_once(pair):
    samples = list(range(4))
    pair.visit(true_values(4, 0.0), samples)
    file = pair.slots[1].file
    assert file is not None
    file.close = file.flush = lambda: (_ for _ in ()).throw(OSError("no space left"))
    for visit in range(1, 4):
        x = true_values(4, 0.05, visit)
        pair.visit(x, samples)
    assert pair.slots[1].file is None
    assert pair.receiver.buffer.since(9) == NEVER
    assert pair.misses == 1
    assert pair.modes == [Mode.PLAIN] * 4


def test_the_same_sample_twice_in_a_microbatch(pair):
    for visit in range(3):
        x = true_values(1, 0.05, visit)[0]
        pair.visit(torch.stack([x, x]), [5, 5])
        pair.assert_same_buffers(6)
    assert pair.modes == [Mode.DELTA] * 2
    assert pair.misses == 0


def test_what_fp16_cannot_hold_is_not_kept(pair):
    x = true_values(2, 0.0)
    for _ in range(3):
        big = torch.stack([x[0] * 1e6, x[1]])
        assert torch.equal(pair.visit(big, [0, 1])[0], pair.plain(big)[0])
        pair.assert_same_buffers(2)
    assert pair.modes == [Mode.PLAIN, Mode.DELTA]


def test_an_exact_codec_never_needs_a_delta(tmp_path):
    pair = Pair(tmp_path, codecs=FP32)
    for visit in range(3):
        x = true_values(2, 0.05, visit)
        assert torch.equal(pair.visit(x, [0, 1]), x)
        assert pair.modes == [Mode.KEPT] * 2


def test_slots_are_given_back(tmp_path):
    slots = Slots(tmp_path, 5 * SLOT_NBYTES, SLOT_NBYTES)
    a, b = Buffer(slots, SHAPE, 5), Buffer(slots, SHAPE, 0)
    values = true_values(9, 0.0).half()
    assert [a.keep(i, 1, values[i]) for i in range(6)] == [True] * 5 + [False]
    a.resize(2)
    b.resize(3)
    assert [i for i in range(6) if i in a] == [3, 4]
    assert [b.keep(i, 1, values[i]) for i in range(4)] == [True] * 3 + [False]
    for i in range(3):
        found = b.find(i)
        assert found is not None and torch.equal(found.value_TD, values[i])
    assert slots.file is not None and os.fstat(slots.file.fileno()).st_size == 5 * SLOT_NBYTES
    slots.close()
    assert a.find(3) is None and not b.keep(0, 2, values[0])


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    buffer = Buffer(Slots(tmp_path / "file" / "folder", 4 * SLOT_NBYTES, SLOT_NBYTES), SHAPE, 4)
    assert not buffer.keep(0, 1, torch.zeros(SHAPE).half())
    assert buffer.find(0) is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=4 * MARK_NBYTES))
def test_any_bytes_are_marks_or_an_error(data):
    try:
        marks = parse_marks(data)
    except CodecError:
        return
    assert pack_marks(marks) == data


numbers = st.integers(0, 2**64 - 1)
some_marks = st.lists(
    st.one_of(
        st.builds(Mark, numbers, st.sampled_from([Mode.PLAIN, Mode.KEPT]), st.just(0), st.just(bytes(8))),
        st.builds(Mark, numbers, st.just(Mode.DELTA), st.integers(1, 2**64 - 1), st.binary(min_size=8, max_size=8)),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(some_marks)
def test_marks_survive_the_wire(marks):
    assert parse_marks(pack_marks(marks)) == marks


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_payload_is_a_value_a_miss_or_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    pair = Pair(folder, (2, 2))
    pair.visit(true_values(2, 0.0), [0, 1])
    found = pair.receiver.buffer.find(0)
    assert found is not None
    marks = [Mark(0, Mode.DELTA, found.version, found.digest), *data.draw(some_marks)]
    nbytes = INT4.nbytes(SHAPE)
    filler = data.draw(st.binary(min_size=1, max_size=40))
    length = data.draw(st.sampled_from([nbytes * len(marks), nbytes * len(marks) - 1, 0]))
    payload = (filler * (1 + length // len(filler)))[:length]
    try:
        got = pair.receiver.decode(payload, marks, 2)
    except CodecError:
        return
    assert got is None or got.shape == (len(marks), *SHAPE)


def test_the_unbiased_form():
    assert unbiased(build("int4")).spec == "int4:tile=64,random"
    assert unbiased(unbiased(build("int8:tile=32"))).spec == "int8:tile=32,random"
    assert unbiased(build("bf16")).spec == "bf16"


@pytest.mark.parametrize(
    "spec", ["int4:tile=64", "int2", "int3:tile=128,hadamard", "int4:zero", "int4:outliers=16", "fp16"]
)
def test_a_sample_is_equally_long_however_it_is_sent(spec):
    plain = build(spec)
    assert 8 * Codecs(plain, unbiased(plain)).nbytes((5, 2048)) == plain.nbytes((8, 5, 2048))
