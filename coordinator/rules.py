"""What a run's configuration fixes for the state machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.config import EvalConfig, Sync
from .assignment import StageNeed


@dataclass(frozen=True, kw_only=True)
class Division:
    """A cut of the layers into stages, and what each of those needs. There is one for each number of stages."""

    layers: tuple[tuple[int, int], ...]  # of each stage, [first, last)
    needs: tuple[StageNeed, ...]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the configuration fixes for the whole run."""

    name: str
    seed: int
    steps: int
    divisions: tuple[Division, ...]  # that the run may have, fewest stages first
    microbatches: int
    microbatch_size: int
    sync: Sync
    eval: EvalConfig
    publish_rounds: int
    wait_for: int
    lease_seconds: float
    patience_seconds: float
    settle_seconds: float = 1.0  # after the last join, before a plan is made for it
    lease_ahead: int = 2  # steps granted beyond the slowest peer
    quorum: int = 1  # replicas of a stage, below which a round is held, then degraded
    reroutes: bool = True  # a generation goes on without a replica whose stage has another one
    silence_seconds: float = 15.0  # without a word, before a peer counts as lost
    away_seconds: float = 3.0  # that a peer has to dial again when its line broke
    prepare_seconds: float = 0.0  # that newcomers may take to fetch their stage, before they are seated without it
    move_seconds: float = 60.0  # that a stage stays thin, before somebody gets ready to move to it
    keepers: int = 0  # peers that keep a redo log of each stage
    divide_seconds: float = 300.0  # that another division stays clearly better, before the layers are divided anew

    def division(self, stages: int) -> Division:
        """The one with so many stages, or the first one if there is none."""
        return next((d for d in self.divisions if len(d.layers) == stages), self.divisions[0])

    def smallest_gb(self, device: str) -> float:
        """What a peer must offer at least to be of any use."""
        return min(need.gigabytes(device) for division in self.divisions for need in division.needs)
