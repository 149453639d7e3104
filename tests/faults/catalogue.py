"""Every scenario: points and actions over layouts, and bad lines. ``ci`` is the part that every change is held to."""

from __future__ import annotations

from collections.abc import Iterator

from potluck.protocol.failpoints import Action, Do

from .roles import Times
from .scenario import GROWS, ONE, TWO, Expect, Fault, Layout, Mode, Scenario, Trouble

SHORT = Times(silence_seconds=2.0, heartbeat_seconds=0.5, give_up_seconds=2.0)
MID = 20  # a hit in the middle of a run, for places that are reached with every microbatch
WELL = 10  # steps done, so that a round older than the newest one is on disk as well
SOON = {"coordinator": {"lease_seconds": 2.0}}  # leases end soon: the only end of a wait for a frame that was refused
STOP_SECONDS = 1.0


def at(
    layout: Layout,
    process: str,
    point: str,
    do: Do,
    hit: int,
    expect: Expect,
    *,
    seconds: float = 0.0,
    **how: object,
) -> Scenario:
    """One fault from inside."""
    action = Action(do=do, hit=hit, seconds=seconds or {"delay": 0.4, "stop": STOP_SECONDS}.get(do, 0.0))
    return Scenario(
        layout=layout,
        faults=(Fault(process=process, point=point, action=action),),
        expect=expect,
        **how,  # type: ignore[arg-type]
    )


def line(layout: Layout, where: str, mode: Mode, seconds: float, expect: Expect, **how: object) -> Scenario:
    """One fault from outside."""
    return Scenario(
        layout=layout,
        troubles=(Trouble(where=where, mode=mode, seconds=seconds),),
        expect=expect,
        **how,  # type: ignore[arg-type]
    )


# Of a worker, in training: the point, who of two stages reaches it, and a hit in the middle of a short run.
TRAINING: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("worker.forward", ("anna", "ben"), MID),
    ("worker.activation.sent", ("anna",), MID),
    ("worker.backward", ("anna", "ben"), MID),
    ("worker.gradient.sent", ("ben",), MID),
    ("worker.update", ("anna", "ben"), WELL),
    ("worker.updated", ("anna", "ben"), WELL),
    ("worker.round.captured", ("anna", "ben"), 3),
    ("worker.round.done", ("anna", "ben"), 3),
    ("worker.round.apply", ("anna", "ben"), 3),
    ("worker.link.send", ("anna", "ben"), MID),
    ("worker.link.receive", ("anna", "ben"), MID),
    ("worker.control.view", ("anna", "ben"), 10),
)
EXCHANGE = ("worker.round.shard_sent", "worker.round.shards_taken", "worker.round.mean_sent")
MEMORY = ("worker.forward", "worker.backward", "worker.update")
LINKS = ("worker.link.send", "worker.link.receive")
COORDINATOR: tuple[tuple[str, int], ...] = (
    ("coordinator.batch.taken", 30),
    ("coordinator.store.commit", 30),
    ("coordinator.store.committed", 30),
    ("coordinator.acks", 30),
    ("coordinator.view", 60),
    ("coordinator.plan.issued", 1),
    ("coordinator.round.verdict", 3),
    ("coordinator.hello.accepted", 1),
    ("coordinator.blob.piece", 1),
    ("coordinator.upload.piece", 1),
    ("coordinator.upload.written", 2),
    ("coordinator.publish.rename", 1),
)


