"""Readers of plain text: what Python carries, files and folders, data sets of the hub. Documents, one after another."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from ...protocol.errors import ConfigError

_PIECE_CHARS = 4_096  # plain text is cut into documents after this many characters, at the next blank line,
_PIECE_CHARS_MAX = 16_384  # and here at the latest
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_SKIPPED_PARTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_HF_CHARS = 400_000_000  # that a data set of the hub is taken to have, for the progress


@dataclass(frozen=True, kw_only=True)
class Texts:
    """``origin``: as volunteers see it, no folder of the operator's machine. ``n_chars``: about, for the progress.
    ``documents`` starts from the first at each call."""

    origin: str
    license: str
    n_chars: int
    documents: Callable[[], Iterator[str]]


def builtin() -> Texts:
    texts = [*_topics(), *_stdlib_texts()]
    return Texts(origin="builtin", license="PSF-2.0", n_chars=sum(map(len, texts)), documents=lambda: iter(texts))


def files(path: Path, column: str = "text") -> Texts:
    """A file or a folder of .txt, .md, .jsonl and .parquet; ``column`` has the text in the last two."""
    paths = below(path, _SUFFIXES)
    try:
        n_chars = sum(file.stat().st_size for file in paths)
    except OSError as error:
        raise unreadable(path, error) from error
    return Texts(
        origin=path.resolve().name or "files",
        license="unknown",
        n_chars=n_chars,
        documents=lambda: chain.from_iterable(_read_file(file, column) for file in paths),
    )


def below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """``path`` itself, or the files below a folder that end so, in order; none that is hidden."""
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes]
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def unreadable(path: Path | str, error: OSError) -> ConfigError:
    hint = "Give `builtin`, a .txt, .md, .jsonl or .parquet file, a folder of them, or hf:NAME."
    return ConfigError(f"cannot read {path}: {error.strerror or error}", hint=hint)


def _read_file(path: Path, column: str) -> Iterator[str]:
    if path.suffix.lower() in (".jsonl", ".parquet"):
        for number, row in rows(path):
            text = row.get(column)
            if not isinstance(text, str) or not _is_unicode(text):
                hint = f'Each row must have a string "{column}".'
                raise ConfigError(f"{path} line {number}: no string called {column}", hint=hint)
            yield text
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _pieces(iter(partial(file.read, 1 << 20), ""))
    except UnicodeDecodeError as error:
        hint = "Convert it to UTF-8, or take it out of the corpus."
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason})", hint=hint) from error
    except OSError as error:
        raise unreadable(path, error) from error


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file, the rows of a .parquet one, with the number of their line or row."""
    if path.suffix.lower() == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(path, number, line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason})", hint="Convert it to UTF-8.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        hint = "Each line must be a JSON object."
        raise ConfigError(f"{path} line {number}: {error}", hint=hint) from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise _no_datasets(path) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="Is it a Parquet file?") from error


def _no_datasets(what: object) -> ConfigError:
    return ConfigError(f"{what} needs the datasets package", hint="In potluck's checkout: pip install -e '.[data]'")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def _pieces(blocks: Iterator[str]) -> Iterator[str]:
    """Plain text as documents: cut at a blank line, else at a line, else at a space, else anywhere."""
    rest = ""
    for block in chain(blocks, [""]):
        rest += block
        start = 0
        while len(rest) - start > (_PIECE_CHARS_MAX if block else _PIECE_CHARS):
            for mark in ("\n\n", "\n", " "):
                cut = rest.find(mark, start + _PIECE_CHARS, start + _PIECE_CHARS_MAX)
                if cut >= 0:
                    cut += len(mark)
                    break
            else:
                cut = min(start + _PIECE_CHARS_MAX, len(rest))
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest.strip():
        yield rest


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield f"{name}\n\n{topics[name].strip()}\n"


def _stdlib_texts() -> Iterator[str]:
    """A document per module of the standard library: docstrings and comments. Nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(inside.parts):
            continue
        try:
            code = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code
                tree = ast.parse(code)
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        parts = [f"{'.'.join(inside.with_suffix('').parts)}\n"]
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
                parts.append(f"{getattr(node, 'name', '')}\n{docstring}\n".lstrip())
        comments = [line.strip()[2:] for line in code.splitlines() if line.lstrip().startswith("# ")]
        text = "\n".join([*parts, *comments]) + "\n"
        if len(parts) > 1 or comments:
            yield text.encode("utf-8", "replace").decode()  # a docstring may hold lone surrogates


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the hub, streamed. ``rows`` starts from the first at each call; with a ``shuffle`` seed they come
    in an order of its own."""

    name: str
    license: str
    rows: Callable[[int | None], Iterator[dict[str, Any]]]


def hub(name: str, split: str = "", subset: str = "") -> Hub:
    """``ConfigError`` if it cannot be opened."""
    shown = f"hf:{name}"
    try:
        import datasets
    except ImportError as error:
        raise _no_datasets(shown) from error
    hint = "Check the name, the split and the connection: hf:NAME:SPLIT."

    def open_it() -> Any:
        try:
            return datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
        except Exception as error:  # the library raises of many kinds, those of its network clients among them
            raise ConfigError(f"cannot open {shown}: {error}", hint=hint) from error

    opened = open_it()

    def rows(shuffle: int | None = None) -> Iterator[dict[str, Any]]:
        try:
            yield from opened if shuffle is None else opened.shuffle(seed=shuffle % 2**32, buffer_size=10_000)
        except Exception as error:
            raise ConfigError(f"cannot read {shown}: {error}", hint=hint) from error

    origin = f"hf:{Path(name).name}" if Path(name).exists() else shown
    return Hub(name=origin, license=getattr(opened.info, "license", None) or "unknown", rows=rows)


def hub_texts(name: str, split: str = "", subset: str = "", column: str = "text") -> Texts:
    opened = hub(name, split, subset)

    def documents() -> Iterator[str]:
        for row in opened.rows(None):
            if not isinstance(row.get(column), str):
                hint = f'Name a data set with a column "{column}", or another column.'
                raise ConfigError(f'hf:{name} has no string "{column}" but {", ".join(row)}', hint=hint)
            yield row[column]

    return Texts(origin=opened.name, license=opened.license, n_chars=_HF_CHARS, documents=documents)
