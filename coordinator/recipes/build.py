"""``potluck data build``: a recipe's sources into shards, and the manifest that describes them.

A folder with a corpus has ``shards/``, ``tokenizer.json`` and ``tokenizer_config.json`` (as stock transformers loads
them), ``recipe.json`` (what it was made of: the next call can reuse the work), reports of what was left out
(left_out.py) and, last, ``manifest.json``. While it is made, ``.building/`` has what a build that was stopped needs to
go on: the tokenizer, what is tokenized so far, and of every source that is done its part of the manifest. That takes as
much room again as the shards of one source.

The same recipe and texts give the same bytes, wherever a build was stopped in between.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ...protocol.errors import ConfigError, StateError
from ...protocol.failpoints import failpoint
from ...protocol.manifest import (
    DENOISING,
    MANIFEST_FILE,
    MAX_NBYTES,
    SHARDS_FOLDER,
    TOKENIZER_FILE,
    WHOLE,
    Manifest,
    Source,
    Stage,
)
from ...protocol.recipe import Recipe, SourceConfig
from . import examples, texts, words
from .left_out import LeftOut
from .render import CHARS_A_TOKEN, Blocks, NiFewshot, P3Fewshot, Renderer
from .rendered import Rows
from .streams import Stream

Progress = Callable[[str, float], None]
RECIPE_FILE = "recipe.json"
BUILDING = ".building"
_LEFT_OUT = "left_out.sha256"
MIN_PLAIN_ROWS = 8
_PARTS = (".tokens", ".documents", ".findings", ".train", ".heldout", ".examples")  # of a source that is being made
_TOKENIZER_SHARE = 0.2  # of the progress


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe, and whether it is that of a plain run: then the whole text is taken, in one shard, and the stage is as
    long as the text."""

    recipe: Recipe
    plain: bool = False

    @property
    def fingerprint(self) -> bytes:
        """Of everything that the bytes depend on but the texts themselves."""
        return msgspec.json.encode(
            msgspec.structs.replace(self, recipe=msgspec.structs.replace(self.recipe, locations=()))
        )


def build(work: Work, folder: Path, here: Path, say: Progress) -> Manifest:
    """The corpus of ``work`` in ``folder``: built, gone on with, or found there undamaged; paths are relative to
    ``here``. Raises ConfigError for the recipe and its texts, StateError when ``folder`` cannot be written."""
    recipe = work.recipe
    try:
        found = reusable(folder, work)
        if found is not None:
            if found.locations != recipe.locations:
                found = msgspec.structs.replace(found, locations=recipe.locations)
                write(folder / MANIFEST_FILE, found.encode())
            return found
        building = folder / BUILDING
        left_out = LeftOut(recipe, here)
        known = (_read(building / RECIPE_FILE), _read(building / _LEFT_OUT))
        if known != (work.fingerprint, left_out.sha256.encode()):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            write(building / RECIPE_FILE, work.fingerprint)
            write(building / _LEFT_OUT, left_out.sha256.encode())
        try:
            manifest = _Build(work, folder, here, say, left_out).manifest()
        except ConfigError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        write(building / MANIFEST_FILE, manifest.encode())
        failpoint("coordinator.corpus.rename")
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for name, report in left_out.reports().items():
            if report is None:
                (folder / name).unlink(missing_ok=True)
            else:
                write(folder / name, report)
        for name in (TOKENIZER_FILE, words.CONFIG_FILE, RECIPE_FILE, MANIFEST_FILE):
            os.replace(building / name, folder / name)
        shutil.rmtree(building, ignore_errors=True)
        for path in (folder / SHARDS_FOLDER).iterdir():
            if path.name not in manifest.shards:
                path.unlink()
    except OSError as error:
        hint = "Free some space there, or choose a folder that can be written."
        message = f"cannot write the corpus in {folder}: {error.strerror or error}"
        raise StateError(message, hint=hint) from error
    return manifest


