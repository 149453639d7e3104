"""axe-core in a page that a test has open: what keeps somebody from using it."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from browser import Page

RULES = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}"
CONTRAST = "{runOnly: ['color-contrast']}"  # all that differs between light and dark
FOUND = (
    "axe.run(document, %s).then(({violations}) => violations.map(({id, impact, nodes}) => "
    "`${impact} ${id}: ${nodes.length} times, ${nodes[0].html.slice(0, 200)} ${nodes[0].failureSummary}`))"
)


@cache
def script() -> str | None:
    """axe-core itself, from the package that brings it; None where that is not installed."""
    found = importlib.util.find_spec("axe_playwright_python")  # found, not imported: only its axe.min.js is used
    if found is None or found.origin is None:
        return None
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


async def findings(page: Page, rules: str = RULES) -> list[str]:
    """What axe finds in the page as it is: one line per rule, the impact first."""
    source = script()
    assert source is not None
    if not await page.value("'axe' in window"):
        await page.value(f"{source};0")
    return await page.value(FOUND % rules)