def one_replica() -> Iterator[Scenario]:
    for point, who, hit in TRAINING:
        for name in who:
            yield at(ONE, name, point, "kill", hit, "back", ci=name == who[0])
    for point, who, hit in TRAINING:
        yield at(ONE, who[-1], point, "delay", hit, "on")
        yield at(ONE, who[0], point, "stop", hit, "on", ci=point == "worker.round.captured")
    for name in ("anna", "ben"):
        for point in MEMORY:
            yield at(ONE, name, point, "error", WELL if point == "worker.update" else MID, "back", ci=name == "ben")
        yield at(ONE, name, "worker.evaluate", "error", 1, "back")
        yield at(ONE, name, "worker.evaluate", "kill", 1, "back")
        yield at(ONE, name, "worker.evaluate", "kill", 2, "anew", ci=name == "ben")
        yield at(ONE, name, "worker.publish", "kill", 1, "back")
        yield at(ONE, name, "worker.publish", "kill", 2, "anew", ci=name == "anna")
        yield at(ONE, name, "worker.upload", "kill", 2, "anew")
        yield at(ONE, name, "worker.upload", "error", 2, "on", ci=name == "anna")
        yield at(ONE, name, "worker.savepoint.write", "kill", 2, "back", ci=name == "anna")
        yield at(ONE, name, "worker.savepoint.rename", "kill", 2, "back", ci=name == "ben")
        yield at(ONE, name, "worker.savepoint.write", "full", 2, "on", ci=name == "ben")
        yield at(ONE, name, "worker.joined", "kill", 1, "on", ci=name == "anna")
        for point in ("worker.seat.fetch", "worker.seat.fetched", "worker.seat.taken"):
            yield at(ONE, name, point, "kill", 1, "anew", ci=name == "ben" and point == "worker.seat.taken")
        for point in LINKS:
            yield at(ONE, name, point, "error", MID, "back", ci=name == "anna", changes=SOON)
    yield at(ONE, "anna", "worker.corpus.piece", "kill", 1, "anew")
    yield at(ONE, "anna", "worker.corpus.piece", "full", 1, "anew", ci=True)


def coordinators() -> Iterator[Scenario]:
    for point, hit in COORDINATOR:
        yield at(ONE, "coordinator", point, "kill", hit, "again", ci=True)
    for point in ("coordinator.batch.taken", "coordinator.round.verdict", "coordinator.acks", "coordinator.blob.piece"):
        hit = dict(COORDINATOR)[point]
        yield at(ONE, "coordinator", point, "delay", hit, "on", ci=point == "coordinator.acks")
    for point in ("coordinator.store.commit", "coordinator.store.committed", "coordinator.view"):
        yield at(ONE, "coordinator", point, "stop", dict(COORDINATOR)[point], "on")
        yield at(TWO, "coordinator", point, "kill", 2 * dict(COORDINATOR)[point], "again", ci=point.endswith("view"))
    for hit in (5, 15, 30):
        yield at(ONE, "coordinator", "coordinator.store.commit", "full", hit, "still", ci=hit == 30)
    yield at(TWO, "coordinator", "coordinator.store.commit", "full", 40, "still")
    yield at(TWO, "coordinator", "coordinator.round.verdict", "kill", 4, "again", ci=True)
    yield at(TWO, "coordinator", "coordinator.plan.issued", "kill", 1, "again")
    for point in ("coordinator.upload.piece", "coordinator.upload.written", "coordinator.publish.rename"):
        yield at(ONE, "coordinator", point, "full", 1, "on", ci=point == "coordinator.upload.piece")
    yield at(ONE, "coordinator", "coordinator.upload.piece", "full", 3, "on", ci=True)
    yield at(ONE, "coordinator", "coordinator.publish.rename", "error", 2, "on")
    for do in ("kill", "full"):
        yield at(ONE, "coordinator", "coordinator.corpus.write", do, 1, "on", ci=do == "full")
        yield at(ONE, "coordinator", "coordinator.corpus.rename", do, 1, "on")


def two_replicas() -> Iterator[Scenario]:
    for point, who, hit in TRAINING:
        yield at(TWO, who[0], point, "kill", hit, "back", ci=True)
        if who[-1] != who[0]:
            yield at(TWO, "carl", point, "kill", hit, "back")
    for point in EXCHANGE:
        for name in ("dora", "carl"):
            yield at(TWO, name, point, "kill", 3, "back", ci=name == "dora")
        yield at(TWO, "ben", point, "delay", 3, "on")
        yield at(TWO, "anna", point, "stop", 3, "on", ci=point == "worker.round.mean_sent")
    for point in ("worker.backward", "worker.round.mean_sent", "worker.round.done"):
        yield at(TWO, "dora", point, "kill", 4, "back", restart=False, ci=point == "worker.round.mean_sent")
    for point in MEMORY:
        yield at(TWO, "carl", point, "error", WELL, "back")
    yield at(TWO, "dora", "worker.savepoint.write", "full", 2, "on")
    for first, second in (("anna", "dora"), ("ben", "carl"), ("anna", "ben")):
        yield Scenario(
            layout=TWO,
            troubles=(Trouble(where=first, mode="kill"), Trouble(where=second, mode="kill")),
            expect="back",
            ci=first == "ben",
        )
    for name in ("anna", "carl"):
        yield Scenario(layout=TWO, troubles=(Trouble(where=name, mode="interrupt"),), expect="on", ci=name == "anna")
    for point, expect in (("worker.leaving", "on"), ("worker.leave", "on")):
        yield Scenario(
            layout=TWO,
            faults=(Fault(process="dora", point=point, action=Action(do="kill")),),
            troubles=(Trouble(where="dora", mode="interrupt"),),
            expect="any",
            ci=expect == "on" and point == "worker.leave",
        )


