"""A boundary's frames: known to the byte, and marks of kept values that nobody can forge into a wrong one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import manifest

from potluck.compression.aq import MARK_NBYTES, Mark, Mode, pack_marks, parse_marks
from potluck.compression.registry import build
from potluck.protocol.errors import WireError
from potluck.protocol.frames import Frame, Header, Kind, TensorSpec
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker.boundary import EVAL, TRAIN, Boundary, Memory, Seat, boundary_check, routes_of
from potluck.worker.layout import Batch
from potluck.worker.links import frame_check

AQ = {"forward": "int4:tile=64", "backward": "int8:tile=64", "reuse": True, "cache_gb": 0.01}
MANIFEST = manifest(24, 4, 16)


def test_what_comes_in_is_known_to_the_byte(make_config):
    plain = {**AQ, "reuse": False}
    check, plain_check = (
        frame_check(b"testrun1", boundary_check(make_config(activations=activations), MANIFEST), lambda n: 0, 0, 0)
        for activations in (AQ, plain)
    )
    hidden = TensorSpec(codec="int4:tile=64", shape=(2, 16, 32), nbytes=build(AQ["forward"]).nbytes((2, 16, 32)))
    ids = TensorSpec(codec="ids16", shape=(2, 16), nbytes=64)
    marks = TensorSpec(codec="aq", shape=(2, MARK_NBYTES), nbytes=2 * MARK_NBYTES)

    def header(kind: Kind, *tensors: TensorSpec, part: int = 0) -> Header:
        return Header(
            kind=kind,
            run=b"testrun1",
            generation=1,
            step=1,
            stage=1,
            microbatch=0,
            part=part,
            attempt=0,
            tensors=tensors,
            targets=0,
            checksum=0,
            dense_nbytes=0,
        )

    good = [
        (check, header(Kind.ACTIVATION, hidden, ids, marks)),
        (check, header(Kind.ACTIVATION, hidden, ids, part=1)),
        (check, header(Kind.MISS)),
        (plain_check, header(Kind.ACTIVATION, hidden, ids)),
    ]
    bad = [
        (check, header(Kind.ACTIVATION, hidden, ids)),
        (check, header(Kind.ACTIVATION, hidden, ids, marks, part=1)),
        (check, header(Kind.ACTIVATION, hidden, marks, ids)),
        (check, header(Kind.ACTIVATION, hidden, ids, ids)),
        (check, header(Kind.MISS, marks)),
        (check, header(Kind.MISS, part=1)),
        (plain_check, header(Kind.ACTIVATION, hidden, ids, marks)),
        (plain_check, header(Kind.MISS)),
    ]
    for changes in ({"codec": "ids16"}, {"shape": (1, MARK_NBYTES)}, {"shape": (2,)}, {"nbytes": 0}, {"nbytes": 2**40}):
        values = {"codec": "aq", "shape": (2, MARK_NBYTES), "nbytes": 2 * MARK_NBYTES, **changes}
        bad.append((check, header(Kind.ACTIVATION, hidden, ids, TensorSpec(**values))))
    for checked, one in good:
        checked(one)
    for checked, one in bad:
        with pytest.raises(WireError):
            checked(one)


def a_plan(*stages: str) -> Plan:
    return Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=tuple(
            StagePlan(first_layer=i, last_layer=i + 1, replicas=tuple(Replica(peer=peer) for peer in peers))
            for i, peers in enumerate(stages)
        ),
        microbatches=4,
        microbatch_size=2,
    )


def seat_of(plan: Plan, peer: str) -> Seat:
    stage, replica = plan.places[peer]
    return Seat(plan=plan, stage=stage, replica=replica, run=b"testrun1")


@pytest.mark.parametrize(
    "stages", [("a", "b"), ("a", "bc"), ("ab", "c"), ("ab", "cd"), ("abc", "de", "f"), ("ab", "cde")]
)
def test_both_ends_of_a_route_have_room_for_the_same(make_config, tmp_path, stages):
    config, plan = make_config(activations={**AQ, "cache_gb": 41 * 2 * 16 * 32 / 1e9}), a_plan(*stages)
    memories = {peer: Memory(config, tmp_path / peer) for peer in plan.places}
    for peer, memory in memories.items():
        memory.follow(seat_of(plan, peer))
        assert sum(buffer.limit for buffer in memory.buffers.values()) <= 41
    routes = routes_of(plan)
    assert {r for memory in memories.values() for r in memory.buffers} == routes
    for route in routes:
        limits = {memories[peer].buffers[route].limit for peer in (route.sender, route.receiver)}
        assert len(limits) == 1
        assert limits.pop() >= 41 // len(routes)


def test_only_what_this_very_receiver_was_sent_is_a_reference(make_config, tmp_path):
    """Another receiver, the same one behind other layers, and the first again: nothing is taken for agreed."""
    memory = Memory(make_config(activations=AQ), tmp_path)
    value = torch.ones(16, 32).half()
    first = a_plan("a", "b")
    memory.follow(seat_of(first, "a"))
    (buffer,) = memory.buffers.values()
    assert buffer.keep(3, 1, value)
    memory.follow(seat_of(replace(first, generation=2), "a"))
    assert [3 in b for b in memory.buffers.values()] == [True]
    memory.follow(seat_of(a_plan("a", "bc"), "a"))
    assert {r.receiver: 3 in b for r, b in memory.buffers.items()} == {"b": True, "c": False}
    for other in (a_plan("a", "c"), a_plan("d", "a", "b"), first):
        memory.follow(seat_of(other, "a"))
        assert not any(3 in b for b in memory.buffers.values())


def test_a_microbatch_of_other_samples_is_refused(make_config, tmp_path):
    """Nor is an attempt that nobody asked for, or bytes that are no marks."""
    config, plan = make_config(activations=AQ), a_plan("a", "b")
    a, b = (Boundary(config, seat_of(plan, p), MANIFEST, Memory(config, tmp_path / p)) for p in "ab")
    hidden, targets = torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.int64)
    frame, has_delta = a.activation(0, TRAIN, 1, Batch(hidden, targets))
    assert not has_delta
    body, marks = frame.payload[: -2 * MARK_NBYTES], parse_marks(frame.payload[-2 * MARK_NBYTES :])
    assert [mark.sample for mark in marks] == a.samples(0, 1) == b.samples(0, 1) != a.samples(0, 0)
    other = pack_marks([marks[0]._replace(sample=marks[1].sample), marks[1]])
    again, _ = a.activation(0, TRAIN, 1, Batch(hidden, targets), attempt=1)
    for bad in (Frame(frame.header, body + other), Frame(frame.header, body + b"\xff" * len(other)), again):
        with pytest.raises(WireError):
            b.received(bad)
    found = b.received(frame)
    assert found is not None and found.x.shape == hidden.shape


@pytest.mark.parametrize("reuse", [True, False])
def test_other_sizes_and_targets_than_the_plans_never_reach_torch(make_config, tmp_path, reuse):
    """Fewer samples in a gradient, or a target outside of the vocabulary, would be an error that ends the worker."""
    config, plan = make_config(activations={**AQ, "reuse": reuse}), a_plan("a", "b")
    a, b = (Boundary(config, seat_of(plan, p), MANIFEST, Memory(config, tmp_path / p) if reuse else None) for p in "ab")
    hidden, targets = torch.randn(2, 16, 32), torch.full((2, 16), MANIFEST.vocab_size - 1)
    found = b.received(a.activation(0, TRAIN, 0, Batch(hidden, targets))[0])
    assert found is not None
    assert torch.equal(found.targets, targets)
    assert a.received_gradient(b.gradient(0, 0, hidden)).shape == hidden.shape
    with pytest.raises(WireError, match="of 1 samples, not 2"):
        a.received_gradient(b.gradient(0, 0, hidden[:1]))
    if not reuse:
        with pytest.raises(WireError, match="of 1 samples, not 2"):
            b.received(a.activation(0, TRAIN, 0, Batch(hidden[:1], targets[:1]))[0])
    for part in (TRAIN, EVAL):
        with pytest.raises(WireError, match="token 300 of 300"):
            b.received(a.activation(0, part, 0, Batch(hidden, targets + 1))[0])
    held_out = config.eval.samples
    assert [b.size(EVAL, m) for m in range(-(-held_out // 2))] == [2] * (held_out // 2) + [1] * (held_out % 2)


def test_any_marks_give_a_value_a_miss_or_a_wire_error(make_config, tmp_path):
    config, plan = make_config(activations=AQ), a_plan("a", "b")
    a, b = (Boundary(config, seat_of(plan, p), MANIFEST, Memory(config, tmp_path / p)) for p in "ab")
    frame, _ = a.activation(0, TRAIN, 0, Batch(torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.int64)))
    assert b.received(frame) is not None
    (buffer,) = b.memory.buffers.values()
    samples = b.samples(0, 0)
    kept = [buffer.find(sample) for sample in samples]
    some = st.one_of(
        st.binary(min_size=MARK_NBYTES, max_size=MARK_NBYTES).map(lambda data: (data, data)),
        st.tuples(*(st.sampled_from(marks_of(s, v.version, v.digest)) for s, v in zip(samples, kept, strict=True))),
    )
    outcomes = Counter()

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(some)
    def check(marks: tuple[bytes, bytes]) -> None:
        payload = frame.payload[: -2 * MARK_NBYTES] + b"".join(marks)
        try:
            found = b.received(Frame(frame.header, payload))
        except WireError:
            outcomes["error"] += 1
        else:
            outcomes["miss" if found is None else "value"] += 1

    check()
    assert set(outcomes) == {"error", "miss", "value"}


def marks_of(sample: int, version: int, digest: bytes) -> list[bytes]:
    """Of one sample: those that a sender makes, those with another version or hash, and one that nobody makes."""
    made = [Mark(sample, Mode.KEPT), Mark(sample, Mode.PLAIN), Mark(sample, Mode.DELTA, version, digest)]
    wrong = [Mark(sample, Mode.DELTA, version + 1, digest), Mark(sample, Mode.DELTA, version, bytes(8))]
    return [pack_marks([mark]) for mark in (*made, *wrong, Mark(sample, Mode.DELTA))]
