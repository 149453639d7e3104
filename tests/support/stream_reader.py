"""Reads server-sent events one after the other."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx


class Reader:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.lines = response.aiter_lines()

    async def next(self) -> dict[str, Any]:
        """The next event, as {"event", "id", "data"}."""
        async with asyncio.timeout(5):
            fields: dict[str, Any] = {}
            async for line in self.lines:
                name, _, value = line.partition(":")
                if line:
                    fields[name] = value.strip()
                else:
                    return {**fields, "data": json.loads(fields["data"]) if fields["event"] != "ping" else None}
        raise AssertionError("the stream ended")

    async def event(self, wanted: str) -> dict[str, Any]:
        """The next event of this kind."""
        while (found := await self.next())["event"] != wanted:
            pass
        return found


def ids(event: dict[str, Any]) -> list[int]:
    return [row["id"] for row in event["data"]]
