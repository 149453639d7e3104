"""Simulated throughput under churn: ``python -m benchmarks.churn``.

The real coordinator, state machine, engines' rules and pipelines of ``tests/sim`` on virtual time; computing is a wait
proportional to the microbatches done, so every figure is simulated. Machines lose power at random (exponentially, at a
given share an hour) and come back after a while. All stages ask for the same work. *Kept* is committed samples per
second, from one committed round to another, divided by those of the same swarm without deaths times the mean share of
machines that were up.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUR = 3600.0
WARM_SECONDS = 600.0
SHARES = (0.0, 0.10, 0.33, 1.00)


@dataclass(frozen=True, kw_only=True)
class Swarm:
    stages: int
    replicas: int
    step_seconds: float
    back_seconds: float
    hours: float


def simulate(swarm: Swarm, share: float, seed: int) -> tuple[float, float, int]:
    """Committed samples per second, the mean share of machines up, and deaths, after a warm-up."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from potluck.protocol.config import CheckpointConfig, CoordinatorConfig, EvalConfig, PipelineConfig, SyncConfig
    from tests.sim import engine
    from tests.sim import world as sim
    from tests.sim.coordinator import patched
    from tests.sim.kernel import sleep

    sys.set_int_max_str_digits(0)  # weights are counters of samples, written as one number
    size, config = swarm.stages * swarm.replicas, sim.a_config(random.Random(seed), 8)
    changes = {
        "steps": 10**6,
        "pipeline": PipelineConfig(stages=swarm.stages, microbatches=8, microbatch_size=1),
        "sync": SyncConfig(preset="cocktail", every=5),
        "eval": EvalConfig(every=50, samples=4),
        "checkpoint": CheckpointConfig(save_rounds=1, publish_rounds=10**6),
        "coordinator": CoordinatorConfig(wait_for=size, lease_seconds=600.0, patience_seconds=60.0),
    }
    import msgspec

    sim.a_size = lambda rng: size
    sim.a_config = lambda rng, _: msgspec.structs.replace(config, **changes)
    deaths, up = 0, 0.0
    rounds: list[tuple[float, int]] = []  # committed, after the warm-up: when, and samples
    with tempfile.TemporaryDirectory(dir=sim.MEMORY if sim.MEMORY.exists() else None) as folder:
        world = sim.World(seed, Path(folder))
        (division,) = world.rules.divisions
        needs = (replace(division.needs[0], work=1.0),) * swarm.stages  # as long as simulated machines compute
        world.rules = replace(world.rules, divisions=(replace(division, needs=needs),))
        with patched(world), engine.patched(world):
            world.faults.plan, world.step_seconds = {}, swarm.step_seconds
            world.coordinator.start()
            machines = [world.add_machine() for _ in range(size)]
            rng, now = random.Random(seed), lambda: world.kernel.now

            async def mortal(machine: sim.Machine) -> None:
                nonlocal deaths
                await sleep(WARM_SECONDS / 2)
                while share:
                    await sleep(rng.expovariate(share / HOUR))
                    machine.kill(silent=True)
                    deaths += 1
                    await sleep(rng.expovariate(1 / swarm.back_seconds))
                    machine.start()

            for machine in machines:
                machine.speed = 1.0
                machine.start()
                world.kernel.spawn(mortal(machine), world.nature)
            start = before = now()
            while now() < WARM_SECONDS + swarm.hours * HOUR:
                world.kernel.turn()
                if now() <= WARM_SECONDS:
                    start = before = now()
                    continue
                up += (now() - before) * sum(m.alive for m in machines) / size
                before = now()
                samples = world.coordinator.state.committed.sample
                if not rounds or samples != rounds[-1][1]:
                    rounds.append((now(), samples))
            (first, since), (last, until) = rounds[0], rounds[-1]
            found = (until - since) / (last - first), up / (now() - start), deaths
            for machine in machines:
                machine.kill()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--step-seconds", type=float, default=20.0, help="of a replica with nobody lost")
    parser.add_argument("--back-seconds", type=float, default=300.0, help="mean time until a killed machine is back")
    parser.add_argument("--hours", type=float, default=3.0, help="simulated, after ten minutes of warm-up")
    parser.add_argument("--seeds", type=int, default=4)
    options = vars(parser.parse_args())
    seeds = options.pop("seeds")
    swarm = Swarm(**options)
    print(f"simulated: {swarm}, {seeds} seeds")
    print("machines lost per hour | deaths | mean share up | samples/s | kept (range over seeds)")
    with ProcessPoolExecutor() as pool:
        jobs = {share: [pool.submit(simulate, swarm, share, seed) for seed in range(seeds)] for share in SHARES}
        ideal = statistics.mean(job.result()[0] for job in jobs[0.0])
        for share, runs in jobs.items():
            results = [job.result() for job in runs]
            kept = [rate / (ideal * up) for rate, up, _ in results]
            up, deaths = statistics.mean(r[1] for r in results), sum(r[2] for r in results)
            rate = statistics.mean(r[0] for r in results)
            print(
                f"{share:.0%} | {deaths} | {up:.3f} | {rate:.2f} | {statistics.mean(kept):.2f}"
                f" ({min(kept):.2f}-{max(kept):.2f})"
            )


if __name__ == "__main__":
    main()
