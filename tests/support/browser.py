"""A headless Chromium, driven over its own debugging pipe."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--remote-debugging-pipe",
]
# The browser reads commands from file 3 and answers on file 4; both are moved out of the way first.
SHIM = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(f), fcntl.F_DUPFD, 10) for f in sys.argv[1:3]);"
    "os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
# Resolves when the expression is true, looking again at every change of the page.
UNTIL = """new Promise((done) => {
  const look = () => (%s) && (watch.disconnect(), done(true));
  const watch = new MutationObserver(look);
  watch.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  document.addEventListener("readystatechange", look);
  look();
})"""


class Page:
    """One tab of a headless browser."""

    def __init__(self, reader: asyncio.StreamReader, commands: int) -> None:
        self.reader = reader
        self.commands = commands
        self.number = 0
        self.session: str | None = None
        self.complaints: list[str] = []
        self.console: list[str] = []  # errors in it: what failed, what the page's policy forbade
        self.requests: list[str] = []  # addresses that were asked for

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads((await self.reader.readuntil(b"\0"))[:-1])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self._heard(answer.get("method"), answer.get("params", {}))

    def _heard(self, event: str | None, said: dict[str, Any]) -> None:
        if event in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.complaints.append(json.dumps(said))
        elif event == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert", "warning"):
            self.console.append(json.dumps(said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.console.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    async def open(self, address: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        await self.call("Log.enable")
        await self.call("Network.enable")
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            await self.value(UNTIL % condition)

    async def look(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Shows the page on a screen of so many CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what the screen shows, or of the ``whole`` page."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))

    async def press(self, key: str, code: int) -> None:
        """A key, by its name and number in JavaScript: ``press("Enter", 13)``."""
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text="\r" if code == 13 else "",
            )

    async def text(self, name: str) -> str:
        return await self.value(f"document.getElementById('{name}').innerText")


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SHIM, str(commands_in), str(answers_out)),
        *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
        pass_fds=(commands_in, answers_out),
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands_in)
    os.close(answers_out)
    reader = asyncio.StreamReader(limit=1 << 24)
    answers = os.fdopen(answers_in, "rb")
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), answers)
    page = Page(reader, commands_out)
    try:
        yield page
        page.session = None
        await page.call("Browser.close")
        await asyncio.wait_for(process.wait(), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group this test started, helpers included
        await process.wait()
        pipe.close()
        os.close(commands_out)
