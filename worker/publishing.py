"""A stage of a round on its way to the coordinator, who makes a model of all of them: beside the training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from mmap import mmap
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..protocol.errors import PotluckError
from ..protocol.plan import SavePoint
from .merging import Merging
from .outside import EngineConfig, Headquarters, Views

log = logging.getLogger(__name__)
PAUSE_SECONDS = 0.5  # after an upload that failed


Packed = Callable[[], AbstractContextManager[bytes | mmap]]


def packing(config: EngineConfig, point: SavePoint, tensors: Mapping[str, Tensor], folder: Path) -> Packed:
    """What makes a stage's file of the ``tensors`` that were trained: of themselves, or merged into their base."""
    run = config.run
    if run.model.train == "full":
        return partial(packed, tensors)
    merging = Merging(run.model, config.manifest.vocab_size, point, tensors, config.beginning, run.seed)
    return partial(merging.packed, folder / "published")


@contextlib.contextmanager
def packed(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """A safetensors file in memory."""
    yield safetensors.torch.save(dict(tensors), {"format": "pt"})


def upload(hq: Headquarters, views: Views, step: int, stage: int, generation: int, make: Packed) -> None:
    """Tries until what ``make`` gives has arrived, or is not wanted any more: another generation's stages may be
    others'."""

    def is_wanted() -> bool:
        view, _ = views.newest
        same = view.plan is not None and view.plan.generation == generation
        return same and view.publish == step and not views.closed

    while is_wanted():
        try:
            with make() as data:
                _send(hq, step, stage, data, is_wanted)
            return
        except PotluckError as error:  # of the disk, where it is made in a file
            log.warning("publishing step %d: %s", step, error)
            time.sleep(PAUSE_SECONDS)
        except Exception:
            log.exception("publishing step %d failed", step)
            return


def _send(hq: Headquarters, step: int, stage: int, data: bytes | mmap, is_wanted: Callable[[], bool]) -> None:
    while is_wanted():
        try:
            hq.publish(step, stage, data, is_wanted)
            return
        except PotluckError as error:
            log.warning("publishing step %d: %s", step, error)
            time.sleep(PAUSE_SECONDS)
