"""A checkpoint of ``.bin`` files as safetensors, once, offline, because somebody asked for it.

The only place that opens a pickle. torch's restricted unpickler makes tensors and containers and nothing else, and runs
no code of the file; still, convert only files whose maker you know. A run never does this by itself.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251  only for the error that it raises
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..protocol.errors import ConfigError, StateError
from ..protocol.weights import shards_of

SINGLE = "pytorch_model.bin"
_BESIDE = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")


def convert(source: Path, target: Path, say: Callable[[str, float], None]) -> int:
    """Writes ``source``'s weights and what lies beside them to the new folder ``target``, file by file, so that memory
    holds one of them at most; returns the number of tensors. Masks and other buffers that are no floats are left out.

    ``ConfigError`` if there is nothing to convert or it is damaged, ``StateError`` if ``target`` cannot be written.
    """
    files = shards_of(source, SINGLE)
    if not files:
        hint = "Name a folder with one; safetensors need not be converted."
        raise ConfigError(f"{source} has no {SINGLE}", hint=hint)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is there already", hint="Name a new folder.")
    index: dict[str, str] = {}
    total = 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(files, 1):
            say(path.name, (number - 1) / len(files))
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {k: v for k, v in _read(path).items() if isinstance(v, Tensor) and v.is_floating_point()}
            seen: set[int] = set()
            for key, tensor in tensors.items():  # safetensors has no tensors that share their bytes
                shared = tensor.untyped_storage().data_ptr() in seen
                seen.add(tensor.untyped_storage().data_ptr())
                tensors[key] = tensor.clone() if shared else tensor.contiguous()
            save_file(tensors, target / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
        if len(files) > 1:
            written = {"metadata": {"total_size": total}, "weight_map": index}
            (target / "model.safetensors.index.json").write_text(json.dumps(written, indent=2) + "\n")
        for pattern in _BESIDE:
            for path in source.glob(pattern):
                if path.name != f"{SINGLE}.index.json":
                    shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise StateError(f"{target}: {error.strerror or error}", hint="Free some space, or name another.") from None
    say(f"{len(index)} tensors", 1.0)
    return len(index)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{path} cannot be read: {reason}", hint="Download it again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no dict of tensors", hint="Name the folder of a model's weights.")
    return found
