"""Training samples as a pure function of manifest, seed and index: never of who asks or how many peers.

Which row an index stands for is in mixture.py; what is made of the row (objectives.py) draws its chances from (seed,
stage, index). So the whole data state of a run is one integer, and anyone can recompute anyone's batch.

Shards come when they are needed, and the next one of a source while the one before it is in use. What was fetched stays
on the disk: a run of several epochs needs it again.

Shapes: B sequences of a batch, T = seq_len.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import PotluckError, StateError
from ..protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest
from .mixture import HELDOUT_KEY, Mixture, Place

if TYPE_CHECKING:
    from .layout import Batch
    from .objectives import Packed

log = logging.getLogger(__name__)
Fetch = Callable[[str, int], None]  # a shard's SHA-256 and size: fetched into the folder's shards; blocks
_AGAIN = "Prepare or download the corpus again."
_CHUNK = 1 << 22  # tokens looked at in one piece when a shard is opened
_OPEN = 64  # shards mapped into memory at a time


class Row(NamedTuple):
    """``tokens``: int64 [T + 1]. ``answers``: bool [T + 1], of a source that has them."""

    tokens: NDArray[np.int64]
    answers: NDArray[np.bool_] | None


class Dataset:
    """A prepared corpus on disk. A shard is checked when it is first used: size, SHA-256, every token inside the
    vocabulary. ``fetch`` brings those that are missing or damaged.

    Raises StateError when files are missing, damaged, or not those of the manifest.
    """

    def __init__(self, folder: Path, fetch: Fetch | None = None) -> None:
        self.manifest = Manifest.decode(_read(folder / MANIFEST_FILE), str(folder / MANIFEST_FILE))
        self._folder, self._fetch = folder / SHARDS_FOLDER, fetch
        self._open: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._coming: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self.mixture = lru_cache(maxsize=4)(lambda seed: Mixture(self.manifest, seed))

    def prepare(self, index: int, seed: int, n_heldout: int) -> None:
        """Has the shards ready that training sample ``index`` and the first ``n_heldout`` held-out ones need."""
        self.row(self.mixture(seed).place(index), seed)
        for heldout in range(min(n_heldout, self.manifest.n_heldout)):
            self.heldout(heldout)

    def row(self, place: Place, seed: int) -> Row:
        """A row to train on, as it is in its shard."""
        source = self.manifest.sources[place.source]
        if source.train[place.shard].sha256 not in self._open and len(source.train) > 1:
            self._ahead(place, seed)
        return self._row(place.source, source.train[place.shard].sha256, source.train[place.shard].rows, place.row)

    def sample(self, index: int, seed: int) -> NDArray[np.int64]:
        """The seq_len + 1 tokens that training index ``index`` >= 0 is made of."""
        return self.row(self.mixture(seed).place(index), seed).tokens

    def heldout(self, index: int, stage: int = -1) -> NDArray[np.int64]:
        """The seq_len + 1 tokens of held-out sample ``index`` in [0, n_heldout) of a stage, the last by default."""
        return self._heldout(index, stage).tokens

    def packed(self, index: int, seed: int) -> Packed:
        """Training sample ``index`` as its stage's objective makes it."""
        place = self.mixture(seed).place(index)
        return self._packed(self.row(place, seed), place.stage, (seed, place.stage, index))

    def batch(self, indices: Iterable[int], seed: int) -> Batch:
        """Samples of at least one training index, int64 on the CPU."""
        if self.manifest.masked:
            return _masked([self.packed(index, seed) for index in indices])
        return _causal([self.sample(index, seed) for index in indices])

    def heldout_batch(self, indices: Iterable[int], seed: int = 0, stage: int = -1) -> Batch:
        """Samples of at least one held-out index of a stage, the same in every run with this ``seed``."""
        if not self.manifest.masked:
            return _causal([self.heldout(index, stage) for index in indices])
        return _masked([self.heldout_packed(index, seed, stage) for index in indices])

    def heldout_packed(self, index: int, seed: int = 0, stage: int = -1) -> Packed:
        """Held-out sample ``index`` of a stage as its objective makes it."""
        stage %= len(self.manifest.stages)
        return self._packed(self._heldout(index, stage), stage, (seed, HELDOUT_KEY + stage, index))

    def _heldout(self, index: int, stage: int) -> Row:
        limit = self.manifest.n_heldout
        if not 0 <= index < limit:
            raise IndexError(f"held-out index {index} is outside [0, {limit})")
        place = self.mixture(0).heldout(index, stage)
        shard = self.manifest.sources[place.source].heldout[place.shard]
        return self._row(place.source, shard.sha256, shard.rows, place.row)

    def _packed(self, row: Row, stage: int, key: tuple[int, int, int]) -> Packed:
        from .objectives import make_sample

        objective = self.manifest.stages[stage].objective
        return make_sample(row.tokens, row.answers, objective, self.manifest.special, key)

    def _row(self, source: int, name: str, rows: int, row: int) -> Row:
        shard = self._shard(name)
        width = self.manifest.seq_len + 1
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        split = rows * width * dtype.itemsize
        tokens = shard[row * width * dtype.itemsize : (row + 1) * width * dtype.itemsize].view(dtype).astype(np.int64)
        if not self.manifest.sources[source].answers:
            return Row(tokens, None)
        flags = shard[split:].reshape(rows, -1)[row]
        return Row(tokens, np.unpackbits(flags, count=width).astype(bool))

    def _shard(self, name: str) -> NDArray[np.uint8]:
        if (found := self._open.get(name)) is not None:
            self._open.move_to_end(name)
            return found
        self._bring(name).result()
        try:
            shard = self._checked(name)
        except StateError as error:
            if self._fetch is None:
                raise
            log.warning("%s; fetching it again", error)
            (self._folder / name).unlink(missing_ok=True)
            self._bring(name).result()
            shard = self._checked(name)
        self._open[name] = shard
        while len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return shard

    def _ahead(self, place: Place, seed: int) -> None:
        """Has the source's next shard fetched meanwhile; what goes wrong is said when it is needed."""
        number = self.mixture(seed).next_shard(place)
        self._bring(self.manifest.sources[place.source].train[place.shard].sha256)  # first what is needed now
        self._bring(self.manifest.sources[place.source].train[number].sha256)

    def _bring(self, name: str) -> Future[None]:
        """A shard on its way, or there."""
        with self._lock:
            if (known := self._coming.get(name)) is not None:
                return known
            coming: Future[None] = Future()
            if self._fetch is None or (self._folder / name).exists():
                coming.set_result(None)
                return coming
            self._coming[name] = coming
        threading.Thread(target=self._run_fetch, args=(name, coming), name="shard", daemon=True).start()
        return coming

    def _run_fetch(self, name: str, coming: Future[None]) -> None:
        assert self._fetch is not None
        problem: BaseException | None = None
        try:
            self._fetch(name, self.manifest.shards[name])
        except BaseException as error:
            if not isinstance(error, PotluckError):
                log.exception("fetching a shard failed")
            problem = error
        with self._lock:  # before the result: who sees it may ask again
            del self._coming[name]
        if problem is None:
            coming.set_result(None)
        else:
            coming.set_exception(problem)

    def _checked(self, name: str) -> NDArray[np.uint8]:
        path, expected = self._folder / name, self.manifest.shards[name]
        try:
            nbytes = path.stat().st_size
            if nbytes != expected:
                raise StateError(f"{path} has {nbytes} bytes, its manifest says {expected}", hint=_AGAIN)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shard = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
        if digest != name:
            raise StateError(f"{path} is damaged: its SHA-256 is not the manifest's", hint=_AGAIN)
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        tokens = shard[: self._n_tokens(name) * dtype.itemsize].view(dtype)
        for start in range(0, len(tokens), _CHUNK):
            largest = int(tokens[start : start + _CHUNK].max())
            # On a GPU a token outside the embedding kills the process, so a wrong manifest is found here.
            if largest >= self.manifest.vocab_size:
                words = self.manifest.vocab_size
                raise StateError(f"{path} has token {largest}, outside {words} words", hint=_AGAIN)
        return shard

    def _n_tokens(self, name: str) -> int:
        rows = next(s.rows for o in self.manifest.sources for s in (*o.train, *o.heldout) if s.sha256 == name)
        return rows * (self.manifest.seq_len + 1)


def _causal(samples: list[NDArray[np.int64]]) -> Batch:
    import torch  # here, so that checking and reading a corpus does not load torch

    from .layout import Batch

    tokens_BT1 = torch.from_numpy(np.stack(samples))
    return Batch(tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous())


def _masked(samples: list[Packed]) -> Batch:
    import torch

    from .layout import Batch, Layout

    def stacked(field: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(sample, field) for sample in samples])).to(dtype)

    layout = Layout(stacked("segments", torch.int16), stacked("is_prefix", torch.bool))
    return Batch(stacked("tokens", torch.int64), stacked("targets", torch.int64), layout)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
