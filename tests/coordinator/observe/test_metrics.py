"""/metrics as Prometheus reads it, and what is deployed beside it: no name in a rule or a panel that is not told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from fake_source import HOSTILE, FakeSource, peer_id
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard.shapes import Alert, LinkRow
from potluck.coordinator.observe.alerts import NAMES
from potluck.coordinator.observe.metrics import MOST_LINKS, MOST_PEERS, OPERATION, Seen, route

DEPLOY = Path(__file__).parents[3] / "deploy"
COUNTED = {
    *("potluck_computed_samples", "potluck_sent_bytes", "potluck_uncompressed_bytes", "potluck_peer_sent_bytes"),
    "potluck_peer_received_bytes",
}
LABELS = {"job", "instance"}  # added by whoever scrapes
WORDS = {"by", "on", "group_left", "and", "or", "time", "rate", "deriv", "max", "avg", "sum", "topk", "predict_linear"}


def seen(source: FakeSource) -> Seen:
    return Seen(source.state(), 10**9, 10**10, 0.5)


async def scrape(found: Seen, accept: str = "text/plain") -> httpx.Response:
    app = web.app(FakeSource(), routes=[route(lambda: found)], operations=[OPERATION])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://run") as client:
        return await client.get("/metrics", headers={"accept": accept})


async def families(found: Seen) -> dict[str, Any]:
    return {family.name: family for family in plain((await scrape(found)).text)}


async def test_prometheus_reads_it_in_both_formats() -> None:
    found = seen(FakeSource(peers=3))
    answer = await scrape(found)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    newer = await scrape(found, "application/openmetrics-text;version=1.0.0")
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    names = [{f.name.removesuffix("_info") for f in read} for read in (plain(answer.text), openmetrics(newer.text))]
    mine = [{name for name in some if name.startswith("potluck_")} for some in names]
    assert mine[0] == mine[1] and len(mine[0]) > 40


async def test_names_units_types_and_help() -> None:
    found = await families(seen(FakeSource(peers=3)))
    mine = {name: family for name, family in found.items() if name.startswith("potluck_")}
    assert {name for name, family in mine.items() if family.type == "counter"} == COUNTED
    for name, family in mine.items():
        assert family.type in ("counter", "gauge") and family.documentation.endswith("."), name
        assert re.fullmatch(r"potluck_[a-z]+(_[a-z]+)*", name)
        assert not re.search(r"_(ms|minutes|hours|kb|mb|gb|mbps|percent|total)(_|$)", name), name
        for sample in family.samples:
            assert sample.name == name + ("_total" if name in COUNTED else ""), sample.name
    timestamps = {name: family for name, family in mine.items() if name.endswith("_timestamp_seconds")}
    assert len(timestamps) == 3 and all(s.value > 1e9 for family in timestamps.values() for s in family.samples)


async def test_values_are_the_states() -> None:
    source = FakeSource(peers=2)
    source.changes(alerts=(Alert(name="clock", text="late", since=1.0),), heldout_loss=None)
    found = await families(seen(source))

    def value(name: str, **labels: str) -> float:
        return next(s.value for s in found[name].samples if s.labels == labels)

    assert value("potluck_train_loss") == 4.0 and not any(name == "potluck_heldout_loss" for name in found)
    assert value("potluck_phase", phase="training") == 1 and value("potluck_phase", phase="waiting") == 0
    assert value("potluck_goodput_ratio") == pytest.approx(0.9)
    assert value("potluck_peers", state="training") == 2 and value("potluck_peers", state="away") == 0
    assert value("potluck_peer_sent_bytes", peer=peer_id(0)) == 1000
    assert value("potluck_link_rtt_seconds", peer=peer_id(0), receiver=peer_id(1)) == 0.04
    assert {s.labels["alert"]: s.value for s in found["potluck_alert"].samples} == {
        name: float(name == "clock") for name in NAMES
    }
    assert value("potluck_disk_free_bytes") == 1e9 and value("potluck_clock_offset_seconds") == 0.5
    assert all(s.value == 1 for name in ("potluck_run_info", "potluck_peer_info") for s in found[name].samples)


@pytest.mark.parametrize(
    "name", [HOSTILE, 'a"} 1\npotluck_step 99\n', "back\\slash\\", "\u2028\x00\x1b[31m", "ü" * 999]
)
async def test_a_hostile_name_is_nothing_but_a_label(name: str) -> None:
    source = FakeSource(peers=1)
    source.moves(0, name=name, region=name, device=name)
    source.changes(run=msgspec.structs.replace(source.state().run, name=name, model=name))
    found = await families(seen(source))
    (step,) = found["potluck_step"].samples
    (peer,) = found["potluck_peer_info"].samples
    assert step.value == 3 and peer.labels.keys() == {"peer", "name", "region", "device"}
    assert "\n" not in peer.labels["name"] and len(peer.labels["name"]) <= 80
    for other in found.values():  # nowhere else
        for sample in other.samples:
            assert sample.name in ("potluck_peer_info", "potluck_run_info") or name not in sample.labels.values()


async def test_many_peers_or_links_are_not_listed() -> None:
    few = await families(seen(FakeSource(peers=MOST_PEERS)))
    assert len(few["potluck_peer_info"].samples) == MOST_PEERS
    assert few["potluck_peer_series_left_out"].samples[0].value == 0
    many = await families(seen(FakeSource(peers=MOST_PEERS + 1)))
    assert many["potluck_peer_series_left_out"].samples[0].value == 1
    assert not any(name.startswith("potluck_peer_") and name != "potluck_peer_series_left_out" for name in many)
    source = FakeSource(peers=1)
    rate = {"rtt_seconds": None, "bytes_per_second": 1.0}
    rows = [LinkRow(sender=peer_id(0), receiver=f"{i:x}", path=None, **rate) for i in range(MOST_LINKS + 1)]
    source.moves(0, links=tuple(rows))
    linked = await families(seen(source))
    assert linked["potluck_link_series_left_out"].samples[0].value == 1
    assert "potluck_link_bytes_per_second" not in linked and "potluck_peer_info" in linked


async def test_nothing_of_a_run_that_has_not_begun_breaks_it() -> None:
    source = FakeSource(points=0, peers=0)
    nothing = ("train_loss", "heldout_loss", "tokens_per_second", "eta_seconds", "eta", "bytes_per_token")
    source.changes(**dict.fromkeys(nothing), rounds=(), traffic=(), stages=(), dense_bytes_per_token=None)
    found = await families(Seen(source.state()))
    assert found["potluck_step"].samples[0].value == 0 and "potluck_disk_free_bytes" not in found
    source.changes(train_loss=float("nan"))
    loss = (await families(Seen(source.state())))["potluck_train_loss"].samples[0].value
    assert loss != loss


# What is deployed.


def expressions() -> dict[str, str]:
    found = {}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("warning", "critical")
            found[f"alert {rule['alert']}"] = rule["expr"]
    board = json.loads((DEPLOY / "grafana" / "potluck.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    found |= {f"annotation {one['name']}": one["expr"] for one in board["annotations"]["list"]}
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            query = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"]["query"])
            assert query and query[2] in LABELS
            found[f"variable {one['name']}"] = query[1]
    return found


TOKEN = re.compile(
    r"""\s+|(?P<number>\d+(\.\d+)?)|(?P<range>\[\d+[smhd]\])|(?P<braces>\{[^{}]*\})"""
    r"""|(?P<name>[a-z_][a-z0-9_]*)|(?P<sign>==|!=|<=|>=|[-+*/<>(),])"""
)
LIST = re.compile(r"\s*\(([a-z_]+(?:, ?[a-z_]+)*)\)")


def check(expression: str, known: dict[str, set[str]]) -> set[str]:
    """Which metrics it names; fails on a name or label that is not told, and on what is no PromQL."""
    at, depth, names, last = 0, 0, set[str](), ""
    while at < len(expression):
        token = TOKEN.match(expression, at)
        assert token, f"not PromQL: {expression[at:]!r}"
        at, kind, text = token.end(), token.lastgroup, token.group()
        if text in ("by", "on", "group_left"):
            labels = LIST.match(expression, at)
            assert labels, f"no labels behind {text}"
            at = labels.end()
            everything = {label for labels in known.values() for label in labels} | LABELS
            assert set(re.split(", ?", labels[1])) <= everything, f"no metric has one of {labels[1]}"
        elif kind == "name" and text not in WORDS:
            assert text in known, f"{text} is not told"
            names.add(text)
            last = text
        elif kind == "braces":
            assert last, f"labels of nothing: {text}"
            for matcher in re.split(r",(?=[a-z])", text[1:-1]):
                label = re.fullmatch(r'([a-z_]+)(=|!=|=~|!~)"[^"]*"', matcher)
                assert label and label[1] in known[last] | LABELS, f"{last} has no label {matcher}"
        elif kind == "range":
            assert last, "a range of nothing"
        elif text in ("(", ")"):
            depth += 1 if text == "(" else -1
            assert depth >= 0
    assert depth == 0, "unbalanced"
    return names


async def told() -> dict[str, set[str]]:
    found = await families(seen(FakeSource(peers=2)))
    known: dict[str, set[str]] = {"up": {"job", "instance"}}
    for family in found.values():
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    return known


async def test_every_rule_and_panel_asks_for_what_is_told() -> None:
    known, found = await told(), expressions()
    assert len(found) > 30
    named = set[str]().union(*(check(expression, known) for expression in found.values()))
    for topic in (
        "train_loss",
        "tokens_per_second",
        "bytes_per_token",
        "uncompressed_bytes_per_token",
        "peers",
        "alert",
    ):
        assert f"potluck_{topic}" in named
    assert {"potluck_goodput_ratio", "potluck_link_bytes_per_second"} <= named
    matched = {
        name for expr in found.values() for some in re.findall(r'alert=~?"([^"]+)"', expr) for name in some.split("|")
    }
    assert matched == set(NAMES), "a judgement without a rule, or a rule without one"


async def test_the_check_itself_refuses_what_is_wrong() -> None:
    known = await told()
    for wrong in (
        *("potluck_setp", "rate(potluck_step[5m]", 'potluck_step{peer="x"}', "potluck_peers{state=~training}"),
        *("sum by (sort) (potluck_peers)", "potluck_step ? 1", '{job="x"}', "rat(potluck_step[5m])"),
    ):
        with pytest.raises(AssertionError):
            check(wrong, known)


def test_prometheus_reads_the_rules_beside_its_settings() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / name).is_file() for name in settings["rule_files"])
    (job,) = settings["scrape_configs"]
    assert job["metrics_path"] == OPERATION.path and job["job_name"] == "potluck"


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads((DEPLOY / "grafana" / "potluck.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
