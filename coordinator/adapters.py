"""A run's adapters in the layout of the library PEFT, taken out of what the stages upload.

A stage's upload has the model's tensors and behind them the adapters, in one safetensors file (``worker/merging.py``).
No tensor is read here: the adapters' bytes are copied, and the file ends before them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..protocol.config import ModelConfig
from ..protocol.errors import WireError
from .headers import encoded, read_header

FOLDER = "adapter"  # inside a published model's: beside its own files, stock transformers would load it, too
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of the names, as PEFT has them


def part_from(path: Path, names: Iterable[str], target: Path) -> None:
    """Moves tensors that stand last in a safetensors file that was checked into ``target``, another such file; the
    first file's header keeps its length, with blanks. ``WireError`` for a header that cannot."""
    own, (header, nbytes) = set(names), read_header(path)
    base = path.stat().st_size - nbytes
    start = min(header[name]["data_offsets"][0] for name in own)
    rest = {name: entry for name, entry in header.items() if name not in own}
    beginning = encoded({"__metadata__": {"format": "pt"}, **rest}, base)
    if len(beginning) != base:
        raise WireError("an upload whose header has no room")
    with path.open("r+b") as file:
        file.seek(base + start)
        with target.open("wb") as out:
            out.write(encoded({n: moved(e, -start) for n, e in header.items() if n in own}))
            shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())
        file.seek(0)
        file.write(beginning)
        file.truncate(base + start)


def write_adapters(folder: Path, parts: Iterable[Path], model: ModelConfig, base: str) -> None:
    """The folder that PEFT loads, of the stages' adapters; ``base``: what they are beside, for people."""
    folder.mkdir()
    entries: dict[str, Any] = {}
    spans, end = [], 0
    for path in parts:
        header, nbytes = read_header(path)
        entries |= {PREFIX + name: moved(entry, end) for name, entry in header.items()}
        spans.append((path, path.stat().st_size - nbytes))
        end += nbytes
    with (folder / WEIGHTS).open("wb") as out:
        out.write(encoded({"__metadata__": {"format": "pt"}, **entries}))
        for path, start in spans:
            with path.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, out)
    text = json.dumps(described(model, base), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def described(model: ModelConfig, base: str) -> dict[str, Any]:
    """``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(model.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def moved(entry: Mapping[str, Any], by: int) -> dict[str, Any]:
    """A tensor's entry in a header, its bytes elsewhere."""
    start, end = entry["data_offsets"]
    return {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start + by, end + by]}
