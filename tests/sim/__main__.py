"""``python -m tests.sim SEED [--trace]``: one history, told."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from .checks import Broken  # noqa: E402
from .world import World, simulate  # noqa: E402


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
            print(world.last_lines())
            if error.__cause__ and not isinstance(error.__cause__, Broken):
                traceback.print_exception(error.__cause__)
            print(f"BROKEN: {error}")
        else:
            if options.trace:
                print(world.last_lines())
        print(summary(world, time.process_time() - started), flush=True)
    return int(failed > 0)


def summary(world: World, seconds: float) -> str:
    state = world.coordinator.state
    faults = ", ".join(f"{count} {name}" for name, count in sorted(world.faults.counts.items()))
    return (
        f"seed {world.seed}: {world.size} machines, {len(world.rules.layers)} stages, {'lost' if world.lost else state.phase} at step"
        f" {state.committed.step} of {world.config.steps}, generation {state.generation}, {world.watch.commits} commits,"
        f" {world.kernel.events} events, {world.kernel.now:.0f} s in {seconds:.2f} s; {faults or 'no fault'}"
    )


if __name__ == "__main__":
    sys.exit(main())
