"""A run's page as one file: what is in it, that it opens from disk, and that nobody's name gets out of its data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, browser
from fake_source import HOSTILE, START, FakeSource, peer_id

from potluck.coordinator.dashboard import report as module
from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard.bundle import bundle, modules
from potluck.coordinator.dashboard.report import answers, as_number, evenly, report, thinned
from potluck.coordinator.dashboard.server import FILES
from potluck.coordinator.dashboard.shapes import Incident

PAGE = {
    "index.html": """<!doctype html>
<html><head>
<title>test</title>
<link rel="stylesheet" href="static/style.css">
<link rel="modulepreload" href="static/b.js">
<script defer src="static/vendor/old.js"></script>
<script type="module" src="static/app.js"></script>
</head><body><p id="out"></p></body></html>""",
    "style.css": "body { color: rgb(1, 2, 3); }",
    "vendor/old.js": "var old = '<\\/script>'.length;",
    "vendor/new.js": "import{twice as t}from'../b.js';export default t;",
    "app.js": """import { said } from "./a.js";
import t from "./vendor/new.js";
const packed = Uint8Array.from(atob(document.getElementById("potluck-data").textContent), (c) => c.charCodeAt(0));
const whole = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const data = await new Response(whole).json();
const { late } = await import("./late.js");
document.getElementById("out").textContent = [said(), t(21), late, old, data["api/x"].name].join(" ");""",
    "a.js": 'import { twice } from "./b.js";\nexport function said() { return `a${twice(1)}`; }\nexport const one = 1;',
    "b.js": 'import { one } from "./a.js";\nexport const twice = (n) => n * 2 * one;',  # each needs the other
    "late.js": 'export const late = "late";',
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in PAGE.items():
        path = tmp_path / "page" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "page"


def data_of(html: str) -> dict[str, Any]:
    [packed] = re.findall(r'<script type="application/json" id="potluck-data">([^<]*)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(packed, validate=True)))


def test_everything_is_inside_and_named_in_the_policy(files: Path) -> None:
    html = bundle(files, {"api/x": b'{"name": 1}'}).decode()
    assert "static/" not in html and data_of(html) == {"api/x": {"name": 1}}
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', html)
    assert html.index("Content-Security-Policy") < html.index("<title>") < html.index("<style>")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for kind in ("script", "style"):
        inline = re.findall(rf"<{kind}(?: type=\"(?:importmap|module)\")?>(.*?)</{kind}>", html, flags=re.DOTALL)
        assert inline
        for text in inline:
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert set(modules(files, "app.js")) == {"app.js", "a.js", "b.js", "late.js", "vendor/new.js"}


def test_a_page_that_loads_in_another_way_is_not_taken(files: Path) -> None:
    (files / "index.html").write_text(PAGE["index.html"].replace("<title>", '<img src="static/x.png"><title>'))
    with pytest.raises(AssertionError, match="does not know"):
        bundle(files, {})


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
async def test_it_opens_from_disk(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(bundle(files, {"api/x": json.dumps({"name": HOSTILE}).encode()}))
    async with browser(tmp_path) as page:
        await page.open(path.as_uri())
        await page.until("document.getElementById('out').textContent")
        assert await page.text("out") == f"a2 42 late 9 {HOSTILE}"
        assert await page.value("getComputedStyle(document.body).color") == "rgb(1, 2, 3)"
        assert page.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.skipif(not (FILES / "source.js").exists(), reason="the page does not read reports yet")
async def test_the_real_page_shows_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(report(FakeSource(name=HOSTILE)))
    async with browser(tmp_path) as page:
        await page.open(path.as_uri())
        await page.until(f"document.getElementById('run-name').textContent === {json.dumps(HOSTILE)}")
        assert await page.value("document.images.length") == 0
        assert page.complaints == []


def test_the_real_page_is_taken_whole() -> None:
    html = report(FakeSource()).decode()
    [names] = [json.loads(text)["imports"] for text in re.findall(r'<script type="importmap">(.*?)</script>', html)]
    for name, address in names.items():
        source = base64.b64decode(address.removeprefix("data:text/javascript;base64,")).decode()
        imported = re.findall(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""", source)
        assert set(imported) <= set(names), name
    assert "page/app.js" in names and html.count("<style>") >= 1


