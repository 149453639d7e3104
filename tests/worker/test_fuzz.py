"""What peers send to a worker, spoilt: boundary tensors, rounds, entries of redo logs, inventories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from manifests import manifest
from msgspec.structs import replace
from mutations import Mutator, outcome, traced

from potluck.protocol.config import RunConfig
from potluck.protocol.errors import WireError
from potluck.protocol.frames import Frame, Header, TensorSpec, encode_header, parse_header
from potluck.protocol.objective import Objective
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker import inventory
from potluck.worker.boundary import TRAIN, Boundary, Memory, Seat, boundary_check
from potluck.worker.layout import Batch, Layout
from potluck.worker.redo import Entry, pieces_of, replay
from potluck.worker.reference import ALONE, FLIPPED, Rule, packed
from potluck.worker.shards import WEIGHTS, codec_of, most_nbytes
from potluck.worker.squeeze import SUFFIX, squeeze
from potluck.worker.stage import State, digest

pytestmark = pytest.mark.timeout(60)
SLACK = 64 * 1024
MANIFEST = manifest(24, 4, 16)
MASKED = replace(MANIFEST, stages=(replace(MANIFEST.stages[0], objective=Objective(kind="prefix")),))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def seats(make_config: Callable[..., RunConfig], folder: Path, **activations: object) -> list[Boundary]:
    """Both ends of a boundary. ``masked``: of a run with documents and prefixes."""
    manifest = MASKED if activations.pop("masked", False) else MANIFEST
    config = make_config(activations=activations)
    stages = tuple(
        StagePlan(first_layer=i, last_layer=i + 1, replicas=(Replica(peer=peer),)) for i, peer in enumerate("ab")
    )
    plan = Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=stages,
        microbatches=4,
        microbatch_size=2,
    )
    memories = [Memory(config, folder / p) if activations.get("reuse") else None for p in "ab"]
    return [
        Boundary(config, Seat(plan=plan, stage=i, replica=0, run=b"testrun1"), manifest, memory)
        for i, memory in enumerate(memories)
    ]


KINDS = {
    "fp32": {"forward": "fp32", "backward": "fp16"},
    "int4": {"forward": "int4:tile=64,hadamard", "backward": "int3:tile=32,zero"},
    "outliers": {"forward": "int2:tile=32,outliers=2", "backward": "int8:tile=64"},
    "reuse": {"forward": "int4:tile=64", "backward": "int6:tile=64", "reuse": True, "cache_gb": 0.01},
    "masked": {"forward": "int4:tile=64", "backward": "int4:tile=64", "masked": True},
}


def a_batch(boundary: Boundary, hidden: torch.Tensor) -> Batch:
    """Without targets; two documents a sample, and padding, where the run has them."""
    layout = None
    if boundary.manifest.masked:
        row = torch.tensor([1] * 7 + [2] * 6 + [0] * 3, dtype=torch.int16)
        layout = Layout(torch.stack([row, row]), torch.stack([row, row]) == 2)
    return Batch(hidden, torch.zeros(2, 16, dtype=torch.int64), layout)


@pytest.mark.parametrize("kind", KINDS)
def test_boundary_tensors(make_config: Callable[..., RunConfig], tmp_path: Path, kind: str) -> None:
    """As the network does it: a header goes through the check first, and a payload has the length it says."""
    mutate, seen = Mutator(len(kind)), Counter[str]()
    a, b = seats(make_config, tmp_path, **KINDS[kind])
    check = boundary_check(a.config, a.manifest)
    hidden = normal(2, 16, 32)
    flat = torch.zeros(2, 16, 32)  # gets shorter through zstd
    frames = [a.activation(0, TRAIN, 0, a_batch(a, x))[0] for x in (hidden, flat)]
    frames += [b.gradient(0, 0, x) for x in (hidden, flat)]

    def take(frame: Frame) -> None:
        check(frame.header)
        if len(frame.payload) != frame.header.nbytes:
            raise WireError("not a frame")
        if frame.header.kind == frames[0].header.kind:
            found = b.received(frame)
            assert found is None or [tuple(x.shape) for x in found[:2]] == [(2, 16, 32), (2, 16)]
        else:
            assert a.received_gradient(frame).shape == (2, 16, 32)

    for frame in frames:
        take(frame)  # compiles
    with traced():
        for number in range(600):
            frame = mutate.random.choice(frames)
            spoilt = Frame(frame.header, mutate([frame.payload], most_nbytes=len(frame.payload)))
            if number % 3:
                spoilt = refitted(mutate, frame)
            outcome(lambda spoilt=spoilt: take(spoilt), (WireError,), 1 << 19, seen)
    assert min(seen["taken"], seen["refused"]) > 20


def refitted(mutate: Mutator, frame: Frame) -> Frame:
    """A payload spoilt with its tensors' sizes kept, or a header that says another size of the first one."""
    specs, at, pieces = frame.header.tensors, 0, []
    which = mutate.random.randrange(len(specs))
    for i, spec in enumerate(specs):
        piece = frame.payload[at : at + spec.nbytes]
        at += spec.nbytes
        if i == which:
            made = mutate([piece], most_nbytes=2 * len(piece))
            piece = made if i == 0 and spec.codec.endswith(SUFFIX) else (made + piece[len(made) :])[: len(piece)]
        pieces.append(piece)
    tensors = tuple(TensorSpec(codec=s.codec, shape=s.shape, nbytes=len(p)) for s, p in zip(specs, pieces, strict=True))
    return Frame(changed(frame.header, tensors=tensors), b"".join(pieces))


