"""The checkpoint that a run begins from, as a worker sees it: only the tensors of its own layers, one at a time."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..protocol.errors import StateError
from ..protocol.weights import StoredDtype, StoredTensor, Weights

log = logging.getLogger(__name__)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 8 << 20


class Beginning:
    """``fetch(tensor, path)`` brings a tensor's bytes into a file and blocks; files are kept in ``folder``, so that a
    worker which is started again downloads nothing. Thread-safe: who keeps a stage may begin with it, too."""

    def __init__(self, weights: Weights, folder: Path, fetch: Callable[[StoredTensor, Path], None]) -> None:
        self._tensors = {tensor.name: tensor for tensor in weights.tensors}
        self._folder, self._fetch = folder, fetch
        self._bringing = threading.Lock()  # tensors of the same bytes are one file

    @torch.no_grad()
    def fill(self, name: str, out: Tensor) -> None:
        """Copies a tensor into ``out``, of its shape and any float dtype. Nothing else is in memory: files are mapped.

        ``StateError`` if the checkpoint has no such tensor, or what is on disk cannot be used.
        """
        out.copy_(self.stored(name, tuple(out.shape)))

    def stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as the checkpoint has it, mapped from its file; errors as of :meth:`fill`."""
        tensor, path = self._tensor(name, shape), self.bring(name, shape)
        return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=DTYPES[tensor.dtype]).view(shape)

    def dtype(self, name: str, shape: tuple[int, ...]) -> StoredDtype:
        """What a tensor is stored as."""
        return self._tensor(name, shape).dtype

    def bring(self, name: str, shape: tuple[int, ...]) -> Path:
        """The file with a tensor's bytes, fetched if it is not here."""
        tensor = self._tensor(name, shape)
        path = self._folder / tensor.sha256
        with self._bringing:
            if not self._is_whole(path, tensor):
                path.unlink(missing_ok=True)
                self._fetch(tensor, path)
        return path

    def _tensor(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            raise StateError(f"the run's checkpoint has no {name} of {shape}", hint="Tell its operator.")
        return tensor

    def _is_whole(self, path: Path, tensor: StoredTensor) -> bool:
        try:
            if path.stat().st_size != tensor.nbytes:
                return False
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(_BLOCK):
                    digest.update(data)
        except OSError:
            return False
        return digest.hexdigest() == tensor.sha256
