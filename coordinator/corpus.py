"""Text -> tokens: make the folder that a run trains on.

``tokens.bin`` (layout: protocol/manifest.py), ``tokenizer.json`` and ``tokenizer_config.json`` (as stock
transformers loads them), ``recipe.json`` (the parameters: the next call can reuse the work) and, last,
``manifest.json``: a folder without a manifest is not a corpus.

Text is cut into documents, one <|endoftext|> after each. Which documents are held out depends on the hash of
their text, not on their place: a document, or a copy of it, is never on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..protocol.errors import ConfigError, PotluckError, StateError
from ..protocol.failpoints import failpoint
from ..protocol.manifest import MANIFEST_FILE, TOKENIZER_FILE, TOKENS_FILE, Dtype, Manifest

Progress = Callable[[str, float], None]

EOS = "<|endoftext|>"
EOS_ID = 0  # the trainer numbers special tokens first
CONFIG_FILE = "tokenizer_config.json"
RECIPE_FILE = "recipe.json"
MAX_HF_TOKENS = 100_000_000  # every volunteer downloads the tokens: this is 200 MB
MIN_TRAIN_SAMPLES = 8
TOKENIZER_TRAIN_CHARS = 8_000_000  # the tokenizer learns from the first documents only
_PIECE_CHARS = 4_096  # plain text is cut into documents after this many characters, at the next blank line,
_PIECE_CHARS_MAX = 16_384  # and here at the latest
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BATCH_DOCUMENTS = 256
_ALL_FILE = "all.bin"  # every document in order, before the two parts are made
_SUFFIXES = (".txt", ".md", ".jsonl")
_SKIPPED_PARTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class _Source:
    name: str  # as volunteers see it: no folder of the operator's machine
    license: str
    n_chars: int  # about, for the progress
    documents: Iterator[str]
    max_tokens: int | None = None


class _Recipe(msgspec.Struct, frozen=True):
    source: str
    vocab_size: int
    seq_len: int
    heldout_share: float
    seed: int


def prepare(
    source: str,
    folder: Path,
    *,
    vocab_size: int,
    seq_len: int,
    heldout_share: float = 0.02,
    seed: int,
    progress: Progress | None = None,
) -> Manifest:
    """Prepare ``source`` in ``folder``, or return what the same parameters made there before, if undamaged.

    ``source``: ``builtin``, a file or folder of .txt, .md and .jsonl, or ``hf:NAME[:SPLIT]``. Later
    changes of its text go unseen: a run keeps its corpus. ``progress`` gets a line and the share done.
    Raises ConfigError for parameters and texts, StateError when ``folder`` cannot be written.
    """
    _check_parameters(vocab_size, seq_len, heldout_share)
    recipe = _Recipe(source, vocab_size, seq_len, float(heldout_share), seed)
    say: Progress = progress or (lambda line, share: None)
    try:
        found = _reusable(folder, recipe)
        if found is not None:
            say(f"{source}: reused, {found.n_tokens:,} tokens", 1.0)
            return found
        building = folder / ".building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            manifest = _build(recipe, building, say)
            failpoint("coordinator.corpus.rename")
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            for name in (TOKENS_FILE, TOKENIZER_FILE, CONFIG_FILE, RECIPE_FILE, MANIFEST_FILE):
                os.replace(building / name, folder / name)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        hint = "Free some space there, or choose a folder that can be written."
        message = f"cannot write the corpus in {folder}: {error.strerror or error}"
        raise StateError(message, hint=hint) from error
    say(f"{source}: {manifest.n_tokens:,} tokens", 1.0)
    return manifest


def _check_parameters(vocab_size: int, seq_len: int, heldout_share: float) -> None:
    if not 257 <= vocab_size <= 1 << 20:
        raise ConfigError(f"vocab_size = {vocab_size}", hint="Use 257 (the bytes and an end of text) or more.")
    if not 2 <= seq_len <= 1 << 20:
        raise ConfigError(f"seq_len = {seq_len}", hint="Use 2 or more tokens per sequence.")
    if not 0 < heldout_share <= 0.5:
        raise ConfigError(f"heldout_share = {heldout_share}", hint="Use a share above 0, at most 0.5.")


def _reusable(folder: Path, recipe: _Recipe) -> Manifest | None:
    """The manifest in ``folder`` if this recipe made it and its files are whole."""
    try:
        manifest = Manifest.decode((folder / MANIFEST_FILE).read_bytes())
        whole = (
            (folder / RECIPE_FILE).read_bytes() == msgspec.json.encode(recipe)
            and _sha256(folder / TOKENS_FILE) == manifest.tokens_sha256
            and _sha256(folder / TOKENIZER_FILE) == manifest.tokenizer_sha256
            and (folder / CONFIG_FILE).is_file()
        )
    except (OSError, StateError):
        return None
    return manifest if whole else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(recipe: _Recipe, folder: Path, say: Progress) -> Manifest:
    say(f"{recipe.source}: reading", 0.0)
    source = _open(recipe.source)
    documents = (document for document in source.documents if document.strip())
    first: list[str] = []
    n_chars = 0
    while n_chars < TOKENIZER_TRAIN_CHARS and (document := next(documents, None)) is not None:
        first.append(document)
        n_chars += len(document)
    if not first:
        raise _too_small(recipe)
    say(f"{recipe.source}: training the tokenizer on {n_chars:,} characters", 0.2)
    tokenizer = _train_tokenizer(first, recipe, folder)
    dtype: Dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    stored = np.dtype(dtype).newbyteorder("<")

    keys, sizes = [], []  # per document: its salted hash; its tokens, with the end of text
    n_chars = n_tokens = 0
    everything = chain(first, documents)
    with (folder / _ALL_FILE).open("wb") as file:
        while batch := list(islice(everything, _BATCH_DOCUMENTS)):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                failpoint("coordinator.corpus.write")
                file.write(np.array([*encoding.ids, EOS_ID], dtype=stored).tobytes())
                keys.append(hashlib.sha256(f"{recipe.seed}:{text}".encode()).digest())
                sizes.append(len(encoding.ids) + 1)
                n_chars, n_tokens = n_chars + len(text), n_tokens + sizes[-1]
            share = 0.3 + 0.6 * min(1.0, n_chars / max(1, source.n_chars))
            say(f"{recipe.source}: {n_tokens:,} tokens", share)
            if source.max_tokens is not None and n_tokens >= source.max_tokens:
                say(f"{recipe.source}: stopped at the limit of {source.max_tokens:,} tokens", share)
                break

    chosen = _choose_heldout(keys, sizes, max(int(n_tokens * recipe.heldout_share), 2 * recipe.seq_len + 1))
    is_heldout = [key in chosen for key in keys]
    n_heldout_tokens = sum(size for size, held in zip(sizes, is_heldout, strict=True) if held)
    n_heldout = (n_heldout_tokens - 1) // recipe.seq_len
    n_train = (n_tokens - n_heldout_tokens - 1) // recipe.seq_len
    if n_train < MIN_TRAIN_SAMPLES or n_heldout < 1:
        raise _too_small(recipe)
    with (folder / TOKENS_FILE).open("wb") as file:
        for held, n_samples in ((False, n_train), (True, n_heldout)):
            wanted = [side == held for side in is_heldout]
            _copy(folder / _ALL_FILE, stored.itemsize, sizes, wanted, n_samples * recipe.seq_len + 1, file)
    manifest = Manifest(
        source=source.name,
        tokens_sha256=_sha256(folder / TOKENS_FILE),
        n_tokens=(n_train + n_heldout) * recipe.seq_len + 2,
        dtype=dtype,
        vocab_size=tokenizer.get_vocab_size(),
        seq_len=recipe.seq_len,
        n_train=n_train,
        n_heldout=n_heldout,
        tokenizer_sha256=_sha256(folder / TOKENIZER_FILE),
        eos_id=EOS_ID,
        license=source.license,
    )
    (folder / RECIPE_FILE).write_bytes(msgspec.json.encode(recipe))
    (folder / MANIFEST_FILE).write_bytes(manifest.encode())
    return manifest


def _copy(path: Path, itemsize: int, sizes: list[int], wanted: list[bool], limit: int, out: IO[bytes]) -> None:
    """The wanted documents of ``path``, cut off after ``limit`` tokens."""
    with path.open("rb") as file:
        for size, take in zip(sizes, wanted, strict=True):
            tokens = file.read(size * itemsize)
            if take and limit:
                out.write(tokens[: limit * itemsize])
                limit -= min(size, limit)


def _choose_heldout(keys: list[bytes], sizes: list[int], at_least: int) -> set[bytes]:
    """The documents with the smallest hashes, until they have ``at_least`` tokens."""
    chosen: set[bytes] = set()
    n_tokens = 0
    for key, size in sorted(zip(keys, sizes, strict=True)):
        if n_tokens >= at_least and key not in chosen:
            break
        chosen.add(key)
        n_tokens += size
    return chosen


def _too_small(recipe: _Recipe) -> ConfigError:
    return ConfigError(
        f"{recipe.source} has too little text for sequences of {recipe.seq_len} tokens",
        hint=f"Add text ({MIN_TRAIN_SAMPLES} sequences to train on, 1 held out, from 2 documents or more).",
    )


def _train_tokenizer(documents: list[str], recipe: _Recipe, folder: Path) -> Tokenizer:
    """Byte-level BPE, written where transformers' AutoTokenizer finds it; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "model_max_length": recipe.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.to_str(pretty=True).encode())
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end its document
    return tokenizer


