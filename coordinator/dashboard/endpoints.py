"""Every read-only address of the API, in one table: the server, the OpenAPI document, docs/API.md and the report are
made from it and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .parameters import Param
from .shapes import (
    Evaluation,
    EventRow,
    Incident,
    LinkPoint,
    LinkRow,
    PeerPage,
    Point,
    RoundPage,
    RoundRow,
    Standing,
    State,
    StepPage,
    StepRow,
    TrafficPoint,
)
from .source import Source
from .tables import Row

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``columns``: of its CSV, which every list has beside it; ``rows`` makes that of the answer where its fields are
    no cells. ``missing``: what a 404 says, where the answer may be None. ``is_quick``: answered from memory."""

    path: str
    summary: str
    answer: Any  # type
    ask: Callable[[Source, Arguments], Any]
    params: tuple[Param, ...] = ()
    columns: tuple[str, ...] = ()
    rows: Callable[[Any], Iterable[Row]] | None = None
    missing: str = ""
    is_quick: Callable[[Arguments], bool] = lambda arguments: False

    def cells(self, answer: Any) -> Iterable[Row]:
        """The answer's rows, in the order of the columns."""
        if self.rows:
            return self.rows(answer)
        return ([getattr(row, column) for column in self.columns] for row in answer)

    @property
    def name(self) -> str:
        """Of the file that its CSV is saved as."""
        return "-".join(part for part in self.path.split("/")[2:] if "{" not in part)


def traffic_rows(answer: list[TrafficPoint]) -> Iterable[Row]:
    return (
        (point.time, point.step, point.tokens, part.purpose, part.nbytes, part.dense_nbytes)
        for point in answer
        for part in point.traffic
    )


def evaluation_rows(answer: list[dict[str, Any]]) -> Iterable[Row]:
    """One for each task that has a score, after one for what stands above them all."""
    for row in answer:
        scores = [(row["label"], "", row["score"])]
        scores += [(task["name"], task["metric"], task.get("score")) for task in row["tasks"]]
        for task, metric, score in scores:
            if score:
                numbers = [score.get(key) for key in ("value", "low", "high", "n")]
                yield (row["step"], row["suite"], row["time"], task, metric, *numbers)


UNTIL = Param(name="until", kind="moment", text="only what was there at this moment")
AT = Param(name="at", kind="moment", text="as it was at this moment; left out: as it is")


def after(what: str) -> Param:
    return Param(name="after", kind="whole", text=f"only {what} with an id above this one", default=0)


def before(what: str) -> Param:
    return Param(name="before", kind="whole", text=f"only {what} before this step")


def at_most(name: str, default: int, high: int, what: str) -> Param:
    return Param(name=name, kind="whole", text=f"so many {what} at most", default=default, low=1, high=high)


def in_path(name: str, kind: Any, text: str) -> Param:
    return Param(name=name, kind=kind, text=text, place="path")


STEP = in_path("step", "whole", "the number of a step")
ROUND = in_path("step", "whole", "the step after which the round was committed")

