"""The page on a run of real processes: views filled, a loss, a restart, an operator's pause, the report of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axe
import pytest
from browser import CHROMIUM, Page, browser

from potluck.coordinator.access import place_of

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(400),
]
ENDLESS = 10**6
SEQ_LEN = 16
PATIENCE = 60.0  # seconds, for whatever has to come
CREW = ("anna", "ben", "carl", "dora")
BROKEN = ("NaN", "undefined", "Infinity", "[object", "null", "Invalid Date")


def text(name: str) -> str:
    return f"document.getElementById('{name}').textContent"


def number(name: str) -> str:
    """The first number in it: "1 234 of 5 000"."""
    return f"Number({text(name)}.split(' of ')[0].replace(/\\D/g, ''))"


@dataclass
class Visit:
    """A page on a run: what it was asked for, and what it showed."""

    page: Page
    network: Any
    pictures: Path
    told: dict[str, float] = field(default_factory=dict)

    async def until(self, condition: str, seconds: float = PATIENCE) -> None:
        try:
            await self.page.until(condition, seconds)
        except TimeoutError:
            seen = await self.page.value("document.body.innerText")
            raise AssertionError(f"never so: {condition}\n{seen}\n{self.network.story([])}") from None

    async def go(self, address: str) -> None:
        await self.page.value(f"location.hash = {json.dumps(address)}")
        await self.until(f"location.hash === {json.dumps(address)}")

    async def shot(self, name: str, width: int = 1280, height: int = 1100, *, is_dark: bool = False) -> None:
        await self.page.look(width, height, is_dark=is_dark)
        assert await self.page.value("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"
        await self.page.screenshot(self.pictures / f"{name}.png")
        await self.page.look(1280, 1100)

    async def api(self, path: str) -> Any:
        return await asyncio.to_thread(ask, f"{self.network.page}{path}")

    async def run(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first state of the run of which that holds."""
        return await asyncio.to_thread(self.network.until, what, PATIENCE)

    async def check_words(self, where: str) -> None:
        shown = await self.page.value("document.body.innerText")
        assert not [word for word in BROKEN if word in shown], (where, shown)
        assert not await self.page.value(r"/(^|[\s(])[-−]\d+(\.\d+)? (ms|s|min|h)\b/.test(document.body.innerText)"), (
            where,
            f"time runs backwards: {shown}",
        )


def ask(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=10.0) as answer:
        return json.load(answer)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where the pictures go: the folder that POTLUCK_PICTURES names, or one of the test's own."""
    folder = Path(os.environ.get("POTLUCK_PICTURES") or tmp_path / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def test_the_page_of_a_real_run(network: Any, pictures: Path, tmp_path: Path) -> None:
    port = free_port()
    network.configure(ENDLESS, http_port=port)
    coordinator = await asyncio.to_thread(network.coordinator)
    crew = {name: network.worker(name) for name in CREW}
    async with browser(tmp_path / "profile") as page:
        visit = Visit(page, network, pictures)
        await page.open(network.page)
        await visit.run(lambda s: s["round"] > 2 and s["phase"] == "training" and seated(s) == len(CREW))
        await everything_is_filled(visit)
        await what_is_new_arrives(visit)
        await someone_is_lost(visit, crew)
        coordinator = await the_coordinator_comes_back(visit, coordinator)
        assert page.complaints == []
        assert [r for r in page.requests if not r.startswith((network.page, "data:", "blob:", "about:"))] == []
        await an_operator_pauses_and_the_run_ends(visit, coordinator, crew, port)
        assert page.complaints == []
    async with browser(tmp_path / "profile-2") as page:
        await the_report_tells_it_again(Visit(page, network, pictures), tmp_path / "report.html")
    delays = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in visit.told.items())
    (pictures / "delays.txt").write_text(delays, encoding="utf-8")
    sys.stdout.write(f"\n{delays}\n")