def _open(source: str) -> _Source:
    if source == "builtin":
        texts = [*_topics(), *_stdlib_texts()]
        return _Source(name=source, license="PSF-2.0", n_chars=sum(map(len, texts)), documents=iter(texts))
    if source.startswith("hf:"):
        return _open_hf(source)
    path = Path(source)
    if path.is_dir():
        paths = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _SUFFIXES]
        paths = [file for file in paths if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    else:
        paths = [path]
    try:
        n_chars = sum(file.stat().st_size for file in paths)
    except OSError as error:
        raise _unreadable(source, error) from error
    documents = chain.from_iterable(map(_read_file, paths))
    name = path.resolve().name or "files"
    return _Source(name=name, license="unknown", n_chars=n_chars, documents=documents)


def _unreadable(path: Path | str, error: OSError) -> ConfigError:
    hint = "Give `builtin`, a .txt, .md or .jsonl file, a folder of them, or hf:NAME."
    return ConfigError(f"cannot read {path}: {error.strerror or error}", hint=hint)


def _read_file(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_text(path, number, line)
            else:
                yield from _pieces(iter(partial(file.read, 1 << 20), ""))
    except UnicodeDecodeError as error:
        hint = "Convert it to UTF-8, or take it out of the corpus."
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason})", hint=hint) from error
    except OSError as error:
        raise _unreadable(path, error) from error


