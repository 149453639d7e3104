"""The API's description and its page in docs: made from the table, complete, and current."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import httpx
from fake_source import FakeSource
from msgspec import Struct

from potluck.coordinator.dashboard import manual, openapi
from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard.endpoints import TABLE


class Order(Struct):
    peer: str


class Told(Struct):
    text: str


class Extra(NamedTuple):
    path: str = "/api/actions/{name}"
    method: str = "post"
    summary: str = "An order"
    request: type = Order
    responses: dict = {200: ("Done", Told), 401: ("No token", Told)}
    parameters: tuple = (("name", "path", "which"), ("preview", "query", "1"), ("Authorization", "header", "Bearer"))


def test_the_page_in_docs_is_current() -> None:
    written = manual.FILE.read_text(encoding="utf-8")
    assert "### `POST /api/actions/{name}`" in written and "### `GET /metrics`" in written
    assert written == manual.manual(), "run: python -m potluck.coordinator.dashboard.manual"


def test_its_links_lead_somewhere() -> None:
    text = manual.manual((Extra(),))
    headings = {line.removeprefix("### ").lower() for line in text.splitlines() if line.startswith("### ")}
    links = set(re.findall(r"\]\(#(\w+)\)", text))
    assert links and links <= headings
    assert {"pointless", "told", "order", "stepname"} & headings == {"told", "order"}


def test_every_reference_is_there_and_every_type_is_used() -> None:
    said = openapi.document(TABLE)
    text = json.dumps(said)
    used = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert used == set(said["components"]["schemas"])
    names = [operation["operationId"] for path in said["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))
    for path, methods in said["paths"].items():
        for operation in methods.values():
            in_path = {param["name"] for param in operation["parameters"] if param["in"] == "path"}
            assert in_path == set(re.findall(r"\{(\w+)\}", path))


async def test_others_are_described_where_they_are_served() -> None:
    assert "/api/actions/{name}" not in openapi.document(TABLE)["paths"]
    app = web.app(FakeSource(), operations=(Extra(),))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        said = (await client.get("/api/openapi.json")).json()
    action = said["paths"]["/api/actions/{name}"]["post"]
    assert action["security"] == [{"operator": []}] and "operator" in said["components"]["securitySchemes"]
    assert [param["name"] for param in action["parameters"]] == ["name", "preview"]
    assert action["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/Order")
    assert set(action["responses"]) == {"200", "401"}
