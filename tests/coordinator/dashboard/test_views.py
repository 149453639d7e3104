"""The views behind the dashboard's first screen, in a real browser over made-up answers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser import CHROMIUM
from dashboard_answers import (
    HOSTILE,
    NOW,
    answers,
    link,
    peer_id,
    peer_page,
    peers,
    round_page,
    standings,
    state,
    step_page,
    steps,
)
from msgspec.structs import replace
from view_page import focused, go, holds, opened, press, words

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(120),
]
DORA = peer_id(0)
MAIN = "document.getElementById('main')"


async def test_lanes_say_where_a_step_goes_and_for_whom_it_waits(tmp_path: Path) -> None:
    made = answers(name=HOSTILE)
    async with opened(tmp_path, made) as page:
        await go(page, "#/", ".lanes")
        await holds(page, "main", "3 stages, 5 replicas", "time is waiting for a peer, most for kitchen", HOSTILE)
        assert await page.value("document.querySelectorAll('.replica').length") == 5
        await holds(page, ".lane-stage", "2 replicas at work")
        bars = "[...document.querySelectorAll('.time-bar')].map((bar) => bar.ariaLabel)"
        first, *_ = await page.value(bars)
        assert (
            first.startswith("One step, 4.9 s: compute: 3.2 s, 66 %; compression: 0.24 s") and "waiting for " in first
        )
        thin = "[...document.querySelectorAll('.is-thin')].map((stage) => stage.innerText)"
        [one] = await page.value(thin)
        assert "Stage 1" in one and "▲" in one and "Only one replica left" in one
        await holds(page, ".free-peers", "Without a stage", "blue", "waiting", "mira", "loading")
        assert await page.value("document.querySelector('.replica a').getAttribute('href')") == f"#/peer/{DORA}"
        # What follows is shown in the same nodes.
        await page.value("window.kept = document.querySelector('.replica'); view.show(source_answers['api/state'])")
        faster = replace(made["api/state"], stages=made["api/state"].stages[:1], peers=made["api/state"].peers[:1])
        await page.value(f"view.show({as_json(faster)})")
        await holds(page, ".lanes", "Stage 0", "garage", "no step timed")  # who is gone is still known by name
        assert await page.value("kept === document.querySelector('.replica')")
        empty = replace(faster, stages=(), peers=())
        await page.value(f"view.show({as_json(empty)})")
        assert await words(page, ".card > div") == "The model is not split into stages yet."


async def test_lanes_of_many_fold_and_of_one_stage_do_not(tmp_path: Path) -> None:
    made = {"api/state": state(8, 60, thin=-1)}
    async with opened(tmp_path, made) as page:
        await go(page, "#/", ".lanes")
        assert await page.value("document.querySelectorAll('.replica').length") == 48
        await holds(page, ".lane-stage", "58 replicas at work, 2 not", "dora", "54 more: 54 training")
        await page.value("document.querySelector('.lane-stage .more').click()")
        assert await page.value("document.querySelectorAll('.lane-stage:first-child .replica').length") == 60
        assert await page.value("document.querySelector('.lane-stage .more').ariaExpanded") == "true"
        assert await page.value("document.querySelectorAll('.is-thin').length") == 0
        await page.value(f"view.show({as_json(state(1, 2, free=0, thin=-1))})")
        assert await page.value("document.querySelectorAll('.replica').length") == 2
        assert await page.value("document.querySelector('.lane-stage .more').hidden")


async def test_matrix_is_walked_with_keys_and_opens_histories(tmp_path: Path) -> None:
    made = answers(name=HOSTILE)
    made["api/links"] = [
        link(0, 1, 1e6, 0.02, "punched"),
        link(1, 0, 5e6, 0.03),
        link(1, 2, 2e5, None, "relayed"),
        link(2, 1, None, 0.5, None),
    ]
    del made[f"api/links/{peer_id(1)}/{DORA}"]
    async with opened(tmp_path, made) as page:
        await go(page, "#/links", "td.heat-5")
        cells = "document.querySelectorAll('.heat tbody td').length"
        assert await page.value(cells) == 36
        assert await page.value("document.querySelectorAll('.heat td[tabindex=\"0\"]').length") == 1
        await page.value("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
        await press(page, "ArrowRight")
        # The hostile name sorts before the others of its stage.
        assert await focused(page) == f"{HOSTILE} → garage: 8.0 Mbit/s, 20 ms, punched, 20 % of the most seen"
        await holds(page, ".readout", f"garage → {HOSTILE}", "40 Mbit/s, 30 ms, direct, 100 % of the 20 Mbit/s allowed")
        await holds(page, ".readout", f"{HOSTILE} → garage")
        assert await page.value("document.querySelectorAll('.heat td[tabindex=\"0\"]').length") == 1
        await press(page, "End", "ArrowUp", "PageDown")
        assert "→ old-titan" in await focused(page)
        await page.call("Input.dispatchKeyEvent", type="keyDown", key="Home", modifiers=2)
        await press(page, "ArrowRight")
        await page.press("Enter", 13)
        await page.until("document.querySelectorAll('.past svg').length === 2")
        assert await page.value("document.activeElement.classList.contains('card')")
        await holds(page, ".past", "90 measurements", "Mbit/s", "There and back")
        assert "Nothing is known" in await words(page, ".past")  # of the way back this page has no history
        await press(page, "Escape")
        assert await page.value("document.querySelector('.past').children.length") == 0
        assert "→ garage" in await focused(page)
        await page.value("document.querySelector('[data-value=rtt]').click()")
        await holds(page, ".heat", "20", "500")
        await page.value("document.querySelector('[data-value=table]').click()")
        assert await page.value("document.querySelector('.heat-map').hidden")
        await holds(page, "table:not(.heat)", "▲ relayed", "1.6", "500", "–")
        column = (
            "[...document.querySelectorAll('table:not(.heat) tbody td:nth-child(4)')].map((cell) => cell.innerText)"
        )
        assert await page.value(column) == ["–", "1.6", "8.0", "40"]
        await page.value("document.querySelectorAll('table:not(.heat) .sort')[3].click()")
        assert await page.value(column) == ["40", "8.0", "1.6", "–"]
        assert await page.value("document.querySelector('[aria-sort=descending]').innerText") == "Mbit/s"
        assert await page.value("document.querySelector('.download').getAttribute('href')") == "api/links.csv"
        await go(page, f"#/links/{peer_id(0)}/{peer_id(1)}", ".past svg")


async def test_matrix_of_many_is_of_stages_and_opens_two_of_them(tmp_path: Path) -> None:
    async with opened(tmp_path, answers(8, 20)) as page:
        await go(page, "#/links", "td.heat-5")
        assert await page.value("document.querySelectorAll('.heat tbody td').length") == 64
        await holds(page, "main", "Between stages, the median of their links", "160 peers")
        await page.value("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
        await press(page, "ArrowRight")
        label = await focused(page)
        assert label.startswith("Stage 0 → Stage 1:") and "median" in label and "the slowest" in label
        await page.press("Enter", 13)
        await holds(page, "main", "Stage 0 to Stage 1")
        assert await page.value("document.querySelectorAll('.heat tbody td').length") == 400
        assert await page.value("document.activeElement.tagName") == "TD"
        await page.value("document.querySelector('.more').click()")
        assert await page.value("document.querySelectorAll('.heat tbody td').length") == 64


async def test_peer_page(tmp_path: Path) -> None:
    made = answers(name=HOSTILE)
    async with opened(tmp_path, made) as page:
        shown = await go(page, f"#/peer/{DORA}", ".spark svg")
        for part in (
            *(HOSTILE, "training", "stage 0, layers 0–3", DORA, "NVIDIA GeForce RTX 3090", "3 s ago", "no. 1"),
            *("GPU memory", "20 GB", "30 Mbit/s", "no limit", "1.33 k whole samples", "12.3 GB"),
            *("One step takes 4.9 s.", "to it", "from it", f"{HOSTILE} took over stage 0"),
        ):
            assert part in shown, part
        assert "Region" not in shown  # it declares none
        assert await page.value("document.querySelectorAll('.spark svg').length") == 3
        assert await page.value("document.querySelectorAll('.spark rect').length") > 90
        await page.value("document.querySelectorAll('.spark-frame')[1].focus()")
        await press(page, "Home")
        assert "compute 60 %, waiting 33 %" in await focused(page)
        await holds(page, ".sparks", "compute 60 %, waiting 33 %")
        bars = (
            "[...document.querySelector('.spark svg').querySelectorAll('rect')]"
            ".map((bar) => [Number(bar.getAttribute('x')), Number(bar.getAttribute('width'))])"
        )
        drawn = await page.value(bars)
        assert all(x + width <= after + 0.2 for (x, width), (after, _) in itertools.pairwise(drawn))
        assert drawn[-1][1] < drawn[-2][1]  # its piece is not over yet
        nobody = peer_page(
            replace(
                peers(1, 1)[0], stage=None, state="waiting", time=None, links=(), seconds_per_step=None, region="NZ"
            )
        )
        bare = replace(nobody, layers=None, rank=None, history=(), events=(), rounds=0)
        await page.value(f"source_answers['api/peers/{DORA}'] = {as_json(bare)}")
        shown = await go(page, f"#/peer/{DORA}?at={NOW}", ".facts div")
        assert await page.value("asked.at(-1)") == f"api/peers/{DORA}?at={NOW:.0f}"
        for part in (
            "holds no stage",
            "NZ",
            "Nothing done yet",
            "Nothing is on record",
            "No step of it has been timed",
        ):
            assert part in shown, part
        assert f"?at={NOW:.0f}" in await page.value(f"{MAIN}.innerHTML") or "Rank" in shown
        shown = await go(page, "#/peer/%3Cimg%20src%3Dx%3E", ".problem")
        assert "Nothing is known of that" in shown and "Everything is linked from /" in shown
        # It is asked again once the state has moved on, not at every word of the coordinator.
        await page.value("number = asked.length, view.show({version: 2}), view.show({version: 3})")
        assert await page.value("asked.length - number") == 0
        await page.value(
            "source_answers['api/peers/%3Cimg%20src%3Dx%3E'] = source_answers['api/peers/' + '0'.repeat(64)]"
        )
        await page.value("earlier = performance.now(), performance.now = () => earlier + 6000")
        await page.value("view.show({version: 4}), view.show({version: 5})")
        await page.until("document.querySelector('.facts div')")
        assert await page.value("asked.length - number") == 1
        assert await page.value("document.querySelector('.problem')") is None


async def test_round_page_tells_who_differs(tmp_path: Path) -> None:
    everybody = peers(2, 3, first_name=HOSTILE)
    made = {
        "api/state": state(2, 3),
        "api/rounds/1200": round_page(everybody, odd=True),
        "api/rounds/1192": round_page(everybody, degraded=True),
    }
    async with opened(tmp_path, made) as page:
        shown = await go(page, "#/round/1200", ".agreement li")
        for part in (
            *(
                "Round 150, after step 1 200",
                "✗",
                "2 different results among 3 replicas",
                "all 3 replicas are the same",
            ),
            *(HOSTILE, "deaddeaddeaddead", "differs", "kitchen", "5.1 s", "3.80 MB", "nobody was missing"),
        ):
            assert part in shown or part == "✗", part
        assert await page.value("document.querySelectorAll('.verdict.bad').length") == 2
        links = "[...document.querySelectorAll('.besides > *')].map((node) => node.getAttribute('href'))"
        assert await page.value(links) == ["#/round/1192", None]
        await page.value("document.querySelector('.besides a').focus(), document.querySelector('.besides a').click()")
        await page.until("document.body.dataset.shown === '#/round/1192' && document.querySelector('.agreement li')")
        await holds(page, "main", "degraded: somebody was missing")


async def test_step_page_says_why_in_words_then_draws_it(tmp_path: Path) -> None:
    slow = step_page(names={DORA: HOSTILE})
    fast = replace(slow, row=replace(slow.row, step=9, seconds=6.2), words=(), path=(), lanes=(), counterfactuals=())
    made = {"api/state": state(), "api/steps": steps(), "api/steps/1200": slow, "api/steps/9": fast}
    async with opened(tmp_path, made) as page:
        shown = await go(page, "#/steps", "tbody tr")
        assert "The newest 40" in shown and "1.6× slow" in shown
        await page.value("document.querySelector('[data-value=slowest]').click()")
        await page.until("document.querySelector('h3').innerText === 'The slowest 40'")
        assert await page.value("asked.at(-1)") == "api/steps?limit=100&order=slowest"
        await page.value("document.querySelector('tbody a').click()")
        await page.until("document.body.dataset.shown.startsWith('#/step/')")
        shown = await go(page, "#/step/1200", ".gantt svg")
        for part in (
            *("Step 1 200: 9.1 s", "usual around it: 6.2 s, so 1.5×", "Why was this step slow?", HOSTILE),
            *("attic-3090 was the slowest machine", "without attic-3090", "7.4 s", "1.7 s less, 19 %", "no difference"),
            *("as it was", "3.4 s, 37 %", "lab4", "backward", "critical path"),
        ):
            assert part in shown, part
        order = "[...document.querySelectorAll('main h3')].map((node) => node.innerText)"
        assert (await page.value(order))[:2] == ["Why was this step slow?", "The step"]
        assert await page.value("document.querySelectorAll('.gantt .op').length") == 6 * 9
        assert await page.value("document.querySelectorAll('.gantt path.critical').length") == 9
        assert await page.value("document.querySelectorAll('.gantt path.on-wire').length") == 3
        label = await page.value("document.querySelector('.gantt-frame').ariaLabel")
        assert "Longest on the critical path: compute at attic-3090 3.4 s, compute at lab4 2.7 s" in label
        shown = await go(page, "#/step/9", ".why li")
        for part in (
            "Where did this step's time go?",
            "There is no trace of this step",
            "No operation",
            "No critical path",
        ):
            assert part in shown, part


async def test_step_of_many_lanes_shows_those_of_its_path_first(tmp_path: Path) -> None:
    made = {"api/state": state(8, 20), "api/steps/1200": step_page(8, 20)}
    async with opened(tmp_path, made) as page:
        shown = await go(page, "#/step/1200", ".gantt svg")
        assert "160 lanes" in shown and "157 more lanes, off the critical path" in shown
        assert await page.value("document.querySelectorAll('.gantt-names li').length") == 3
        await page.value("document.querySelector('.gantt .more').click()")
        assert await page.value("document.querySelectorAll('.gantt-names li').length") == 160
        assert await page.value("document.querySelectorAll('.gantt path.critical').length") == 9


async def test_leaderboard_shows_regions_only_where_somebody_says_one(tmp_path: Path) -> None:
    rows = standings(peers(2, 2, first_name=HOSTILE))
    silent = [replace(row, region="") for row in rows]
    async with opened(tmp_path, {"api/state": state(), "api/leaderboard": rows}) as page:
        shown = await go(page, "#/leaderboard", "tbody tr")
        for part in (HOSTILE, "Region, as they say", "DE", "25 %", "not here" if not rows[-1].is_here else "here"):
            assert part in shown, part
        first = "document.querySelector('tbody th').innerText"
        assert await page.value(first) == HOSTILE
        await page.value("document.querySelectorAll('.sort')[1].click()")
        assert await page.value(first) == "kitchen"
        await page.value(f"source_answers['api/leaderboard'] = {as_json(silent)}")
        assert "Region" not in await go(page, f"#/leaderboard?at={NOW}", "tbody tr")
        await page.value("source_answers['api/leaderboard'] = []")
        assert "No work has been committed yet" in await go(page, "#/leaderboard")


async def test_what_is_not_there_yet_is_said(tmp_path: Path) -> None:
    made = {"api/state": state(), "api/links": [], "api/steps": []}
    async with opened(tmp_path, made) as page:
        for address, sentence in {
            "#/links": "No link has been measured yet.",
            f"#/links?at={NOW}": "No link had been measured by then.",
            "#/steps": "No step has been traced yet.",
            "#/step/3": "Nothing is known of that",
            "#/round/3": "Everything is linked from /",
            "#/leaderboard": "Nothing is known of that",
        }.items():
            await go(page, address)
            await page.until(f"{MAIN}.innerText.includes('{sentence}')")
        assert f"api/links?at={NOW:.0f}" in await page.value("asked")


def as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
