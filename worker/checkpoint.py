"""States in memory and on disk: what a worker can go back to, and what it hands to a newcomer.

A state is one safetensors file, its name and numbers in the file's metadata; writing is a temporary file, fsync and
a rename, so a file that is there is whole.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..protocol.errors import StateError, WireError
from ..protocol.failpoints import failpoint
from ..protocol.plan import SavePoint
from .stage import Owned, State, digest

VECTORS = ("g", "x", "m", "v", "momentum", "unsent", "feedback")
KEPT_ROUNDS = 2


def to_bytes(state: State) -> bytes:
    """A state as safetensors."""
    return safetensors.torch.save(_tensors(state), _metadata(state))


def from_bytes(data: bytes, wanted: SavePoint, size: int) -> State:
    """The state of ``wanted`` from a peer's bytes; ``WireError`` unless it is exactly that, to the digest."""
    try:
        tensors = safetensors.torch.load(data)
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        metadata = _read_metadata(header)
        return _state(tensors, metadata, wanted, size)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise WireError(f"the state from a peer is not usable: {error}") from None


class SavePoints:
    """Every state this worker can start from, newest in memory, some on disk. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._memory: dict[SavePoint, State] = {}
        self._disk: dict[SavePoint, Path] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise StateError(f"{folder}: {error}", hint="Choose a writable folder: --data-dir") from None
        for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
            with contextlib.suppress(StateError):
                self._disk[_point_of(path)] = path

    def points(self) -> list[SavePoint]:
        with self._lock:
            return sorted({*self._memory, *self._disk}, key=lambda p: (p.step, p.generation, p.kind))

    def keep(self, state: State) -> None:
        """In memory."""
        with self._lock:
            self._memory[state.point] = state

    def find(self, kind: str, generation: int, step: int, layers: tuple[int, int]) -> State | None:
        """A state by name, from memory or disk; None if it is not here or damaged."""
        with self._lock:
            known: dict[SavePoint, State | Path] = {**self._disk, **self._memory}
            for point, place in known.items():
                if (point.kind, point.generation, point.step) == (kind, generation, step) and (
                    point.first_layer,
                    point.last_layer,
                ) == layers:
                    state = place if isinstance(place, State) else _load(place, point)
                    if state is not None and (not point.digest or digest(state.g) == point.digest):
                        return state
        return None

    def save(self, state: State) -> None:
        """On disk, durably; of rounds the ``KEPT_ROUNDS`` written last stay."""
        with self._saving:  # a round is saved in the background; a stop may save the same one at the same time
            self._save(state)

    def _save(self, state: State) -> None:
        point = state.point
        name = f"{point.kind}-{point.generation}-{point.step}-{point.first_layer}-{point.last_layer}.safetensors"
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(to_bytes(state))
                file.flush()
                failpoint("worker.savepoint.write")
                os.fsync(file.fileno())
            failpoint("worker.savepoint.rename")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StateError(f"{path}: cannot be written ({error})", hint="Free some space on that disk.") from None
        with self._lock:
            self._disk.pop(point, None)
            self._disk[point] = path  # last: the order in which they were written
            same = [p for p in self._disk if p.kind == point.kind]
            keep = KEPT_ROUNDS if point.kind == "round" else 1
            for old in same[:-keep]:
                self._disk.pop(old).unlink(missing_ok=True)

    def drop_after(self, step: int) -> None:
        """Lets go of what a generation that went back to ``step`` had done beyond it."""
        with self._lock:
            for point in [p for p in self._memory if p.step > step]:
                del self._memory[point]

    def forget(self, before: int, but: int | None) -> None:
        """Lets go of rounds in memory that are older than the last committed one (but not of step ``but``)."""
        with self._lock:
            for point in [p for p in self._memory if p.step < before and p.step != but]:
                del self._memory[point]


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: vector for name in VECTORS if (vector := getattr(state, name)) is not None}


def _metadata(state: State) -> dict[str, str]:
    p, o = state.point, state.owned
    return {
        "kind": p.kind,
        "generation": str(p.generation),
        "step": str(p.step),
        "first_layer": str(p.first_layer),
        "last_layer": str(p.last_layer),
        "digest": p.digest.hex(),
        "updates": str(state.updates),
        "pending": str(state.pending),
        "owned": "" if o is None else f"{o.fragments}:{o.replicas}:{o.replica}",
    }


def _read_metadata(header: bytes) -> dict[str, str]:
    import json

    metadata = json.loads(header)["__metadata__"]
    if not isinstance(metadata, dict):
        raise ValueError("no metadata")
    return metadata


def _point_of(path: Path) -> SavePoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _point(file.metadata())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        raise StateError(f"{path} is damaged", hint="It is left out; delete it.") from None


def _point(metadata: dict[str, str]) -> SavePoint:
    return SavePoint(
        kind="step" if metadata["kind"] == "step" else "round",
        generation=int(metadata["generation"]),
        step=int(metadata["step"]),
        first_layer=int(metadata["first_layer"]),
        last_layer=int(metadata["last_layer"]),
        digest=bytes.fromhex(metadata["digest"]),
    )


def _load(path: Path, point: SavePoint) -> State | None:
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            return _state(tensors, file.metadata(), point, tensors["g"].numel())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def _state(tensors: dict[str, Tensor], metadata: dict[str, str], wanted: SavePoint, size: int) -> State:
    point = _point(metadata)
    if replace(point, digest=b"") != replace(wanted, digest=b""):
        raise ValueError("it is of another step or stage")
    if wanted.digest and (point.digest != wanted.digest or digest(tensors["g"]) != wanted.digest):
        raise ValueError("its weights are not the run's")
    for name, vector in tensors.items():
        if name not in VECTORS or vector.dim() != 1 or (name != "feedback" and vector.numel() != size):
            raise ValueError(f"its {name} has another size")
        if vector.dtype != torch.float32 or not torch.isfinite(vector).all():
            raise ValueError(f"its {name} is not made of finite fp32 numbers")
    if bool((tensors["v"] < 0).any()):
        raise ValueError("its v, means of squares, has negative numbers")
    updates, pending = int(metadata["updates"]), int(metadata["pending"])
    if not (0 <= updates < 2**31 and 0 <= pending < 2**53):
        raise ValueError("its counts are impossible")
    owned = None
    if metadata["owned"]:
        fragments, replicas, replica = map(int, metadata["owned"].split(":"))
        owned = Owned(fragments=fragments, replicas=replicas, replica=replica)
    return State(
        point=point,
        g=tensors["g"],
        m=tensors["m"],
        v=tensors["v"],
        updates=updates,
        x=tensors.get("x"),
        momentum=tensors.get("momentum"),
        unsent=tensors.get("unsent"),
        feedback=tensors.get("feedback"),
        owned=owned,
        pending=pending,
    )
