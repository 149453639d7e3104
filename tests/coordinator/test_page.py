"""The dashboard's page in a real browser, driven over the browser's own debugging pipe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator import web

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(60),
]
HOSTILE = "<img src=x onerror=alert(1)>"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--remote-debugging-pipe",
]
# The browser reads commands from file 3 and answers on file 4; both are moved out of the way first.
SHIM = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(f), fcntl.F_DUPFD, 10) for f in sys.argv[1:3]);"
    "os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
# Resolves when the expression is true, looking again at every change of the page.
UNTIL = """new Promise((done) => {
  const look = () => (%s) && (watch.disconnect(), done(true));
  const watch = new MutationObserver(look);
  watch.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  look();
})"""


class Page:
    """One tab of a headless browser."""

    def __init__(self, reader: asyncio.StreamReader, commands: int) -> None:
        self.reader = reader
        self.commands = commands
        self.number = 0
        self.session: str | None = None
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads((await self.reader.readuntil(b"\0"))[:-1])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                self.complaints.append(json.dumps(answer["params"]))

    async def open(self, address: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        async with asyncio.timeout(10):
            await self.value(UNTIL % condition)

    async def text(self, name: str) -> str:
        return await self.value(f"document.getElementById('{name}').innerText")


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SHIM, str(commands_in), str(answers_out)),
        *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
        pass_fds=(commands_in, answers_out),
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands_in)
    os.close(answers_out)
    reader = asyncio.StreamReader(limit=1 << 24)
    answers = os.fdopen(answers_in, "rb")
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), answers)
    page = Page(reader, commands_out)
    try:
        yield page
        page.session = None
        await page.call("Browser.close")
        await asyncio.wait_for(process.wait(), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group this test started, helpers included
        await process.wait()
        pipe.close()
        os.close(commands_out)


class FakeSource:
    def __init__(self, state: dict[str, Any], points: list[dict[str, Any]]) -> None:
        self.now, self.curve = state, points
        self.scores: list[dict[str, Any]] = []
        self.news = asyncio.Event()

    def state(self) -> dict[str, Any]:
        return {**self.now, "now": time.time()}

    def points(self, after: int) -> list[dict[str, Any]]:
        return [point for point in self.curve if point["id"] > after]

    def evaluations(self) -> list[dict[str, Any]]:
        return self.scores

    async def changed(self, version: int) -> int:
        while self.now.get("version", 0) == version:
            await self.news.wait()
        return self.now["version"]

    def update(self, **fields: Any) -> None:
        self.now.update(fields, version=self.now.get("version", 0) + 1)
        self.news.set()
        self.news = asyncio.Event()


def a_run() -> FakeSource:
    now = time.time()
    peer = {"stage": 0, "state": "training", "samples": 30, "sent": 12_300, "received": 4_560_000}
    peers = [
        {
            **peer,
            "id": "aa" * 32,
            "name": HOSTILE,
            "last_seen": now,
            "seconds_per_step": 0.5,
            "device": "cpu",
        },
        {**peer, "id": "bb" * 32, "name": "garage", "stage": 1, "state": "lost", "last_seen": now - 60},
        {"id": "cc" * 32, "name": None, "stage": None, "state": None},
    ]
    stage = {"first_layer": 0, "last_layer": 1, "parameters": 2_100_000}
    rounds = [
        {
            "round": 3,
            "step": 24,
            "replicas": 2,
            "samples": 16,
            "agree": False,
            "nbytes": 1234,
            "seconds": 0.4,
        },
        {"round": 2, "step": 16, "agree": True, "committed": now - 70, "degraded": True},
    ]
    traffic = [
        {"purpose": "activation", "nbytes": 40_000, "dense_nbytes": 800_000},
        {"purpose": "control", "nbytes": 500, "dense_nbytes": 0},
    ]
    state = {
        "version": 1,
        "run": {"name": "demo", "id": "ab12", "model": "GPT-J shape", "preset": "potluck", "codec": "int4"},
        "phase": "training",
        "started": now - 125,
        **{"step": 30, "steps": 120, "eta_seconds": 300.0, "round": 3, "note": ""},
        **{"train_loss": 4.1, "heldout_loss": 4.2, "heldout_first": 7.7},
        **{"tokens": 48_000, "tokens_per_second": 3200.5},
        **{"bytes_per_token": 431.0, "dense_bytes_per_token": 9051.0},
        "traffic": traffic,
        "stages": [
            {**stage, "stage": 0, "replicas": ["aa" * 32]},
            {**stage, "stage": 1, "replicas": ["bb" * 32]},
        ],
        "peers": peers,
        "rounds": rounds,
        "events": [{"id": 9, "time": now, "kind": "PeerJoined", "text": f"{HOSTILE} joined"}],
    }
    points = [
        {"id": i, "step": i, "tokens": i * 1600, "time": now, "train": None if i == 7 else 8 - i / 8}
        for i in range(1, 31)
    ]
    points.append({"id": 31, "step": 10, "tokens": 16_000, "time": now, "train": None, "heldout": 6.5})
    return FakeSource(state, points)


async def test_page_shows_the_run_and_nothing_foreign(tmp_path: Path) -> None:
    source = a_run()
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    async with browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until("document.getElementById('step').textContent === '30 of 120'")
        shown = {
            "run-name": "demo",
            "phase": "training",
            "sentence": "1 peer at work",
            "elapsed": "2 min",
            "eta": "25 %, about 5 min left",
            "heldout": "4.200",
            "heldout-sub": "7.700 at the start",
            "train-sub": "latest 4.250",
            "tokens": "48.0 k",
            "tokens-sub": "3.20 k tokens/s",
            "bpt": "431 B",
            "bpt-sub": "21× fewer than uncompressed",
            "peer-count": "3",
            "round-sub": "1 disagreed, 1 degraded",
            "traffic": "0.83 B of 16.7 B, 20× fewer",
            "stages": "One replica at work, no spare",
            "peers": "12.3 kB",
            "rounds": "degraded",
            "events": HOSTILE,
        }
        for name, text in shown.items():
            assert text in await page.text(name), name
        assert await page.value("document.querySelectorAll('#rounds tr').length") == 2
        names = "[...document.querySelectorAll('#peers .name span')].map((cell) => cell.textContent)"
        assert await page.value(names) == [HOSTILE, "garage", "–"]
        assert await page.value("document.querySelectorAll('#peers tr.old').length") == 1
        assert await page.value("document.images.length") == 0
        await page.until("document.getElementById('canvas').ariaLabel.includes('steps 1 to 30')")
        await page.value("document.getElementById('canvas').focus()")
        for _ in range(2):
            await page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
        assert "Step 28" in await page.text("tip")
        assert "held-out, step 10" in await page.text("tip")
        assert await page.value("document.getElementById('canvas').ariaLabel.includes('held-out 6.500')")
        await check_words(page)
        source.update(step=31)
        await page.until("document.getElementById('step').textContent === '31 of 120'")
        await page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        await page.until("document.documentElement.scrollWidth === 360")
        assert await page.value("document.getElementById('tip').hidden") is False
        assert page.complaints == []
    await asyncio.wait_for(running.close(), 5)


def scores(step: int, value: float) -> list[dict[str, Any]]:
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 60}
    tasks = [
        {"name": HOSTILE, "metric": "macro-f1", "score": score, "majority": 0.333, "tfidf": 0.8},
        {"name": "mine", "metric": "bits-per-byte", "score": {**score, "low": -0.0001}, "lower_is_better": True},
        {"name": "brown", "metric": "macro-f1", "skipped": "its texts are missing"},
    ]
    row = {"step": step, "suite": "offline", "time": 1.76e9, "label": "mean macro-f1", "score": score, "tasks": tasks}
    return [row, {"step": step, "suite": HOSTILE, "label": "", "score": None, "tasks": []}]


async def test_evaluations_come_when_there_are_some_and_unfold(tmp_path: Path) -> None:
    source = a_run()
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    async with browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until("document.getElementById('step').textContent === '30 of 120'")
        assert await page.value("document.getElementById('evaluations-card').hidden") is True
        assert await page.value("document.getElementById('key-evaluated').hidden") is True
        source.scores = scores(24, 0.5)
        source.update(evaluations=7)
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
            "0.800",
            "Skipped brown: its texts are missing.",
        ):
            assert text in shown, text
        source.scores = scores(30, 0.75) + source.scores
        source.update(evaluations=9)
        await page.until("document.querySelectorAll('#evaluations details').length === 4")
        assert "2 published models" in await page.text("evaluations-note")
        steps = "[...document.querySelectorAll('#evaluations details[open] .step')].map((node) => node.textContent)"
        assert await page.value(steps) == ["step 24"]  # what somebody reads stays open
        await page.value("document.getElementById('canvas').focus()")
        await page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
        await page.call("Input.dispatchKeyEvent", type="keyDown", key="End")
        assert "evaluated" in await page.text("tip") and await page.value("document.images.length") == 0
        await check_words(page)
        await page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        await page.until("document.documentElement.scrollWidth === 360")
        assert page.complaints == []
    await asyncio.wait_for(running.close(), 5)


async def test_empty_run_then_lost_coordinator_then_back(tmp_path: Path) -> None:
    source = FakeSource({}, [])
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    async with browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await page.until("document.body.classList.contains('live') && document.title === 'potluck'")
        await page.until("document.getElementById('peer-count').textContent === '0'")
        assert await page.text("rounds-empty") == "No round yet."
        assert await page.text("peers-empty") == "Nobody has joined yet."
        assert "No loss yet" in await page.text("chart-empty")
        await check_words(page)

        source.update(phase="waiting", note="waiting for 1 more worker")
        await page.until("document.getElementById('sentence').textContent.includes('1 more worker')")
        await asyncio.wait_for(running.close(), 5)
        await page.until("document.body.classList.contains('stale')")
        await page.until("/is \\d+ s old/.test(document.getElementById('banner').textContent)")
        assert "Lost the coordinator, retrying" in await page.text("banner")

        source.curve = [{"id": 1, "step": 1, "tokens": 5, "time": 1.76e9, "train": 4.0, "heldout": 4.2}]
        source.update(phase="training", note="")
        running, _ = await web.serve(web.app(source), "127.0.0.1", port)
        await page.until("document.getElementById('banner').hidden")
        await page.until("document.getElementById('train').textContent === '4.000'")
        assert await page.value("document.getElementById('link').textContent") == "live"
        await check_words(page)
        assert page.complaints == []
    await asyncio.wait_for(running.close(), 5)


async def check_words(page: Page) -> None:
    html = await page.value("document.documentElement.outerHTML")
    for word in ("NaN", "undefined", "null", "Infinity", "[object"):
        assert word not in html, html[max(0, html.find(word) - 200) :][:300]
