"""The corpus of a run: what ``data.source`` of run.yaml names, prepared or as ``potluck data build`` left it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..protocol.config import RunConfig
from ..protocol.errors import ConfigError, StateError
from ..protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest
from ..protocol.recipe import Recipe, SourceConfig, StageConfig, TokenizerConfig, load
from .recipes.build import Work, build, reusable

Progress = Callable[[str, float], None]
MAX_HF_TOKENS = 100_000_000  # of a plain run: every volunteer downloads the tokens, 200 MB
_RECIPES = (".yaml", ".yml")


def of_run(config: RunConfig, folder: Path, progress: Progress | None = None) -> tuple[Path, Manifest]:
    """The folder of a run's corpus and its manifest: made in ``folder``, or where ``data.source`` says that one is.

    ``ConfigError`` if the model's sequences are not as long as the corpus's.
    """
    data, seq_len = config.data, config.model.seq_len
    path = Path(data.source)
    if (path / MANIFEST_FILE).is_file():
        folder, manifest = path, opened(path)
    elif path.suffix.lower() in _RECIPES:
        recipe = load(path)
        _check_length(recipe.seq_len, seq_len, data.source)
        manifest = build(Work(recipe=recipe), folder, path.parent, progress or _silent)
    else:
        return folder, prepare(
            data.source,
            folder,
            vocab_size=data.vocab_size,
            seq_len=seq_len,
            heldout_share=data.heldout_share,
            seed=config.seed,
            progress=progress,
        )
    _check_length(manifest.seq_len, seq_len, data.source)
    if manifest.masked and config.activations.reuse:
        raise ConfigError(
            "activations.reuse: the recipe's objectives make another sample of the same text in every epoch",
            hint="Leave activations.reuse out.",
        )
    return folder, manifest


def opened(folder: Path) -> Manifest:
    """The manifest of a corpus that was built before; ``StateError`` if shards of it are not there."""
    try:
        manifest = Manifest.decode((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))
        for name, nbytes in manifest.shards.items():
            if (folder / SHARDS_FOLDER / name).stat().st_size != nbytes:
                raise StateError(f"{folder / SHARDS_FOLDER / name} is damaged", hint="Build the corpus again.")
    except OSError as error:
        hint = "Name a folder that `potluck data build` made."
        raise StateError(f"{folder} is no whole corpus: {error}", hint=hint) from error
    return manifest


def _check_length(corpus: int, model: int, source: str) -> None:
    if corpus != model:
        raise ConfigError(
            f"model.seq_len {model} is not the {corpus} tokens of {source}", hint=f"Set model.seq_len to {corpus}."
        )


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
    """Prepare the text ``source`` in ``folder``, or return what the same parameters made there before, if undamaged: a
    recipe of one source in one shard, one stage and its own tokenizer.

    ``source``: ``builtin``, a file or folder of .txt, .md, .jsonl and .parquet, or ``hf:NAME[:SPLIT]``. Later
    changes of its text go unseen: a run keeps its corpus. ``progress`` gets a line and the share done.
    Raises ConfigError for parameters and texts, StateError when ``folder`` cannot be written.
    """
    _check_parameters(vocab_size, seq_len, heldout_share)
    work = Work(recipe=_plain(source, vocab_size, seq_len, float(heldout_share), seed), plain=True)
    say: Progress = progress or _silent
    if (found := reusable(folder, work)) is not None:
        say(f"{source}: reused, {found.n_tokens:,} tokens", 1.0)
        return found
    say(f"{source}: reading", 0.0)
    manifest = build(work, folder, Path(), say)
    say(f"{source}: {manifest.n_tokens:,} tokens", 1.0)
    return manifest


def _plain(source: str, vocab_size: int, seq_len: int, heldout_share: float, seed: int) -> Recipe:
    if source == "builtin":
        text = SourceConfig(loader="builtin", license="unknown")
    elif source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        text = SourceConfig(loader="hf", path=name, split=split, license="unknown", max_tokens=MAX_HF_TOKENS)
    else:
        text = SourceConfig(loader="text", path=source or ".", license="unknown")
    return Recipe(
        seed=seed,
        seq_len=seq_len,
        tokenizer=TokenizerConfig(kind="train", vocab_size=vocab_size),
        sources={"text": text},
        stages=(StageConfig(name="text", tokens=float(seq_len), mix={"text": 1.0}),),
        heldout_share=heldout_share,
    )


def _silent(line: str, share: float) -> None: ...


def _check_parameters(vocab_size: int, seq_len: int, heldout_share: float) -> None:
    if not 257 <= vocab_size <= 1 << 20:
        raise ConfigError(f"vocab_size = {vocab_size}", hint="Use 257 (the bytes and an end of text) or more.")
    if not 2 <= seq_len <= 1 << 20:
        raise ConfigError(f"seq_len = {seq_len}", hint="Use 2 or more tokens per sequence.")
    if not 0 < heldout_share <= 0.5:
        raise ConfigError(f"heldout_share = {heldout_share}", hint="Use a share above 0, at most 0.5.")
