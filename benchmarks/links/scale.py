"""The scaling rule: how a small model on two cores meets a line as hard as GPT-J on home GPUs meets the real one.

A microbatch of the real run computes for ``c`` seconds at a stage and sends ``n`` bytes over a line of rate ``b`` and
latency ``l``. The small one computes for ``c'`` and sends ``n'``. Transfer takes the same share of compute if

    b' = b * (n' / n) / (c' / c)        and        l' = l * (c' / c).

Bytes go by tokens times width, for both use the same codecs: n' / n = T' d' / (T d). What rounds send goes by weights:
the small model's stages have fewer of them for their T' d' than GPT-J's, ``thin`` times, so that a round takes so many
fragments at once (of four, one a time, in the real run). The number of microbatches in a step is the real one, so
bubbles are the real ones. Packets, headers and the kernel's timers do not shrink: the small line is the harder one.

Stages that are wide enough to be lines' match are too much for two cores, so their blocks' computing is replaced by
waiting. What is sent is real: noise of the right shapes, through the real codecs, optimizer, rounds and sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GPTJ = {"d_model": 4096, "layers": 28, "vocab": 50_400}
BLOCK_WEIGHTS = 12 * 4096**2 + 9 * 4096  # about
SEQ_LEN = 2048
MICROBATCHES = 16  # of one sequence, a replica and step: 32,768 tokens, GPT-JT's 131,072 by four replicas
UTILISATION = 0.35  # of the published peak: what training reaches on GPUs (INTELLECT-1 tells 36 to 41 %)


@dataclass(frozen=True, kw_only=True)
class Card:
    """``tflops``: published dense fp16 tensor peak with fp32 accumulation."""

    name: str
    memory_gb: int
    tflops: float


CARDS = {
    "3090": Card(name="RTX 3090", memory_gb=24, tflops=71.0),
    "3060": Card(name="RTX 3060", memory_gb=12, tflops=25.5),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Stages times replicas, the card that holds a GPT-J stage of that size, and the small model that stands for it.

    ``layers`` make ``thin`` four; ``compute_seconds`` is what a microbatch is made to take at a stage, forward,
    recomputed forward and backward together.
    """

    stages: int
    replicas: int
    card: Card
    layers: int
    vocab: int = 512
    width: int = 1024
    seq_len: int = 256
    compute_seconds: float = 0.2

    @property
    def name(self) -> str:
        return f"{self.stages}x{self.replicas}"

    @property
    def real_seconds(self) -> float:
        """Of GPT-J's microbatch at a stage: 8 operations a weight and token, with the forward done twice."""
        weights = GPTJ["layers"] * BLOCK_WEIGHTS / self.stages
        return 8 * weights * SEQ_LEN / (UTILISATION * self.card.tflops * 1e12)

    @property
    def head(self) -> float:
        """Blocks of the small model that its head counts for: GPT-J's is as much work as one of its own."""
        return GPTJ["vocab"] * GPTJ["d_model"] / BLOCK_WEIGHTS * self.layers / GPTJ["layers"]

    @property
    def bytes_factor(self) -> float:
        return self.seq_len * self.width / (SEQ_LEN * GPTJ["d_model"])

    @property
    def time_factor(self) -> float:
        return self.compute_seconds / self.real_seconds

    @property
    def rate_factor(self) -> float:
        return self.bytes_factor / self.time_factor

    @property
    def thin(self) -> float:
        """Weights of a mean stage for its T d: GPT-J's over the small model's."""
        small = self.layers * 12 * self.width**2 + 2 * self.vocab * self.width
        return gptj_weights() / small * self.bytes_factor

    def describe(self) -> str:
        return (
            f"{self.name}: {GPTJ['layers'] // self.stages} GPT-J blocks on an {self.card.name}"
            f" ({UTILISATION:.0%} of {self.card.tflops:g} TFLOP/s), {self.real_seconds:.2f} s a microbatch of"
            f" {SEQ_LEN}. In its place: d {self.width}, {self.layers // self.stages} blocks, calibrated waiting of"
            f" {self.compute_seconds:g} s a microbatch of {self.seq_len}; rates x {self.rate_factor:.4f}, latencies x"
            f" {self.time_factor:.4f}; {self.thin:.1f} times fewer weights for T d, so all 4 fragments at once"
        )


def gptj_weights() -> float:
    return GPTJ["layers"] * BLOCK_WEIGHTS + 2 * GPTJ["vocab"] * GPTJ["d_model"]


LAYOUTS = {
    "2x2": Layout(stages=2, replicas=2, card=CARDS["3090"], layers=4),
    "4x2": Layout(stages=4, replicas=2, card=CARDS["3060"], layers=4, compute_seconds=0.4),
}

# Of the real run, with a quarter of the weights in each round; here all of them at once (see ``thin``).
SETTINGS: dict[str, dict[str, Any]] = {
    # The run.yaml of nobody who changes anything.
    "default": {"sync": {"preset": "potluck", "every": 5, "fragments": 1, "delay": 4}},
    # docs/PARITY.md: everything every 60 steps, 3-bit activations; one keeper: for lines slower than their GPUs.
    "lean": {
        "sync": {"preset": "potluck", "every": 15, "fragments": 1, "delay": 12},
        "activations": {"forward": "int3:tile=64,hadamard", "backward": "int3:tile=64,hadamard"},
        "checkpoint": {"keepers": 1, "save_rounds": 10**6, "publish_rounds": 10**6},
    },
    # What a pipeline in ordinary code sends: fp16 activations, an fp32 average of the weights every step.
    "plain": {"sync": {"preset": "dense"}, "activations": {"forward": "fp16", "backward": "fp16"}, "zstd": False},
}


def run_config(layout: Layout, setting: str, *, steps: int, host: str) -> dict[str, Any]:
    """``run.yaml`` of the small run, as plain data."""
    return {
        "name": "links",
        "steps": steps,
        "model": {
            "d_model": layout.width,
            "layers": layout.layers,
            "heads": 8,
            "rotary_dim": 32,
            "seq_len": layout.seq_len,
        },
        "data": {"vocab_size": layout.vocab},
        "pipeline": {"stages": layout.stages, "microbatch_size": 1, "microbatches": MICROBATCHES},
        "eval": {"every": 10**6, "samples": 8},
        "checkpoint": {"save_rounds": 10**6, "publish_rounds": 10**6},
        "coordinator": {
            "host": host,
            "wait_for": layout.stages * layout.replicas,
            "lease_seconds": 600.0,
        },
        **SETTINGS[setting],
    }
