"""What a build leaves out of its sources, and the reports of it in the corpus's folder.

``decontamination.json`` says what repeats evaluation texts, ``kept.json`` which pairs were dropped for their scores.
What is found in a source is written beside its other parts while it is made, so that a build that was stopped knows it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from ...protocol.errors import ConfigError
from ...protocol.recipe import Recipe, SourceConfig
from . import evaluations, pairs
from .examples import Task
from .guard import Finding, Guard, Seen
from .words import Words

DECONTAMINATION_FILE = "decontamination.json"
KEPT_FILE = "kept.json"
_PLACES = 5  # of a file of evaluation texts that are named in the report
_LINE = msgspec.json.Decoder(Finding)


class LeftOut:
    """For one build of ``recipe``: nothing is, before :meth:`begin`, as a tokenizer is trained on everything. Raises
    ConfigError for texts and scores that cannot be read."""

    def __init__(self, recipe: Recipe, here: Path) -> None:
        self._recipe, self._here = recipe, here
        config = recipe.decontaminate
        self._texts = evaluations.read(config.against, here) if config else []
        self.sha256 = digest(recipe, self._texts, here)
        self.guard: Guard | None = None
        self.is_choosing = False
        self._seen: dict[str, Seen] = {}
        self._kept: dict[str, pairs.Kept] = {}

    def begin(self, words: Words) -> None:
        """Whether there is something to leave out is then ``is_choosing``. ConfigError if no evaluation text is long
        enough."""
        if self._recipe.decontaminate:
            self.guard = Guard(self._recipe.decontaminate, self._texts, words)
        self.is_choosing = self.guard is not None or any(source.keep for source in self._recipe.sources.values())

    def tasks(self, name: str, config: SourceConfig, tasks: list[Task]) -> list[Task]:
        """What is taken of a source with examples: first what repeats evaluation texts goes, then what scores low."""
        if self.guard:
            tasks, self._seen[name] = self.guard.tasks(tasks)
            self._check(name, tasks)
        if config.keep and self.is_choosing:
            tasks, self._kept[name] = pairs.keep(tasks, config.keep, name, self._here)
        return tasks

    def blocks(self, name: str, texts: list[str]) -> list[str]:
        if self.guard:
            texts, self._seen[name] = self.guard.blocks(texts)
            self._check(name, texts)
        return texts

    def documents(self, name: str, seen: Seen) -> None:
        self._seen[name] = seen

    def save(self, building: Path, name: str) -> None:
        """What is known of source ``name``."""
        found = (self._seen.get(name), self._kept.get(name))
        (building / f"{name}.left_out").write_bytes(msgspec.json.encode(found))

    def load(self, building: Path, name: str) -> bool:
        """What :meth:`save` wrote, if it did."""
        try:
            data = (building / f"{name}.left_out").read_bytes()
        except FileNotFoundError:
            return False
        seen, kept = msgspec.json.decode(data, type=tuple[Seen | None, pairs.Kept | None])
        self._seen |= {name: seen} if seen else {}
        self._kept |= {name: kept} if kept else {}
        return True

    def reports(self) -> dict[str, bytes | None]:
        """Files for the corpus's folder: None where there is nothing to say."""
        made: dict[str, Any] = {
            DECONTAMINATION_FILE: self._decontamination(),
            KEPT_FILE: {"left_out_sha256": self.sha256, "sources": self._kept} if self._kept else None,
        }
        return {
            name: msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n" if report else None
            for name, report in made.items()
        }

    def _check(self, name: str, left: list[Any]) -> None:
        if not left:
            raise ConfigError(f"sources.{name}: every example repeats an evaluation text", hint="Leave the source out.")

    def _decontamination(self) -> dict[str, Any] | None:
        config = self._recipe.decontaminate
        if not config or not self.guard:
            return None
        sources = {
            name: {
                "looked_at": seen.looked_at,
                "found": len(seen.findings),
                "tokens": seen.tokens,
                "dropped_tokens": sum(one.dropped for one in seen.findings),
            }
            for name, seen in self._seen.items()
        }
        files: dict[str, dict[str, Any]] = {}
        for one, short in zip(self._texts, self.guard.is_short, strict=True):
            file = files.setdefault(one.file, {"texts": 0, "too_short": 0, "found": 0, "examples": []})
            file["texts"] += 1
            file["too_short"] += short
        found: set[int] = set()
        for name, seen in self._seen.items():
            for finding in seen.findings:
                for place, excerpt in finding.texts:
                    file = files[self._texts[place].file]
                    file["found"] += place not in found
                    if place not in found and len(file["examples"]) < _PLACES:
                        where = {"text": self._texts[place].where, "source": name, "number": finding.number}
                        file["examples"].append(where | {"excerpt": excerpt})
                    found.add(place)
        return {
            "ngram": config.ngram,
            "unit": "tokens of this corpus's tokenizer",
            "action": config.action,
            "left_out_sha256": self.sha256,
            "sources": sources,
            "against": files,
        }


class Findings:
    """What is found in a text's documents, a line each, beside its tokens; a build that goes on keeps what is of
    documents that are done."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reopen(self, n_documents: int) -> None:
        """Forgets those of document ``n_documents`` and later, and what was written half."""
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        kept = [line for line in lines if _LINE.decode(line).number < n_documents]
        self._path.write_bytes(b"".join(line + b"\n" for line in kept))

    def add(self, finding: Finding) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(finding) + b"\n")

    def all(self) -> tuple[Finding, ...]:
        return tuple(_LINE.decode(line) for line in self._path.read_bytes().splitlines())


def digest(recipe: Recipe, texts: list[evaluations.EvaluationText], here: Path) -> str:
    """SHA-256 of what decides what is left out, besides the recipe and its sources: evaluation texts and scores."""
    sha256 = hashlib.sha256(evaluations.digest(texts).encode())
    for name, config in recipe.sources.items():
        if config.keep:
            try:
                sha256.update(f"{name}\0".encode() + hashlib.sha256((here / config.keep.pmi).read_bytes()).digest())
            except OSError:
                pairs.read(here / config.keep.pmi)  # which says what is wrong with it
    return sha256.hexdigest()


def check_unchanged(recipe: Recipe, folder: Path, here: Path) -> None:
    """ConfigError if the corpus in ``folder`` was made with other evaluation texts or scores than there are now."""
    for name in (DECONTAMINATION_FILE, KEPT_FILE):
        try:
            found = msgspec.json.decode((folder / name).read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError):
            continue
        if found.get("left_out_sha256") != LeftOut(recipe, here).sha256:
            raise ConfigError(
                f"the evaluation texts or scores have changed since {folder} was built",
                hint="Build another with --out, or delete this one.",
            )
