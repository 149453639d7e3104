"""``potluck data score``: how well questions and answers of a recipe fit, and tables of what a build left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import CONTEXT
from .protocol.errors import ConfigError, StateError

if TYPE_CHECKING:
    from .coordinator.recipes.pairs import Header

_FOLDER = click.Path(path_type=Path)
_CHUNK = 256  # pairs that are lost at most when it is stopped


@click.command(context_settings=CONTEXT)
@click.argument("recipe", type=_FOLDER)
@click.option(
    "--model", type=_FOLDER, required=True, help="Folder of a causal language model, as transformers saves it."
)
@click.option("--source", "only", default="", help="Score this source's pairs.  [default: of all that have pairs]")
@click.option("--out", type=_FOLDER, default=None, help="File of scores.  [default: RECIPE.scores.jsonl in --root]")
@click.option("--root", type=_FOLDER, default=None, help="Where RECIPE's paths start from.  [default: its folder]")
def score(recipe: Path, model: Path, only: str, out: Path | None, root: Path | None) -> None:
    """Score the questions and answers of RECIPE by what the one says about the other, for `keep` in a recipe.

    A score is (log p(answer | question) - log p(answer)) / tokens of the answer, by MODEL. Ctrl-C stops it; the same
    command goes on from there.
    """
    from .cli_data import progress
    from .coordinator.recipes import pairs
    from .protocol.identity import lock
    from .protocol.recipe import load as load_recipe
    from .worker import pmi

    here = root or recipe.parent
    known = dict(_pairs(load_recipe(recipe), only, here))
    out = out or here / f"{recipe.stem}.scores.jsonl"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(out.with_name(f".{out.name}")), progress() as say:
            say("the model", 0.0)
            header = pairs.Header(model=model.resolve().name, model_sha256=pmi.fingerprint(model))
            scored = _begun(out, header)
            left = [one for one in known if one not in scored]
            left.sort(key=lambda one: (sum(map(len, known[one])), one))  # equal lengths make full batches
            scorer = pmi.load(model) if left else None
            n_done = len(known) - len(left)
            with out.open("ab") as file:
                for keys in _chunks(left):
                    assert scorer is not None
                    found = scorer.score([known[one] for one in keys])
                    rows = zip(keys, found, strict=True)
                    file.write(b"".join(_line(pairs.Row(one, s.pmi, *s)) for one, s in rows))
                    file.flush()
                    n_done += len(keys)
                    say(f"scores: {n_done:,} of {len(known):,} pairs", n_done / len(known))
    except KeyboardInterrupt:
        raise ConfigError("stopped", hint="The same command goes on from there.") from None
    except OSError as error:
        raise StateError(
            f"cannot write {out}: {error.strerror or error}", hint="Name another file with --out."
        ) from None
    click.echo(f"{out}: scores of {len(known):,} pairs by {header.model}")
    click.echo(f"In {recipe.name}, at a source: keep: {{pmi: {_from(out, here)}, share: 0.9}}")


def _pairs(recipe: Any, only: str, here: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    from .coordinator.recipes import examples, pairs
    from .protocol.recipe import PAIRED

    with_pairs = [name for name, source in recipe.sources.items() if source.loader in PAIRED]
    if only and only not in with_pairs:
        what = (
            f"source {only} has no questions and answers" if only in recipe.sources else f"no source is called {only}"
        )
        raise ConfigError(what, hint=f"With pairs there are: {', '.join(with_pairs) or 'none'}.")
    if not with_pairs:
        raise ConfigError("the recipe has no source with questions and answers", hint=f"Those are {', '.join(PAIRED)}.")
    for name in [only] if only else with_pairs:
        yield from pairs.pairs(examples.tasks(recipe.sources[name], here, recipe.seed)).items()


def _begun(out: Path, header: Header) -> set[str]:
    """Keys that ``out`` has already, made if it is not there; a line that was written half is cut off."""
    from .coordinator.recipes import pairs

    if not out.exists() or not out.stat().st_size:
        out.write_bytes(_line(header))
        return set()
    found, rows = pairs.read(out)
    if found != header:
        raise ConfigError(
            f"{out} has scores of another model, {found.model}", hint="Name another file with --out, or delete it."
        )
    whole = out.read_bytes().rfind(b"\n") + 1
    if not whole:
        out.write_bytes(_line(header))
    else:
        os.truncate(out, whole)
    return set(rows)


def _line(row: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(row) + b"\n"


def _chunks(keys: list[str]) -> Iterator[list[str]]:
    left = iter(keys)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk


def _from(path: Path, here: Path) -> Path:
    """``path`` as a recipe names it whose paths start from ``here``."""
    inside = path.resolve()
    return inside.relative_to(here.resolve()) if inside.is_relative_to(here.resolve()) else inside


def show_left_out(folder: Path) -> None:
    """Prints what the reports in a corpus's folder say, if there are any."""
    import msgspec
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .coordinator.recipes.left_out import DECONTAMINATION_FILE, KEPT_FILE

    console = Console()

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
        return found

    if report := read(DECONTAMINATION_FILE):
        what = "dropped" if report["action"] == "drop" else "not dropped"
        console.print(Text(f"repeats {report['ngram']} tokens of an evaluation text ({what}):"))
        table = Table("source", "looked at", "found", "tokens", "dropped tokens", box=None)
        for name, source in report["sources"].items():
            cells = (source["looked_at"], source["found"], source["tokens"], source["dropped_tokens"])
            table.add_row(Text(name), *(f"{cell:,}" for cell in cells))
        console.print(table)
        table = Table("evaluation texts", "texts", "too short", "found", "first found in", box=None)
        for name, file in report["against"].items():
            first = next((f"{one['source']} {one['number']}: {one['excerpt'][:40]!r}" for one in file["examples"]), "")
            table.add_row(Text(name), *(f"{file[key]:,}" for key in ("texts", "too_short", "found")), Text(first))
        console.print(table)
    for name, kept in read(KEPT_FILE).get("sources", {}).items():
        line = f"{name}: {kept['kept']:,} of {kept['pairs']:,} pairs kept by the scores of {kept['model']}"
        console.print(Text(line + (f", {kept['too_long']:,} too long" if kept["too_long"] else "")))
        for which in ("best", "worst"):
            for one in kept[which][:1]:
                shown = " ".join(f"{one['x'][-60:]} -> {one['y'][:60]}".split())
                console.print(Text(f"  {which} dropped ({one['pmi']:.2f}): {shown}"))