class _Line(msgspec.Struct):
    text: str


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        return msgspec.json.decode(line, type=_Line).text
    except (msgspec.DecodeError, UnicodeError) as error:
        hint = 'Each line must be a JSON object with a string "text".'
        raise ConfigError(f"{path} line {number}: {error}", hint=hint) from error


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


def _open_hf(source: str) -> _Source:
    try:
        import datasets
    except ImportError as error:
        hint = "In potluck's checkout: pip install -e '.[data]'"
        raise ConfigError(f"{source} needs the datasets package", hint=hint) from error
    name, _, split = source.removeprefix("hf:").partition(":")
    hint = 'Check the name, the split and the connection: hf:NAME:SPLIT, a data set with a column "text".'
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises of many kinds, those of its network clients among them
        raise ConfigError(f"cannot open {source}: {error}", hint=hint) from error

    def documents() -> Iterator[str]:
        try:
            for row in rows:
                if not isinstance(row.get("text"), str):
                    raise ConfigError(f'{source} has no string "text" but {", ".join(row)}', hint=hint)
                yield row["text"]
        except PotluckError:
            raise
        except Exception as error:
            raise ConfigError(f"cannot read {source}: {error}", hint=hint) from error

    return _Source(
        name=f"hf:{Path(name).name}" if Path(name).exists() else source,
        license=getattr(rows.info, "license", None) or "unknown",
        n_chars=4 * MAX_HF_TOKENS,
        documents=documents(),
        max_tokens=MAX_HF_TOKENS,
    )
