"""Alerts by POST, to a real server that takes them, hangs, refuses, or answers with nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator.dashboard.shapes import Alert
from potluck.coordinator.observe import webhook as module
from potluck.coordinator.observe.webhook import Webhook, message
from potluck.protocol.config import ObserveConfig, RunConfig, convert, encoded, told
from potluck.protocol.errors import ConfigError
from potluck.protocol.tls import Certificate

RUN = {"name": "tiny", "id": "ab12"}
OK = b"HTTP/1.1 204 No Content\r\n\r\n"
SECRET = "T0P5ECRET"


def alert(name: str, since: float = 1.0, text: str = "") -> Alert:
    return Alert(name=name, text=text or f"{name} is wrong", since=since)


class Server:
    """What each request is answered with, in order, the last for all others; None: never."""

    def __init__(self) -> None:
        self.answers: list[bytes | None] = [OK]
        self.heads: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.heads.append(head)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer is None:
                await reader.read()  # until the other side has had enough
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook/{SECRET}?x=1"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    listening = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    yield made
    listening.close()


@contextlib.asynccontextmanager
async def following(url: str, kind: str = "generic") -> AsyncIterator[Webhook]:
    hook = Webhook(url, kind, RUN, pause_seconds=0.0, retry_seconds=0.001)
    task = asyncio.create_task(hook.follow())
    try:
        yield hook
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_raised_and_resolved_are_told_once_each(server: Server) -> None:
    async with following(server.url) as hook:
        hook.tell([alert("clock")])
        await until(lambda: hook.delivered)
        hook.tell([alert("clock", text="other words, the same alert")])
        hook.tell([alert("disk_low")])
        await until(lambda: ("disk_low", 1.0) in hook.delivered)
        hook.tell([])
        await until(lambda: not hook.delivered)
    names = [[[a["name"] for a in body[key]] for key in ("raised", "resolved", "standing")] for body in server.bodies]
    assert names == [[["clock"], [], ["clock"]], [["disk_low"], ["clock"], ["disk_low"]], [[], ["disk_low"], []]]
    assert server.bodies[0]["run"] == RUN and server.heads[0].startswith(f"POST /hook/{SECRET}?x=1 HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in server.heads[0]


@pytest.mark.parametrize(
    "bad",
    [
        *(b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 429 Slow\r\nRetry-After: 0\r\n\r\n", b"", b"SSH-2.0-x\r\n\r\n"),
        *(b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, b"\x00" * 50_000, None),
    ],
    ids=["500", "429", "hangs up", "not HTTP", "no number", "endless head", "zeros", "hangs"],
)
async def test_what_fails_is_tried_again_with_what_is_newest(
    bad: bytes | None, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SEND_SECONDS", 0.1 if bad is None else 5.0)
    caplog.set_level(logging.INFO)
    server.answers = [bad, bad, OK]
    async with following(server.url) as hook:
        hook.tell([alert("clock")])
        await until(lambda: server.bodies)
        hook.tell([alert("loss", 2.0), alert("disk_low", 3.0)])
        await until(lambda: hook.delivered)
    assert hook.delivered.keys() == {("loss", 2.0), ("disk_low", 3.0)}
    assert [a["name"] for a in server.bodies[-1]["raised"]] == ["loss", "disk_low"]
    said = [record.getMessage() for record in caplog.records if record.name.endswith("webhook")]
    assert len(said) == 2 and "again" in said[0], "a reason is logged once"
    assert SECRET not in caplog.text and "127.0.0.1" not in caplog.text


async def test_a_server_that_cannot_prove_who_it_is_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own.pem").write_bytes(Certificate.generate()._pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    server = Server()
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=context)
    server.port = listening.sockets[0].getsockname()[1]
    async with following(server.url.replace("http:", "https:")) as hook:
        hook.tell([alert("clock")])
        await until(lambda: "its certificate or TLS is not right" in caplog.text)
    listening.close()
    assert not hook.delivered and not server.bodies and SECRET not in caplog.text


async def test_a_redirect_is_not_followed(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    other = Server()
    listening = await asyncio.start_server(other.handle, "127.0.0.1", 0)
    other.port = listening.sockets[0].getsockname()[1]
    server.answers = [f"HTTP/1.1 307 There\r\nLocation: {other.url}\r\n\r\n".encode()]
    async with following(server.url) as hook:
        hook.tell([alert("clock")])
        await until(lambda: len(server.bodies) > 2)
        assert not hook.delivered and not other.bodies
    listening.close()
    assert "redirects are not followed" in caplog.text


async def test_an_interim_answer_is_not_the_answer(server: Server) -> None:
    server.answers = [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK]
    async with following(server.url) as hook:
        hook.tell([alert("clock")])
        await until(lambda: hook.delivered)
    assert len(server.bodies) == 1


async def test_nobody_waits_for_a_server_that_hangs_or_is_not_there(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [None]
    async with following(server.url) as hook:
        for number in range(1000):
            hook.tell([alert("clock", number)])  # returns at once
        await until(lambda: server.bodies)
        await hook.last_word(0.05)
        assert not hook.delivered and len(server.bodies) <= 2
    async with following("http://127.0.0.1:1/" + SECRET) as hook:
        hook.tell([alert("clock")])
        await until(lambda: "cannot be reached" in caplog.text)
    assert SECRET not in caplog.text


async def test_the_last_word_is_delivered_though_it_would_wait(server: Server) -> None:
    hook = Webhook(server.url, "generic", RUN)
    hook.tell([alert("clock")])
    await hook.last_word(5.0)
    await hook.last_word(5.0)
    assert len(server.bodies) == 1 and hook.delivered


async def test_messages_keep_a_distance(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    server.answers = [b"HTTP/1.1 503 Busy\r\nRetry-After: 120\r\n\r\n", *[b"HTTP/1.1 500 No\r\n\r\n"] * 9, OK]
    hook = Webhook(server.url, "generic", RUN)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    task = asyncio.create_task(hook.follow())
    hook.tell([alert("clock")])
    async with asyncio.timeout(10.0):
        while not hook.delivered:
            await real(0.001)
    task.cancel()
    assert slept == [120.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0, 300.0, 10.0]


# What is written.

NASTY = "<!channel> <@U1> @everyone [x](http://evil) *b* & `c` \\ " + "ü" * 500


def test_a_chat_is_sent_words_and_nothing_else() -> None:
    alerts = [alert("clock", i, NASTY) for i in range(50)]
    slack = json.loads(message("slack", RUN, alerts, alerts, alerts, 5.0))
    assert slack.keys() == {"text"} and "<" not in slack["text"] and "&lt;!channel&gt;" in slack["text"]
    discord = json.loads(message("discord", RUN, alerts, alerts, alerts, 5.0))
    assert discord["allowed_mentions"] == {"parse": []} and "\\[x\\]" in discord["content"]
    assert max(len(slack["text"]), len(discord["content"])) <= 2000
    assert len(message("generic", RUN, alerts, alerts, alerts, 5.0)) < 64 * 1024
    resolved = json.loads(message("slack", RUN, [], alerts[:1], [], 5.0))
    assert resolved["text"].startswith("tiny: Resolved: ")


# Settings.


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://a.example/x", "a.example/x", "https:///x", "https://a b/", "https://ä.example/", "http://a:0/"),
        *("https://u:p@a.example/", "https://a.example/\r\nX: 1", "http://[::1/", "http://a:99999/", "file:///etc"),
        "https://a.example/" + "x" * 3000,
    ],
)
def test_a_wrong_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert({"observe": {"webhook": url}})
    assert "observe.webhook" in str(caught.value) and caught.value.hint
    assert url not in caught.value.one_line()


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"webhook_kind": "teams"}, "generic, slack, discord"),
        ({"track": "mlflow"}, "tensorboard"),
        ({"no_commit_minutes": -1}, "observe.no_commit_minutes"),
        ({"webhok": "x"}, "unknown key"),
        ({"log_mb": 0}, "observe.log_mb"),
    ],
)
def test_wrong_settings_are_named(section: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        convert({"observe": section})


def test_workers_and_the_log_do_not_see_the_address() -> None:
    config = convert({"name": "x", "observe": {"webhook": f"https://a.example/{SECRET}", "track": "wandb"}})
    sent = json.loads(encoded(config))
    assert "observe" not in sent and convert(sent) == RunConfig(name="x") == told(config)
    hook = Webhook(config.observe.webhook, "slack", RUN)
    assert SECRET not in f"{config!r} {config.observe!r} {hook!r}" and SECRET in config.observe.webhook
    assert ObserveConfig().webhook == "" and ObserveConfig().track == "off" and ObserveConfig().log == ""
