"""``python -m tests.faults.kills N``: N times SIGKILL for a process that writes batches to a run's file.

The writer says through a pipe what it wrote, after each commit. Whatever it said must be in the file, which must open
and verify every time. Prints how it went as JSON, and fails at the first loss with the seed that shows it again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.coordinator import events as ev
from potluck.coordinator.service import open_run
from potluck.coordinator.state import Command, Commit, Journal, Lease, Mark, Point, Remember, ReturnLeases
from potluck.coordinator.store import Store
from potluck.coordinator.verify import verify
from potluck.protocol.config import RunConfig
from potluck.protocol.manifest import Shard, plain

CONFIG = RunConfig(name="kills")
SAMPLES = CONFIG.pipeline.microbatches * CONFIG.pipeline.microbatch_size
EVERY = 3  # steps to a round
LIVES = 40  # of one file
MOST_ACKS = 12  # of one life, before it is ended
PEER = "writer"


@dataclass(frozen=True, kw_only=True)
class Ack:
    """What the writer said is on disk: the leases of so many steps and a round, of one generation."""

    generation: int
    step: int
    committed: int


MANIFEST = plain(
    source="none",
    license="none",
    seq_len=CONFIG.model.seq_len,
    dtype="uint16",
    vocab_size=300,
    eos=0,
    tokenizer_sha256="0" * 64,
    train=(Shard("0" * 64, 10),),
    heldout=(Shard("1" * 64, 10),),
)


def write(path: Path, out: int) -> None:
    """The writer's life: goes on from what is there, as a coordinator does, until it is killed."""
    store = Store(path)
    _, _, state = open_run(store, CONFIG, MANIFEST)
    generation, step, number = state.generation + 1, state.committed.step, state.rounds
    committed, sample = step, state.committed.sample
    origin = state.committed.kind

    def say() -> None:
        os.write(out, f"{generation} {step} {committed}\n".encode())

    names = tuple((f"w{i}",) for i in range(CONFIG.pipeline.stages))
    begin: list[Command] = [
        Journal(event=ev.RunOpened(name=CONFIG.name, step=step)),
        ReturnLeases(reason="a new plan starts from the last committed round"),
        Remember(generation=generation, stop=None),
        Journal(event=ev.PlanIssued(generation=generation, step=step, origin=origin, stages=names)),
        Journal(event=ev.TrainingStarted(generation=generation, step=step)),
    ]
    store.write(begin, time.time())
    say()
    base, first = step, sample
    while True:
        start = first + (step - base) * SAMPLES
        lease = Lease(generation=generation, step=step, peer=PEER, first=start, count=SAMPLES, expires=time.time() + 9)
        step += 1
        batch: list[Command] = [lease, Point(step=step, tokens_samples=start + SAMPLES, train=1.0)]
        if step % EVERY == 0:
            number, end = number + 1, start + SAMPLES
            mark = Mark(kind="round", generation=generation, step=step, sample=end, digests=(b"d",) * len(names))
            told: dict[str, Any] = {
                "round": number,
                "replicas": len(names),
                "samples": end - sample,
                "nbytes": 1,
                "seconds": 0.1,
            }
            told["degraded"] = False
            batch += [Commit(mark=mark, **told), Journal(event=ev.RoundCommitted(step=step, **told))]
            committed, sample = step, end
        store.write(batch, time.time())
        say()


def one_life(path: Path, rng: random.Random) -> list[Ack]:
    """Lets a writer live for a while; what it said."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            write(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    wanted, data = rng.randrange(MOST_ACKS), b""
    while data.count(b"\n") < wanted and (more := os.read(reading, 4096)):
        data += more
    time.sleep(rng.random() * 0.004)  # anywhere in what it does next
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the writer ended by itself"
    while more := os.read(reading, 4096):
        data += more
    os.close(reading)
    lines = [line.split() for line in data.decode().splitlines()]
    return [Ack(generation=int(g), step=int(s), committed=int(c)) for g, s, c in lines]


def lost(path: Path, acks: list[Ack]) -> list[str]:
    """What was said and is not there, or what is there and is wrong."""
    store = Store(path)
    try:
        generation = store.meta("generation", 0)
        leased = {tuple(row) for row in store.rows("SELECT generation, step FROM ledger")}
        rounds = {step for (step,) in store.rows("SELECT step FROM rounds")}
    finally:
        store.close()
    found = []
    base = acks[0].step if acks else 0
    for ack in acks:
        if ack.generation > generation:
            found.append(f"generation {ack.generation}")
        if ack.step > base and (ack.generation, ack.step - 1) not in leased:
            found.append(f"the lease of step {ack.step - 1}")
        if ack.committed and ack.committed not in rounds:
            found.append(f"the round at step {ack.committed}")
    report = verify(path)
    return found + ([] if not report.problems else report.lines())


def main(kills: int, seed: int = 1) -> int:
    started, said, worst = time.monotonic(), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for life in range(kills):
            path = Path(folder) / f"{life // LIVES}" / "run.sqlite"
            acks = one_life(path, random.Random(f"{seed}:{life}"))
            said += len(acks)
            if not path.exists() and not acks:
                continue
            opened = time.monotonic()
            if found := lost(path, acks):
                sys.stderr.write(f"life {life} of seed {seed} lost:\n" + "\n".join(found) + "\n")
                return 1
            worst = max(worst, time.monotonic() - opened)
    took = time.monotonic() - started
    told = {"kills": kills, "acknowledged": said, "lost": 0, "slowest_reopening": round(worst, 3), "seconds": took}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
