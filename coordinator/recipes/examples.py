"""Readers of examples to render: Natural-Instructions tasks, rows of prompts, questions and answers, blocks of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ...protocol.errors import ConfigError
from ...protocol.recipe import SourceConfig
from .texts import below, hub, rows, unreadable

FEW_LABELS = 10  # a task with so many different outputs at most counts as classification


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is asked, and answers that are all right."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples of one kind. ``labels``: every answer, if they are few."""

    name: str
    definition: str = ""
    examples: list[Example] = field(default_factory=list)
    labels: tuple[str, ...] = ()


def tasks(config: SourceConfig, here: Path, seed: int) -> list[Task]:
    """All of a source's examples, at most ``max_rows``, none twice in a task. ``ConfigError`` for files that do
    not fit the loader."""
    if config.loader == "ni_json":
        found = list(_natural_instructions(config, here))
    elif config.loader == "pairs":
        found = list(_pairs(config, here))
    else:
        found = [Task(name="rows", examples=list(islice(_prompts(config, here, seed), config.max_rows)))]
    once = (replace(task, examples=list(dict.fromkeys(task.examples))) for task in found)
    return [task for task in once if task.examples]


def blocks(config: SourceConfig, here: Path) -> list[str]:
    """The texts of a JSON object, longer ones with several parts as a list."""
    path = here / config.path
    raw = _json(path, dict[str, str | list[str]])
    found = [text for value in raw.values() for text in ([value] if isinstance(value, str) else value)]
    return [text.strip() for text in found if text.strip()]


class _Instance(msgspec.Struct):
    input: str
    output: str | list[str]


class _NiTask(msgspec.Struct, rename={"definition": "Definition", "instances": "Instances"}):
    definition: str | list[str]
    instances: list[_Instance]


def _natural_instructions(config: SourceConfig, here: Path) -> Iterator[Task]:
    folder = here / config.path
    files = {path.stem: path for path in below(folder, (".json",))}
    taken = _names(here / config.tasks) if config.tasks else set(files)
    dropped = _names(here / config.drop_tasks) if config.drop_tasks else set()
    names = [name for name in files if name in taken and name not in dropped]
    if not names:
        raise ConfigError(f"{folder} has no task files", hint="Give the folder of Natural-Instructions' task*.json.")
    each = max(1, config.max_rows // len(names))
    for name in names:
        raw = _json(files[name], _NiTask)
        definition = raw.definition if isinstance(raw.definition, str) else " ".join(raw.definition)
        examples = [_example(i.input, i.output) for i in raw.instances[:each]]
        yield _task(name, definition, [e for e in examples if e])


def _pairs(config: SourceConfig, here: Path) -> Iterator[Task]:
    paths = below(here / config.path, (".yml", ".yaml", ".jsonl", ".parquet"))
    each = max(1, config.max_rows // max(1, len(paths)))
    for path in paths:
        if path.suffix.lower() in (".yml", ".yaml"):
            found = _conversations(path)
        else:
            found = _columns(path, config.columns or ("question", "answer"))
        yield _task(path.stem, "", list(islice(found, each)))


def _conversations(path: Path) -> Iterator[Example]:
    """ChatterBot's files: lists of turns. A question is answered by the next turn, or by any of the others."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        turns = raw["conversations"]
    except OSError as error:
        raise unreadable(path, error) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no list of conversations ({error})", hint="See the package chatterbot-corpus."
        ) from error
    for turn in turns:
        texts = [str(text) for text in turn] if isinstance(turn, list) else []
        if len(texts) >= 2 and (example := _example(texts[0], texts[1:2])):
            yield example


def _prompts(config: SourceConfig, here: Path, seed: int) -> Iterator[Example]:
    """P3's rows: a prompt and a target each."""
    columns = config.columns or ("inputs", "targets")
    if config.path.startswith("hf:"):
        opened = hub(config.path.removeprefix("hf:"), config.split, config.subset)
        for row in opened.rows(seed):
            yield from _of_row(row, columns, config.path)
        return
    for path in below(here / config.path, (".jsonl", ".parquet")):
        yield from _columns(path, columns)


def _columns(path: Path, columns: tuple[str, ...]) -> Iterator[Example]:
    for number, row in rows(path):
        yield from _of_row(row, columns, f"{path} line {number}")


def _of_row(row: dict[str, Any], columns: tuple[str, ...], where: str) -> Iterator[Example]:
    if len(columns) != 2 or not all(isinstance(row.get(column), str) for column in columns):
        names = " and ".join(columns)
        raise ConfigError(f"{where}: no strings {names} but {', '.join(row)}", hint="Name them in `columns`.")
    if example := _example(row[columns[0]], row[columns[1]]):
        yield example


def _example(prompt: str, answers: str | list[str]) -> Example | None:
    given = [answers] if isinstance(answers, str) else answers
    kept = tuple(text.strip() for text in given if text.strip())
    return Example(prompt=prompt.strip(), answers=kept) if prompt.strip() and kept else None


def _task(name: str, definition: str, examples: list[Example]) -> Task:
    labels = dict.fromkeys(answer for example in examples for answer in example.answers)
    few = tuple(labels) if len(labels) <= FEW_LABELS < len(examples) else ()
    return Task(name=name, definition=definition.strip(), examples=examples, labels=few)


def _names(path: Path) -> set[str]:
    try:
        return {line.strip().removesuffix(".json") for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="Give a text file, one task name a line.") from error


def _json(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise unreadable(path, error) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}", hint="Is it a file for this loader?") from error