# What each view must show of a real run; none may be left empty.
FILLED = {
    "#/links": "document.querySelectorAll('#view .heat-cell, #view [class*=heat-]').length > 3",
    "#/steps": "document.querySelectorAll('#view tbody tr').length > 5",
    "#/leaderboard": "document.querySelectorAll('#view tbody tr').length === 4",
    "#/operate": "document.querySelectorAll('#operate-peer option').length === 5",
}
# The points of the curve, as soon as the page has the one of that number.
DRAWN = """import('/static/app.js').then(({curve}) => new Promise((done) => {
  const look = () => curve.points.at(-1).id >= %d
    ? done(curve.points.map((p) => [p.id, p.step, p.train, p.heldout])) : setTimeout(look, 50);
  look();
}))"""
EMPTY = (
    "[...document.querySelectorAll('main .empty')].filter((node) => node.offsetParent && node.textContent.trim())"
    ".map((node) => node.textContent)"
)


async def everything_is_filled(visit: Visit) -> None:
    page = visit.page
    await visit.until(f"{text('phase')} === 'training' && document.querySelectorAll('#rounds tr').length > 1")
    await visit.until("document.querySelectorAll('#lanes .piece').length > 4")
    await visit.until(f"/\\d/.test({text('heldout')}) && /\\d/.test({text('finish')}) && /%/.test({text('goodput')})")
    await visit.until(f"{EMPTY}.length === 0")
    for name in ("tokens", "train", "bpt", "round", "elapsed", "bytes-total", "traffic", "run-about"):
        assert any(letter.isdigit() for letter in await page.text(name)), name
    assert await page.text("peer-count") == str(len(CREW)) and await page.text("link") == "live"
    assert await page.value("document.querySelectorAll('#peers tr').length") == len(CREW)
    await visit.check_words("#/")
    await findings(visit, "#/")
    await visit.shot("desktop")
    await visit.shot("dark", is_dark=True)
    await visit.shot("phone", 360, 780)
    state = await visit.api("api/state")
    await agreement(visit, state)
    pages = [await visit.api(f"api/steps/{row['step']}") for row in await visit.api("api/steps?limit=40")]
    step = next(page["row"]["step"] for page in pages if page["path"] and page["counterfactuals"])
    assert all(op["start"] <= op["end"] for page in pages for lane in page["lanes"] for op in lane["ops"])
    views = {
        **FILLED,
        f"#/step/{step}": "document.querySelectorAll('#view svg rect, #view tbody tr').length > 4",
        f"#/peer/{state['peers'][0]['id']}": "document.querySelectorAll('#view tbody tr').length > 0",
        f"#/round/{state['rounds'][0]['step']}": "document.querySelectorAll('#view tbody tr').length === 4",
    }
    for address, filled in views.items():
        await visit.go(address)
        await visit.until(filled)
        await visit.until(f"{EMPTY}.length === 0")
        await visit.check_words(address)
        await findings(visit, address)
        await visit.shot(address.split("/")[1])
        await visit.shot(f"{address.split('/')[1]}-phone", 360, 780)
    await visit.go("#/")
    assert page.console == []


async def findings(visit: Visit, where: str) -> None:
    """Nothing that keeps somebody from using the page, if axe is there to say so."""
    if axe.script() is not None:
        found = [line for line in await axe.findings(visit.page) if line.startswith(("serious", "critical"))]
        assert found == [], where


async def agreement(visit: Visit, state: dict[str, Any]) -> None:
    """Numbers of one answer that must add up."""
    goodput, stages = state["goodput"], state["stages"]
    assert 0 < goodput["committed"] <= goodput["computed"] * (1 + 1e-9)
    assert math.isclose(sum(p["work"] for p in state["peers"]), goodput["committed"], rel_tol=1e-6)
    assert state["tokens"] == round(goodput["committed"] * SEQ_LEN)
    assert sorted(p["id"] for p in state["peers"]) == sorted(peer for s in stages for peer in s["replicas"])
    board = await visit.api("api/leaderboard")
    assert math.isclose(sum(row["share"] for row in board), 1.0, rel_tol=1e-6)
    for page in [await visit.api(f"api/rounds/{row['step']}") for row in state["rounds"][:3]]:
        assert page["row"]["nbytes"] == sum(part["nbytes"] for part in page["parts"])
        whole = [sum(p["samples"] for p in page["parts"] if p["stage"] == s["stage"]) for s in stages]
        assert whole == [page["row"]["samples"]] * len(stages), page
    assert max(e["time"] for e in state["events"]) <= state["now"] + 1 and abs(state["now"] - time.time()) < 60