def test_no_name_gets_out_of_the_data() -> None:
    html = report(FakeSource(name=HOSTILE)).decode()
    assert HOSTILE not in html and "alert(1)" not in html
    assert data_of(html)["api/state"]["run"]["name"] == HOSTILE
    opened, closed = len(re.findall("<script", html)), len(re.findall("</script>", html))
    assert opened == closed == report(FakeSource()).decode().count("</script>")


async def test_it_holds_what_the_server_would_answer() -> None:
    source = FakeSource()
    held = dict(answers(source))
    wanted = {
        *("api/state", "api/curve?most=2000", "api/points", "api/events", "api/incidents", "api/rounds", "api/links"),
        *("api/traffic?most=500", "api/leaderboard", "api/evaluations", "api/rounds/8", "api/rounds/24"),
        *("api/steps?limit=100&order=newest", "api/steps?limit=100&order=slowest", "api/steps/1", "api/steps/2"),
        *(f"api/peers/{peer_id(0)}", f"api/links/{peer_id(0)}/{peer_id(1)}", f"api/state?at={START + 0.5!r}"),
        f"api/state?at={int(START) + 3}",
    }
    assert wanted <= set(held)
    transport = httpx.ASGITransport(web.app(source))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, body in held.items():
            said, mine = (await client.get(f"/{path}")).json(), json.loads(body)
            if "now" in mine:
                assert said.pop("now") and mine.pop("now")
            assert said == mine, path


def test_a_long_run_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(points=30)
    monkeypatch.setattr(module, "MOST_POINTS", 20)
    monkeypatch.setattr(module, "PAGE", 7)
    monkeypatch.setattr(module, "MOST_EVENTS", 25)
    held = dict(answers(source))
    assert "api/points" not in held
    assert [row["id"] for row in json.loads(held["api/events"])] == list(range(6, 31))
    assert sum(path.startswith("api/state?at=") for path in held) <= 401
    [row, *_] = source.rounds(None, 1)
    rounds = [type(row)(**{**as_dict(row), "step": n, "degraded": n == 17}) for n in range(9000, 0, -1)]
    some = thinned(rounds)
    assert len(some) <= module.MOST_ROUNDS + 1 and some[:200] == rounds[:200] and some[-1].step == 1
    assert [row.step for row in some if row.degraded] == [17]
    assert sorted((row.step for row in some), reverse=True) == [row.step for row in some]


def as_dict(row: Any) -> dict[str, Any]:
    return {field: getattr(row, field) for field in row.__struct_fields__}


def test_moments_fit_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eventful(FakeSource):
        def incidents(self, until: float | None) -> list[Incident]:
            return [Incident(id=n, time=START + n / 8, step=n, group="lost", text="") for n in range(1000)]

    source = Eventful(points=1000)
    found = module.moments(source, source.state(), START + 1000)
    assert 390 < len(found) <= 400 and found == sorted(found, key=float)
    assert found[0] == str(int(START)) and found[-1] == str(int(START) + 1000)
    size = len(next(body for path, body in answers(source) if path == "api/state"))
    monkeypatch.setattr(module, "STATES_NBYTES", 20 * size + size // 2)  # the time in it has more or fewer digits
    assert len(module.moments(source, source.state(), START + 1000)) == 20


def test_numbers_are_written_as_javascript_does() -> None:
    assert [as_number(value) for value in (1.7e9, 1.7e9 + 0.5, 1700000000.123)] == [
        "1700000000",
        "1700000000.5",
        "1700000000.123",
    ]
    assert [evenly(range(10), most) for most in (0, 1, 2, 3, 10, 20)] == [
        [],
        [0],
        [0, 9],
        [0, 4, 9],
        *[list(range(10))] * 2,
    ]
