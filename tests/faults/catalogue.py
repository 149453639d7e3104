"""Every scenario: points and actions over layouts, and bad lines. ``ci`` is the part that every change is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from potluck.protocol.failpoints import Action, Do

from .roles import Times
from .scenario import DIVIDES, GROWS, ONE, THIRDS, THREE, TWO, Expect, Fault, Layout, Mode, Scenario, Trouble

SHORT = Times(silence_seconds=2.0, heartbeat_seconds=0.5, give_up_seconds=2.0)
SLOW = (  # words of what CI leaves out
    *("2x1 anna:worker.forward:kill", "2x1 anna:worker.activation.sent:kill", "2x1 anna:worker.update:kill"),
    *("2x1 anna:worker.updated:kill", "2x1 anna:worker.round.done:kill", "2x1 anna:worker.link", "acks:delay"),
    *("2x1 anna:worker.control.view:kill", "2x1 ben:worker.backward:error", "hello.accepted", "upload.written"),
    *("2x2 anna:worker.activation.sent", "2x2 anna:worker.updated", "2x2 anna:worker.link.send", "upload.piece:full@1"),
    *("2x1 ben-coordinator:late", "worker.leave:kill", "to-carl:cut 0.5s", "2x1 anna:stop", "worker.upload:error"),
)
MID = 20  # a hit in the middle of a run, for places that are reached with every microbatch
WELL = 10  # steps done, so that a round older than the newest one is on disk as well
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
    with_: tuple[str, str, int] | None = None,
    **how: object,
) -> Scenario:
    """One fault from inside, and perhaps a death (process, point, hit) ``with_`` it."""
    action = Action(do=do, hit=hit, seconds=seconds or {"delay": 0.4, "stop": STOP_SECONDS}.get(do, 0.0))
    faults = [Fault(process=process, point=point, action=action)]
    if with_:
        faults.append(Fault(process=with_[0], point=with_[1], action=Action(do="kill", hit=with_[2])))
    return Scenario(
        layout=layout,
        faults=tuple(faults),
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
LOGS = ("worker.link.state.send", "worker.link.state.receive")  # of two stages: redo logs, which nobody waits for
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
            yield at(ONE, name, point, "error", MID, "back", ci=name == "anna")
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
        yield at(
            TWO, "coordinator", point, "kill", 3 * dict(COORDINATOR)[point] // 2, "again", ci=point.endswith("view")
        )
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
        yield at(TWO, who[0], point, "kill", hit, "without", ci=True)
        if who[-1] != who[0]:
            yield at(TWO, "carl", point, "kill", hit, "without")
    for point in EXCHANGE:
        for name in ("dora", "carl"):
            yield at(TWO, name, point, "kill", 3, "without", ci=name == "dora")
        yield at(TWO, "ben", point, "delay", 3, "on")
        yield at(TWO, "anna", point, "stop", 3, "on", ci=point == "worker.round.mean_sent")
    for point in ("worker.backward", "worker.round.mean_sent", "worker.round.done"):
        yield at(TWO, "dora", point, "kill", 4, "without", restart=False, ci=point == "worker.round.mean_sent")
        yield at(TWO, "ben", point, "kill", 4, "without", restart=False)
    for point in MEMORY:
        yield at(TWO, "carl", point, "error", WELL, "without")
    for point in LINKS:
        for name in ("anna", "carl"):
            yield at(TWO, name, point, "error", MID, "without", ci=name == "carl")
    for point in LOGS:
        for name in ("anna", "carl"):
            yield at(TWO, name, point, "error", 3, "on", ci=name == "carl")
    yield at(TWO, "dora", "worker.savepoint.write", "full", 2, "on")
    for name in ("anna", "carl"):
        yield Scenario(layout=TWO, troubles=(Trouble(where=name, mode="interrupt"),), expect="on", ci=name == "anna")
    for point in ("worker.leaving", "worker.leave"):
        yield Scenario(
            layout=TWO,
            faults=(Fault(process="dora", point=point, action=Action(do="kill")),),
            troubles=(Trouble(where="dora", mode="interrupt"),),
            expect="any",
            ci=point == "worker.leave",
        )


def deaths() -> Iterator[Scenario]:
    """More than one at a time."""

    def of(layout: Layout, *who: tuple[str, str, int], expect: Expect, **how: object) -> Scenario:
        faults = tuple(Fault(process=n, point=p, action=Action(do="kill", hit=hit)) for n, p, hit in who)
        return Scenario(layout=layout, faults=faults, expect=expect, **how)  # type: ignore[arg-type]

    first = "dora", "worker.backward", 10
    yield of(TWO, first, ("anna", "worker.rerouted", 1), expect="back", ci=True)  # the substitute
    third = "carl", "worker.backward", 10
    yield of(THREE, third, ("ben", "worker.rerouted", 1), expect="without", ci=True)
    yield of(THREE, third, ("erin", "worker.rerouted", 1), expect="without")
    yield of(THREE, third, ("ben", "worker.update", 12), expect="without", restart=False)
    yield of(THREE, third, first, expect="without", restart=False)
    for name in ("ben", "carl"):  # a neighbour, as it sends again
        yield of(TWO, first, (name, "worker.rerouted", 1), expect="without", ci=name == "carl")
        yield of(TWO, ("anna", "worker.forward", 10), (name, "worker.rerouted", 1), expect="without")
    for point in ("worker.backward", "worker.round.captured", "worker.round.mean_sent"):  # neighbours, together
        hit = 10 if point == "worker.backward" else 3
        yield of(TWO, ("anna", point, hit), ("ben", point, hit), expect="without", ci=point == "worker.backward")
        yield of(TWO, ("dora", point, hit), ("carl", point, hit), expect="without", restart=False)
    for point, hit in (("coordinator.view", 120), ("coordinator.store.committed", 40), ("coordinator.acks", 50)):
        for name in ("dora", "ben"):
            both = ("coordinator", point, hit), (name, "worker.backward", 10)
            yield of(TWO, *both, expect="again", ci=point == "coordinator.view" and name == "dora")
    yield of(ONE, ("coordinator", "coordinator.view", 60), ("ben", "worker.backward", 10), expect="again", ci=True)
    yield of(TWO, ("coordinator", "coordinator.round.verdict", 3), ("carl", "worker.round.done", 3), expect="again")
    for first_one, second in (("anna", "dora"), ("ben", "carl"), ("anna", "ben")):
        yield Scenario(
            layout=TWO,
            troubles=(Trouble(where=first_one, mode="kill"), Trouble(where=second, mode="kill")),
            expect="without" if second == "ben" else "back",
            ci=first_one == "ben",
        )
    yield at(TWO, "carl", "worker.rerouted", "delay", 1, "without", with_=first)
    yield at(TWO, "anna", "worker.rerouted", "stop", 1, "without", with_=first)
    for name in ("dora", "carl"):
        where, times = Trouble(where=name, mode="kill"), {"patience_seconds": 2.0}
        for restart in (True, False):
            yield Scenario(
                layout=TWO,
                troubles=(where,),
                expect="held",
                steps=48,
                restart=restart,
                changes={"coordinator": times, "pipeline": {"quorum": 2}},
                ci=name == "dora",
            )


def newcomers() -> Iterator[Scenario]:
    more = {"steps": 90}
    yield Scenario(layout=GROWS, expect="on", ci=True, **more)  # type: ignore[arg-type]
    for do, expect in (("kill", "anew"), ("delay", "on"), ("stop", "on")):
        yield at(GROWS, "ben", "worker.state.serve", do, 1, expect, ci=do == "kill", **more)  # type: ignore[arg-type]
    for point in ("worker.seat.fetch", "worker.seat.fetched", "worker.seat.taken", "worker.joined"):
        yield at(GROWS, "carl", point, "kill", 1, "any", ci=point == "worker.seat.fetched", **more)  # type: ignore[arg-type]


def unevens() -> Iterator[Scenario]:
    """Of each stage one replica serves three microbatches of four, and either may be lost."""
    speeds = {"anna": 3.0, "ben": 5.0, "carl": 2.0}
    yield Scenario(layout=TWO, speeds=speeds, expect="on", ci=True)
    for name in ("anna", "dora"):
        where = Trouble(where=name, mode="kill")
        yield Scenario(layout=TWO, speeds=speeds, troubles=(where,), expect="without", ci=name == "anna")


def divisions() -> Iterator[Scenario]:
    """Three workers train three stages faster than two: the layers are divided anew, for the third one."""
    more = {
        "steps": 30,
        "changes": {"model": {"d_model": 128, "layers": 6}, "pipeline": {"stages": {"min": 2, "max": 3}}},
        "times": Times(divide_seconds=0.0),
    }
    yield Scenario(layout=DIVIDES, expect="divided", ci=True, **more)  # type: ignore[arg-type]
    leaves = Trouble(where="carl", mode="interrupt")  # and gives its part to two stages that are left
    yield Scenario(layout=THIRDS, troubles=(leaves,), expect="divided", ci=True, **more)  # type: ignore[arg-type]
    for name in ("anna", "ben", "carl"):
        for point in ("worker.seat.fetch", "worker.seat.fetched", "worker.seat.taken"):
            hit = 1 if name == "carl" else 2
            ci = (name, point) in (("carl", "worker.seat.fetched"), ("anna", "worker.seat.taken"))
            yield at(DIVIDES, name, point, "kill", hit, "any", ci=ci, **more)  # type: ignore[arg-type]
    yield at(DIVIDES, "ben", "worker.state.serve", "kill", 1, "any", **more)  # type: ignore[arg-type]
    yield at(DIVIDES, "coordinator", "coordinator.plan.issued", "kill", 2, "any", ci=True, **more)  # type: ignore[arg-type]


def lines() -> Iterator[Scenario]:
    for name in ("anna", "ben"):
        yield line(ONE, name, "stop", 1.0, "on", ci=name == "anna")
        yield line(ONE, name, "stop", 3.5, "back", times=SHORT, ci=name == "ben")
        yield line(ONE, f"{name}-coordinator", "cut", 0.5, "on", ci=name == "anna")
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
        yield line(TWO, name, "stop", 3.5, "without", times=SHORT, steps=200, ci=name == "dora")
        yield line(TWO, f"to-{name}", "cut", 4.0, "without", times=SHORT, ci=name == "carl")
        yield line(TWO, f"{name}-coordinator", "cut", 0.5, "on")
        yield line(TWO, f"{name}-coordinator", "cut", 5.0, "without", ci=name == "dora")
        yield line(TWO, f"{name}-coordinator", "hole", 3.5, "without", times=SHORT)
        yield line(TWO, f"to-{name}", "cut", 0.5, "on", ci=name == "carl")
        yield line(TWO, f"to-{name}", "hole", 1.0, "on")
        yield line(TWO, f"to-{name}", "late", 1.0, "on")


def redialling() -> Iterator[Scenario]:
    cut = Trouble(where="anna-coordinator", mode="cut", seconds=0.2)
    for do in ("error", "kill", "delay"):
        action = Action(do=do, hit=2, seconds=0.4)  # type: ignore[arg-type]
        fault = Fault(process="anna", point="worker.control.dial", action=action)
        expect: Expect = "back" if do == "kill" else "on"
        yield Scenario(layout=ONE, faults=(fault,), troubles=(cut,), expect=expect, ci=do == "error")


def proofs() -> list[Scenario]:
    """Not faults of a run, but of the harness: what it must see."""
    return [
        Scenario(layout=TWO, sabotage=f"{name}:{what}") for name, what in (("dora", "gradient"), ("anna", "sample"))
    ]


def every() -> list[Scenario]:
    """All of them; no two have the same name."""
    found = [
        *one_replica(),
        *coordinators(),
        *two_replicas(),
        *deaths(),
        *newcomers(),
        *unevens(),
        *divisions(),
        *lines(),
        *redialling(),
    ]
    found = [replace(s, ci=s.ci and not any(word in s.name for word in SLOW)) for s in found]
    assert len({s.name for s in found}) == len(found), "two scenarios are the same"
    return found
