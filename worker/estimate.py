"""What a run will send, before anything starts: bytes per token by purpose, and how long a line needs for them.

Counted as the meter counts (``protocol/meter.py``): frames with their headers, and what gRPC, TLS, TCP and IP add.
Before zstd, which takes some per cent off more, in every run differently (``squeeze.py``). Not in it: control streams
(0.1 kB/s a worker or so), the corpus, the states that newcomers fetch, what is sent twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compression.aq import MARK_NBYTES
from ..compression.mask import count
from ..compression.registry import build
from ..protocol.config import RunConfig
from ..protocol.frames import Header, Kind, Purpose, TensorSpec, encode_header, message_lengths
from ..protocol.meter import INTERNET
from ..protocol.plan import Shape
from ..protocol.schedule import fragments, is_eval, is_round
from .boundary import MARKS
from .reference import FLIPPED
from .shards import WEIGHTS, codec_of, layout
from .side_inputs import IDS, ids_codec

LONE_NBYTES = 3.0  # a weight, of a lone replica's round for its keepers (tests/worker/test_redo.py)
LOOK_AHEAD = 20_000  # steps whose rounds are counted; a longer run goes on like them


@dataclass(frozen=True, kw_only=True)
class Line:
    """A machine's internet line, in 10^6 bits per second."""

    up_mbps: float
    down_mbps: float

    def seconds(self, sent: float, received: float) -> float:
        """Time for so many bytes each way, both ways at once."""
        return max(sent * 8e-6 / self.up_mbps, received * 8e-6 / self.down_mbps)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One replica of a stage: mean bytes sent per step, and received; a round's bytes each way."""

    stage: int
    parameters: int
    sent: float
    received: float
    round_nbytes: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``nbytes`` and ``dense``: mean bytes per trained token, sent by all machines together, by purpose.

    ``dense`` is the same run uncompressed: fp16 boundaries, an fp16 ring all-reduce of the gradients every step.
    ``tokens`` are those of a step over all chains, ``chain_tokens`` those of one.
    """

    nbytes: dict[Purpose, float]
    dense: dict[Purpose, float]
    machines: tuple[Machine, ...]
    tokens: int
    chain_tokens: int
    steps_per_round: float

    @property
    def total(self) -> float:
        return sum(self.nbytes.values())

    def machine_nbytes(self) -> float:
        """Mean over the machines of bytes sent plus received per token of the machine's own chain."""
        each = [m.sent + m.received for m in self.machines]
        return sum(each) / len(each) / self.chain_tokens


def estimate(config: RunConfig, vocab_size: int, replicas: int) -> Estimate:
    """Of a run with ``replicas`` of every stage."""
    pipeline, model, sync = config.pipeline, config.model, config.sync.resolved()
    shape = Shape.of(model, vocab_size)
    stages = pipeline.counts(model.layers)[0]  # where the coordinator chooses: the fewest
    sizes = [shape.size(*layers) for layers in shape.split(stages)]
    boundaries, steps = stages - 1, min(config.steps, LOOK_AHEAD)
    chain_tokens = pipeline.microbatches * pipeline.microbatch_size * model.seq_len
    tokens = chain_tokens * replicas

    size = pipeline.microbatch_size
    forward = activation_nbytes(config, vocab_size, size, train=True)
    gradient = gradient_nbytes(config, size)
    evaluated = sum(is_eval(config.eval, steps, at) for at in range(steps + 1))
    whole, rest = divmod(config.eval.samples, size)
    held_out = whole * activation_nbytes(config, vocab_size, size, train=False)
    if rest:
        held_out += activation_nbytes(config, vocab_size, rest, train=False)
    per_step = pipeline.microbatches * replicas
    held_out_per_step = evaluated / steps * held_out

    rounds, sent = 0, [0.0] * len(sizes)
    pieces = {(n, f): round_nbytes(config, n, f, replicas) for n in set(sizes) for f in range(sync.fragments)}
    for step in range(min(steps, config.steps - 1)):
        if is_round(sync, config.seed, step):
            rounds += 1
            for f in fragments(sync, config.seed, step, last=False):
                sent = [total + pieces[n, f] for total, n in zip(sent, sizes, strict=True)]
    closing = [
        sum(round_nbytes(config, n, f, replicas, full=sync.completes) for f in range(sync.fragments)) for n in sizes
    ]
    per_round = max(1, min(steps, config.steps - 1))
    sent = [
        total / per_round * (1 - 1 / config.steps) + last / config.steps
        for total, last in zip(sent, closing, strict=True)
    ]

    machines = []
    for s, (n, total) in enumerate(zip(sizes, sent, strict=True)):
        ahead = pipeline.microbatches * forward + held_out_per_step / replicas
        back = pipeline.microbatches * gradient
        exchanged = total / replicas
        machines.append(
            Machine(
                stage=s,
                parameters=n,
                sent=(ahead if s < boundaries else 0) + (back if s else 0) + exchanged,
                received=(ahead if s else 0) + (back if s < boundaries else 0) + exchanged,
                round_nbytes=max(pieces[n, f] for f in range(sync.fragments)) / replicas,
            )
        )
    dense_boundary = 2 * model.d_model * boundaries
    return Estimate(
        nbytes={
            Purpose.ACTIVATION: boundaries * (per_step * forward + held_out_per_step) / tokens,
            Purpose.GRADIENT: boundaries * per_step * gradient / tokens,
            Purpose.WEIGHTS: sum(sent) / tokens,
        },
        dense={
            Purpose.ACTIVATION: dense_boundary * (1 + evaluated / steps * config.eval.samples * model.seq_len / tokens),
            Purpose.GRADIENT: dense_boundary,
            Purpose.WEIGHTS: 2 * (replicas - 1) * 2 * sum(sizes) / tokens,
        },
        machines=tuple(machines),
        tokens=tokens,
        chain_tokens=chain_tokens,
        steps_per_round=steps / max(1, rounds + (steps == config.steps)),
    )