def newcomers() -> Iterator[Scenario]:
    more = {"steps": 90}
    yield Scenario(layout=GROWS, expect="on", ci=True, **more)  # type: ignore[arg-type]
    for do, expect in (("kill", "anew"), ("delay", "on"), ("stop", "on")):
        yield at(GROWS, "ben", "worker.state.serve", do, 1, expect, ci=do == "kill", **more)  # type: ignore[arg-type]
    for point in ("worker.seat.fetch", "worker.seat.fetched", "worker.seat.taken", "worker.joined"):
        yield at(GROWS, "carl", point, "kill", 1, "any", ci=point == "worker.seat.fetched", **more)  # type: ignore[arg-type]


def lines() -> Iterator[Scenario]:
    for name in ("anna", "ben"):
        yield line(ONE, name, "stop", 1.0, "on", ci=name == "anna")
        yield line(ONE, name, "stop", 3.5, "back", times=SHORT, ci=name == "ben")
        yield line(ONE, f"{name}-coordinator", "cut", 0.5, "back", ci=name == "anna")
        yield line(ONE, f"{name}-coordinator", "hole", 1.0, "on")
        yield line(ONE, f"{name}-coordinator", "hole", 3.5, "back", times=SHORT, ci=name == "ben")
        yield line(ONE, f"{name}-coordinator", "slow", 1.0, "on")
        yield line(ONE, f"{name}-coordinator", "late", 1.0, "on", ci=name == "ben")
        yield line(ONE, f"to-{name}", "cut", 0.5, "on", ci=name == "ben")
        yield line(ONE, f"to-{name}", "cut", 4.0, "back", times=SHORT)
        yield line(ONE, f"to-{name}", "hole", 1.0, "on", ci=name == "anna")
        yield line(ONE, f"to-{name}", "slow", 1.0, "on")
        yield line(ONE, f"to-{name}", "late", 1.0, "on")
    yield line(ONE, "coordinator", "stop", 1.0, "on")
    yield line(ONE, "coordinator", "stop", 3.5, "on", times=SHORT, ci=True)
    for name in ("dora", "carl"):
        yield line(TWO, name, "stop", 3.5, "back", times=SHORT, steps=200)
        yield line(TWO, f"to-{name}", "cut", 0.5, "on", ci=name == "carl")
        yield line(TWO, f"to-{name}", "hole", 1.0, "on")
        yield line(TWO, f"to-{name}", "late", 1.0, "on")


def redialling() -> Iterator[Scenario]:
    cut = Trouble(where="anna-coordinator", mode="cut", seconds=0.2)
    for do in ("error", "kill", "delay"):
        action = Action(do=do, hit=2, seconds=0.4)  # type: ignore[arg-type]
        fault = Fault(process="anna", point="worker.control.dial", action=action)
        yield Scenario(layout=ONE, faults=(fault,), troubles=(cut,), expect="back", ci=do == "error")


def proofs() -> list[Scenario]:
    """Not faults of a run, but of the harness: what it must see."""
    return [
        Scenario(layout=TWO, sabotage=f"{name}:{what}") for name, what in (("dora", "gradient"), ("anna", "sample"))
    ]


def every() -> list[Scenario]:
    """All of them; no two have the same name."""
    found = [*one_replica(), *coordinators(), *two_replicas(), *newcomers(), *lines(), *redialling()]
    assert len({s.name for s in found}) == len(found), "two scenarios are the same"
    return found
