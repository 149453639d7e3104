"""``/metrics``: the run's state for Prometheus, in its text format or OpenMetrics.

Names and units follow Prometheus' conventions (base units, ``_total`` for what only grows). A peer is told by its id;
the name that it chose itself stands in ``potluck_peer_info`` alone. How many series there are is bounded: of more than
:data:`MOST_PEERS` peers, or :data:`MOST_LINKS` links, none is listed one by one, and a gauge says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..dashboard.openapi import Own
from ..dashboard.shapes import PeerRow, State
from .alerts import NAMES

MOST_PEERS, MOST_LINKS = 500, 2000
MOST_NAME = 80  # characters of a peer's own words
PHASES = ("waiting", "preparing", "training", "finishing", "finished", "stopped")
PEER_STATES = ("training", "loading", "waiting", "leaving", "away")
OPERATION = Own(
    "/metrics",
    "The run's state for Prometheus, in its text format or OpenMetrics, as the header Accept asks",
    {200: ("The metrics", None)},
    media="text/plain",
)


@dataclass(frozen=True)
class Seen:
    """What is told: the state, and what the coordinator knows of its own machine (None: nobody has looked yet)."""

    state: State
    disk_free_nbytes: int | None = None
    disk_nbytes: int | None = None
    clock_offset_seconds: float | None = None


class RunCollector(Collector):
    """The metrics of one moment. ``look`` is asked once for each scrape."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        self.look = look

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks for no state

    def collect(self) -> Iterator[Metric]:
        seen = self.look()
        yield from of_run(seen.state)
        yield from of_work(seen.state)
        yield from of_traffic(seen.state)
        yield from of_stages(seen.state)
        yield from of_peers(seen.state)
        yield from of_links(seen.state)
        yield from of_machine(seen)


def gauge(name: str, text: str, value: float | None) -> Iterator[Metric]:
    """One value; nothing of what nobody knows."""
    if value is not None:
        yield GaugeMetricFamily(name, text, value=float(value))


def counter(name: str, text: str, value: float | None) -> Iterator[Metric]:
    if value is not None:
        yield CounterMetricFamily(name, text, value=float(value))


def of_run(s: State) -> Iterator[Metric]:
    about = {"name": s.run.name, "run": s.run.id, "model": s.run.model, "preset": s.run.preset, "codec": s.run.codec}
    yield InfoMetricFamily("potluck_run", "What is trained, and how it is exchanged.", value=about)
    phases = GaugeMetricFamily(
        "potluck_phase", "1 for the phase that the run is in, 0 for the others.", labels=["phase"]
    )
    for phase in dict.fromkeys((*PHASES, s.phase)):
        phases.add_metric([phase], float(s.phase == phase))
    yield phases
    yield from gauge("potluck_paused", "Whether the operator has paused the run.", s.is_paused)
    yield from gauge("potluck_started_timestamp_seconds", "Unix time at which the run began.", s.started)
    yield from gauge("potluck_step", "Steps done; falls when the run goes back to a committed round.", s.step)
    yield from gauge("potluck_target_steps", "Steps after which the run is finished.", s.steps)
    yield from gauge("potluck_generation", "Number of the plan in force.", s.generation)
    yield from gauge(
        "potluck_train_loss", "Exponential mean of the newest steps' training loss, nats a token.", s.train_loss
    )
    yield from gauge("potluck_heldout_loss", "Newest loss on held-out text, nats a token.", s.heldout_loss)
    yield from gauge("potluck_eta_seconds", "Seconds until the run is finished, at its mean pace.", s.eta_seconds)
    alerts = GaugeMetricFamily("potluck_alert", "1 for each alert that stands, 0 for the others.", labels=["alert"])
    standing = {alert.name for alert in s.alerts}
    for name in dict.fromkeys((*NAMES, *sorted(standing))):
        alerts.add_metric([name], float(name in standing))
    yield alerts


