"""What the computing thread has of the world outside: its configuration, the coordinator, the newest view."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Protocol

from ..protocol.config import RunConfig
from ..protocol.manifest import Manifest
from .plan import View
from .weights import Beginning


class MissingError(Exception):
    """A state that a plan starts from cannot be had; ``holder``: who lacks it though the coordinator believes in it,
    empty if all were silent."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class Headquarters(Protocol):
    """The coordinator, as the computing thread sees it."""

    state: str

    def report(self, **body: object) -> None: ...

    def counterfactual(self, dense_nbytes: int) -> None:
        """Books what averaging in fp16 would have sent after a step: a ring's 2 (R - 1) / R of the stage."""

    def corpus(self) -> Path:
        """The folder of the run's corpus, with its manifest; shards are there as far as they were fetched."""

    def fetch(self, name: str, nbytes: int) -> None:
        """Brings a shard by its SHA-256 into the corpus. Blocks; may be called from any thread."""

    def publish(self, step: int, stage: int, data: bytes | mmap, is_wanted: Callable[[], bool]) -> None:
        """Uploads a stage of a published round. Blocks; gives up when it is not wanted any more."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    run: RunConfig
    manifest: Manifest
    run_name: bytes  # 8 bytes, in every frame
    peer: str
    device: str = "cpu"
    beginning: Beginning | None = None  # the checkpoint that the run begins from


class Views:
    """The newest view, handed from the event loop to the computing thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._view = View()
        self._version = 0
        self.closed = False
        self.idle = False  # the computing thread waits for the coordinator or for a round

    def put(self, view: View) -> None:
        with self._changed:
            self._view, self._version = view, self._version + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    @property
    def newest(self) -> tuple[View, int]:
        with self._changed:
            return self._view, self._version

    def wait(self, seen: int) -> None:
        with self._changed:
            self.idle = True
            self._changed.wait_for(lambda: self.closed or self._version != seen)
            self.idle = False
