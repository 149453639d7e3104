"""Any moment of a run on the page: by a mark, by keys, by the slider, by address, and in a report without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser import CHROMIUM, Page, browser
from fake_dashboard import HOSTILE, START, FakeRun, served
from one_file import one_file

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(60),
]
STEP = "document.getElementById('step').textContent === '%s of 480'"
BANNER = "document.querySelector('#replay .said').textContent"


async def drive(page: Page) -> None:
    """The controls, as they are on a live run and in a report."""
    await page.until(STEP % 240)
    await page.until("document.querySelectorAll('.mark').length === 9")  # the two at 120 share a mark
    assert await page.value("document.getElementById('replay').hidden") is True
    marks = await page.value("[...document.querySelectorAll('.mark')].map((mark) => mark.ariaLabel)")
    assert f"step 60: {HOSTILE} is lost. Show this moment" in marks[2] and "and 1 more" in marks[5]
    assert "degraded" in await page.value("document.querySelectorAll('.mark')[4].firstChild.classList.value")

    await page.value("document.querySelectorAll('.mark')[2].click()")
    await page.until(STEP % 60)
    assert f"step 60: {HOSTILE} is lost" in await page.value(BANNER)
    assert await page.value("location.hash") == f"#/?at={START + 120:.0f}"
    assert await page.value("document.querySelectorAll('.mark.later').length") == 6
    assert await page.text("peer-sub") == "5 training, 1 lost"
    assert await page.value("document.title.includes(' at ')") is True

    await page.press(".", 190)
    await page.until(STEP % 66)
    await page.press(",", 188)
    await page.until(STEP % 60)
    await page.press(",", 188)
    await page.until(STEP % 30)
    await page.value("history.back()")
    await page.until(STEP % 60)

    # Along the marks by keys: the roving one, then Enter.
    await page.value("document.querySelector('.mark').focus()")
    await page.press("ArrowRight", 39)
    assert "step 30" in await page.text("incident-tip")
    await page.press("Enter", 13)
    await page.until(STEP % 30)
    await page.value("document.getElementById('incident-list').open = true")
    await page.until("document.querySelectorAll('#incident-rows a').length === 10")
    await page.value(
        "[...document.querySelectorAll('#incident-rows a')].find((a) => a.textContent.includes('fay')).click()"
    )
    await page.until(STEP % 200)
    assert "fay left" in await page.value(BANNER)

    await page.value("document.getElementById('replay-close').click()")
    await page.until(STEP % 240)
    assert await page.value("document.getElementById('replay').hidden") is True
    assert await page.value("location.hash") == "#/"
    assert await page.value("document.images.length") == 0


async def test_a_live_run_is_seen_at_any_moment(tmp_path: Path) -> None:
    run = FakeRun()
    async with served(run) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/")
        await drive(page)
        # A moment is written with milliseconds, and not before what happened then.
        await page.value("import('./static/app.js').then(({page}) => page.go('#/?at=%s'))" % (START + 120.0001))
        await page.until(STEP % 60)
        assert await page.value("location.hash") == f"#/?at={START + 120.001:.3f}"
        await page.value("document.getElementById('replay-close').click()")
        await page.until(STEP % 240)
        # What goes on meanwhile does not disturb the moment that is looked at, and is there afterwards.
        await page.press(",", 188)
        await page.until(STEP % 200)
        run.update(step=250)
        await page.until("document.getElementById('plot').ariaLabel.includes('steps 1 to 250')")
        assert await page.value(STEP % 200) is True
        # Asking is bounded however fast the slider moves, and the last place wins.
        run.asked.clear()
        await page.value("""new Promise((done) => { const slider = document.getElementById('replay-slider'); let at = 0;
            const timer = setInterval(() => { slider.value = at += 20;
              slider.dispatchEvent(new Event('input', {bubbles: true}));
              if (at >= 1000) { clearInterval(timer); done(); } }, 10); })""")
        await page.until(STEP % 250)
        assert 2 <= sum(path.startswith("state?at=") for path in run.asked) <= 14
        await page.until("location.hash.length > 8")
        await page.value("document.getElementById('replay-close').click()")
        await page.until("document.getElementById('replay').hidden")
        assert page.complaints == []


async def test_views_keep_the_moment_and_a_missing_one_says_so(tmp_path: Path) -> None:
    run = FakeRun()
    async with served(run) as port, browser(tmp_path) as page:
        await page.open(f"http://127.0.0.1:{port}/#/?at={START + 120}")
        await page.until(STEP % 60)
        await page.value("location.hash = '#/nowhere/<b>?at=" + f"{START + 120}'")
        await page.until("document.querySelector('#view h2')?.textContent === 'Nothing to see here'")
        assert await page.value("document.activeElement.textContent") == "Nothing to see here"
        assert await page.value("document.getElementById('home').hidden") is True
        await page.value("document.querySelector('#view a').click()")
        await page.until("!document.getElementById('home').hidden")
        assert await page.value("location.hash") == f"#/?at={START + 120:.0f}"
        await page.value("document.querySelector('.skip').click()")
        assert await page.value("document.activeElement.id") == "main"
        assert await page.value(STEP % 60) is True
        assert page.complaints == []


def held(run: FakeRun) -> dict[str, Any]:
    """What a report of the run holds."""
    moments = [START + 2 * step for step in range(0, run.step, 10)]
    answers: dict[str, Any] = {
        "/api/state": run.state(),
        "/api/curve": run.curve(2000, None),
        "/api/incidents": run.incidents(None),
        "/api/events": run.events(0),
        "/api/traffic": run.traffic_points(400, None),
        "/api/evaluations": [],
    }
    answers |= {f"/api/state?at={at:.0f}": run.state(at) for at in moments}
    answers |= {f"/api/state?at={i.time:.0f}": run.state(i.time) for i in run.incidents(None)}
    return json.loads(msgspec.json.encode(answers))


async def test_a_report_opens_from_its_file_with_the_same_controls(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(one_file(held(FakeRun())), encoding="utf-8")
    async with browser(tmp_path / "profile") as page:
        await page.open(file.as_uri())
        await drive(page)
        assert await page.value("document.getElementById('link').textContent") == "report"
        await page.value(f"location.hash = '#/?at={START + 245}'")  # between two answers: the one before
        await page.until(STEP % 121)
        # Its numbers can be saved; a cell that a spreadsheet would run is tamed.
        saved = """import('potluck/source.js').then(({source}) => fetch(source.url('api/incidents.csv?until=%s')))
            .then((answer) => answer.text())"""
        rows = (await page.value(saved % (START + 121))).splitlines()
        assert rows[0] == "id,time,step,group,text,peer" and len(rows) == 4
        assert rows[3].endswith(f"lost,{HOSTILE} is lost,{'01' * 32}")
        refused = (
            "import('potluck/source.js').then(({source}) => source.get('api/leaderboard')).catch((e) => e.message)"
        )
        assert await page.value(refused) == "This report does not hold that"
        assert page.complaints == []