def of_work(s: State) -> Iterator[Metric]:
    yield from gauge("potluck_committed_tokens", "Tokens of committed rounds; falls if one is taken back.", s.tokens)
    yield from gauge("potluck_tokens_per_second", "Tokens trained per second just now.", s.tokens_per_second)
    yield from gauge(
        "potluck_committed_samples", "Samples that count, summed over stages by work.", s.goodput.committed
    )
    yield from counter(
        "potluck_computed_samples",
        "Samples computed, in vain or again too, summed over stages by work.",
        s.goodput.computed,
    )
    share = min(1.0, s.goodput.committed / s.goodput.computed) if s.goodput.computed > 0 else None
    yield from gauge("potluck_goodput_ratio", "Share of the computed samples that count.", share)
    yield from gauge("potluck_round", "Number of the newest committed round.", s.round)
    newest = s.rounds[0] if s.rounds else None
    if newest:
        committed = newest.committed
        yield from gauge("potluck_round_committed_timestamp_seconds", "Unix time of the newest commit.", committed)
        yield from gauge("potluck_round_duration_seconds", "How long the newest round took.", newest.seconds)
        yield from gauge("potluck_round_size_bytes", "Bytes exchanged in the newest round.", newest.nbytes)
        yield from gauge("potluck_round_degraded", "Whether the newest round was below quorum.", newest.degraded)


def of_traffic(s: State) -> Iterator[Metric]:
    sent = CounterMetricFamily("potluck_sent_bytes", "Bytes that peers sent, by purpose.", labels=["purpose"])
    dense = CounterMetricFamily(
        "potluck_uncompressed_bytes", "Bytes that the same would have been uncompressed.", labels=["purpose"]
    )
    for row in s.traffic:
        sent.add_metric([row.purpose], float(row.nbytes))
        dense.add_metric([row.purpose], float(row.dense_nbytes))
    yield from (sent, dense)
    yield from gauge("potluck_bytes_per_token", "Bytes sent for each committed token.", s.bytes_per_token)
    yield from gauge(
        "potluck_uncompressed_bytes_per_token", "What it would have been uncompressed.", s.dense_bytes_per_token
    )


def of_stages(s: State) -> Iterator[Metric]:
    replicas = GaugeMetricFamily("potluck_stage_replicas", "Peers that have a seat at a stage.", labels=["stage"])
    sizes = GaugeMetricFamily("potluck_stage_parameters", "Parameters that a stage holds.", labels=["stage"])
    for stage in s.stages:
        replicas.add_metric([str(stage.stage)], float(len(stage.replicas)))
        sizes.add_metric([str(stage.stage)], float(stage.parameters))
    yield from (replicas, sizes)


def of_peers(s: State) -> Iterator[Metric]:
    present = Counter(peer.state for peer in s.peers if peer.state != "gone")
    peers = GaugeMetricFamily("potluck_peers", "Peers that are here, by state.", labels=["state"])
    for state in dict.fromkeys((*PEER_STATES, *sorted(present))):
        peers.add_metric([state], float(present[state]))
    yield peers
    left_out = present.total() > MOST_PEERS
    yield from gauge("potluck_peer_series_left_out", f"Whether there are over {MOST_PEERS} peers to list.", left_out)
    if left_out:
        return
    here = [peer for peer in s.peers if peer.state != "gone"]
    info = InfoMetricFamily("potluck_peer", "What a peer says of itself.", labels=["peer"])
    for peer in here:
        info.add_metric(
            [peer.id], {"name": shown(peer.name), "region": shown(peer.region), "device": shown(peer.device)}
        )
    yield info
    yield each("potluck_peer_stage", "Stage at which a peer has a seat.", here, lambda p: p.stage)
    yield each(
        "potluck_peer_step_duration_seconds",
        "Seconds that a peer takes for a step.",
        here,
        lambda p: p.seconds_per_step,
    )
    yield each(
        "potluck_peer_tokens_per_second",
        "Tokens that a peer takes through its stage.",
        here,
        lambda p: p.tokens_per_second if p.state == "training" else None,
    )
    last_seen = "potluck_peer_last_seen_timestamp_seconds"
    yield each(last_seen, "Unix time at which a peer was last heard of.", here, lambda p: p.last_seen)
    yield each("potluck_peer_samples", "Committed samples of a peer's stage.", here, lambda p: p.samples)
    for name, text, value in (
        ("potluck_peer_sent_bytes", "Bytes that a peer sent.", lambda p: p.sent),
        ("potluck_peer_received_bytes", "Bytes that a peer received.", lambda p: p.received),
    ):
        yield each(name, text, here, value, CounterMetricFamily)
    parts = GaugeMetricFamily(
        "potluck_peer_step_part_seconds", "Where a peer's time goes in a step.", labels=["peer", "part"]
    )
    for peer in here:
        if (time := peer.time) is not None:
            waits = sum(wait.seconds for wait in time.waits)
            for part in ("compute", "codec", "update", "wire", "other"):
                parts.add_metric([peer.id, part], getattr(time, part))
            parts.add_metric([peer.id, "wait"], waits)
    yield parts


