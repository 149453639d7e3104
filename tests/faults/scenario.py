"""A scenario as data: which faults strike which process of which layout, and what the run must make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from potluck.protocol.failpoints import Action

from .roles import Times

Mode = Literal["stop", "kill", "interrupt", "cut", "hole", "slow", "late"]
Expect = Literal["on", "without", "held", "back", "anew", "again", "still", "divided", "any"]
WORDS: dict[Expect, str] = {
    "on": "goes on, nobody goes back",
    "without": "goes on without the lost replica, nobody goes back",
    "held": "rounds are held until the replica is back, or patience ends",
    "back": "all go back to the last committed round",
    "anew": "a new plan",
    "again": "the coordinator goes on from its file",
    "still": "the coordinator stands still, then goes on",
    "divided": "the layers are divided anew, or stay as they are: goes on",
    "any": "goes on",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """From inside: a failpoint."""

    process: str
    point: str
    action: Action

    def __str__(self) -> str:
        action = self.action
        much = f" {action.seconds:g}s" if action.do in ("delay", "stop") else ""
        return f"{self.process}:{self.point}:{action.do}{much}@{action.hit}"


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """From outside: a signal to a process, or a line's bad time, once ``round`` rounds are committed.

    Lines are called ``anna-coordinator`` (anna's control stream) and ``to-anna`` (what other workers send her).
    """

    where: str
    mode: Mode
    round: int = 2
    seconds: float = 0.0

    def __str__(self) -> str:
        much = f" {self.seconds:g}s" if self.seconds else ""
        return f"{self.where}:{self.mode}{much}@round{self.round}"

    @property
    def is_signal(self) -> bool:
        return self.mode in ("stop", "kill", "interrupt")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who is there. With these keys and equal speeds, the first one named of a stage is its replica 0."""

    name: str
    stages: tuple[tuple[str, ...], ...]
    late: tuple[str, ...] = ()  # join once a round is committed

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(sorted(name for stage in self.stages for name in stage))


ONE = Layout(name="2x1", stages=(("anna",), ("ben",)))
TWO = Layout(name="2x2", stages=(("anna", "dora"), ("ben", "carl")))
THREE = Layout(name="2+3", stages=(("anna", "dora"), ("ben", "carl", "erin")))
DIVIDES = Layout(name="2..3x1+1", stages=(("anna",), ("ben",)), late=("carl",))
THIRDS = Layout(name="2..3x1", stages=(("anna",), ("ben",), ("carl",)))
GROWS = Layout(name="2x1+1", stages=(("anna",), ("ben",)), late=("carl",))


AS_IT_IS = Times()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run. ``changes`` are made to the sections of its configuration."""

    layout: Layout
    faults: tuple[Fault, ...] = ()
    troubles: tuple[Trouble, ...] = ()
    expect: Expect = "any"
    steps: int = 24
    times: Times = AS_IT_IS
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)  # that workers say they have
    restart: bool = True  # who dies is started again
    sabotage: str = ""  # a worker that trains otherwise than it says, for a proof that it is found
    ci: bool = False

    @property
    def name(self) -> str:
        lone = "" if self.restart else "for good"
        fast = " ".join(f"{name}x{speed:g}" for name, speed in self.speeds.items())
        words = [self.layout.name, fast, *map(str, (*self.faults, *self.troubles)), lone, self.sabotage]
        return " ".join(filter(None, words))

    @property
    def what(self) -> str:
        what = " and ".join(map(str, (*self.faults, *self.troubles))) or "none"
        return what if self.restart else what + ", for good"

    @property
    def lines(self) -> dict[str, str]:
        """Of the proxy: name to the process behind it."""
        names = {t.where for t in self.troubles if not t.is_signal}
        return {n: "coordinator" if n.endswith("-coordinator") else n.removeprefix("to-") for n in sorted(names)}

    def config(self, source: str) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "name": "faults",
            "steps": self.steps,
            "model": {"d_model": 32, "layers": 2, "heads": 2, "rotary_dim": 8, "seq_len": 16},
            "data": {"source": source, "vocab_size": 300, "heldout_share": 0.1},
            "pipeline": {"stages": 2, "microbatch_size": 2, "microbatches": 2},
            "activations": {"forward": "fp32", "backward": "fp32"},
            "sync": {"preset": "dense", "every": 3, "delay": 1},
            "eval": {"every": 1000, "samples": 4},
            "checkpoint": {"save_rounds": 1, "publish_rounds": 10**9},
            "coordinator": {"patience_seconds": 1.0, "wait_for": len(self.layout.workers), "relay": False},
        }
        for section, values in self.changes.items():
            raw[section] = {**raw[section], **values}
        return raw