async def what_is_new_arrives(visit: Visit) -> None:
    """How long after the coordinator wrote a point and a round down the page shows them, by one machine's clock."""
    for name, path, moment in (("step", "points?after=0", "time"), ("round", "rounds", "committed")):
        before = (await visit.api("api/state"))[name]
        await visit.until(f"{number(name)} > {before}")
        shown, seen = await visit.page.value(f"[{number(name)}, Date.now() / 1000]")
        written = [row[moment] for row in await visit.api(f"api/{path}") if row[name] == shown]
        if written:
            visit.told[f"a {name} is on the page after"] = seen - written[0]


async def someone_is_lost(visit: Visit, crew: dict[str, Any]) -> None:
    page = visit.page
    state = await visit.run(lambda s: s["phase"] == "training" and seated(s) == len(CREW))
    victim = "dora"
    known = next(p for p in state["peers"] if p["name"] == victim)
    await asyncio.to_thread(crew.pop(victim).kill)
    await visit.until(
        "[...document.querySelectorAll('.mark')].some((mark) => mark.firstChild.classList.contains('lost'))"
    )
    await visit.until("document.querySelector('#lanes .is-thin') !== null")
    await visit.run(lambda s: s["phase"] == "training" and seated(s) == len(CREW) - 1)
    incident = next(i for i in await visit.api("api/incidents") if i["group"] == "lost")
    assert incident["peer"] == known["id"] and victim in incident["text"]
    await visit.until(f"{text('peer-count')} === '3'")
    await visit.shot("lost")

    row = "[...document.querySelectorAll('#incident-rows a')].find((a) => a.textContent.includes('dora is lost'))"
    await page.value("document.getElementById('incident-list').open = true")
    await visit.until(f"{row} !== undefined")
    await page.value(f"{row}.click()")
    await visit.until("document.body.classList.contains('past')")
    await visit.until(f"{text('replay-what')}.includes('dora is lost')")
    past = await visit.api(f"api/state?at={incident['time']}")
    await visit.until(f"{number('step')} === {past['step']}")
    assert past["goodput"]["committed"] * SEQ_LEN == past["tokens"] > 0
    shown = await page.text("peers")
    assert all(p["name"] in shown for p in past["peers"]) and len(past["peers"]) == len(CREW) - 1
    await visit.check_words("replay")
    await visit.shot("replay")
    await visit.go(f"#/peer/{known['id']}?at={incident['time'] - 1}")
    await visit.until("document.querySelector('#view h2')?.textContent.includes('dora')")
    await visit.check_words("a lost peer")
    await page.value("document.getElementById('replay-close').click()")
    await visit.until("!document.body.classList.contains('past')")
    await visit.go("#/")
    await visit.until(f"{text('peer-count')} === '3'")
    assert page.console == []


async def the_coordinator_comes_back(visit: Visit, coordinator: Any) -> Any:
    page = visit.page
    await asyncio.to_thread(coordinator.kill)
    await visit.until("document.body.classList.contains('stale')")
    await visit.until(f"/is \\d+ s old/.test({text('banner-age')})")
    await visit.shot("stale")
    before = await asyncio.to_thread(visit.network.committed_samples)
    coordinator = await asyncio.to_thread(visit.network.coordinator)
    await visit.until("document.body.classList.contains('live') && document.getElementById('banner').hidden")
    rounds = (await visit.api("api/state"))["round"]
    state = await visit.run(lambda s: s["round"] > rounds + 1 and seated(s) == len(CREW) - 1)
    await visit.until(f"{number('round')} >= {state['round']}")
    assert await asyncio.to_thread(visit.network.committed_samples) > before
    points = [row for row in await visit.api("api/points?after=0") if row["time"] <= state["now"]]
    last = points[-1]["id"]
    drawn = await page.value(DRAWN % last)
    drawn = [point for point in drawn if point[0] <= last]
    assert drawn == [[p["id"], p["step"], p["train"], p["heldout"]] for p in points], "a point is lost or doubled"
    return coordinator


