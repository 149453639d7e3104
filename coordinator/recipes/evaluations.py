"""Reader of evaluation texts, which training text must not repeat: every string of files, folders and data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...protocol.errors import ConfigError
from .texts import below, hub, rows, unreadable

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md")
MAX_CHARS = 1 << 30  # they stay in memory, as some bytes a character
_DEEPEST = 32  # objects in objects


class EvaluationText(NamedTuple):
    """``file``: as it is shown, no folder of this machine. ``where``: line and field in it."""

    file: str
    where: str
    text: str


def read(against: tuple[str, ...], here: Path) -> list[EvaluationText]:
    """All strings of what ``against`` names, in order; paths are relative to ``here``. ConfigError for what cannot be
    read, and for a name that has no text."""
    found: list[EvaluationText] = []
    n_chars = 0
    for name in against:
        before = len(found)
        for one in _named(name, here):
            n_chars += len(one.text)
            if n_chars > MAX_CHARS:
                hint = "Name the files of the evaluations only, not a whole corpus."
                raise ConfigError(f"decontaminate.against has more than {MAX_CHARS >> 20} Mi characters", hint=hint)
            found.append(one)
        if len(found) == before:
            hint = f"Name {', '.join(SUFFIXES)} files, a folder of them, or hf:NAME:SPLIT."
            raise ConfigError(f"decontaminate.against: no text in {name}", hint=hint)
    return found


def digest(texts: list[EvaluationText]) -> str:
    """SHA-256 of the texts in their order."""
    sha256 = hashlib.sha256()
    for one in texts:
        data = one.text.encode("utf-8", "surrogatepass")
        sha256.update(len(data).to_bytes(8, "little") + data)
    return sha256.hexdigest()


def _named(name: str, here: Path) -> Iterator[EvaluationText]:
    if name.startswith("hf:"):
        parts = name.removeprefix("hf:").split(":")
        if len(parts) > 3:
            raise ConfigError(f"decontaminate.against: {name} has too many parts", hint="Use hf:NAME:SPLIT:SUBSET.")
        opened = hub(*parts)
        shown = ":".join((opened.name, *parts[1:]))
        for number, row in enumerate(opened.rows(None), 1):
            yield from _strings(row, shown, f"row {number}")
        return
    top = here / name
    for path in below(top, SUFFIXES):
        inside = path.relative_to(top).as_posix() if path != top else ""
        yield from _file(path, "/".join(part for part in (Path(name).name, inside) if part))


def _file(path: Path, shown: str) -> Iterator[EvaluationText]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".parquet"):
        for number, row in rows(path):
            yield from _strings(row, shown, f"line {number}")
        return
    if path.is_file() and suffix not in SUFFIXES:
        raise ConfigError(f"{path} is no {', '.join(SUFFIXES)} file", hint="Convert it, or take it out of `against`.")
    try:
        data = path.read_bytes()
        if suffix == ".json":
            yield from _strings(msgspec.json.decode(data), shown, "")
        else:
            yield EvaluationText(shown, "", data.decode("utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason})", hint="Convert it to UTF-8.") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}", hint="Is it JSON?") from error


def _strings(value: Any, file: str, where: str, depth: int = 0) -> Iterator[EvaluationText]:
    """Every string in ``value``, with the keys that lead to it."""
    if isinstance(value, str):
        if value.strip():
            yield EvaluationText(file, where, value)
        return
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if depth >= _DEEPEST and inside:
        raise ConfigError(f"{file} {where[:80]}: nested more than {_DEEPEST} deep", hint="Make its rows flat.")
    for key, one in inside:
        yield from _strings(one, file, f"{where} {key}".strip(), depth + 1)