def reusable(folder: Path, work: Work) -> Manifest | None:
    """The manifest in ``folder`` if this recipe made it and its files are whole; what another build left half done is
    removed then."""
    try:
        manifest = Manifest.decode((folder / MANIFEST_FILE).read_bytes())
        whole = (
            _read(folder / RECIPE_FILE) == work.fingerprint
            and sha256(folder / TOKENIZER_FILE) == manifest.tokenizer_sha256
            and (folder / words.CONFIG_FILE).is_file()
            and all(sha256(folder / SHARDS_FOLDER / name) == name for name in manifest.shards)
        )
    except (OSError, StateError):
        return None
    if not whole:
        return None
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def whole_shares(mix: dict[str, float]) -> dict[str, int]:
    """Shares in ten-thousandths with the right sum: the largest remainders are rounded up."""
    exact = {name: share * WHOLE / sum(mix.values()) for name, share in mix.items()}
    found = {name: max(1, math.floor(share + 1e-9)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: WHOLE - sum(found.values())]:
        found[name] += 1
    found[max(found, key=lambda name: found[name])] += WHOLE - sum(found.values())
    return found


class _Build:
    """One call's work."""

    def __init__(self, work: Work, folder: Path, here: Path, say: Progress, left_out: LeftOut) -> None:
        self.recipe, self.plain, self.here, self.say, self.left_out = work.recipe, work.plain, here, say, left_out
        self.shards, self.building = folder / SHARDS_FOLDER, folder / BUILDING
        self.stages = [
            Stage(
                name=stage.name,
                rows=int(stage.tokens) // self.recipe.seq_len,
                mix=whole_shares(stage.mix),
                objective=stage.objective,
            )
            for stage in self.recipe.stages
        ]
        self._texts: dict[str, texts.Texts] = {}
        self._renderers: dict[str, Renderer] = {}
        self._tasks: dict[str, list[examples.Task]] = {}
        self._blocks: dict[str, list[str]] = {}

    def manifest(self) -> Manifest:
        recipe = self.recipe
        if not (self.building / words.CONFIG_FILE).exists():
            self.say("the tokenizer", 0.0)
            words.make(recipe.tokenizer, self.building, self.here, recipe.seq_len, self._sample())
        rows = recipe.tokenizer.vocab_size if recipe.tokenizer.kind == "folder" else 0
        self.words = words.load(self.building, rows, recipe.tokenizer.spare_words)
        self._check_objectives()
        self.left_out.begin(self.words)
        if self.left_out.is_choosing:
            self._renderers.clear()  # those that showed the tokenizer everything
        width = (recipe.seq_len + 1) * (2 if self.words.dtype == "uint16" else 4)
        self.rows_each = 1 << 48 if self.plain else max(1, int(recipe.shard_mb * 2**20) // width)
        sources = []
        for place, (name, config) in enumerate(recipe.sources.items()):
            self._begin = _TOKENIZER_SHARE + (1 - _TOKENIZER_SHARE) * place / len(recipe.sources)
            sources.append(self._source(name, config))
        if self.plain:
            self.stages = [msgspec.structs.replace(self.stages[0], rows=sources[0].rows)]
        try:
            manifest = Manifest(
                seq_len=recipe.seq_len,
                dtype=self.words.dtype,
                vocab_size=self.words.vocab_size,
                special=self.words.special,
                tokenizer_sha256=self.words.sha256,
                sources=tuple(sources),
                stages=tuple(self.stages),
                locations=recipe.locations,
            )
        except ValueError as error:
            raise ConfigError(f"the recipe makes no corpus: {error}", hint="Change the recipe.") from error
        if (nbytes := len(msgspec.json.encode(manifest))) > MAX_NBYTES:
            n = len(manifest.shards)
            hint = f"Set shard_mb to {math.ceil(recipe.shard_mb * nbytes / MAX_NBYTES) * 2}."
            raise ConfigError(f"{n} shards are too many for a manifest that fits one message", hint=hint)
        return manifest

    def _check_objectives(self) -> None:
        """Before hours of work: denoising needs words of its own."""
        for place, stage in enumerate(self.stages):
            if stage.objective.kind in DENOISING and not (self.words.special.sentinels and self.words.special.modes):
                raise ConfigError(
                    f"stages[{place}].objective.kind {stage.objective.kind} needs sentinels: the tokenizer has none",
                    hint="Set tokenizer.spare (112, for instance), use tokenizer.kind gptj, or name special words of a"
                    " checkpoint's tokenizer in tokenizer.spare_words.",
                )

    def _source(self, name: str, config: SourceConfig) -> Source:
        done = self.building / f"{name}.done"
        if (data := _read(done)) is not None:
            source = msgspec.json.decode(data, type=Source)
            whole = all((self.shards / shard.sha256).exists() for shard in (*source.train, *source.heldout))
            if whole and self.left_out.load(self.building, name):
                return source
        source = self._text(name, config) if config.is_text else self._rendered(name, config)
        self.left_out.save(self.building, name)
        write(done, msgspec.json.encode(source))
        for path in self.building.glob(f"{name}.*"):
            if path != done and path.suffix in _PARTS:
                path.unlink()
        return source

    def _text(self, name: str, config: SourceConfig) -> Source:
        recipe, opened = self.recipe, self._opened(name, config)
        shown = opened.origin if self.plain else name
        wanted = self._wanted(name)
        # Some more than the stages ask for: what is held out is taken from it, in whole documents.
        most = 0 if self.plain else math.ceil(wanted * recipe.seq_len / (1 - recipe.heldout_share) * 1.01)
        most += 0 if self.plain else 8 * recipe.seq_len
        if config.max_tokens:
            most = min(most or config.max_tokens, config.max_tokens)
        stream = Stream(self.building, name, self.words, recipe.seed, self.left_out.guard)

        def say(n_tokens: int, chars: int) -> None:
            share = n_tokens / most if most else chars / max(1, opened.n_chars)
            self._say(f"{shown}: {n_tokens:,} tokens", share)
            if config.max_tokens and n_tokens >= config.max_tokens:
                self._say(f"{shown}: stopped at the limit of {config.max_tokens:,} tokens", share)

        stream.encode(opened.documents, most, say)
        if self.left_out.guard:
            self.left_out.documents(name, stream.seen())
        train, heldout = stream.cut(self.shards, recipe.seq_len, recipe.heldout_share, self.rows_each)
        rows = sum(shard.rows for shard in train)
        if rows < (MIN_PLAIN_ROWS if self.plain else 1) or not heldout:
            raise ConfigError(
                f"{opened.origin if self.plain else f'sources.{name}'} has too little text for sequences of"
                f" {recipe.seq_len} tokens",
                hint=f"Add text ({MIN_PLAIN_ROWS} sequences to train on, 1 held out, from 2 documents or more).",
            )
        if not self.plain:
            self._check_passes(name, config, wanted / rows)
        license = opened.license if self.plain else config.license
        return Source(name=name, origin=opened.origin, license=license, train=train, heldout=heldout)

    def _rendered(self, name: str, config: SourceConfig) -> Source:
        recipe, renderer, wanted = self.recipe, self._renderer(name, config), self._wanted(name)
        examples_file = self.building / f"{name}.examples"
        there = repr([renderer.size(split) for split in ("train", "heldout")]).encode()
        paths = {split: self.building / f"{name}.{split}" for split in ("train", "heldout")}
        if _read(examples_file) != there:
            for path in paths.values():
                path.unlink(missing_ok=True)
            write(examples_file, there)
        train = Rows(paths["train"], renderer, "train", self.words, recipe.seq_len)
        size = renderer.size("train")
        n = train.make(
            wanted,
            config.max_epochs * size,
            name,
            lambda n: self._say(f"{name}: {n:,} of {wanted:,} sequences", n / wanted),
        )
        if n < wanted:
            self._check_passes(name, config, wanted / max(1, n) * config.max_epochs)
        heldout = Rows(paths["heldout"], renderer, "heldout", self.words, recipe.seq_len)
        heldout.make(math.ceil(wanted * recipe.heldout_share), renderer.size("heldout"), name, lambda n: None)
        return Source(
            name=name,
            origin=self._origin(config),
            license=config.license,
            answers=renderer.answers,
            train=train.cut(self.shards, self.rows_each),
            heldout=heldout.cut(self.shards, self.rows_each),
        )

    def _check_passes(self, name: str, config: SourceConfig, passes: float) -> None:
        if passes > config.max_epochs:
            raise ConfigError(
                f"the stages ask for {passes:,.1f} passes over sources.{name}, its max_epochs is {config.max_epochs:g}",
                hint=f"Give it more text, lower its shares or the stages' tokens, or set max_epochs to"
                f" {math.ceil(passes * 1.05)}.",
            )

    def _wanted(self, name: str) -> int:
        """Rows of a source that the stages take at most (a mix is off by less than two)."""
        return sum(math.ceil(stage.rows * stage.mix[name] / WHOLE) + 2 for stage in self.stages if name in stage.mix)

    def _say(self, line: str, share: float) -> None:
        self.say(line, self._begin + (1 - _TOKENIZER_SHARE) / len(self.recipe.sources) * min(1.0, share))

    def _sample(self) -> Iterator[str]:
        """The first texts of every source, as many characters of each, for a tokenizer to learn from."""
        each = words.TRAIN_CHARS // len(self.recipe.sources)
        for name, config in self.recipe.sources.items():
            n_chars = 0
            for text in self._shown(name, config):
                if n_chars >= each:
                    break
                n_chars += len(text)
                yield text

    def _shown(self, name: str, config: SourceConfig) -> Iterator[str]:
        if config.is_text:
            yield from (text for text in self._opened(name, config).documents() if text.strip())
            return
        renderer = self._renderer(name, config)
        used, number = 0, 0
        while used < renderer.size("train"):
            text, pieces = "", renderer.sequence("train", number)
            while len(text) < 4 * self.recipe.seq_len:
                piece = next(pieces)
                text += piece.text
                used += piece.starts
            yield text
            number += 1

    def _opened(self, name: str, config: SourceConfig) -> texts.Texts:
        if name not in self._texts:
            column = config.columns[0] if config.columns else "text"
            if config.loader == "builtin":
                self._texts[name] = texts.builtin()
            elif config.loader == "hf":
                self._texts[name] = texts.hub_texts(config.path, config.split, config.subset, column)
            else:
                self._texts[name] = texts.files(self.here / config.path, column)
        return self._texts[name]

    def _renderer(self, name: str, config: SourceConfig) -> Renderer:
        if name in self._renderers:
            return self._renderers[name]
        seed, share, chars = self.recipe.seed, self.recipe.heldout_share, CHARS_A_TOKEN * self.recipe.seq_len
        made: Renderer
        if config.rendering == "blocks":
            if name not in self._blocks:
                self._blocks[name] = examples.blocks(config, self.here)
            made = Blocks(self.left_out.blocks(name, self._blocks[name]), name, seed=seed, share=share)
        else:
            if name not in self._tasks:
                self._tasks[name] = examples.tasks(config, self.here, seed)
            found = self.left_out.tasks(name, config, self._tasks[name])
            if config.rendering == "ni_fewshot":
                classify = config.min_classification
                made = NiFewshot(found, name, seed=seed, share=share, chars=chars, classify=classify)
            else:
                made = P3Fewshot(found, name, seed=seed, share=share, chars=chars)
        self._renderers[name] = made
        return made

    def _origin(self, config: SourceConfig) -> str:
        """As everybody sees it: no folder of this machine."""
        return config.path if config.path.startswith("hf:") else Path(config.path).name
