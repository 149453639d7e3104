"""Training samples as a pure function of manifest, seed and index: never of who asks or how many peers.

Index i belongs to epoch i // n_train, and each epoch visits every sample once, in an order of its own. So the
whole data state of a run is one integer, and anyone can recompute anyone's batch.

Shapes: B sequences of a batch, T = seq_len.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import StateError
from ..protocol.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from .permutation import epoch_key, permute

if TYPE_CHECKING:
    from .layout import Batch

_AGAIN = "Prepare or download the corpus again."
_CHUNK = 1 << 22  # tokens looked at in one piece when a corpus is opened


def sample_of(index: int, n_train: int, seed: int) -> int:
    """Which of ``n_train`` samples, in [0, n_train), training index ``index`` >= 0 stands for: without the corpus."""
    if index < 0:
        raise IndexError(f"training index {index} is negative")
    epoch, place = divmod(index, n_train)
    return permute(place, n_train, epoch_key(seed, epoch))


class Dataset:
    """A prepared corpus on disk, checked when opened: size, SHA-256, every token inside the vocabulary.

    Raises StateError when the files are missing, damaged, or not those of the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.decode(_read(folder / MANIFEST_FILE), str(folder / MANIFEST_FILE))
        self._tokens = _open_tokens(folder / TOKENS_FILE, self.manifest)

    def position(self, index: int, seed: int) -> int:
        """Which sample of the train part, in [0, n_train), training index ``index`` >= 0 stands for."""
        return sample_of(index, self.manifest.n_train, seed)

    def sample(self, index: int, seed: int) -> NDArray[np.int64]:
        """The seq_len + 1 tokens of training index ``index`` >= 0: inputs are [:-1], targets [1:]."""
        return self._window(self.position(index, seed) * self.manifest.seq_len)

    def heldout(self, index: int) -> NDArray[np.int64]:
        """The seq_len + 1 tokens of held-out sequence ``index`` in [0, n_heldout): file order, no shuffle."""
        if not 0 <= index < self.manifest.n_heldout:
            raise IndexError(f"held-out index {index} is outside [0, {self.manifest.n_heldout})")
        return self._window(self.manifest.heldout_start + index * self.manifest.seq_len)

    def batch(self, indices: Iterable[int], seed: int) -> Batch:
        """Samples of at least one training index, on the CPU."""
        return _to_batch([self.sample(index, seed) for index in indices])

    def heldout_batch(self, indices: Iterable[int]) -> Batch:
        """Samples of at least one held-out index, on the CPU."""
        return _to_batch([self.heldout(index) for index in indices])

    def _window(self, start: int) -> NDArray[np.int64]:
        return self._tokens[start : start + self.manifest.seq_len + 1].astype(np.int64)


def _to_batch(samples: list[NDArray[np.int64]]) -> Batch:
    import torch  # here, so that checking and reading a corpus does not load torch

    from .layout import Batch

    tokens_BT1 = torch.from_numpy(np.stack(samples))
    return Batch(tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error


def _open_tokens(path: Path, manifest: Manifest) -> np.memmap:
    try:
        nbytes = path.stat().st_size
        if nbytes != manifest.nbytes:
            raise StateError(f"{path} has {nbytes} bytes, its manifest says {manifest.nbytes}", hint=_AGAIN)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tokens = np.memmap(path, dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
    if digest != manifest.tokens_sha256:
        raise StateError(f"{path} is damaged: its SHA-256 is not the manifest's", hint=_AGAIN)
    for start in range(0, len(tokens), _CHUNK):
        largest = int(tokens[start : start + _CHUNK].max())
        # On a GPU a token outside the embedding kills the process, so a wrong manifest is found here.
        if largest >= manifest.vocab_size:
            raise StateError(f"{path} has token {largest}, outside {manifest.vocab_size} words", hint=_AGAIN)
    return tokens
