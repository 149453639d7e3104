"""How much memory a stage takes, in bytes, before anything starts: counted tensor by tensor, no torch here.

The one place that knows: the coordinator seats workers by it, ``potluck estimate`` prints it, a worker keeps as many
microbatches under way as it allows. ``benchmarks/memory.py`` holds it to the truth. Letters: B samples, T positions,
D width, F inside the MLP, K all heads of keys, H heads, V vocabulary; a *unit* is one number for each of B x T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from msgspec.structs import replace

from . import architecture
from .config import RunConfig
from .plan import Shape

NBYTES = {"fp32": 4, "bf16": 2}
LOGITS_NBYTES = 64 << 20  # of fp32 logits, above which the loss is made of parts of the positions (worker/head_loss.py)
LOGITS_PART_NBYTES = 32 << 20
MOMENTS_8BIT = 2 * (1 + 4 / 256)  # bytes a weight: a code and its share of a block's scale, twice
UPDATE_NBYTES = {"cpu": 10 * 4 << 20, "cuda": 8 * 4 << 22}  # copies of the weights that are updated at a time
CARDS = (8, 10, 12, 16, 24)  # gigabytes (2^30 bytes) that GPUs in homes have
CONTEXT_NBYTES = 500_000_000  # CUDA's own on a GPU, with the libraries' workspaces
FRAGMENTED = 0.05  # share of a GPU's memory that is lost between tensors


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one replica of a stage, at their most. On a GPU, ``reference`` and ``rounds`` are in the machine's."""

    parameters: int
    weights: float
    gradients: float
    moments: float
    reference: float  # fp32, what all replicas share
    rounds: float  # copies for a round on its way and to go back to
    flights: float  # microbatches between their forward and their backward
    graph: float  # of the blocks whose backward is at work
    workspace: float  # loss, gradients on their way into a tensor's, parts of an update

    @property
    def on_gpu(self) -> float:
        own = self.weights + self.gradients + self.moments + self.flights + self.graph + self.workspace
        return own + CONTEXT_NBYTES

    @property
    def beside_gpu(self) -> float:
        """Of the machine's memory, for a stage on a GPU."""
        return self.reference + self.rounds

    @property
    def on_cpu(self) -> float:
        """All in the machine's memory; beside it, what a process takes that does nothing, about 0.5 GB."""
        return self.on_gpu - CONTEXT_NBYTES + self.beside_gpu


def fits(footprint: Footprint, gigabytes: float) -> bool:
    """Whether a GPU sold with so many gigabytes (2^30 bytes) holds the stage."""
    return footprint.on_gpu <= gigabytes * (1 << 30) * (1 - FRAGMENTED)


def footprints(
    config: RunConfig, vocab_size: int, layers: Sequence[tuple[int, int]], device: str
) -> tuple[Footprint, ...]:
    """Of every stage [first, last) of a division. ``device``: ``cuda`` or ``cpu``, the kind of torch device."""
    count = len(layers)
    return tuple(footprint(config, vocab_size, *stage, count - i, device) for i, stage in enumerate(layers))


class Choice(NamedTuple):
    """What decides about memory in ``run.yaml``: ``model.dtype``, ``optimizer.bits``, ``pipeline.recompute``."""

    dtype: Literal["fp32", "bf16"]
    bits: Literal[8, 32]
    recompute: bool

    def within(self, config: RunConfig) -> RunConfig:
        return replace(
            config,
            model=replace(config.model, dtype=self.dtype),
            optimizer=replace(config.optimizer, bits=self.bits),
            pipeline=replace(config.pipeline, recompute=self.recompute),
        )


CHOICES = tuple(Choice(d, b, r) for d in ("fp32", "bf16") for b in (32, 8) for r in (False, True))


