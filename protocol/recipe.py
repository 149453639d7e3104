"""``recipe.yaml``: what a run learns from. Sources, a tokenizer, and stages that mix the sources.

Read by ``potluck data build``, which makes a corpus of it (manifest.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from msgspec import Meta

from .errors import ConfigError
from .objective import Objective
from .strict import convert_to
from .sync_config import Section

Loader = Literal["builtin", "text", "hf", "ni_json", "p3", "json_dict", "pairs"]
Render = Literal["document", "ni_fewshot", "p3_fewshot", "blocks"]
PAIRED: tuple[Loader, ...] = ("ni_json", "p3", "pairs")  # what they read has a question and answers
RENDERS: dict[Loader, tuple[Render, ...]] = {
    "builtin": ("document",),
    "text": ("document",),
    "hf": ("document",),
    "ni_json": ("ni_fewshot",),
    "p3": ("p3_fewshot",),
    "json_dict": ("blocks",),
    "pairs": ("p3_fewshot", "ni_fewshot"),
}
_Share = Annotated[float, Meta(ge=0, le=1)]
_Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z", description="must be letters, digits, _, . and -, at most 64")
]
Location = Annotated[
    str,
    Meta(
        pattern=r"^(https?|s3|hf)://[^\s]{1,500}\Z",
        description="must begin with https://, http://, s3:// or hf://",
    ),
]


class TokenizerConfig(Section, frozen=True, kw_only=True):
    """``train``: a byte-level BPE of the sources' first text, ``spare`` of its words for denoising (sentinels and, of
    four or more, three modes). ``gptj``: GPT-2's BPE and 143 spare words, from a folder or ``package:NAME/FOLDER`` with
    encoder.json and vocab.bpe. ``folder``: tokenizer.json and tokenizer_config.json of a checkpoint; ``vocab_size`` is
    then the rows of its embedding, if there are more than words, and ``spare_words`` names special words of it that
    become sentinels and, the last three, modes: a checkpoint has rarely words that were made for that."""

    kind: Literal["train", "gptj", "folder"] = "train"
    path: str = ""
    vocab_size: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    spare: Annotated[int, Meta(ge=0, le=1024)] = 0
    spare_words: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(max_length=1024)] = ()

    def __post_init__(self) -> None:
        if self.kind == "train" and self.vocab_size < 257 + self.spare:
            raise ConfigError(
                f"tokenizer.vocab_size {self.vocab_size} is too small",
                hint=f"Use {257 + self.spare} (the bytes, an end of text, and what is spare) or more.",
            )
        if self.kind != "train" and (not self.path or self.spare):
            raise ConfigError(
                f"tokenizer.kind {self.kind} needs a path and has no spare words to choose",
                hint="Set tokenizer.path, leave tokenizer.spare out.",
            )
        n_spare = len(set(self.spare_words))
        if self.spare_words and (self.kind != "folder" or not 5 <= n_spare == len(self.spare_words)):
            raise ConfigError(
                "tokenizer.spare_words are five or more different words of a tokenizer of kind folder",
                hint="Two sentinels and the modes R, X and S are the least; leave it out where nothing is denoised.",
            )


class KeepConfig(Section, frozen=True, kw_only=True):
    """Which pairs of a source are taken: the ``share`` with the highest scores, or those with one ``above`` a number,
    in nats per token of the answer. ``pmi``: scores that `potluck data score` wrote."""

    pmi: Annotated[str, Meta(min_length=1)]
    share: Annotated[float, Meta(gt=0, le=1)] | None = None
    above: Annotated[float, Meta(ge=-1e3, le=1e3)] | None = None
    max_ratio: Annotated[float, Meta(gt=0)] | None = None  # tokens of the answer for each of the question

    def __post_init__(self) -> None:
        if (self.share is None) == (self.above is None):
            raise ConfigError("keep needs one of share and above", hint="`share: 0.9`, for instance, or `above: 0.0`.")


class DecontaminateConfig(Section, frozen=True, kw_only=True):
    """Training text that repeats ``ngram`` tokens of an evaluation text, as the recipe's tokenizer cuts both, is left
    out, or only reported. ``against``: files of .jsonl, .json, .parquet, .txt and .md, folders of them, and data sets
    of the hub as hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:SUBSET; of rows, every string is a text."""

    against: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1, max_length=256)]
    ngram: Annotated[int, Meta(ge=4, le=256)] = 13
    action: Literal["drop", "report"] = "drop"


class SourceConfig(Section, frozen=True, kw_only=True):
    """``loader`` reads, ``render`` makes sequences of what it reads (by default the loader's first).

    builtin; text: .txt, .md, .jsonl and .parquet, a file or a folder; hf: a data set's name (``split``, ``subset``);
    ni_json: a folder of Natural-Instructions tasks; p3: rows of inputs and targets, of a file, a folder or ``hf:NAME``;
    json_dict: a JSON object of texts; pairs: questions and answers, in .yml or .jsonl files, each file a task.
    """

    loader: Loader
    license: str = ""
    path: str = ""
    render: Render | None = None
    split: str = ""
    subset: str = ""
    columns: tuple[str, ...] = ()  # of the text, or of input and output, if they have other names
    max_epochs: Annotated[float, Meta(gt=0, le=1e6)] = 4.0  # passes over its text that the stages may ask for
    max_tokens: Annotated[int, Meta(ge=0)] = 0  # of a text that are read at most; 0: all that the stages ask for
    max_rows: Annotated[int, Meta(ge=1, le=10**8)] = 1_000_000  # of examples that are held in memory at most
    min_classification: _Share = 0.3  # of ni_fewshot: share of sequences of tasks with ten answers at most
    drop_tasks: str = ""  # of ni_fewshot: a file of task names to leave out, one a line
    tasks: str = ""  # of ni_fewshot: a file of those to take, if not all
    keep: KeepConfig | None = None  # of pairs, those whose question and answer fit

    @property
    def rendering(self) -> Render:
        return self.render or RENDERS[self.loader][0]

    @property
    def is_text(self) -> bool:
        return self.rendering == "document"


class StageConfig(Section, frozen=True, kw_only=True):
    """``tokens`` of training with one mix of sources (shares of the tokens) and one objective."""

    name: _Name
    tokens: Annotated[float, Meta(ge=1, le=1e15)]
    mix: Annotated[dict[str, Annotated[float, Meta(gt=0, le=1)]], Meta(min_length=1, max_length=256)]
    objective: Objective = Objective()


class Recipe(Section, frozen=True, kw_only=True):
    """The whole of ``recipe.yaml``."""

    seed: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    seq_len: Annotated[int, Meta(ge=2, le=1 << 20)]
    tokenizer: TokenizerConfig
    sources: Annotated[dict[_Name, SourceConfig], Meta(min_length=1, max_length=256)]
    stages: Annotated[tuple[StageConfig, ...], Meta(min_length=1, max_length=64)]
    heldout_share: Annotated[float, Meta(gt=0, le=0.5)] = 0.01
    shard_mb: Annotated[float, Meta(gt=0, le=4096)] = 16.0
    # Where workers find the shards before they ask the coordinator: what `potluck data build` writes to OUT/shards,
    # copied there by you.
    locations: Annotated[tuple[Location, ...], Meta(max_length=16)] = ()
    decontaminate: DecontaminateConfig | None = None

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if not source.license.strip():
                raise ConfigError(
                    f"sources.{name} has no license",
                    hint="Say under what terms its text may be used; `unknown` will be shown to everybody who joins.",
                )
            if source.rendering not in RENDERS[source.loader]:
                known = " or ".join(RENDERS[source.loader])
                raise ConfigError(
                    f"sources.{name}: {source.loader} cannot be rendered as {source.rendering}",
                    hint=f"Use render: {known}.",
                )
            if source.keep is not None and source.loader not in PAIRED:
                raise ConfigError(
                    f"sources.{name}.keep: {source.loader} has no questions and answers",
                    hint=f"Only {', '.join(PAIRED)} can be kept by their scores.",
                )
            if source.loader != "builtin" and not source.path:
                raise ConfigError(f"sources.{name} has no path", hint="Name a file, a folder or a data set.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError("two stages have the same name", hint="Give each its own.")
        for number, stage in enumerate(self.stages):
            where = f"stages[{number}]"
            for name in stage.mix:
                if name not in self.sources:
                    raise ConfigError(
                        f"{where}.mix: no source is called {name}", hint=f"There are {', '.join(self.sources)}."
                    )
            if abs(sum(stage.mix.values()) - 1) > 1e-6:
                total = sum(stage.mix.values())
                raise ConfigError(f"{where}.mix sums to {total:g}", hint="Make the shares sum to 1.")
            if min(stage.mix.values()) < 1e-4:
                raise ConfigError(f"{where}.mix has a share below 0.0001", hint="Leave that source out.")
            if stage.tokens < self.seq_len:
                raise ConfigError(f"{where}.tokens is less than one sequence", hint=f"Use {self.seq_len} or more.")
        for name in self.sources:
            if not any(name in stage.mix for stage in self.stages):
                raise ConfigError(f"sources.{name} is in no stage's mix", hint="Leave it out, or mix it.")


def load(path: Path) -> Recipe:
    """The recipe in ``path``; ``ConfigError`` for anything that is none."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint="Name a recipe.yaml; deploy/recipes has examples.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", hint="Check the path and its rights.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({error})", hint="Mend that line.") from None
    return convert_to(Recipe, raw, str(path))
