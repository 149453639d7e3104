"""A whole coordinator that is observed: metrics by HTTP, an alert on the page, at a webhook and in the log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from potluck import cli_coordinator
from potluck.coordinator import service
from potluck.coordinator.observe import watch as module
from potluck.coordinator.store import Store
from potluck.protocol.config import ObserveConfig, RunConfig, convert
from potluck.protocol.errors import ConfigError

SECRET = "T0P5ECRET"


def a_run(folder: Path, **observe: Any) -> RunConfig:
    text = "\n".join(f"Guest {i} brought {i * 7} plums and took home {i * 13 % 97} jars.\n" for i in range(400))
    (folder / "corpus.txt").write_text(text)
    return convert(
        {
            "name": "tiny",
            "model": {"d_model": 32, "layers": 2, "heads": 2, "rotary_dim": 8, "seq_len": 16},
            "data": {"source": str(folder / "corpus.txt"), "vocab_size": 300, "heldout_share": 0.1},
            "pipeline": {"stages": 1, "microbatch_size": 2, "microbatches": 2},
            "coordinator": {"host": "127.0.0.1"},
            "observe": observe,
        }
    )


async def test_it_is_observed_and_the_webhook_stays_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    heard: list[dict[str, Any]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
        heard.append(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        writer.close()

    hook = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{hook.sockets[0].getsockname()[1]}/{SECRET}"
    config = a_run(tmp_path, webhook=url, log="logs/run.jsonl", disk_free_gb=1e6)
    home = tmp_path / "data"
    async with service.running(config, home) as up:
        async with asyncio.timeout(20.0):
            while not (heard and up.board.state().alerts):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=up.page) as client:
            metrics = (await client.get("/metrics")).text
            answers = [
                (await client.get(path)).text for path in ("/api/state", "/api/openapi.json", "/healthz", "/readyz")
            ]
        assert json.loads(answers[2]) == {"ok": True, "why": None} == json.loads(answers[3])
    hook.close()
    found = {family.name: family for family in text_string_to_metric_families(metrics)}
    alerts = {sample.labels["alert"]: sample.value for sample in found["potluck_alert"].samples}
    assert alerts["disk_low"] == 1 and found["potluck_disk_free_bytes"].samples[0].value > 0
    assert (
        [alert["name"] for alert in json.loads(answers[0])["alerts"]]
        == ["disk_low"]
        == [alert["name"] for alert in heard[0]["raised"]]
    )
    assert "/metrics" in json.loads(answers[1])["paths"] and heard[0]["run"]["name"] == "tiny"
    lines = [json.loads(line) for line in (home / "logs" / "run.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "RunOpened" and "AlertRaised" in kinds and lines[0]["fields"]["name"] == "tiny"
    known = [
        metrics,
        *answers,
        caplog.text,
        json.dumps(lines),
        *(path.read_bytes().decode("latin-1") for path in home.glob("run*")),
    ]
    assert not [text[:80] for text in known if SECRET in text]


async def test_workers_begin_anew_for_none_of_it(tmp_path: Path) -> None:
    """The section may change between two starts; what workers are sent does not."""
    config, home = a_run(tmp_path), tmp_path / "data"
    async with service.running(config, home):
        pass
    store = Store(home / "run.sqlite")
    store.set_meta(crew=["kept"])
    store.close()
    changed = msgspec.structs.replace(config, observe=ObserveConfig(no_commit_minutes=5.0, log="run.jsonl"))
    async with service.running(changed, home):
        pass
    store = Store(home / "run.sqlite")
    assert store.meta("crew") == ["kept"]
    store.close()


async def test_a_tracker_that_is_missing_is_told_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb"):
        async with service.running(a_run(tmp_path, track="wandb"), tmp_path / "data"):
            pass
    assert not (tmp_path / "data" / "run.sqlite").exists()


def test_the_command_names_the_log_from_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []

    async def remember(config: RunConfig, *_: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(cli_coordinator, "_coordinator", remember)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: tiny\nobserve: {log: own.jsonl, track: trackio}\n")
    for more in ([], ["--log-json", "logs/x.jsonl"]):
        CliRunner().invoke(cli_coordinator.coordinator, ["up", "run.yaml", "--data-dir", "data", *more])
    assert [config.observe.log for config in seen] == ["own.jsonl", str(tmp_path / "logs" / "x.jsonl")]
    assert all(config.observe.track == "trackio" for config in seen)