def each(
    name: str,
    text: str,
    peers: Sequence[PeerRow],
    value: Callable[[PeerRow], float | None],
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily] = GaugeMetricFamily,
) -> Metric:
    """One series for each peer of whom it is known."""
    family = kind(name, text, labels=["peer"])
    for peer in peers:
        if (number := value(peer)) is not None:
            family.add_metric([peer.id], float(number))
    return family


def of_links(s: State) -> Iterator[Metric]:
    links = {(link.sender, link.receiver): link for peer in s.peers for link in peer.links}
    left_out = len(links) > MOST_LINKS
    yield from gauge("potluck_link_series_left_out", f"Whether there are over {MOST_LINKS} links to list.", left_out)
    if left_out:
        return
    pair = ["peer", "receiver"]
    rates = GaugeMetricFamily("potluck_link_bytes_per_second", "How fast a peer reaches another.", labels=pair)
    delays = GaugeMetricFamily("potluck_link_rtt_seconds", "Round trip from a peer to another.", labels=pair)
    for (sender, receiver), link in links.items():
        if link.bytes_per_second is not None:
            rates.add_metric([sender, receiver], link.bytes_per_second)
        if link.rtt_seconds is not None:
            delays.add_metric([sender, receiver], link.rtt_seconds)
    yield from (rates, delays)
    paths = Counter(link.path or "unknown" for link in links.values())
    ways = GaugeMetricFamily("potluck_links", "Links by the way that they take.", labels=["path"])
    for path in ("direct", "punched", "relayed", "unknown"):
        ways.add_metric([path], float(paths[path]))
    yield ways


def of_machine(seen: Seen) -> Iterator[Metric]:
    yield from gauge("potluck_disk_free_bytes", "Free on the disk that holds the run.", seen.disk_free_nbytes)
    yield from gauge("potluck_disk_size_bytes", "Size of the disk that holds the run.", seen.disk_nbytes)
    offset = seen.clock_offset_seconds
    yield from gauge("potluck_clock_offset_seconds", "By how much the machine's clock is ahead of the run's.", offset)


def shown(text: str) -> str:
    """A peer's own words: one line, short. Quotes and backslashes are escaped by the format."""
    return "".join(c if c.isprintable() else " " for c in text)[:MOST_NAME]


def route(look: Callable[[], Seen]) -> Route:
    """``/metrics``; ``look`` is called in the event loop, and the text made elsewhere."""

    async def metrics(request: Request) -> Response:
        seen = look()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(RunCollector(lambda: seen))
        registry.register(PROCESS)
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(partial(encode, registry))
        return Response(text, headers={"content-type": kind, "Cache-Control": "no-store", "Vary": "Accept"})

    return Route("/metrics", metrics)


PROCESS = ProcessCollector(registry=None)
