"""How smooth the dashboard's page is in a real browser, in front of a large made-up run that goes on.

    python -m potluck.benchmarks.dashboard_page [--peers 500] [--steps 100000] [--seconds 60] [--rate 2] [--throttle 4]

Needs Chromium and a checkout: the run, its server and the browser's driver are those of tests/support. Every state
changes every peer, and nothing is cached between two openings of the page. Prints its conditions, then:

* opening it (five times, CPU slowed ``--throttle`` times): first contentful paint, first numbers, the curve;
* while ``--rate`` states a second come in, at rest and then with the table of peers scrolling: time between two
  animation frames (median, 95th percentile, longest; 16.7 ms is 60 a second), main thread's share, JS heap after a
  collection, before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from browser import CHROMIUM, Page, browser
from fake_dashboard import FakeRun, served

OPENINGS = 5
WATCH = """(() => {
  const seen = window.seen = {};
  new MutationObserver(() => {
    if (!seen.numbers && document.getElementById("step")?.textContent) seen.numbers = performance.now();
    if (!seen.curve && document.querySelector("#plot canvas")) seen.curve = performance.now();
  }).observe(document, {subtree: true, childList: true, characterData: true});
})()"""
SCROLL = """(() => {
  const box = document.getElementById("peers-scroll");
  box.scrollIntoView();
  setInterval(() => { box.scrollTop = (box.scrollTop + 40) % (box.scrollHeight - box.clientHeight); }, 50);
})()"""
FRAMES = """new Promise((done) => {
  const gaps = [];
  let before = null;
  const end = performance.now() + %d;
  const frame = (now) => {
    if (before !== null) gaps.push(now - before);
    before = now;
    if (now < end) requestAnimationFrame(frame); else done(gaps);
  };
  requestAnimationFrame(frame);
})"""


def large(peers: int, steps: int) -> FakeRun:
    """Nine tenths of a run behind it, with 400 incidents."""
    groups = ("lost", "joined", "degraded", "divided")
    told = tuple(
        (steps * i // 450, groups[i % 4], i * 7 % peers if i % 4 < 2 else None, f"incident {i}") for i in range(1, 401)
    )
    return FakeRun(steps=steps, step=steps * 9 // 10, peers=peers, stages=8, told=told)


async def metrics(page: Page) -> dict[str, float]:
    await page.call("HeapProfiler.collectGarbage")
    answer = await page.call("Performance.getMetrics")
    return {row["name"]: row["value"] for row in answer["metrics"]}


async def opened(page: Page, address: str, throttle: float) -> dict[str, float]:
    """Milliseconds since navigation began."""
    await page.call("Emulation.setCPUThrottlingRate", rate=throttle)
    await page.call("Page.navigate", url="about:blank")
    await page.call("Page.navigate", url=address)
    drawn = "new Promise((done) => { const look = () => window.seen?.curve ? done() : setTimeout(look, 20); look(); })"
    async with asyncio.timeout(60):
        await page.value(drawn)
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    found: dict[str, float] = await page.value(f"({{paint: {paint}, ...window.seen}})")
    await page.call("Emulation.setCPUThrottlingRate", rate=1)
    return found


async def grow(run: FakeRun, rate: float) -> None:
    while run.step < run.steps:
        await asyncio.sleep(1 / rate)
        run.update(step=run.step + 1)


async def watched(page: Page, seconds: float) -> None:
    before = await metrics(page)
    gaps = sorted(await page.value(FRAMES % (seconds * 1000)))
    after = await metrics(page)
    busy = (after["TaskDuration"] - before["TaskDuration"]) / (after["Timestamp"] - before["Timestamp"])
    heap = [m["JSHeapUsedSize"] / 1e6 for m in (before, after)]
    print(
        f"  frames: median {statistics.median(gaps):.1f} ms, p95 {gaps[int(len(gaps) * 0.95)]:.1f} ms, longest "
        f"{gaps[-1]:.0f} ms, {sum(gap > 50 for gap in gaps)} of {len(gaps)} over 50 ms\n"
        f"  main thread busy {busy:.0%}; JS heap {heap[0]:.1f} MB before, {heap[1]:.1f} MB after; "
        f"{after['Nodes']:.0f} nodes"
    )


async def measure(options: argparse.Namespace) -> None:
    run = large(options.peers, options.steps)
    every = 0.8 / options.rate
    with tempfile.TemporaryDirectory() as profile:
        async with served(run, every=every) as port, browser(Path(profile)) as page:
            address = f"http://127.0.0.1:{port}/"
            await page.open("about:blank")
            await page.look(1280, 900)
            await page.call("Performance.enable")
            await page.call("Network.enable")
            await page.call("Network.setCacheDisabled", cacheDisabled=True)
            await page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
            version = (await page.call("Browser.getVersion"))["product"]
            print(
                f"{version}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
                f"{options.peers} peers, {run.step} steps done, {len(run.told)} incidents, {options.rate} states/s"
            )
            rows = [await opened(page, address, options.throttle) for _ in range(OPENINGS)]
            for name, words in (("paint", "first paint"), ("numbers", "first numbers"), ("curve", "the curve")):
                times = [row[name] for row in rows]
                print(
                    f"  {words}, CPU {options.throttle:g}x slower: median {statistics.median(times):.0f} ms, "
                    f"slowest {max(times):.0f} ms of {OPENINGS}"
                )
            growing = asyncio.create_task(grow(run, options.rate))
            await asyncio.sleep(3)
            for what, prepare in (("at rest", "0"), ("peers scrolling", SCROLL)):
                await page.value(prepare)
                print(f"{what}, {options.seconds:g} s:")
                await watched(page, options.seconds)
            growing.cancel()
            assert not page.complaints, page.complaints


def main() -> None:
    arguments: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--peers", type=int, default=500)
    arguments.add_argument("--steps", type=int, default=100_000)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--rate", type=float, default=2)
    arguments.add_argument("--throttle", type=float, default=4)
    if CHROMIUM is None:
        sys.exit("Chromium is not installed: apt install chromium")
    asyncio.run(measure(arguments.parse_args()))


if __name__ == "__main__":
    main()
