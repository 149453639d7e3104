"""Evaluations beside the checkpoints of a run: written into their folders, and made as they are published."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ...protocol.errors import PotluckError, StateError
from ...protocol.evaluation import CHECKPOINTS, MOST_NBYTES, file_name, step_of
from .report import Evaluation


class Checkpoint(NamedTuple):
    """A published model of a run. ``inode``: of its folder, which another one has when the step is published anew."""

    folder: Path
    step: int
    inode: int

    @property
    def is_there(self) -> bool:
        """Whether the folder is still the one that was found."""
        return checkpoint(self.folder) == self


def checkpoint(folder: Path) -> Checkpoint | None:
    """``folder`` as a published step of a run; None if it does not look like one."""
    with contextlib.suppress(OSError):
        place = folder.absolute()
        if (step := step_of(place)) is not None:
            return Checkpoint(place, step, place.stat().st_ino)
    return None


def of_run(found: Evaluation, at: Checkpoint) -> Evaluation:
    """``found`` as a result of the run's step: named by it, for whoever gets the folder need not know its path here."""
    return msgspec.structs.replace(found, step=at.step, model=at.folder.name)


def keep(found: Evaluation, at: Checkpoint) -> Path:
    """Writes ``found`` into the checkpoint's folder, whole or not at all, and returns the file.

    Without the rows if it is too large for a coordinator to read with them. Raises ``StateError`` (code ``anew``) when
    the step was published anew meanwhile, for then these are not its weights.
    """
    data = found.encode()
    if len(data) > MOST_NBYTES:
        data = found.without_rows().encode()
    target = at.folder / file_name(found.suite)
    unfinished = at.folder / f".{target.name}.{os.getpid()}"
    if not at.is_there:
        raise StateError(f"step {at.step} was published anew meanwhile", hint="Evaluate it again.", code="anew")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise StateError(
            f"cannot write {target}: {error.strerror}", hint="Mend the folder's rights, or free some space."
        ) from error
    return target


def published(run: Path) -> Iterator[Checkpoint]:
    """Every published step in a run's folder, the first ones first."""
    with contextlib.suppress(OSError):
        found = (checkpoint(folder) for folder in (run / CHECKPOINTS).iterdir())
        yield from sorted((at for at in found if at), key=lambda at: at.step)


class Watch:
    """Evaluates what a run publishes, each step once for each suite: a file of the suite says that it is done."""

    def __init__(
        self,
        run: Path,
        suite: str,
        evaluate: Callable[[Path], Evaluation],
        *,
        finished: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.run, self.suite = run, suite
        self._evaluate, self._finished, self._say = evaluate, finished, say
        self._passed: set[Checkpoint] = set()
        self.evaluated = 0

    def until_finished(self, pause: Callable[[], None]) -> None:
        """Goes on until the run is finished and all of it is evaluated; ``pause`` waits between two looks."""
        idle = False
        while True:
            over = self._finished()  # asked first, so that the last model is not missed
            if todo := self.todo():
                idle = False
                self.one(todo[0])
                continue
            if over:
                return
            if not idle:
                self._say("waiting for the next checkpoint")
                idle = True
            pause()

    def todo(self) -> list[Checkpoint]:
        """What is published and has no result of the suite, the first steps first."""
        todo = []
        for at in published(self.run):
            if not (at.folder / file_name(self.suite)).exists():
                todo.append(at)
            elif at not in self._passed:
                self._passed.add(at)
                self._say(f"step {at.step}: is evaluated already, see {at.folder / file_name(self.suite)}")
        return todo

    def one(self, at: Checkpoint) -> None:
        """Evaluates a checkpoint. Errors count for nothing if it was published anew meanwhile."""
        self._say(f"step {at.step}: evaluating")
        began = time.monotonic()
        try:
            found = of_run(self._evaluate(at.folder), at)
            target = keep(found, at)
        except PotluckError:
            if at.is_there:
                raise
            self._say(f"step {at.step}: was published anew meanwhile, again")
            return
        self._passed.add(at)
        self.evaluated += 1
        self._say(f"step {at.step}: {headline(found)}; took {time.monotonic() - began:.0f} s; {target}")


def headline(found: Evaluation) -> str:
    """The mean, or else every score, in one line."""
    if mean := found.mean:
        return f"mean macro-f1 {mean.value:.3f} ({mean.low:.3f} … {mean.high:.3f})"
    scores = [f"{task.name} {task.metric} {task.score.value:.3f}" for task in found.tasks if task.score]
    return ", ".join(scores) or "no task has a score"