TABLE: tuple[Endpoint, ...] = (
    Endpoint(
        path="/api/state",
        summary="Everything but the curve: the run, its stages, peers, links, newest rounds and events.",
        answer=State,
        params=(AT,),
        ask=lambda s, a: s.state() if a["at"] is None else s.state_at(a["at"]),
        is_quick=lambda a: a["at"] is None,
    ),
    Endpoint(
        path="/api/points",
        summary="The loss curve as it was recorded, point by point.",
        answer=list[Point],
        params=(after("points"),),
        columns=("id", "step", "tokens", "time", "train", "heldout"),
        ask=lambda s, a: s.points(a["after"]),
        is_quick=lambda a: True,
    ),
    Endpoint(
        path="/api/curve",
        summary="The loss curve, down-sampled: low and high are the extremes of what a point stands for.",
        answer=list[Point],
        params=(at_most("most", 2000, 20_000, "points"), UNTIL),
        columns=("id", "step", "tokens", "time", "train", "heldout", "low", "high"),
        ask=lambda s, a: s.curve(a["most"], a["until"]),
    ),
    Endpoint(
        path="/api/events",
        summary="What happened to the run.",
        answer=list[EventRow],
        params=(
            after("events"),
            UNTIL,
            at_most("limit", 200, 1000, "events"),
            Param(name="kind", kind="word", text="only events of this kind, as PeerJoined"),
        ),
        columns=("id", "time", "step", "kind", "text", "peer"),
        ask=lambda s, a: s.events(a["after"], a["until"], a["limit"], a["kind"]),
    ),
    Endpoint(
        path="/api/incidents",
        summary="Events that explain a curve: who died, came or moved, degraded rounds, steps taken back.",
        answer=list[Incident],
        params=(UNTIL,),
        columns=("id", "time", "step", "group", "text", "peer"),
        ask=lambda s, a: s.incidents(a["until"]),
    ),
    Endpoint(
        path="/api/rounds",
        summary="Committed rounds, newest first.",
        answer=list[RoundRow],
        params=(before("rounds committed"), at_most("limit", 100, 1000, "rounds")),
        columns=(
            *("round", "step", "replicas", "samples", "agree", "nbytes", "seconds", "committed"),
            "degraded",
        ),
        ask=lambda s, a: s.rounds(a["before"], a["limit"]),
    ),
    Endpoint(
        path="/api/rounds/{step}",
        summary="One round: what every replica brought into it, and the digest of the weights after it.",
        answer=RoundPage,
        params=(ROUND,),
        ask=lambda s, a: s.round(a["step"]),
        missing="No round was committed at this step",
    ),
    Endpoint(
        path="/api/peers/{id}",
        summary="One peer: its caps, history, events and rank.",
        answer=PeerPage,
        params=(in_path("id", "word", "a peer's id"), AT),
        ask=lambda s, a: s.peer(a["id"], a["at"]),
        missing="The run knows no such peer",
    ),
    Endpoint(
        path="/api/links",
        summary="How peers reach each other, as the senders said.",
        answer=list[LinkRow],
        params=(AT,),
        columns=("sender", "receiver", "path", "rtt_seconds", "bytes_per_second", "cap", "share", "time"),
        ask=lambda s, a: s.links(a["at"]),
    ),
    Endpoint(
        path="/api/links/{sender}/{receiver}",
        summary="One link's speed and round trip over time.",
        answer=list[LinkPoint],
        params=(in_path("sender", "word", "a peer's id"), in_path("receiver", "word", "a peer's id")),
        columns=("time", "bytes_per_second", "rtt_seconds"),
        ask=lambda s, a: s.link(a["sender"], a["receiver"]),
    ),
    Endpoint(
        path="/api/traffic",
        summary="All bytes sent, by purpose, over time; its CSV has a line for each purpose.",
        answer=list[TrafficPoint],
        params=(at_most("most", 500, 5000, "moments"), UNTIL),
        columns=("time", "step", "tokens", "purpose", "nbytes", "dense_nbytes"),
        rows=traffic_rows,
        ask=lambda s, a: s.traffic(a["most"], a["until"]),
    ),
    Endpoint(
        path="/api/leaderboard",
        summary="Who did how much of the committed work, most first.",
        answer=list[Standing],
        columns=(
            *("rank", "peer", "name", "region", "work", "tokens", "share", "rounds", "first_seen"),
            "is_here",
        ),
        ask=lambda s, a: s.leaderboard(),
    ),
    Endpoint(
        path="/api/steps",
        summary="Steps whose course is on record.",
        answer=list[StepRow],
        params=(
            at_most("limit", 50, 1000, "steps"),
            Param(
                name="order",
                kind="choice",
                text="which come first",
                default="newest",
                choices=("newest", "slowest"),
            ),
        ),
        columns=("step", "time", "seconds", "usual"),
        ask=lambda s, a: s.steps(a["limit"], a["order"]),
    ),
    Endpoint(
        path="/api/steps/{step}",
        summary="One step: who did what when, its critical path, and why it took so long.",
        answer=StepPage,
        params=(STEP,),
        ask=lambda s, a: s.step(a["step"]),
        missing="This step's course is not on record",
    ),
    Endpoint(
        path="/api/evaluations",
        summary="What published models scored; the CSV has a line for each task.",
        answer=list[Evaluation],
        columns=("step", "suite", "time", "task", "metric", "value", "low", "high", "n"),
        rows=evaluation_rows,
        ask=lambda s, a: s.evaluations(),
    ),
)
