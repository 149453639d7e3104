"""``python -m tests.sim SEED [--trace]``: one history, told."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from .checks import Broken
from .world import World, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--trace", action="store_true", help="every line, not the last ones of a failure only")
    parser.add_argument("--count", type=int, default=1, help="that many seeds from this one on")
    options = parser.parse_args()
    failed = 0
    for seed in range(options.seed, options.seed + options.count):
        started = time.process_time()
        try:
            world = simulate(seed, trace=options.trace)
        except Broken as error:
            failed += 1
            world = error.world  # type: ignore[attr-defined]
            sys.stdout.write(world.last_lines() + "\n")
            if error.__cause__ and not isinstance(error.__cause__, Broken):
                traceback.print_exception(error.__cause__)
            sys.stdout.write(f"BROKEN: {error}\n")
        else:
            if options.trace:
                sys.stdout.write(world.last_lines() + "\n")
        sys.stdout.write(summary(world, time.process_time() - started) + "\n")
        sys.stdout.flush()
    return int(failed > 0)


def counts(world: World) -> str:
    found = [len(division.layers) for division in world.rules.divisions]
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])


def summary(world: World, seconds: float) -> str:
    state = world.coordinator.state
    end = "lost" if world.lost else state.phase
    faults = ", ".join(f"{count} {name}" for name, count in sorted(world.faults.counts.items()))
    return (
        f"seed {world.seed}: {world.size} machines, {counts(world)} stages, {end} at step"
        f" {state.committed.step} of {world.config.steps}, generation {state.generation},"
        f" {world.watch.commits} commits, {world.kernel.events} events, {world.kernel.now:.0f} s"
        f" in {seconds:.2f} s; {faults or 'no fault'}"
    )


if __name__ == "__main__":
    sys.exit(main())
