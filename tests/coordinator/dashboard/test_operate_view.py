"""The operator's panel, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM
from dashboard_answers import (
    HOSTILE,
    NOW,
    answers,
    peer_id,
)
from view_page import go, holds, opened, press

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.timeout(120),
]
DORA = peer_id(0)
MAIN = "document.getElementById('main')"


async def test_operator_sees_what_an_action_would_do_before_it_is_done(tmp_path: Path) -> None:
    async with opened(tmp_path, answers(name=HOSTILE)) as page:
        await go(page, "#/operate")
        click = "document.querySelector('[data-action={}]').click()"
        await page.value(click.format("ban"))
        await holds(page, ".told", "Whom to ban?", "Choose a peer first")
        assert await page.value("document.activeElement.id") == "operate-peer"
        await page.value(click.format("pause"))
        await holds(page, ".told", "token is missing")
        assert await page.value("document.activeElement.id") == "operate-token"
        assert await page.value("sent.length") == 0
        await page.call("Input.insertText", text="wrong")
        await page.value(click.format("pause"))
        await page.until("document.querySelector('.told').innerText.includes('not the operator')")
        await holds(page, ".told", "It is in the run's folder")
        await page.value("document.getElementById('operate-token').value = ''")
        await page.call("Input.insertText", text="right")
        assert await page.value("sessionStorage.length") == 0
        await page.value(f"select = document.getElementById('operate-peer'), select.value = '{DORA}'")
        await page.value("select.dispatchEvent(new Event('change'))")
        await page.value(click.format("ban"))
        await page.until("document.querySelector('.answer:not([hidden])')")
        await holds(page, ".answer", f"Ban {HOSTILE}?", "Moves 3 stages, 2.1 GB, about 4 minutes.", "all the same")
        last = "sent.at(-1)"
        ban = {"name": "ban", "body": {"peer": DORA}, "token": "right", "preview": True}
        assert await page.value(last) == ban
        assert await page.value("document.activeElement.id") == "operate-why"
        await page.call("Input.insertText", text="sends noise")
        await press(page, "Escape")
        assert await page.value("document.querySelector('.answer').hidden")
        assert await page.value("document.activeElement.dataset.action") == "ban"
        assert await page.value("sent.length") == 2  # nothing was done
        await page.value(click.format("ban"))
        await page.until("document.querySelector('.answer:not([hidden])')")
        await page.call("Input.insertText", text="sends noise")
        await page.press("Enter", 13)
        assert await page.value("sent.length") == 3  # the tick is missing
        await page.value("document.querySelector('.answer [type=checkbox]').click()")
        await page.value("document.querySelector('.answer .primary').click()")
        await page.until("document.querySelector('.told').innerText === 'Done: ban is ordered.'")
        done = {**ban, "preview": False, "body": {"peer": DORA, "why": "sends noise", "force": True}}
        assert await page.value(last) == done
        await page.value("document.getElementById('operate-keep').click()")
        assert await page.value("sessionStorage.length") == 1
        await page.value("document.getElementById('operate-keep').click()")
        assert await page.value("sessionStorage.length") == 0


@pytest.mark.parametrize(("is_live", "address"), [(False, "#/operate"), (True, f"#/operate?at={NOW}")])
async def test_nothing_is_operated_in_a_report_or_in_the_past(tmp_path: Path, is_live: bool, address: str) -> None:
    async with opened(tmp_path, answers(), is_live=is_live) as page:
        assert "Nothing to operate" in await go(page, address)
        assert await page.value("document.querySelectorAll('main button, main input').length") == 0
