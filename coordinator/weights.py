"""The checkpoint that a run begins from: which tensors it has, whether they are the model's, and where each lies.

A folder in the hub's layout: ``config.json`` and safetensors files, with an index where they are several. A hub's id is
downloaded into the hub's own cache first. No tensor is held in memory here: files are read once, piece by piece, for
their hashes, and served by range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..protocol.architecture import of_hf, tensors
from ..protocol.config import RunConfig
from ..protocol.errors import ConfigError, StateError, WireError
from ..protocol.model_config import ModelConfig
from ..protocol.weights import ITEMSIZE, StoredTensor, Weights, shards_of
from .headers import read_header

Progress = Callable[[str, float], None]
SINGLE = "model.safetensors"
CACHE_FILE = "weights.json"
OWN = ("init", "seq_len", "dtype", "train", "lora")  # of model, what is no checkpoint's to say
_BLOCK = 8 << 20


class Span(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    nbytes: int


class _Cached(msgspec.Struct, frozen=True):
    """Hashes of a checkpoint that was read before; ``files``: (name, size, time of the last change)."""

    files: tuple[tuple[str, int, int], ...]
    weights: Weights


def folder_of(init: str) -> Path:
    """The checkpoint's folder: ``init`` itself, or where the hub's files of that id are. ``ConfigError`` if neither."""
    path = Path(init).expanduser()
    if path.is_dir():
        return path
    if init.startswith((".", "/", "~")) or init.count("/") != 1:
        raise ConfigError(
            f"model.init: {init} is no folder", hint="Name a folder with config.json and safetensors, or a hub's id."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(init, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the library raises of many kinds, those of its network client among them
        raise ConfigError(
            f"model.init: {init} cannot be had from the hub: {str(error).splitlines()[0]}",
            hint="Check the id and the connection, or name a folder.",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} cannot be read: {error}", hint="Name a folder that transformers wrote."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / 'config.json'} is no object", hint="Name a folder that transformers wrote.")
    return found


def shaped(model: ModelConfig) -> ModelConfig:
    """``model`` with the shape that its checkpoint has; as it is where it has none.

    ``ConfigError`` if the architecture is not one of ours, or if ``model`` says another shape than the default's and
    the checkpoint's.
    """
    if not model.init:
        return model
    found = of_hf(read_config(folder_of(model.init)))
    default, theirs = msgspec.structs.asdict(ModelConfig()), msgspec.structs.asdict(found)
    for key, value in msgspec.structs.asdict(model).items():
        if key not in OWN and value not in (default[key], theirs[key]):
            raise ConfigError(
                f"model.{key} is {value}, and {theirs[key]} in {model.init}", hint=f"Leave model.{key} out."
            )
    out = msgspec.structs.replace(found, **{key: getattr(model, key) for key in OWN})
    out.check_targets()
    return out


def with_shape(config: RunConfig) -> tuple[RunConfig, int]:
    """A run with its checkpoint's shape, and the size of its vocabulary: where the checkpoint is a folder here. Nothing
    is downloaded: of another one the shape is as ``run.yaml`` says."""
    if not config.model.init or not Path(config.model.init).expanduser().is_dir():
        return config, config.data.vocab_size
    found = read_config(folder_of(config.model.init)).get("vocab_size")
    size = found if type(found) is int and found > 0 else config.data.vocab_size
    return msgspec.structs.replace(config, model=shaped(config.model)), size


class Checkpoint:
    """A checkpoint that was looked through. ``spans``: where each tensor's bytes are, by their SHA-256."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.weights = weights
        self.spans = {t.sha256: Span(folder / t.file, t.start, t.nbytes) for t in weights.tensors}


