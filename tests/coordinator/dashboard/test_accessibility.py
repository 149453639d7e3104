"""Every view of the dashboard's page under axe-core, in light and in dark; none scrolls sideways on a phone."""

from __future__ import annotations

from pathlib import Path

import axe
import pytest
from browser import CHROMIUM, Page, browser
from dashboard_answers import HOSTILE, answers, peer_id
from view_page import view_page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.skipif(axe.script() is None, reason='axe is not installed (pip install -e ".[test]")'),
    pytest.mark.timeout(120),
]
FILLED = "document.querySelector('main .card, main .problem')"
# A view by its address, and what is done in it before each look.
VIEWS: dict[str, tuple[str, ...]] = {
    "#/": ("",),
    "#/links": (
        "",
        "document.querySelector('[data-value=rtt]').click()",
        "document.querySelector('.heat-5').click()",
        "document.querySelector('[data-value=table]').click()",
    ),
    f"#/peer/{peer_id(0)}": ("",),
    "#/round/1200": ("",),
    "#/steps": ("",),
    "#/step/1200": ("",),
    "#/leaderboard": ("",),
    "#/operate": (
        "",
        "document.querySelector('[data-action=ban]').click()",
        """document.getElementById('operate-token').value = 'right';
           document.getElementById('operate-other').value = 'dora';
           document.querySelector('[data-action=ban]').click()""",
    ),
    "#/operate?at=1763900000": ("",),
    "#/step/7": ("",),
}


async def go(page: Page, address: str) -> None:
    await page.value(f"location.hash = '{address}'")
    await page.until(f"document.body.dataset.shown === '{address}' && {FILLED}")
    await page.value("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")


async def test_axe_finds_a_fault_that_is_there(tmp_path: Path) -> None:
    async with view_page(answers()) as address, browser(tmp_path) as page:
        await page.open(address + "#/")
        await page.until(FILLED)
        style = "const fault = document.createElement('p'); fault.textContent = 'hardly to be read';"
        await page.value(f"{style} fault.style.color = '#ddd'; document.querySelector('.card').append(fault)")
        assert any("color-contrast" in line for line in await axe.findings(page))


async def test_axe_finds_nothing(tmp_path: Path) -> None:
    made = answers(name=HOSTILE)
    made["api/steps"] = made["api/steps"][:10]
    async with view_page(made) as base, browser(tmp_path) as page:
        await page.open(base + "#/nothing")
        for address, acts in VIEWS.items():
            await page.look(1280, 900)
            await go(page, address)
            for act in acts:
                await page.value(f"{act or 0}; new Promise((done) => setTimeout(done, 60))")
                assert await axe.findings(page) == [], (address, act)
            await page.look(1280, 900, is_dark=True)
            assert await axe.findings(page, axe.CONTRAST) == [], (address, "dark")
            await page.look(360, 780)
            assert await page.value("document.documentElement.scrollWidth") == 360, address
        assert page.complaints == []
