"""The coordinator, as the computing thread has it: calls that block until the event loop has done them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

from ..protocol.errors import StateError, UnreachableError
from ..protocol.frames import Purpose
from ..protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest
from ..protocol.weights import StoredTensor
from .control import Control
from .files import Files
from .places import Place

LOOK_SECONDS = 0.5  # between two looks whether an upload is still wanted


class Coordinator:
    """The control stream, as the computing thread sees it: calls that block until the loop has done them."""

    def __init__(self, control: Control, files: Files, folder: Path, manifest: Manifest) -> None:
        self.reported: Callable[[dict[str, object]], None] | None = None  # hears of every report, in the loop
        self._control, self._files, self._folder, self._manifest = control, files, folder, manifest
        self._loop = asyncio.get_running_loop()

    @property
    def state(self) -> str:
        return self._control.state

    @state.setter
    def state(self, value: str) -> None:
        self._control.state = value

    def report(self, **body: object) -> None:
        self._control.report(**body)
        if self.reported is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
                self._loop.call_soon_threadsafe(self.reported, body)

    def counterfactual(self, dense_nbytes: int) -> None:
        self._control.meter.counterfactual(self._control.identity.peer_id, Purpose.WEIGHTS, dense_nbytes)

    def corpus(self) -> Path:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / MANIFEST_FILE).write_bytes(self._manifest.encode())
        except OSError as error:
            raise StateError(f"{self._folder}: {error}", hint="Free some space, or mend its rights.") from None
        return self._folder

    def fetch(self, name: str, nbytes: int) -> None:
        fetched = self._files.fetch(name, self._folder / SHARDS_FOLDER / name, nbytes)
        asyncio.run_coroutine_threadsafe(fetched, self._loop).result()

    def fetch_weights(self, locations: tuple[str, ...], tensor: StoredTensor, path: Path) -> None:
        """Brings a tensor of the run's checkpoint. Blocks; may be called from any thread."""
        places = [Place(root, tensor.file, tensor.start) for root in locations]
        fetched = self._files.fetch(tensor.sha256, path, tensor.nbytes, places)
        asyncio.run_coroutine_threadsafe(fetched, self._loop).result()

    def publish(self, step: int, stage: int, data: bytes | mmap, is_wanted: Callable[[], bool]) -> None:
        going = asyncio.run_coroutine_threadsafe(self._files.upload(step, stage, data), self._loop)
        while True:
            try:
                return going.result(LOOK_SECONDS)
            except TimeoutError:
                if going.done() or not is_wanted():
                    going.cancel()
                    raise UnreachableError("the upload is not wanted any more") from None