def open_checkpoint(
    model: ModelConfig, vocab_size: int, data_dir: Path, progress: Progress | None = None
) -> Checkpoint | None:
    """Looks through the checkpoint of ``model.init``; None if there is none. Hashes are kept in ``data_dir``.

    ``ConfigError`` if tensors are missing, of another shape or of a dtype that nobody trains from.
    """
    if not model.init:
        return None
    say: Progress = progress or (lambda what, share: None)
    folder = folder_of(model.init)
    wanted = _located(folder, model, vocab_size)
    names = sorted({str(entry["file"]) for entry in wanted.values()})
    try:
        stats = [(folder / name).stat() for name in names]
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}", hint="Download the checkpoint again.") from None
    files = tuple((n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True))
    cache = data_dir / CACHE_FILE
    try:
        known = msgspec.json.decode(cache.read_bytes(), type=_Cached)
        if known.files == files and [t.name for t in known.weights.tensors] == list(wanted):
            return Checkpoint(folder, known.weights)
    except (OSError, msgspec.DecodeError):
        pass
    total, done, found = sum(s.st_size for s in stats), 0, []
    for name, entry in wanted.items():
        say(f"{model.init}: hashing", done / max(1, total))
        sha256 = _sha256(Span(folder / entry["file"], entry["start"], entry["nbytes"]))
        found.append(
            StoredTensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                sha256=sha256,
                file=entry["file"],
                start=entry["start"],
            )
        )
        done += entry["nbytes"]
    source = model.init if not Path(model.init).exists() else folder.resolve().name
    # The hub's cache names a folder by its commit.
    locations = (f"hf://{model.init}@{folder.name}",) if source == model.init else ()
    weights = Weights(source=source, license=_license(folder), locations=locations, tensors=tuple(found))
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(msgspec.json.encode(_Cached(files=files, weights=weights)))
    except OSError as error:
        raise StateError(f"{cache}: {error.strerror}", hint="Free some space there.") from None
    say(f"{model.init}: {len(found)} tensors", 1.0)
    return Checkpoint(folder, weights)


def _located(folder: Path, model: ModelConfig, vocab_size: int) -> dict[str, dict[str, Any]]:
    """Of each tensor of the model: file, start, nbytes, dtype and shape, in the model's order."""
    stored: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        try:
            header, size = read_header(path)
            base = path.stat().st_size - size
        except (WireError, OSError) as error:
            raise ConfigError(f"{path}: {error}", hint="Download the checkpoint again.") from None
        for name, entry in header.items():
            try:
                start, end = entry["data_offsets"]
                stored_shape, dtype = tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
                if not 0 <= start <= end <= size:
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise ConfigError(f"{path}: its header is damaged at {name}", hint="Download it again.") from None
            stored[name] = {
                "file": path.name,
                "start": base + start,
                "nbytes": end - start,
                "dtype": dtype,
                "shape": stored_shape,
            }
    out = {}
    for name, shape in tensors(model, vocab_size, 0, model.layers).items():
        entry = stored.get(name) or (stored.get(_embedding(model, vocab_size)) if name == "lm_head.weight" else None)
        if entry is None:
            raise ConfigError(
                f"{model.init} has no tensor {name}", hint="Name a checkpoint of a causal language model, whole."
            )
        if tuple(entry["shape"]) != shape:
            raise ConfigError(
                f"{model.init}: {name} is {list(entry['shape'])}, and the run's is {list(shape)}",
                hint="Its tokenizer's vocabulary must be the checkpoint's: data.source with the same tokenizer.",
            )
        if entry["dtype"] not in ITEMSIZE:
            raise ConfigError(
                f"{model.init}: {name} is stored as {entry['dtype']}", hint="Store it as fp32, fp16 or bf16."
            )
        out[name] = entry
    return out


def _embedding(model: ModelConfig, vocab_size: int) -> str:
    """What a head that is tied to the embedding is stored as."""
    return next(iter(tensors(model, vocab_size, 0, 0)))


def _files(folder: Path) -> list[Path]:
    if files := shards_of(folder, SINGLE):
        return files
    hint = f"Convert it once: potluck model convert {folder} NEW_FOLDER" if list(folder.glob("*.bin")) else ""
    raise ConfigError(f"{folder} has no safetensors files", hint=hint or "Name a folder that transformers wrote.")


def _sha256(span: Span) -> str:
    digest, left = hashlib.sha256(), span.nbytes
    try:
        with span.path.open("rb") as file:
            file.seek(span.start)
            while left and (data := file.read(min(_BLOCK, left))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise ConfigError(f"{span.path}: {error.strerror}", hint="Download it again.") from None
    if left:
        raise ConfigError(f"{span.path} is cut off", hint="Download it again.")
    return digest.hexdigest()


def _license(folder: Path) -> str:
    """As its model card's front matter says."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "unknown"
    lines = text.split("---", 2)[1].splitlines() if text.startswith("---") and text.count("---") >= 2 else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), "") or "unknown"
