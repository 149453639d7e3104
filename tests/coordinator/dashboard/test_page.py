"""The dashboard's first screen in a real browser, driven over the browser's own debugging pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from fake_dashboard import HOSTILE, START, FakeRun, served

from potluck.coordinator.dashboard import shapes

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(60),
]
STEP = "document.getElementById('step').textContent === '%s of 480'"


async def test_the_first_screen_shows_the_run_and_nothing_foreign(tmp_path: Path) -> None:
    run = FakeRun(step=130, alerts=(shapes.Alert(name="thin", text=f"{HOSTILE} is alone", since=START),))
    async with served(run) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until(STEP % 130)
        await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 130')")
        await page.until("document.querySelectorAll('.mark').length === 6")
        shown = {
            "run-name": "demo",
            "phase": "training",
            "sentence": "5 peers at work",
            "elapsed": "4 min",
            "eta": "27 %",
            "heldout": "3.220",
            "heldout-sub": "6.3",
            "tokens": "208 k",
            "tokens-sub": "800 tokens/s",
            "finish": "11 – 16 min",
            "finish-sub": "done ",
            "goodput": "94 %",
            "goodput-sub": "2.08 k of 2.21 k samples",
            "bpt": "87.5 B",
            "bpt-sub": "20× fewer than uncompressed",
            "peer-count": "6",
            "peer-sub": "5 training, 1 lost",
            "round-sub": "1 degraded",
            "traffic": "41 B of 800 B, 19.5× fewer",
            "bytes-total": "18.2 MB instead of 372 MB",
            "lanes": "2 replicas at work",
            "peers": "through a relay",
            "rounds": "degraded",
            "events": f"{HOSTILE} is lost",
            "alerts": f"{HOSTILE} is alone",
        }
        for name, text in shown.items():
            assert text in await page.text(name), name
        assert await page.value("document.querySelectorAll('#rounds tr').length") == 16
        names = "[...document.querySelectorAll('#peers .name a')].map((cell) => cell.textContent)"
        assert await page.value(names) == ["ada", "carl", "emil", HOSTILE, "dora", "fay"]
        assert await page.value("document.querySelectorAll('#peers tr.old').length") == 1
        assert await page.value("document.images.length") == 0
        assert await page.value("document.title") == "3.220 · demo · potluck"
        links = "[...document.querySelectorAll('.takes a')].map((link) => link.getAttribute('href'))"
        assert {"api/curve.csv?most=2000", "api/incidents", "api/rounds.csv"} <= set(await page.value(links))
        await check_words(page)
        run.update(step=131)
        await page.until(STEP % 131)
        await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 131')")
        for width, is_dark in ((360, False), (360, True), (700, False), (1000, False)):
            await page.look(width, 780, is_dark=is_dark)
            await page.until(f"document.documentElement.scrollWidth <= {width}")
        assert page.complaints == []


async def drag(page: Page, start: float, end: float) -> None:
    """Across the plot with the mouse, from one share of its width to another."""
    await page.value("document.getElementById('plot').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = await page.value(
        "(({left, top, width}) => ({left, top, width}))(document.querySelector('.u-over').getBoundingClientRect())"
    )
    at = {"y": box["top"] + 50, "button": "left", "clickCount": 1}
    for kind, share in (("mouseMoved", start), ("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
        held = {"buttons": 1} if kind != "mouseMoved" or share == end else {}
        await page.call("Input.dispatchMouseEvent", type=kind, x=box["left"] + share * box["width"], **at, **held)
    await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)


async def test_a_curve_is_read_by_keys_and_drawn_on_other_axes(tmp_path: Path) -> None:
    async with served(FakeRun(step=130)) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 130')")
        await page.until("document.querySelectorAll('.mark').length === 6")
        await drag(page, 0.4, 0.8)  # steps 53 to 104: the incidents at 60, 66 and 90
        await page.until("!document.getElementById('whole-run').hidden")
        await page.until("document.querySelectorAll('.mark').length === 3")
        await page.value("document.getElementById('whole-run').click()")
        await page.until("document.querySelectorAll('.mark').length === 6")
        await page.value("document.getElementById('plot').focus()")
        for _ in range(2):
            await page.press("ArrowLeft", 37)
        tip = await page.text("tip")
        assert "Step 128" in tip and "held-out, step 120" in tip
        assert "Step 128: training" in await page.value("document.getElementById('chart-live').textContent")
        for choice, label in (("tokens", "tokens"), ("time", "time"), ("log", "time")):
            await page.value(f"document.querySelector('input[value={choice}]').click()")
            await page.until(f"document.getElementById('plot').ariaLabel.startsWith('Loss by {label}')")
        assert await page.text("h-loss") == "Loss by time"
        soft = "document.getElementById('train').textContent"
        await page.until(f"{soft} === '2.961'")
        await page.value("smoothing.value = '0'; smoothing.dispatchEvent(new Event('input'))")
        await page.value("document.querySelector('input[value=step]').click()")
        await page.call("Page.reload")
        await page.until("document.readyState === 'complete'")
        await page.until(f"{soft} === '2.981'")  # the choice is remembered: nothing is smoothed
        await page.until("document.getElementById('train-sub').textContent === 'smoothed; latest 2.981'")
        assert await page.value("document.querySelector('input[value=log]').checked") is True
        assert page.complaints == []


def scores(step: int, value: float) -> list[dict[str, Any]]:
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 60}
    tasks = [
        {"name": HOSTILE, "metric": "macro-f1", "score": score, "majority": 0.333, "tfidf": 0.8},
        {"name": "mine", "metric": "bits-per-byte", "score": {**score, "low": -0.0001}, "lower_is_better": True},
        {"name": "brown", "metric": "macro-f1", "skipped": "its texts are missing"},
    ]
    at = START + step * 2
    row = {"step": step, "suite": "offline", "time": at, "label": "mean macro-f1", "score": score, "tasks": tasks}
    return [row, {"step": step, "suite": HOSTILE, "time": at, "label": "", "score": None, "tasks": []}]


async def test_evaluations_come_when_there_are_some_and_unfold(tmp_path: Path) -> None:
    run = FakeRun(step=30)
    async with served(run) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until(STEP % 30)
        assert await page.value("document.getElementById('evaluations-card').hidden") is True
        assert await page.value("document.getElementById('key-evaluated').hidden") is True
        run.update(evaluated=scores(24, 0.5), evaluations_version=7)
        await page.until("document.getElementById('evaluations-card').hidden === false")
        assert await page.value("document.getElementById('key-evaluated').hidden") is False
        shown = await page.text("evaluations")
        for text in ("step 24", "offline", "mean macro-f1", "0.500", "0.400 … 0.600", HOSTILE, "no task has a score"):
            assert text in shown, text
        assert "bits-per-byte" not in shown
        await page.value("document.querySelector('#evaluations summary').click()")
        await page.until("document.querySelector('#evaluations details').open")
        shown = await page.text("evaluations")
        for text in (
            "bits-per-byte (lower is better)",
            "0.000 … 0.600",
            "0.333",
            "Skipped brown: its texts are missing.",
        ):
            assert text in shown, text
        run.update(evaluated=scores(30, 0.75) + run.evaluated, evaluations_version=9)
        await page.until("document.querySelectorAll('#evaluations details').length === 4")
        assert "2 published models" in await page.text("evaluations-note")
        steps = "[...document.querySelectorAll('#evaluations details[open] .step')].map((node) => node.textContent)"
        assert await page.value(steps) == ["step 24"]  # what somebody reads stays open
        await page.value("document.getElementById('plot').focus()")
        await page.press("ArrowLeft", 37)
        await page.press("End", 35)
        assert "evaluated" in await page.text("tip") and await page.value("document.images.length") == 0
        await check_words(page)
        await page.value(f"location.hash = '#/?at={START + 50}'")  # then only the first was known
        await page.until("document.querySelectorAll('#evaluations details').length === 2")
        await page.look(360, 740)
        await page.until("document.documentElement.scrollWidth === 360")
        assert page.complaints == []


async def test_empty_run_then_lost_coordinator_then_back_without_a_point_twice(tmp_path: Path) -> None:
    run = FakeRun(step=0, peers=0, told=(), phase="waiting")
    async with browser(tmp_path) as page:
        async with served(run) as port:
            await page.open(f"http://127.0.0.1:{port}/")
            await page.until("document.body.classList.contains('live') && document.title === 'demo · potluck'")
            await page.until("document.getElementById('peer-count').textContent === '0'")
            assert await page.text("rounds-empty") == "No round yet."
            assert await page.text("peers-empty") == "Nobody has joined yet."
            assert "No loss yet" in await page.text("chart-empty")
            await check_words(page)
            run.update(note="waiting for 1 more worker")
            await page.until("document.getElementById('sentence').textContent.includes('1 more worker')")
            run.update(step=3, peers=2, phase="training", note="")
            await page.until(STEP % 3)
            await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 3')")
        await page.until("document.body.classList.contains('stale')")
        await page.until("/is \\d+ s old/.test(document.getElementById('banner').textContent)")
        assert "Lost the coordinator, retrying" in await page.text("banner")
        run.asked.clear()
        run.update(step=5, peers=1)
        async with served(run, port):
            await page.until("document.getElementById('banner').hidden")
            await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 5')")
            await page.until("document.getElementById('peer-count').textContent === '1'")  # the other is not kept
            assert "stream?after=3.0" in run.asked
            assert await page.value("document.getElementById('link').textContent") == "live"
            points = "import('./static/app.js').then(({curve}) => curve.points.map((point) => point.step))"
            assert await page.value(points) == [1, 2, 3, 4, 5]
            await check_words(page)
            run.update(phase="finished")
            await page.until("document.getElementById('link').textContent === 'ended'")
            # Another run at the same address: nothing of the old one stays.
            run.update(id="cd34", step=2, phase="training")
            await page.until(STEP % 2)
            await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 2')")
            assert await page.value(points) == [1, 2]
            assert page.complaints == []


async def test_of_hundreds_of_peers_those_in_sight_are_in_the_document(tmp_path: Path) -> None:
    run = FakeRun(peers=400, is_finite=False)
    async with served(run) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until(STEP % 240)
        shown = "[...peers.rows].map((row) => row.cells[0].querySelector('a').textContent)"
        first = await page.value(shown)
        assert first[:3] == ["ada", "carl", "emil"] and len(first) < 60
        assert await page.value("document.querySelector('#peers-scroll table').ariaRowCount") == "400"
        assert await page.value("document.getElementById('peers-scroll').scrollHeight") > 399 * 25
        await page.value("document.getElementById('peers-scroll').scrollTop = 1e6")
        await page.until("peers.rows[peers.rows.length - 1].cells[0].textContent.startsWith('peer 399')")
        assert await page.value("peers.rows.length") < 60
        assert await page.value("peers.rows[peers.rows.length - 1].ariaRowIndex") == "400"
        # A row is written again only when what it shows has changed.
        await page.value("peers.rows[9].cells[3].textContent = 'mine'")
        run.update(note="nothing about peers")
        await page.until("document.getElementById('sentence').textContent === 'nothing about peers'")
        assert await page.value("peers.rows[9].cells[3].textContent") == "mine"
        run.update(step=241)
        await page.until("/^[0-9]+$/.test(peers.rows[9].cells[3].textContent)")
        await page.value("""(() => { const find = document.getElementById('peers-find');
            find.value = 'DORA'; find.dispatchEvent(new Event('input')); })()""")
        await page.until("peers.rows.length === 1")
        assert await page.value(shown) == ["dora"] and await page.text("peers-note") == "1 of 399"
        await check_words(page)
        assert page.complaints == []


async def check_words(page: Page) -> None:
    html = await page.value("document.documentElement.outerHTML")
    for word in ("NaN", "undefined", "null", "Infinity", "[object"):
        assert word not in html, html[max(0, html.find(word) - 200) :][:300]
