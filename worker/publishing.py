"""A stage of a round on its way to the coordinator, who makes a model of all of them: beside the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from ..protocol.errors import PotluckError
from .outside import Headquarters, Views

log = logging.getLogger(__name__)
PAUSE_SECONDS = 0.5  # after an upload that failed


def upload(
    hq: Headquarters, views: Views, step: int, stage: int, generation: int, tensors: Mapping[str, Tensor]
) -> None:
    """Tries until it has arrived, or is not wanted any more: another generation's stages may be others'."""

    def is_wanted() -> bool:
        view, _ = views.newest
        same = view.plan is not None and view.plan.generation == generation
        return same and view.publish == step and not views.closed

    data = safetensors.torch.save(dict(tensors), {"format": "pt"})
    while is_wanted():
        try:
            hq.publish(step, stage, data, is_wanted)
            return
        except PotluckError as error:
            log.warning("publishing step %d: %s", step, error)
            time.sleep(PAUSE_SECONDS)
        except Exception:
            log.exception("publishing step %d failed", step)
            return
