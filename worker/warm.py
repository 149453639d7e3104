"""Compiles a run's codecs before the first step needs them: seconds once in a machine's life, then they are on disk.

Workers that start side by side take turns: the first one compiles, the others find what it made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs
import torch

from ..compression.feedback import ErrorFeedback
from ..compression.mask import Mask
from ..compression.mean import weighted_mean
from ..compression.registry import build
from ..protocol.config import RunConfig
from .shards import codec_of

LOCK_SECONDS = 120.0  # then everybody compiles for himself


def warm(config: RunConfig) -> None:
    """Runs every codec of ``config`` once, on a few numbers."""
    with one_at_a_time(Path(platformdirs.user_cache_dir("potluck", appauthor=False))):
        x = torch.linspace(-1.0, 1.0, 4096).view(4, 1024)
        for spec in {config.activations.forward, config.activations.backward}:
            codec = build(spec)
            codec.decode(codec.encode(x), x.shape)
        sync = config.sync.resolved()
        values, mask, codec_of_round = x.view(-1), Mask(4096, sync.density, 0), codec_of(sync)
        encoded = codec_of_round.encode(mask.gather(values).clone())
        sent = codec_of_round.decode(encoded.payload, mask.count)
        mean = weighted_mean([(sent, 1), (encoded.sent, 2)], mask.count)
        feedback = ErrorFeedback(4096)
        for _ in range(2):
            owed = feedback.compensated(mask, mean)
            feedback.keep(mask, owed, sent)
        mask.put(values.clone(), sent.dense(mask.count))


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A lock among the processes of this user; none where ``folder`` cannot be written, or it takes too long."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, filelock.Timeout):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(folder / "kernels.lock", timeout=LOCK_SECONDS))
        yield
