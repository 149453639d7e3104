"""A synthetic run's file, as a coordinator would have left it: for measuring the dashboard, and for pictures of it.

    python -m benchmarks.dashboard_run OUT/run.sqlite [--peers 500] [--steps 100000] [--seed 0]

Written through the real store, with the real events. Nothing in it was trained, so its name says "synthetic". It has no
ledger: the dashboard reads none. Its peers' rows are as coarse as the store would have made them by now.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from potluck.coordinator import events as ev
from potluck.coordinator.store import Store
from potluck.protocol.config import EvalConfig, ModelConfig, PipelineConfig, RunConfig, StageRange, SyncConfig

from .dashboard_author import BEGAN, LARGE, Author, Peer

VOCAB = {False: 2048, True: 50_304}


def config_of(peers: int, steps: int) -> RunConfig:
    large = peers >= LARGE
    model = (
        ModelConfig(d_model=2048, layers=24, heads=16, rotary_dim=64, seq_len=1024) if large else ModelConfig(layers=6)
    )
    stages = StageRange(min=2, max=8) if large else StageRange(min=2, max=3)
    return RunConfig(
        name=f"synthetic-{peers}-peers",
        steps=steps,
        model=model,
        pipeline=PipelineConfig(stages=stages, microbatches=4, microbatch_size=2, quorum=2 if large else 1),
        sync=SyncConfig(preset="diloco"),
        eval=EvalConfig(every=500 if large else 20, samples=64),
    )


def write_run(path: Path, peers: int = 500, steps: int = 100_000, seed: int = 0) -> None:
    """Writes a run's file of so many peers and steps, the same for the same arguments. With a death, its return, a
    rollback, one of committed rounds, and a re-division, whatever the size; a large one (from 50 peers on) has peers
    that come and go all the time."""
    config = config_of(peers, steps)
    vocab_size = VOCAB[peers >= LARGE]
    with closing(Store(path)) as store:
        store.rows("PRAGMA synchronous = OFF")  # it can be written again
        store.set_meta(config=msgspec.to_builtins(config), vocab_size=vocab_size, run_id=f"{seed:016x}", generation=0)
        author = Author(store, config, vocab_size, peers, seed)
        compose(author, config, steps)


def compose(author: Author, config: RunConfig, steps: int) -> None:
    every = min(20, max(1, steps // 20))
    end = BEGAN + steps * author.pace * 1.25
    author.say(ev.RunOpened(name=config.name, step=0))
    author.write()
    author.churn(0.0)
    for peer in author.crew:
        if peer.back and (not author.is_large or author.chance.random() < 0.7):
            author.join(peer)
    author.plan(4 if author.is_large else 2)
    moments = moments_of(steps, every)
    victim: Peer | None = None
    while author.step < steps:
        before = author.now
        author.train()
        if author.step % every == 0 or author.step == steps:
            author.commit()
            if author.step % (every * max(1, steps // every // 8)) == 0:
                author.publish()
        author.churn(author.now - before)
        author.flush(end)
        author.write()
        while moments and author.step >= moments[0][0]:
            _, what = moments.pop(0)
            if what == "death":
                victim = max(
                    (max(s, key=lambda p: p.speed) for s in author.stages if len(s) > 1), key=lambda p: p.speed
                )
                author.leave(victim, graceful=False)
                victim.back = math.inf
            elif what == "return" and victim is not None:
                author.join(victim)
            elif what == "seat":
                author.plan()
            elif what == "rollback":
                author.back(*author.marks[-1], why="ben: no answer for 20 s")
            elif what == "lost rounds":
                author.back(*author.marks[-3], why="nobody holds a newer state of every stage")
            elif what == "division":
                author.plan(6 if author.is_large else 3, why="with 3 more workers each stage is smaller and faster")
            author.write()
    author.say(ev.PhaseChanged(phase="finishing", note="the last round is committed: evaluating and publishing"))
    author.now += 5.0
    author.publish()
    author.say(ev.Finished(step=steps), ev.PhaseChanged(phase="finished", note="the run is complete"))
    author.flush(author.now)
    author.extra += [
        ("INSERT INTO traffic VALUES (?,?,?,?,?,?)", [peer, "00", *way, *sums])
        for peer, totals in author.book.peers.items()
        for way, sums in author.sent(totals.samples).items()
    ]
    author.write()


def moments_of(steps: int, every: int) -> list[tuple[int, str]]:
    """After which step what happens, in order. What begins a plan does so at a committed round."""
    shares: Sequence[tuple[float, str, int]] = (
        (0.2, "death", 3),
        (0.3, "return", 1),
        (0.35, "seat", 0),
        (0.5, "rollback", every // 2),
        (0.65, "lost rounds", 0),
        (0.8, "division", 0),
    )
    return [(int(share * steps / every) * every + more, what) for share, what, more in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--peers", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    write_run(args.path, args.peers, args.steps, args.seed)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
