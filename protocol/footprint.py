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
from .model_config import LoraConfig, Precision
from .plan import Shape

WEIGHT_NBYTES = {"fp32": 4, "mixed": 4 + 2, "bf16": 2}  # one that trains; mixed: and what the blocks compute with
STATE_NBYTES = {"fp32": 4, "mixed": 4, "bf16": 2}  # the same in a state
NBYTES = {"fp32": 4, "mixed": 2, "bf16": 2}  # a number in the arithmetic, and a gradient
BASE_NBYTES = {"fp32": 4.0, "bf16": 2.0, "4bit": 0.5 + 4 / 64}  # a weight of a frozen matrix: worker/nf4.py
LOGITS_NBYTES = 64 << 20  # of fp32 logits, above which the loss is made of parts of the positions (worker/head_loss.py)
LOGITS_PART_NBYTES = 32 << 20
ROUND_NBYTES = 16 << 20  # of a round, whatever the size
RECENT_NBYTES = 1  # a weight, of rounds as they were sent, for newcomers whose state is a few of them old
MOMENTS_8BIT = 2 * (1 + 4 / 256)  # bytes a weight: a code and its share of a block's scale, twice
UPDATE_NBYTES = {"cpu": 10 * 4 << 20, "cuda": 8 * 4 << 22}  # copies of the weights that are updated at a time
CARDS = (8, 10, 12, 16, 24)  # gigabytes (2^30 bytes) that GPUs in homes have
CONTEXT_NBYTES = 500_000_000  # CUDA's own on a GPU, with the libraries' workspaces
FRAGMENTED = 0.05  # share of a GPU's memory that is lost between tensors


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one replica of a stage, at their most. On a GPU, ``reference`` and ``rounds`` are in the machine's.

    ``parameters``: how many are trained; all but ``base`` and what microbatches take follows from them.
    """

    parameters: int
    base: float  # frozen weights; 0 where all are trained
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
        own = self.base + self.weights + self.gradients + self.moments + self.flights + self.graph + self.workspace
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
    """What decides about memory in ``run.yaml``: ``model.dtype``, ``optimizer.bits``, ``pipeline.recompute``, and what
    the base is held in where only adapters train (``model.train``, ``model.lora.base``); empty: all weights train."""

    dtype: Precision
    bits: Literal[8, 32]
    recompute: bool
    base: Literal["", "4bit", "bf16", "fp32"] = ""

    @classmethod
    def of(cls, config: RunConfig) -> Choice:
        model = config.model
        base: Literal["", "4bit", "bf16", "fp32"] = model.lora.base if model.train == "lora" else ""
        return cls(model.dtype, config.optimizer.bits, config.pipeline.recompute, base)

    def within(self, config: RunConfig) -> RunConfig:
        model = config.model
        if self.base:
            lora = replace(model.lora, base=self.base)
            model = replace(model, dtype=self.dtype, train="lora", lora=lora)
        else:
            model = replace(model, dtype=self.dtype, train="full", lora=LoraConfig())
        return replace(
            config,
            model=model,
            optimizer=replace(config.optimizer, bits=self.bits),
            pipeline=replace(config.pipeline, recompute=self.recompute),
        )


CHOICES = tuple(Choice(d, b, r) for d in ("fp32", "mixed", "bf16") for b in (32, 8) for r in (False, True))
LORA_CHOICES = tuple(Choice("bf16", 32, r, base) for base in ("bf16", "4bit") for r in (False, True))


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
        base=base_nbytes(config, vocab_size, first, last),
        weights=n * WEIGHT_NBYTES[model.dtype],
        gradients=n * e,
        moments=n * (8 if config.optimizer.bits == 32 else MOMENTS_8BIT),
        reference=4 * n,
        rounds=_rounds(config, n),
        flights=flights,
        graph=graph,
        workspace=_workspace(config, vocab_size, first, last, device),
    )


def base_nbytes(config: RunConfig, vocab_size: int, first: int, last: int) -> float:
    """Of the frozen weights of layers [first, last)."""
    model = config.model
    if model.train == "full":
        return 0.0
    total = 0.0
    for name, shape in architecture.tensors(model, vocab_size, first, last).items():
        held = BASE_NBYTES[model.lora.base] if architecture.is_projection(model, name) else NBYTES[model.dtype]
        total += math.prod(shape) * held
    return total


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
    if m.train == "lora":
        unit += len(m.targets) * m.lora.rank * e  # what A makes of the input
    return float(_units(config) * unit)


def _units(config: RunConfig) -> int:
    return config.pipeline.microbatch_size * config.model.seq_len


def _rounds(config: RunConfig, n: int) -> float:
    """The state to go back to and the one that a round makes: each has x and the moments as they lie in memory, the new
    one a reference of its own. What an owner of half of the weights owes, now and before. Of the weights that are moved
    at a time, what is left of them, what is decided, by how much they move, and parts of that. What a round that sends
    everything sends, and the last rounds as they were sent."""
    sync, e = config.sync.resolved(), STATE_NBYTES[config.model.dtype]
    moments = 8 if config.optimizer.bits == 32 else MOMENTS_8BIT
    is_lossy = min(sync.density, sync.topk) < 1 or sync.bits < 32
    vectors = 1 + is_lossy + 4 / sync.fragments + 1
    vectors += 3 * bool(sync.outer_momentum) + 2 * (sync.feedback == "explicit")
    recent = max(RECENT_NBYTES, sync.density * sync.topk * sync.bits / 8) if config.checkpoint.keepers else 0.0
    return n * (4.0 * vectors + 2 * (e + moments) + recent) + ROUND_NBYTES


def _workspace(config: RunConfig, vocab_size: int, first: int, last: int, device: str) -> float:
    """The most of: the loss, a block's backward, an update."""
    model, units = config.model.resolved(), _units(config)
    e, d, f = NBYTES[model.dtype], model.d_model, model.d_ff
    parts = architecture.parts(model, vocab_size)
    shapes = {**parts.block, **(parts.embedding if first == 0 else {}), **(parts.head if last == model.layers else {})}
    lora = model.train == "lora"
    # A gradient before it is added; of a frozen base, a matrix in the dtype of the arithmetic.
    matrix = max(map(math.prod, (parts.block if lora else shapes).values())) * e
    backward = max(map(math.prod, parts.block.values())) * e + units * (3 * f + 2 * d) * e
    if device == "cpu" and model.architecture == "gptj":
        scores = 2 * model.heads * model.seq_len * 4
        backward += units * max(0, scores - 4 * f * e)  # the MLP's graph is gone by then
    loss = 0.0
    if last == model.layers:
        logits = units * vocab_size * 4
        in_parts = logits > LOGITS_NBYTES
        of_head = 0 if lora else matrix
        n_parts = 4 if e == 4 else 5  # logits, in bf16 too, and what becomes of them on the way to their gradient
        loss = n_parts * LOGITS_PART_NBYTES + (0 if lora else vocab_size * d * e) if in_parts else 3 * logits + of_head
        loss += 2 * units * d * e
    plain = model.dtype == "fp32" and config.optimizer.bits == 32
    update = 0 if plain else UPDATE_NBYTES["cuda" if device == "cuda" else "cpu"]
    return float(max(loss, backward, matrix, update))  # an embedding's gradient comes when the blocks' are done