def footprint(
    config: RunConfig, vocab_size: int, first: int, last: int, window: int = 1, device: str = "cpu"
) -> Footprint:
    """Of layers [first, last). ``window``: microbatches under way in 1F1B, the last stage's being 1."""
    model, pipeline = config.model.resolved(), config.pipeline
    n, e = Shape.of(model, vocab_size).size(first, last), NBYTES[model.dtype]
    blocks, is_last = last - first, last == model.layers
    block = graph_nbytes(config, device)
    if is_last:
        flights, window = 0.0, 1
        whole = not recomputes(config, vocab_size, first, last, device)
        graph = (blocks if whole else 1) * block + blocks * _units(config) * model.d_model * e
    else:
        each = flight_nbytes(config, first, last, device)
        spare = min(pipeline.in_flight_gb * 1e9 // each, max(0, pipeline.microbatches - window))
        flights, graph = (min(window, pipeline.microbatches) + spare) * each, block if pipeline.recompute else 0.0
    return Footprint(
        parameters=n,
        weights=n * e,
        gradients=n * e,
        moments=n * (8 if config.optimizer.bits == 32 else MOMENTS_8BIT),
        reference=4 * n,
        rounds=_rounds(config, n),
        flights=flights,
        graph=graph,
        workspace=_workspace(config, vocab_size, first, last, device),
    )


def recomputes(config: RunConfig, vocab_size: int, first: int, last: int, device: str) -> bool:
    """Whether a stage's backward makes the blocks' graphs anew. The last stage's follows its forward at once: it keeps
    them where there is memory for them."""
    if not config.pipeline.recompute:
        return False
    return (
        last < config.model.layers or (last - first) * graph_nbytes(config, device) > config.pipeline.in_flight_gb * 1e9
    )


def flight_nbytes(config: RunConfig, first: int, last: int, device: str) -> float:
    """A microbatch between its forward and its backward, not at the last stage: what it came as and went as in fp32,
    and what the blocks begin with, or all their graphs."""
    e, blocks, units = NBYTES[config.model.dtype], last - first, _units(config)
    outside = units * config.model.d_model * 4
    kept = blocks * units * config.model.d_model * e
    if e == 4:  # what comes in and goes out is what the blocks begin and end with
        kept -= 0 if first == 0 else outside
    total = kept + outside + (outside if first > 0 else 0)
    return total if config.pipeline.recompute else total + blocks * graph_nbytes(config, device)


def graph_nbytes(config: RunConfig, device: str) -> float:
    """What autograd keeps for a block, besides its input: as of transformers' blocks, and ours for GPT-J."""
    m = config.model.resolved()
    e, d, f, k = NBYTES[m.dtype], m.d_model, m.d_ff, m.kv_heads * m.head_dim
    if m.architecture == "llama":
        unit = (6 * d + 2 * k + 4 * f) * e + (2 * d * 4 if e == 2 else d * e)  # an RMSNorm multiplies in fp32
    else:
        unit = 5 * (d + f) * e
        if device == "cpu":  # the plain arithmetic of attention, in fp32
            unit += m.heads * m.seq_len * (4 if e == 4 else 4 + e) + (2 * d * (4 - e))
    return float(_units(config) * unit)


def _units(config: RunConfig) -> int:
    return config.pipeline.microbatch_size * config.model.seq_len


def _rounds(config: RunConfig, n: int) -> float:
    """The state of the last round, x, m and v; the copies of a round on its way, again these three; what it makes of x
    and of the reference; what is sent and what is left."""
    sync = config.sync.resolved()
    vectors = 3 + 3 + 2 + 2
    vectors += 4 * bool(sync.outer_momentum) + 3 * (sync.feedback == "explicit")
    return 4.0 * n * vectors


def _workspace(config: RunConfig, vocab_size: int, first: int, last: int, device: str) -> float:
    """The most of: the loss, a block's backward, an update."""
    model, units = config.model.resolved(), _units(config)
    e, d, f = NBYTES[model.dtype], model.d_model, model.d_ff
    parts = architecture.parts(model, vocab_size)
    shapes = {**parts.block, **(parts.embedding if first == 0 else {}), **(parts.head if last == model.layers else {})}
    matrix = max(map(math.prod, shapes.values())) * e  # a gradient before it is added
    backward = matrix + units * (3 * f + 2 * d) * e
    if device == "cpu" and model.architecture == "gptj":
        scores = 2 * model.heads * model.seq_len * 4
        backward += units * max(0, scores - 4 * f * e)  # the MLP's graph is gone by then
    loss = 0.0
    if last == model.layers:
        logits = units * vocab_size * 4
        in_parts = logits > LOGITS_NBYTES
        loss = 2 * LOGITS_PART_NBYTES + vocab_size * d * e if in_parts else 3 * logits + matrix
        loss += 2 * units * d * e
    plain = model.dtype == "fp32" and config.optimizer.bits == 32
    update = 0 if plain else UPDATE_NBYTES["cuda" if device == "cuda" else "cpu"]
    return float(max(loss, backward, update))
