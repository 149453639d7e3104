"""Codecs are compiled before training, by one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from potluck.worker.warm import one_at_a_time

RUN = "sync: {preset: sparseloco}\nactivations: {forward: 'int3:tile=128,hadamard', backward: 'int4:random'}"
COMPILES = """
import sys
import numba.core.event as event
import torch
from potluck.compression.mask import Mask
from potluck.compression.registry import build
from potluck.protocol.config import parse
from potluck.worker.shards import codec_of
from potluck.worker.warm import warm
config = parse(sys.argv[1])
with event.install_recorder("numba:compile") as first:
    warm(config)
with event.install_recorder("numba:compile") as later:
    for spec in (config.activations.forward, config.activations.backward):
        codec, x = build(spec), torch.randn(2, 3, 96)
        codec.decode(memoryview(codec.encode(x)), x.shape)
    codec, x = codec_of(config.sync.resolved()), torch.randn(9000)
    codec.decode(codec.encode(x).payload, 9000)
print(len(first.buffer), len(later.buffer))
"""


def test_nothing_is_left_to_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILES, RUN]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, later = map(int, done.stdout.split())
    assert first > 0
    assert later == 0


def test_without_a_folder_or_a_turn_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with one_at_a_time(tmp_path / "file" / "below"):
        pass
    monkeypatch.setattr("potluck.worker.warm.LOCK_SECONDS", 0.05)
    with filelock.FileLock(tmp_path / "kernels.lock"), one_at_a_time(tmp_path):
        pass
