"""What goes wrong, by one seed: each history has its own mixture of faults, so that they meet in many ways."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from potluck.coordinator.state import Action, Order

from .kernel import Process, sleep
from .net import COORDINATOR

if TYPE_CHECKING:
    from .worker import Machine
    from .world import World

HOUR = 3600.0


class Faults:
    """Faults of a world, until ``over``."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.counts: dict[str, int] = {}
        kinds: dict[str, tuple[float, Callable[[], None]]] = {  # how often in an hour, for 4 machines
            "kill": (60, lambda: self.some().kill()),
            "power": (40, lambda: self.some().kill(silent=True)),
            "pause": (60, self.pause),
            "wipe": (30, self.wipe),
            "leave": (60, self.leave),
            "newcomer": (30, self.newcomer),
            "storm": (15, self.storm),
            "thin": (40, self.thin),
            "rot": (60, self.rot),
            "hang": (10, self.hang),
            "break": (120, self.break_line),
            "stall": (60, self.stall),
            "cut": (60, self.cut),
            "cut crew": (60, self.cut_crew),
            "slow": (60, self.slow),
            "crash": (60, lambda: self.world.coordinator.crash(power=self.rng.random() < 0.3)),
            "crash at": (60, self.crash_at),
            "disk": (30, self.disk),
            "slow disk": (20, self.slow_disk),
            "clock": (15, self.clock),
            "stop": (30, self.stop),
            "pause run": (40, self.pause_run),
            "drain": (40, lambda: self.order("drain", self.some().peer)),
            "ban": (40, lambda: self.order("ban", self.some().peer)),
            "checkpoint": (60, lambda: self.order("checkpoint")),
            "nap": (20, self.nap),
        }
        self.is_alone = rng.random() < 0.1  # only the coordinator fails: that costs nobody any work
        if self.is_alone:
            kinds = {name: kinds[name] for name in ("crash", "crash at", "disk", "clock", "pause run", "checkpoint")}
        strength = rng.choice([0.5, 1.0, 2.0, 4.0])
        self.plan = {
            name: (rate * strength * rng.choice([0.3, 1.0, 3.0]), action)
            for name, (rate, action) in kinds.items()
            if rng.random() < 0.45
        }

    def begin(self, process: Process) -> None:
        for name, (rate, action) in self.plan.items():
            self.world.kernel.spawn(self._again(name, rate, action), process)

    async def _again(self, name: str, rate: float, action: Callable[[], None]) -> None:
        while True:
            await sleep(self.rng.expovariate(rate / HOUR))
            if not self.world.faulty:
                return
            self.counts[name] = self.counts.get(name, 0) + 1
            action()

    def some(self) -> Machine:
        return self.rng.choice(list(self.world.machines.values()))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.world.kernel.later(seconds, action)

    # Machines.

    def pause(self) -> None:
        """SIGSTOP, or a lid that is closed."""
        machine = self.some()
        if machine.alive:
            assert machine.worker
            seconds = self.rng.choice([3.0, 15.0, 30.0, 120.0]) * self.rng.random()
            self.world.trace(machine.peer, f"is paused for {seconds:.0f} s")
            machine.worker.process.paused_until = self.world.kernel.now + seconds
            self.later(seconds, self.world.crew.flush)
            if machine.worker.connection:
                until = machine.worker.process.paused_until
                machine.worker.connection.server.unanswered(lambda: until > self.world.kernel.now)

    def wipe(self) -> None:
        machine = self.some()
        machine.kill(silent=self.rng.random() < 0.5)
        self.world.trace(machine.peer, "loses its disk")
        machine.disk.clear()
        self.world.wiped = True

    def leave(self) -> None:
        machine = self.some()
        if machine.alive:
            assert machine.worker
            self.world.trace(machine.peer, "wants to leave")
            machine.worker.leave()

    def newcomer(self) -> None:
        if len(self.world.machines) < 2 * self.world.size + 2:
            self.world.add_machine().start()

    def storm(self) -> None:
        """Half of all machines within a minute."""
        machines = list(self.world.machines.values())
        what = self.rng.choice(["kill", "leave", "join"])
        self.world.trace("everybody", f"a storm: {what}")
        for machine in self.rng.sample(machines, len(machines) // 2):
            after = 60 * self.rng.random()
            if what == "join":
                self.later(after, lambda: self.newcomer() if self.world.faulty else None)
            elif what == "kill":
                self.later(after, lambda m=machine: m.kill() if self.world.faulty else None)  # type: ignore[misc]
            else:
                self.later(after, lambda m=machine: m.worker.leave() if m.alive and m.worker else None)  # type: ignore[misc]

    def thin(self) -> None:
        """All replicas of a stage but one."""
        plan = self.world.coordinator.state.plan
        for replica in self.rng.choice(plan.replicas)[1:] if plan else ():
            self.world.machines[replica.peer].kill(silent=self.rng.random() < 0.5)

    def rot(self) -> None:
        """Memory goes bad: the reference is not what it was."""
        seated = [m for m in self.world.machines.values() if m.alive and m.worker and m.worker.engine.local.seated]
        if seated:
            machine = self.rng.choice(seated)
            assert machine.worker
            stage: Any = machine.worker.engine.stage
            if stage and stage.g.name in self.world.watch.contents:  # else there is no digest to see it by
                self.world.trace(machine.peer, "its memory rots")
                stage.g = stage.g.rotten(self.rng.randrange(1 << 30))

    def hang(self) -> None:
        machine = self.some()
        seconds = self.rng.choice([10.0, 60.0, 300.0])
        self.world.trace(machine.peer, f"computes nothing for {seconds:.0f} s")
        machine.hang_until = self.world.kernel.now + seconds

    # Lines.

    def break_line(self) -> None:
        """Both ends learn it, or one; most often of a worker whose reports are not acknowledged yet."""
        connections = list(self.world.net.connections)
        talking = [m.worker for m in self.world.machines.values() if m.worker and m.alive and m.worker.reports]
        if talking and self.rng.random() < 0.7:
            connections = [c for c in (w.connection for w in talking) if c and c.client.open]
        if connections:
            connection = self.rng.choice(connections)
            if self.rng.random() < 0.5:
                connection.client.broken(half_open=True)
            else:
                ends = [connection.client, connection.server]
                for end in self.rng.sample(ends, self.rng.choice([1, 2])):
                    end.broken()

    def stall(self) -> None:
        """What a worker sends on this connection comes minutes late; it dials again meanwhile."""
        connections = list(self.world.net.connections)
        if connections:
            connection = self.rng.choice(connections)
            connection.client.stalled = 600 * self.rng.random()
            self.world.trace(connection.client.here, f"its line stalls for {connection.client.stalled:.0f} s")
            self.later(self.rng.uniform(1, 20), lambda: connection.client.broken(half_open=True))

    def _cut(self, one: str, other: str) -> None:
        seconds = self.rng.choice([2.0, 10.0, 60.0, 300.0]) * self.rng.random()
        self.world.trace(one, f"is cut off from {other} for {seconds:.0f} s")
        self.world.net.cut(one, other)
        self.later(seconds, lambda: self.world.net.heal(one, other))

    def cut(self) -> None:
        self._cut(self.some().peer, COORDINATOR)

    def cut_crew(self) -> None:
        one, other = self.some().peer, self.some().peer
        if one != other:
            self._cut(one, other)

    def slow(self) -> None:
        peer = self.some().peer
        self.world.net.slow[peer] = 10.0
        self.later(self.rng.uniform(5, 120), lambda: self.world.net.slow.pop(peer, None))

    # The coordinator.

    def crash_at(self) -> None:
        self.world.coordinator.crash_at = self.rng.choice(["write", "commit"])

    def disk(self) -> None:
        disk = self.world.coordinator.disk
        disk.refusing = self.rng.choice([sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_BUSY])
        seconds = self.rng.choice([1.0, 10.0, 60.0]) * self.rng.random()
        self.world.trace(COORDINATOR, f"its disk refuses for {seconds:.0f} s")
        self.later(seconds, self.world.mend_disk)

    def slow_disk(self) -> None:
        """Lines break meanwhile, so that reports are repeated while the first ones are still being written."""
        self.world.coordinator.disk.slowness = self.rng.choice([10.0, 100.0, 2000.0])
        seconds = self.rng.uniform(1, 30)
        for _ in range(4):
            self.later(seconds * self.rng.random(), self.break_line)
        self.later(seconds, self.world.quick_disk)

    def clock(self) -> None:
        """The wall clock is set."""
        seconds = self.rng.choice([-HOUR, -30.0, -1.0, 1.0, 30.0, HOUR]) * self.rng.random()
        self.world.trace(COORDINATOR, f"its clock jumps by {seconds:.0f} s")
        self.world.coordinator.skew += seconds

    def order(self, action: Action, peer: str = "") -> None:
        """The operator's; now and then he insists."""
        hub = self.world.coordinator.hub
        if hub:
            self.world.trace(COORDINATOR, f"the operator orders: {action} {peer}".rstrip())
            hub.put(Order(action=action, peer=peer, why="a test", force=self.rng.random() < 0.3))

    def pause_run(self) -> None:
        """And on again, unless that is forgotten."""
        self.order("pause")
        if self.rng.random() < 0.9:
            self.later(self.rng.choice([2.0, 20.0, 100.0]) * self.rng.random(), lambda: self.order("resume"))

    def tidy(self) -> None:
        """Once nothing goes wrong any more: a run that stood by the operator's will goes on, with everybody."""
        state = self.world.coordinator.state
        if state.paused is not None:
            self.order("resume")
        for peer in state.bans:
            self.order("unban", peer)

    def nap(self) -> None:
        """The coordinator's machine sleeps."""
        seconds = self.rng.choice([3.0, 30.0, 300.0]) * self.rng.random()
        self.world.trace(COORDINATOR, f"sleeps for {seconds:.0f} s")
        self.world.coordinator.process.paused_until = self.world.kernel.now + seconds

    def stop(self) -> None:
        hub = self.world.coordinator.hub
        if hub:
            self.world.trace(COORDINATOR, "the operator asks it to stop")
            hub.stop()