def activation_nbytes(config: RunConfig, vocab_size: int, samples: int, *, train: bool) -> float:
    """A microbatch's hidden states and targets on their way to the next stage."""
    model, ids = config.model, ids_codec(vocab_size)
    hidden, targets = (samples, model.seq_len, model.d_model), (samples, model.seq_len)
    codec = build(config.activations.forward)
    specs = [
        TensorSpec(codec=codec.spec, shape=hidden, nbytes=codec.nbytes(hidden)),
        TensorSpec(codec=ids, shape=targets, nbytes=samples * model.seq_len * int(IDS[ids][-1])),
    ]
    if train and config.activations.reuse:
        specs.append(TensorSpec(codec=MARKS, shape=(samples, MARK_NBYTES), nbytes=samples * MARK_NBYTES))
    return frame_nbytes(Kind.ACTIVATION, specs)


def gradient_nbytes(config: RunConfig, samples: int) -> float:
    """A microbatch's gradient on its way back."""
    shape, codec = (samples, config.model.seq_len, config.model.d_model), build(config.activations.backward)
    return frame_nbytes(Kind.GRADIENT, [TensorSpec(codec=codec.spec, shape=shape, nbytes=codec.nbytes(shape))])


def round_nbytes(config: RunConfig, n: int, fragment: int, replicas: int, *, full: bool = False) -> float:
    """What all replicas of a stage of ``n`` weights send together in a round of one fragment; ``full``: in the last."""
    sync = config.sync.resolved()
    total = 0.0
    keepers = min(config.checkpoint.keepers, (config.pipeline.counts(config.model.layers)[0] - 1) * replicas)
    if replicas == 1:
        keepers = min(keepers, 1)
        for piece in layout(n, sync.fragments, 1)[fragment]:
            weights = piece.end - piece.start
            spec = TensorSpec(codec=FLIPPED, shape=(weights,), nbytes=round(LONE_NBYTES * weights))
            total += keepers * frame_nbytes(Kind.REDO, [spec])
        return total
    for a, b in (shard for piece in layout(n, sync.fragments, replicas)[fragment] for shard in piece.shards):
        values = b - a if full else count(b - a, sync.density)
        payload = round(codec_of(sync, full=full).expected(values))
        each = frame_nbytes(Kind.SHARD, [TensorSpec(codec=WEIGHTS, shape=(b - a,), nbytes=payload)])
        total += (2 * (replicas - 1) + keepers) * each  # the others' shards to their owner, his mean to them and these
    return total


def frame_nbytes(kind: Kind, specs: list[TensorSpec]) -> float:
    """A frame on the wire, with what the layers below add in both directions."""
    header = Header(
        kind=kind,
        run=bytes(8),
        generation=100,
        step=1000,
        stage=1,
        microbatch=1,
        part=0,
        attempt=0,
        tensors=tuple(specs),
        targets=1000,
        checksum=2**32 - 1,
        dense_nbytes=2**20,
    )
    total = 0.0
    for length in message_lengths(len(encode_header(header)), header.nbytes):
        added, acknowledged = INTERNET.of(length)
        total += length + added + acknowledged
    return total
