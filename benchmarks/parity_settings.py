"""What :mod:`benchmarks.parity` compares, as data.

A setting is a round rule and two activation codecs. ``schedule`` names the uncompressed setting with the same rounds:
its own best local and outer learning rates are searched, and all settings of that schedule use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS, REPLICAS, STAGES = 300, 4, 3
SHAPE: dict[str, Any] = {
    "steps": STEPS,
    "model": {"d_model": 128, "layers": 3, "heads": 4, "rotary_dim": 16, "seq_len": 64},
    "pipeline": {"stages": STAGES, "microbatch_size": 4, "microbatches": 1, "recompute": False, "in_flight_gb": 0.0},
    "eval": {"every": 10**6, "samples": 1024},
}
VOCABULARY = 512
BASE_STEPS, BASE_BATCH, BASE_LR = 2500, 32, 3e-3
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)  # of a schedule, as far as loss falls
RAW = {"forward": "fp32", "backward": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    schedule: str
    group: str  # of the table: schedule, weights, activations, together
    sync: dict[str, Any] = field(default_factory=dict)  # beside the schedule's
    activations: dict[str, str] = field(default_factory=lambda: dict(RAW))


# What is searched: every local rate with every outer rate of the list.
SCHEDULES: dict[str, dict[str, Any]] = {
    "every step": {"preset": "dense"},
    "coin 1/50": {"preset": "dense", "coin": 1 / 50},
    "every 5": {"preset": "dense", "every": 5, "delay": 1},
    "every 20": {"preset": "dense", "every": 20, "delay": 1},
    "every 20, Nesterov": {"preset": "dense", "every": 20, "delay": 1, "outer_momentum": 0.9},
    "every 50": {"preset": "dense", "every": 50, "delay": 1},
    "every 60": {"preset": "dense", "every": 60, "delay": 1},
    "every 100": {"preset": "dense", "every": 100, "delay": 1},
}
OUTER: dict[str, tuple[float, ...]] = {
    "every step": (1.0,),
    "coin 1/50": (1.0,),
    "every 5": (1.0,),
    "every 20": (1.0, 1.5),
    "every 20, Nesterov": (0.4, 0.7),
    "every 50": (1.0,),
    "every 60": (1.0,),
    "every 100": (1.0,),
}


def weights(name: str, schedule: str, **sync: Any) -> Setting:
    return Setting(name=name, schedule=schedule, group="weights", sync=sync)


def activations(forward: str, backward: str) -> Setting:
    return Setting(
        name=f"{forward} / {backward}",
        schedule="every 20",
        group="activations",
        activations={"forward": forward, "backward": backward},
    )


HADAMARD_4, HADAMARD_3 = "int4:tile=64,hadamard", "int3:tile=64,hadamard"
STREAM: dict[str, Any] = {"fragments": 4, "delay": 4}
SPARSELOCO: dict[str, Any] = {"chunk": 4096, "bits": 2, "feedback": "explicit", "decay": 0.95}

SETTINGS: list[Setting] = [
    *(Setting(name=f"uncompressed, {s}", schedule=s, group="schedule") for s in SCHEDULES),
    weights("gptjt: everything, 16 bits", "coin 1/50", bits=16),
    weights("cocktail: mask 10 %, top 20 %, 4 bits", "every step", density=0.1, topk=0.2, bits=4, delay=1),
    weights("mask 10 %, 4 bits, every 5", "every 5", density=0.1, bits=4),
    weights("everything, 4 bits", "every 20", bits=4),
    weights("everything, 2 bits", "every 20", bits=2),
    weights("everything, 4 bits, 4 fragments, 4 steps late", "every 20", bits=4, **STREAM),
    weights("everything, 2 bits, 4 fragments, 4 steps late", "every 20", bits=2, **STREAM),
    weights("everything, 2 bits, every 50", "every 50", bits=2),
    weights("everything, 2 bits, every 60", "every 60", bits=2),
    weights("everything, 2 bits, every 100", "every 100", bits=2),
    weights("mask 25 %, 4 bits", "every 20", density=0.25, bits=4),
    weights("mask 10 %, 4 bits", "every 20", density=0.1, bits=4),
    weights("mask 5 %, 4 bits", "every 20", density=0.05, bits=4),
    weights("mask 20 %, 2 bits", "every 20", density=0.2, bits=2),
    weights("top 3 % of chunks, 2 bits", "every 20", topk=0.03, chunk=4096, bits=2),
    weights("mask 10 %, 4 bits, 5 fragments", "every 20", density=0.1, bits=4, fragments=5),
    weights("mask 10 %, 4 bits, 10 steps late", "every 20", density=0.1, bits=4, delay=10),
    weights("sparseloco: top 1.6 % of chunks, 2 bits", "every 20", topk=1 / 64, **SPARSELOCO),
    weights("sparseloco: top 3 % of chunks, 2 bits", "every 20", topk=0.03, **SPARSELOCO),
    weights("mask 10 %, 4 bits, every 50", "every 50", density=0.1, bits=4),
    weights("diloco: everything, 4 bits", "every 20, Nesterov", bits=4),
    activations("fp16", "fp16"),
    activations("int8:tile=64", "int8:tile=64"),
    activations("int4:tile=64", "int8:tile=64"),
    activations("int4:tile=64", "int4:tile=64"),
    activations("int4:tile=64,hadamard", "int4:tile=64,hadamard"),
    activations("int3:tile=64", "int3:tile=64"),
    activations("int3:tile=64,hadamard", "int3:tile=64,hadamard"),
    activations("int3:tile=64,hadamard", "int4:tile=64,hadamard"),
    activations("int2:tile=64,hadamard", "int2:tile=64,hadamard"),
    *(
        Setting(
            name=f"{what}, {schedule}; {forward} / {backward}",
            schedule=schedule,
            group="together",
            sync=sync,
            activations={"forward": forward, "backward": backward},
        )
        for what, schedule, sync, forward, backward in [
            ("4 bits, 4 fragments", "every 20", {"bits": 4, **STREAM}, HADAMARD_4, HADAMARD_4),
            ("2 bits, 4 fragments", "every 20", {"bits": 2, **STREAM}, HADAMARD_4, HADAMARD_4),
            ("2 bits", "every 50", {"bits": 2}, HADAMARD_4, HADAMARD_4),
            ("2 bits", "every 50", {"bits": 2}, HADAMARD_3, HADAMARD_3),
            ("mask 10 %, 4 bits", "every 20", {"density": 0.1, "bits": 4}, "int4:tile=64", "int4:tile=64"),
        ]
    ),
]
