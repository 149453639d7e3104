"""A line that fails on command: TCP in, TCP out, and in between what a bad network does.

Commands come as lines of JSON on a pipe: ``{"line": NAME, "mode": MODE, "seconds": S}``; after that time the line is
sound again. Modes: ``cut`` ends all connections and takes no new ones, ``hole`` keeps them open and passes nothing on,
``slow`` passes a tenth of ``FULL_RATE``, ``late`` passes everything on after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .roles import write

FULL_RATE = 2_000_000  # bytes per second: what a scenario's line carries at ease
LATE_SECONDS = 0.15
PIECE_NBYTES = 16 * 1024


@dataclass
class Line:
    """One listening port, and the place where the address behind it stands."""

    name: str
    target: Path
    mode: str = ""
    sound: asyncio.Event = field(default_factory=asyncio.Event)
    open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self.open.add(writer)
        try:
            if self.mode == "cut":
                return
            if self.mode == "hole":
                await self.sound.wait()
            host, _, port = address_in(self.target).rpartition(":")
            back, out = await asyncio.open_connection(host, int(port))
            ends.append(out)
            self.open.add(out)
            ways = [asyncio.create_task(self.pump(reader, out)), asyncio.create_task(self.pump(back, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # nobody there: what is before the proxy sees its connection end
        finally:
            for end in ends:
                self.open.discard(end)
                end.close()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE_NBYTES):
                if self.mode == "hole":
                    await self.sound.wait()
                elif self.mode == "slow":
                    await asyncio.sleep(len(data) / (FULL_RATE / 10))
                elif self.mode == "late":
                    await asyncio.sleep(LATE_SECONDS)
                writer.write(data)
                await writer.drain()

    def set(self, mode: str) -> None:
        self.mode = mode
        if mode:
            self.sound.clear()
        else:
            self.sound.set()
        if mode == "cut":
            for end in self.open:
                end.transport.abort()


def address_in(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["address"] if path.suffix == ".json" else text


def run(folder: Path, targets: dict[str, Path], commands: int) -> None:
    """Until the pipe ``commands`` ends. The lines' addresses are in ``proxy.addresses`` once all listen."""
    with os.fdopen(commands, "rb", buffering=0) as pipe:
        asyncio.run(_run(folder, targets, pipe))


async def _run(folder: Path, targets: dict[str, Path], commands: IO[bytes]) -> None:
    lines = {name: Line(name, target) for name, target in targets.items()}
    addresses = {}
    for name, line in lines.items():
        line.set("")
        server = await asyncio.start_server(line.serve, "127.0.0.1", 0)
        addresses[name] = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    write(folder / "proxy.addresses", json.dumps(addresses))
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), commands)
    while text := await reader.readline():
        command = json.loads(text)
        line = lines[command["line"]]
        line.set(command["mode"])
        with (folder / "proxy.fired").open("a") as file:
            file.write(json.dumps({"name": command["line"], "do": command["mode"], "time": time.time()}) + "\n")
        loop.call_later(command["seconds"], line.set, "")