def changed(header: Header, **changes: object) -> Header:
    named = {name: getattr(header, name) for name in header.__struct_fields__}
    return Header(**(named | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_headers_of_boundary_tensors(make_config: Callable[..., RunConfig], tmp_path: Path, kind: str) -> None:
    mutate, seen = Mutator(10 + len(kind)), Counter[str]()
    a, b = seats(make_config, tmp_path, **KINDS[kind])
    check = boundary_check(a.config, a.manifest)
    hidden = normal(2, 16, 32)
    valid = [
        encode_header(frame.header)
        for frame in (a.activation(0, TRAIN, 0, a_batch(a, hidden))[0], b.gradient(0, 0, hidden))
    ]
    most = 4 * 2 * 16 * 32 + 2 * 2 * 16 + 1000
    with traced():
        for _ in range(400):
            data = mutate(valid)

            def look(data: bytes = data) -> Header:
                header, _ = parse_header(data)
                if header.kind in (1, 2, 7):
                    check(header)
                return header

            header = outcome(look, (WireError,), SLACK, seen)
            assert header is None or header.kind not in (1, 2) or header.nbytes <= most
    assert min(seen["taken"], seen["refused"]) > 20


SYNCS = {
    "dense": {"preset": "dense"},
    "masked": {"preset": None, "every": 4, "bits": 4, "density": 0.1, "topk": 1.0},
    "sparse": {"preset": None, "every": 4, "bits": 2, "density": 1.0, "topk": 0.05, "chunk": 64},
    "coin": {"preset": None, "coin": 0.5, "bits": 4, "density": 0.1, "topk": 0.2},
}


def rule_of(make_config: Callable[..., RunConfig], sync: dict[str, object]) -> Rule:
    given = {key: value for key, value in sync.items() if value is not None}
    config = make_config(sync=given)
    return Rule(sync=config.sync.resolved(), seed=1, stage=0)


@pytest.mark.parametrize("name", SYNCS)
def test_entries_of_a_redo_log(make_config: Callable[..., RunConfig], name: str) -> None:
    """They come from a donor whose word nobody has: what they lead to is compared with the run's digest."""
    mutate, seen = Mutator(20 + len(name)), Counter[str]()
    rule, size, owners, step = rule_of(make_config, SYNCS[name]), 3000, 2, 8
    g = normal(size)
    payloads: list[tuple[str, bytes]] = []
    for piece in pieces_of(rule, size, [0], owners):
        for owner in range(owners):
            mask = rule.mask(piece, owner, step, full=False)
            payloads.append(squeeze(WEIGHTS, codec_of(rule.sync).encode(normal(mask.count)).payload))
    lone = [(codec, squeeze(codec, packed(0 * g, g if codec == FLIPPED else None))) for codec in (ALONE, FLIPPED)]
    parts = {"generation": 1, "step": step, "fragments": (0,), "full": False, "base_digest": b"", "digest": b""}
    entries = [
        Entry(**parts, replicas=owners, payloads=tuple(payloads)),  # type: ignore[arg-type]
        *(Entry(**parts, replicas=1, payloads=(squeezed,)) for _, squeezed in lone),  # type: ignore[arg-type]
    ]
    after, _ = replay(rule, g, None, entries[0])
    entries.append(msgspec.structs.replace(entries[0], digest=digest(after)))
    valid = [entry.encode() for entry in entries]

    def follow(data: bytes) -> Entry:
        entry = Entry.decode(data)
        if 0 < entry.step <= 100:  # as ``catch_up`` and ``Kept.follows`` hold it against the run's rounds
            found, _ = replay(rule, g, None, entry)
            assert found.shape == g.shape
        return entry

    with traced():
        for _ in range(400):
            data = mutate(valid)
            outcome(lambda data=data: follow(data), (WireError,), 1 << 20, seen)
    assert min(seen["taken"], seen["refused"]) > 20


@pytest.mark.parametrize("name", SYNCS)
def test_pieces_of_rounds(make_config: Callable[..., RunConfig], name: str) -> None:
    mutate, seen = Mutator(30 + len(name)), Counter[str]()
    rule, count = rule_of(make_config, SYNCS[name]), 2000
    valid = [squeeze(WEIGHTS, codec_of(rule.sync).encode(x).payload) for x in (normal(count), torch.zeros(count))]
    most = most_nbytes(rule.sync, 100_000)
    with traced():
        for _ in range(400):
            codec = mutate.random.choice([codec for codec, _ in valid] + [WEIGHTS, WEIGHTS + SUFFIX])
            data = mutate([payload for _, payload in valid])[:most]
            outcome(lambda c=codec, d=data: rule.decoded(c, d, count, full=False), (WireError,), 1 << 18, seen)
    assert seen["refused"] > 50
    assert seen["taken"] > 5


def test_inventories() -> None:
    mutate, seen = Mutator(40), Counter[str]()
    size = 300_000
    state = State(point=None, g=torch.zeros(size), m=None, v=None, updates=3, momentum=torch.ones(size))  # type: ignore[arg-type]
    valid = [inventory.encode(inventory.inventory(state))]
    with traced():
        for _ in range(600):
            data = mutate(valid)
            outcome(lambda data=data: inventory.decode(data, size), (WireError,), SLACK, seen)
    assert min(seen["taken"], seen["refused"]) > 50