async def an_operator_pauses_and_the_run_ends(visit: Visit, coordinator: Any, crew: dict[str, Any], port: int) -> None:
    """Paused on the page; the coordinator is started anew with an end near, stays paused, and is resumed. Workers leave
    a run whose settings have changed, and are started anew, too."""
    page, token = visit.page, place_of(visit.network.data_dir).token
    await visit.go("#/operate")
    await visit.until("document.getElementById('operate-token') !== null")
    await page.value(f"document.getElementById('operate-token').value = '{token}'")
    await act(visit, "pause", "a thunderstorm")
    await visit.until(f"{text('phase')} === 'paused'")
    state = await visit.run(lambda s: s["is_paused"])
    assert "thunderstorm" in await page.text("sentence")
    await visit.shot("paused")
    await asyncio.to_thread(coordinator.kill)
    visit.network.configure(state["step"] + 60, http_port=port)
    coordinator = await asyncio.to_thread(visit.network.coordinator)
    await visit.until("document.body.classList.contains('live') && document.getElementById('banner').hidden")
    assert [await asyncio.to_thread(p.wait, PATIENCE) for p in crew.values()] == [1] * len(crew)
    crew = {name: visit.network.worker(name) for name in crew}
    await visit.until(f"{text('phase')} === 'paused' && {text('peer-count')} === '{len(crew)}'")
    await act(visit, "resume", "")
    await visit.until(f"{text('phase')} !== 'paused'")
    await visit.go("#/")
    codes = [await asyncio.to_thread(p.wait, 2 * PATIENCE) for p in (coordinator, *crew.values())]
    assert codes == [0] * len(codes), visit.network.story([])
    await visit.until(f"{text('phase')} === 'finished'")


async def act(visit: Visit, name: str, why: str) -> None:
    """An action by mouse: what it would do is read first, then it is confirmed."""
    await visit.page.value(f"document.querySelector('[data-action={name}]').click()")
    await visit.until("document.querySelector('.answer:not([hidden]) .would') !== null")
    assert await visit.page.value("document.querySelector('.answer .would').textContent.length > 10")
    await visit.shot(f"{name}-preview")
    await visit.page.value(
        f"document.getElementById('operate-why').value = {json.dumps(why)};"
        "document.querySelector('.answer button.primary').click()"
    )
    await visit.until("/^(Done|Not yet): /.test(document.querySelector('#view .told').textContent)")


async def the_report_tells_it_again(visit: Visit, path: Path) -> None:
    page, network = visit.page, visit.network
    process = network.start("report", "report", network.data_dir, "-o", path)
    assert await asyncio.to_thread(process.wait, PATIENCE) == 0, process.output
    await page.open(f"{path.as_uri()}")
    await page.look(1280, 1100)
    await visit.until(f"{text('phase')} === 'finished' && document.querySelectorAll('#rounds tr').length > 1")
    await visit.until(f"{EMPTY}.join() === 'Everybody has left. The leaderboard names who was here.'")
    assert await page.text("peer-sub") == "everybody has left"
    assert "Nobody holds" not in await page.text("lanes")
    await visit.check_words("report")
    await visit.shot("report")
    await page.value("document.getElementById('incident-list').open = true")
    row = "[...document.querySelectorAll('#incident-rows a')].find((a) => a.textContent.includes('dora is lost'))"
    await visit.until(f"{row} !== undefined")
    await page.value(f"{row}.click()")
    await visit.until("document.body.classList.contains('past')")
    await visit.until("document.querySelectorAll('#peers tr').length === 3")
    await visit.shot("report-replay")
    await page.value("document.querySelector('#peers a').click()")
    await visit.until("document.querySelectorAll('#view .card').length > 3")
    await visit.check_words("a peer in the report")
    await visit.shot("report-peer")
    await page.value("document.getElementById('replay-close').click()")
    await visit.until("!document.body.classList.contains('past')")
    await visit.go("#/steps")
    await visit.until("document.querySelectorAll('#view tbody a').length > 0")
    await page.value("document.querySelector('#view tbody a').click()")
    await visit.until("document.querySelectorAll('#view .why li').length > 0")
    await visit.check_words("a step in the report")
    await visit.shot("report-step")
    assert page.complaints == [] and page.console == []
    assert [r for r in page.requests if not r.startswith(("file://", "data:", "blob:", "about:"))] == []


def seated(state: dict[str, Any]) -> int:
    return sum(p["stage"] is not None for p in state["peers"])
