"""potluck's model and optimizer for the other systems, with pieces that take as long as the task's machine would.

Shape letters: B samples, T positions, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potluck.protocol.config import ModelConfig, RunConfig
from potluck.protocol.plan import Shape
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule
from potluck.worker.stage import learning_rate

from .pace import Pace
from .record import interface_of
from .rounds import places
from .task import Host


class _Mark(torch.autograd.Function):
    """The identity that tells when forward, and when backward, comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[], None], backward: Callable[[], None]) -> Tensor:
        ctx.pass_by = backward
        forward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.pass_by()
        return gradients[0], None, None


class Part(StageModule):
    """Layers [first, last) with the run's own first weights, paced piece by piece, forward and backward."""

    def __init__(self, run: RunConfig, vocab_size: int, first: int, last: int, pace: Pace) -> None:
        super().__init__(run.model, vocab_size, first, last, run.seed)
        self.pace, self.microbatch_size = pace, run.pipeline.microbatch_size
        self.block_share, self.head_share = shares(run.model, vocab_size)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Token ids [B, T] or hidden states [B, T, D] to hidden states [B, T, D], as :class:`StageModule` has it."""
        pace, work = self.pace, self.block_share * self._microbatches(x)
        pace.start()
        hidden_BTD = self.embedded(x)
        view = self.view(hidden_BTD, layout)
        for block in self.blocks:
            hidden_BTD = _Mark.apply(hidden_BTD, _nothing, lambda: pace.finish(work * (1 - pace.FORWARD)))
            hidden_BTD = block(hidden_BTD, view)
            pace.finish(work * pace.FORWARD)
        if self.is_last:
            return self.normalized(hidden_BTD)
        return _Mark.apply(hidden_BTD, _nothing, pace.start)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        pace, work = self.pace, self.head_share * self._microbatches(hidden_BTD)
        hidden_BTD = _Mark.apply(hidden_BTD, _nothing, lambda: pace.finish(work * (1 - pace.FORWARD)))
        logits = super().logits(hidden_BTD)
        pace.finish(work * pace.FORWARD)
        return _Mark.apply(logits, _nothing, pace.start)

    def _microbatches(self, x: Tensor) -> float:
        """How many microbatches' samples are in a batch."""
        return x.shape[0] / self.microbatch_size


class Whole(Part):
    """The whole model: ids and targets [B, T] to the mean loss in nats per token."""

    def __init__(self, run: RunConfig, vocab_size: int, pace: Pace) -> None:
        super().__init__(run, vocab_size, 0, run.model.layers, pace)

    def forward(self, x: Tensor, targets_BT: Tensor) -> Tensor:  # type: ignore[override]
        return self.loss_sum(super().forward(x), targets_BT) / targets_BT.numel()


def _nothing() -> None:
    pass


def shares(model: ModelConfig, vocab_size: int) -> tuple[float, float]:
    """A block's and the output head's share of the whole model's work, as :class:`Shape` counts it."""
    shape = Shape.of(model, vocab_size)
    total = shape.work(0, model.layers)
    return shape.block_work / total, shape.head_work / total


def adamw(parameters: Iterable[Tensor], run: RunConfig) -> torch.optim.AdamW:
    c = run.optimizer
    return torch.optim.AdamW(
        parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, run: RunConfig, update: int) -> None:
    """The run's learning rate for the ``update``-th optimizer update (0-based)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.optimizer, run.steps, update)


class Sketch:
    """The few values that are shown after a round, see rounds.py: of tensors of the same shapes every time."""

    def __init__(self, like: Iterable[Tensor]) -> None:
        ends = np.cumsum([t.numel() for t in like])
        chosen = places(int(ends[-1]))
        which = np.searchsorted(ends, chosen, side="right")
        starts = np.concatenate([[0], ends[:-1]])[which]
        self._at = list(zip(which.tolist(), (chosen - starts).tolist(), strict=True))

    def __call__(self, tensors: Iterable[Tensor]) -> list[float]:
        flat = [t.detach().reshape(-1) for t in tensors]
        return [float(flat[i][place]) for i, place in self._at]


def snapshot(host: Host, step: int, samples: int, weights: Mapping[str, Tensor], part: int = 0, parts: int = 1) -> None:
    """Leaves weights, by checkpoint name, for the judge; the clock stands still while they are written."""
    from safetensors.torch import save_file

    at = host.progress.time
    with host.progress.paused():
        path = host.out.with_name(f"{host.out.stem}-{step}.safetensors")
        save_file({name: t.detach().contiguous().clone() for name, t in weights.items()}, path)
    host.progress.say("snapshot", step=step, samples=samples, trained=at, file=str(path), part=part, parts=parts)


def rendezvous(host: Host) -> torch.distributed.TCPStore:
    """Where ranks find each other before the clock starts: rank 0's store. One compute thread a host from here on."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(host.address)  # otherwise gloo takes what the host's name says
    patience = timedelta(seconds=host.task.seconds) + timedelta(hours=1)
    return torch.distributed.TCPStore(host.peers[0], host.port, is_master=host.rank == 0, timeout=patience)


def begin(host: Host, store: torch.distributed.Store) -> None:
    """All together: nobody's clock starts before everybody is ready."""
    store.set(f"ready/{host.rank}", "1")
    store.wait([f"ready/{rank}" for rank in range(host.world)])
    host.progress.begin()


def end(host: Host, store: torch.distributed.Store) -> None:
    """Says so, and waits for the others: who is behind may need them, and everybody needs rank 0's store."""
    host.progress.say("end", paused=host.progress.paused_seconds)
    store.set(f"done/{host.rank}", "1")
    store.wait([f"done/{rank}" for rank in range(host.world)])
    store.set(f"left/{host.rank}", "1")
    if host.rank == 0:
        store.wait([f"left/{rank}" for rank in range(host.world)])
