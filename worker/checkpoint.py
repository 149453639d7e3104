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

from ..protocol.errors import StateError
from ..protocol.failpoints import failpoint
from ..protocol.plan import SavePoint
from .moments import Coded, Moment
from .stage import Owned, State, digest

VECTORS = ("g", "x", "m", "v", "momentum", "unsent")
FEEDBACK = "feedback"  # of all shards, one after the other
SCALES = {"m": "m.scales", "v": "v.scales"}  # of moments in 8 bits, beside their codes
KEPT_ROUNDS = 2


class SavePoints:
    """Every state this worker can start from, newest in memory, some on disk. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._memory: dict[SavePoint, State] = {}
        self._disk: dict[SavePoint, Path] = {}
        self.trouble = ""  # why the last state could not be saved
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise StateError(f"{folder}: {error}", hint="Choose a writable folder: --data-dir") from None
        for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
            with contextlib.suppress(StateError):
                self._disk[point_of(path)] = path

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
                    state = place if isinstance(place, State) else load_state(place, point)
                    if state is not None and (not point.digest or digest(state.g) == point.digest):
                        return state
        return None

    def newest(self, layers: tuple[int, int], step: int) -> State | None:
        """Of the rounds of these layers that are here, the last one that is not beyond ``step``."""
        with self._lock:
            known = {p for p in (*self._disk, *self._memory) if p.kind == "round" and p.digest and p.step <= step}
        for point in sorted(known, key=lambda p: (p.step, p.generation), reverse=True):
            if (point.first_layer, point.last_layer) == layers:
                state = self.find(point.kind, point.generation, point.step, layers)
                if state is not None:
                    return state
        return None

    def save(self, state: State) -> None:
        """On disk, durably; of rounds the ``KEPT_ROUNDS`` written last stay."""
        with self._saving:  # a round is saved in the background; a stop may save the same one at the same time
            try:
                self._save(state)
            except StateError as error:
                self.trouble = error.one_line()
                raise
            self.trouble = ""

    def _save(self, state: State) -> None:
        point = state.point
        name = f"{point.kind}-{point.generation}-{point.step}-{point.first_layer}-{point.last_layer}.safetensors"
        path = self.folder / name
        write_state(path, state)
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


def write_state(path: Path, state: State) -> None:
    """Durably: a temporary file, fsync and a rename. ``StateError`` if the disk refuses."""
    temporary = path.with_suffix(".tmp")
    try:
        safetensors.torch.save_file(_tensors(state), temporary, _metadata(state))  # out of the tensors' own memory
        with temporary.open("rb+") as file:
            failpoint("worker.savepoint.write")
            os.fsync(file.fileno())
        failpoint("worker.savepoint.rename")
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StateError(f"{path}: cannot be written ({error})", hint="Free some space on that disk.") from None


def _tensors(state: State) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in VECTORS:
        match getattr(state, name):
            case Coded(codes=codes, scales=scales):
                out |= {name: codes, SCALES[name]: scales}
            case Tensor() as vector:
                out[name] = vector
    if state.owned is not None and any(kept is not None for kept in state.feedback):
        lengths = [end - start for start, end in state.owned.shards(state.g.numel())]
        both = zip(state.feedback, lengths, strict=True)
        out[FEEDBACK] = torch.cat([torch.zeros(n) if kept is None else kept for kept, n in both])
    return out


def _moment(tensors: dict[str, Tensor], name: str) -> Moment | None:
    scales = tensors.get(SCALES[name])
    return tensors.get(name) if scales is None else Coded(tensors[name], scales, signed=name == "m")


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


def point_of(path: Path) -> SavePoint:
    """What a file holds; ``StateError`` if it is damaged or not there."""
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


def load_state(path: Path, point: SavePoint) -> State | None:
    """The state of ``point`` from a file; None if it is damaged or another one."""
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
    if wanted.digest and point.digest != wanted.digest:
        raise ValueError("its weights are not the run's")
    if strange := tensors.keys() - {*VECTORS, *SCALES.values(), FEEDBACK}:
        raise ValueError(f"it has a strange {min(strange)}")
    owned = None
    if metadata["owned"]:
        fragments, replicas, replica = map(int, metadata["owned"].split(":"))
        owned = Owned(fragments=fragments, replicas=replicas, replica=replica)
    feedback: tuple[Tensor | None, ...] = ()
    if FEEDBACK in tensors and owned is not None:
        feedback = tensors[FEEDBACK].split([end - start for start, end in owned.shards(size)])
    state = State(
        point=point,
        g=tensors["g"],
        m=_moment(tensors, "m"),
        v=_moment(tensors, "v"),
        updates=int(metadata["updates"]),
        x=tensors.get("x"),
        momentum=tensors.get("momentum"),
        unsent=tensors.get("unsent"),
        feedback=feedback,
        owned=owned,
        pending=int(metadata["pending"]),
    )
    check(state, size)
    return state


def check(state: State, size: int) -> None:
    """``ValueError`` for a state that no stage of ``size`` weights can have; wherever it comes from."""
    for name in VECTORS:
        vector = getattr(state, name)
        if vector is None:
            continue
        if isinstance(vector, Coded):
            vector.check(size)
            continue
        if vector.shape != (size,):
            raise ValueError(f"its {name} has another size")
        dtypes = (torch.float32, torch.bfloat16) if name == "x" else (torch.float32,)
        if vector.dtype not in dtypes or not torch.isfinite(vector).all():
            raise ValueError(f"its {name} is not made of finite numbers of its kind")
    if any(k is not None and not (k.dtype == torch.float32 and torch.isfinite(k).all()) for k in state.feedback):
        raise ValueError("what it owes is not made of finite fp32 numbers")
    if isinstance(state.v, Tensor) and bool((state.v < 0).any()):
        raise ValueError("its v, means of squares, has negative numbers")
    if not (0 <= state.updates < 2**31 and 0 <= state.pending < 2**53):
        raise ValueError("its counts are impossible")
    if (state.m is None) != (state.v is None) or (state.m is None and state.updates):
        raise ValueError("it has half of the optimizer's moments")
    if state.point.digest and digest(state.g) != state.point.digest:
        raise ValueError("its weights are not the run's")
