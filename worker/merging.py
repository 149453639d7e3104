"""A stage's part of the published model where adapters were trained: the base's tensors with B A alpha / rank added.

The base is read from the run's checkpoint in its own precision, tensor by tensor, and written so into a file: in memory
is one tensor at a time. Behind the model's tensors stand the adapters, in fp32; the coordinator parts the two
(``coordinator/adapters.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..protocol import architecture
from ..protocol.architecture import LORA_A, LORA_B
from ..protocol.config import ModelConfig
from ..protocol.errors import StateError
from ..protocol.plan import SavePoint
from ..protocol.weights import ITEMSIZE, StoredDtype
from .initial import fill
from .weights import Beginning


class Merging:
    """``adapters``: of one round, by name, fp32. Without a ``beginning`` the base is drawn from the seed, as fp32."""

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        point: SavePoint,
        adapters: Mapping[str, Tensor],
        beginning: Beginning | None,
        seed: int = 0,
    ) -> None:
        self.model, self.adapters, self.beginning, self.seed = model.resolved(), adapters, beginning, seed
        self.shapes = architecture.tensors(model, vocab_size, point.first_layer, point.last_layer)
        self.name = f"{point.step}-{point.first_layer}-{point.last_layer}.merged"

    @contextlib.contextmanager
    def packed(self, folder: Path) -> Iterator[mmap]:
        """The part as a safetensors file in ``folder``, mapped, which is gone afterwards. ``StateError`` if the disk
        refuses."""
        path = folder / self.name
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.write(path)
                with path.open("rb") as file:
                    data = mmap(file.fileno(), 0, access=ACCESS_READ)
            except OSError as error:
                raise StateError(f"{path}: {error.strerror}", hint="Free some space on that disk.") from None
            with data:
                yield data
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def write(self, path: Path) -> None:
        """The model's tensors in order, then the adapters."""
        entries, start = {}, 0
        everything = [(name, self._dtype(name), shape) for name, shape in self.shapes.items()]
        everything += [(name, "F32", tuple(adapter.shape)) for name, adapter in self.adapters.items()]
        for name, dtype, shape in everything:
            end = start + ITEMSIZE[dtype] * math.prod(shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            start = end
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in self.shapes:
                file.write(_bytes_of(self.merged(name)))
            for adapter in self.adapters.values():
                file.write(_bytes_of(adapter))
            file.flush()
            os.fsync(file.fileno())

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """A tensor of the model, of the checkpoint's dtype; the sum is made in fp32."""
        base, root = self._base(name), name.removesuffix("weight")
        if root + LORA_A not in self.adapters:
            return base
        a, b = self.adapters[root + LORA_A], self.adapters[root + LORA_B]
        scale = self.model.lora.alpha / self.model.lora.rank
        return torch.addmm(base.float(), b, a, alpha=scale).to(base.dtype)

    def _base(self, name: str) -> Tensor:
        if self.beginning is not None:
            return self.beginning.stored(name, self.shapes[name])
        out = torch.empty(self.shapes[name])
        fill(name, out, self.seed, None)
        return out

    def _dtype(self, name: str) -> StoredDtype:
        return "F32" if self.beginning is None else self.beginning.dtype(name, self.shapes[name])


def _bytes_of(tensor: Tensor) -> memoryview:
    """Little-endian, row by row."""
    flat: np.ndarray[Any, np.dtype[np.uint8]] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data
