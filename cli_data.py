"""``potluck data``: build a corpus from a recipe, look at its samples, count what is in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import CONTEXT, data_home
from .cli_score import score, show_left_out
from .protocol.errors import ConfigError

if TYPE_CHECKING:
    from .protocol.manifest import Manifest

_FOLDER = click.Path(path_type=Path)


@click.group(context_settings=CONTEXT)
def data() -> None:
    """Make and look at what a run learns from."""


data.add_command(score)


@data.command(context_settings=CONTEXT)
@click.argument("recipe", type=_FOLDER)
@click.option("--out", type=_FOLDER, default=None, help="Folder for the corpus.  [default: one in your data folder]")
@click.option("--root", type=_FOLDER, default=None, help="Where RECIPE's paths start from.  [default: its folder]")
def build(recipe: Path, out: Path | None, root: Path | None) -> None:
    """Make a corpus of RECIPE (recipe.yaml): tokenized, rendered, mixed, in shards named by their hash.

    Ctrl-C stops it; the same command goes on from there. For a run with it, name its folder in run.yaml's data.source.
    """
    from .coordinator.recipes.build import Work
    from .coordinator.recipes.build import build as make
    from .coordinator.recipes.left_out import check_unchanged
    from .protocol.identity import lock
    from .protocol.recipe import load

    work = Work(recipe=load(recipe))
    folder = out or data_home() / "corpora" / recipe.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}", hint="Name a folder that can be written with --out.") from None
    here = root or recipe.parent
    try:
        with lock(folder / "corpus"), progress() as say:
            manifest = make(work, folder, here, say)
            check_unchanged(work.recipe, folder, here)
    except KeyboardInterrupt:
        raise ConfigError("stopped", hint="The same command goes on from there.") from None
    show_left_out(folder)
    click.echo(
        f"{folder}: {manifest.n_tokens:,} tokens in {len(manifest.shards)} shards, vocabulary {manifest.vocab_size:,}"
    )
    click.echo(f"Look at a sample:  potluck data show 0 --manifest {folder}")
    click.echo(f"In run.yaml:       data: {{source: {folder}}}, model: {{seq_len: {manifest.seq_len}}}")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar where there is a terminal; otherwise a line when something else begins or a tenth more is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda line, share: bar.update(task, description=line, completed=share)
        return
    last = ("", -1.0)

    def say(line: str, share: float) -> None:
        nonlocal last
        what = line.partition(":")[0]
        if what != last[0] or share - last[1] >= 0.1:
            last = (what, share)
            click.echo(f"{share:4.0%}  {line}", err=True)

    yield say


@data.command(context_settings=CONTEXT)
@click.argument("number", type=click.IntRange(0), metavar="N")
@click.option("--manifest", "folder", type=_FOLDER, default=Path(), help="The corpus.  [default: this folder]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The run's seed: it is the order.")
@click.option("--heldout", is_flag=True, help="Of the held-out samples, as the last stage sees them.")
def show(number: int, folder: Path, seed: int, heldout: bool) -> None:
    """Print sample N of a run with this corpus: what is given, what is to be said, where it is from."""
    from rich.console import Console
    from rich.text import Text

    dataset, words = opened(folder)
    manifest: Manifest = dataset.manifest
    if heldout and number >= manifest.n_heldout:
        raise ConfigError(f"there are {manifest.n_heldout} held-out samples", hint="Name a smaller number.")
    place = dataset.mixture(seed).heldout(number, -1) if heldout else dataset.mixture(seed).place(number)
    stage, source = manifest.stages[place.stage], manifest.sources[place.source]
    console = Console()
    what = f"held-out sample {number}" if heldout else f"sample {number}"
    passes = "" if heldout else f", pass {place.position // source.rows + 1}"
    console.print(
        Text(f"{what}: stage {stage.name} ({stage.objective.kind}), source {source.name} from {source.origin},")
        + Text(f" license {source.license}, row {place.number}{passes}"),
        style="bold",
        soft_wrap=True,
    )
    for kind, tokens in pieces(dataset, number, seed, heldout):
        text = words.decode([int(token) for token in tokens], skip_special_tokens=False)
        if kind.startswith("-"):
            console.print(Text(kind), style="dim")
            continue
        line = Text(f"{kind:>6} | ", style="dim")
        shown = text.replace("\n", "\n       | ")
        console.print(line + Text(shown, style=STYLES[kind]), soft_wrap=True, highlight=False)


STYLES = {"given": "cyan", "target": "green", "other": ""}


def pieces(dataset: Any, number: int, seed: int, heldout: bool) -> Iterator[tuple[str, Any]]:
    """Runs of tokens with what they are: ``given`` (seen whole), ``target`` (to be said), ``other`` (seen, not to be
    said), and a line of dashes with the mode before each document of a sample of several."""
    import numpy as np

    if not dataset.manifest.masked:
        row = dataset.heldout(number) if heldout else dataset.sample(number, seed)
        yield "target", row
        return
    packed = dataset.heldout_packed(number, seed) if heldout else dataset.packed(number, seed)
    last = int(packed.segments.max())
    for document in range(1, last + 1):
        at = np.flatnonzero(packed.segments == document)
        mode = packed.modes[document - 1] if document <= len(packed.modes) else ""
        yield f"--- {document} of {last}: {mode or 'causal'}", ()
        # A token is a target if the position before says it; the last one is not read any more.
        said = np.concatenate([[False], packed.targets[at] >= 0])
        tokens = np.concatenate([packed.tokens[at], packed.targets[at][-1:]])
        given = np.concatenate([packed.is_prefix[at], [False]])
        kinds = np.where(said, "target", np.where(given, "given", "other"))
        if not said[-1]:
            tokens, kinds = tokens[:-1], kinds[:-1]
        cuts = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1), len(kinds)]
        for begin, end in pairwise(cuts):
            yield str(kinds[begin]), tokens[begin:end]


@data.command(context_settings=CONTEXT)
@click.argument("folder", type=_FOLDER)
def stats(folder: Path) -> None:
    """Count what is in a corpus: tokens, licenses and shares by source and stage."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dataset, _ = opened(folder)
    manifest: Manifest = dataset.manifest
    mixture = dataset.mixture(0)
    console = Console()
    table = Table("source", "license", "rows", "tokens", "held out", "shards", "answers", box=None)
    for number, source in enumerate(manifest.sources):
        answers = "-"
        if source.answers:
            some = [dataset.row(mixture.at(number, at), 0).answers for at in range(min(100, source.rows))]
            answers = f"{np.mean(some):.0%}"
        cells = (f"{source.rows:,}", f"{source.rows * manifest.seq_len:,}", f"{source.heldout_rows:,}")
        table.add_row(Text(source.name), Text(source.license), *cells, str(len(source.train)), answers)
    console.print(table)
    begun: dict[int, int] = {}
    table = Table("stage", "objective", "tokens", "source", "share", "passes, to the stage's end", "fill", box=None)
    first = 0
    for number, stage in enumerate(manifest.stages):
        size = f"{stage.rows * manifest.seq_len:,}"
        head: tuple[Text, str, str] = (Text(stage.name), stage.objective.kind, size)
        fill = _fill(dataset, first, stage.rows)
        for source, count in mixture.counts(number, stage.rows).items():
            begun[source] = begun.get(source, 0) + count
            passes = begun[source] / manifest.sources[source].rows
            name = Text(manifest.sources[source].name)
            table.add_row(*head, name, f"{count / stage.rows:.2%}", f"{passes:.2f}", fill)
            head, fill = (Text(""), "", ""), ""
        first += stage.rows
    console.print(table)
    nbytes = sum(manifest.shards.values())
    console.print(
        f"{nbytes / 1e6:,.1f} MB in {len(manifest.shards)} shards; licenses: {manifest.license}", soft_wrap=True
    )


def _fill(dataset: Any, first: int, rows: int) -> str:
    """Of some of a stage's samples: positions that are no padding, and those with a target."""
    import numpy as np

    if not dataset.manifest.masked:
        return "100%, all targets"
    some = [dataset.packed(index, 0) for index in range(first, first + min(rows, 100))]
    full = np.mean([sample.segments > 0 for sample in some])
    targets = np.mean([sample.targets >= 0 for sample in some])
    return f"{full:.1%}, {targets:.1%} targets"


def opened(folder: Path) -> tuple[Any, Any]:
    """A corpus and its tokenizer."""
    from tokenizers import Tokenizer

    from .protocol.manifest import TOKENIZER_FILE
    from .worker.data import Dataset

    dataset = Dataset(folder)
    try:
        return dataset, Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the library raises plain Exceptions
        hint = "Build the corpus again."
        raise ConfigError(f"{folder / TOKENIZER_FILE} cannot be used ({error})", hint=hint) from error
