"""What a replica owns: its layers' weights as one flat vector, the shared reference, and its local AdamW.

``x`` are the weights that train, ``g`` the reference that all replicas of the stage share bit for bit. It is never
written to, only replaced, so that a :class:`State` may hold it without a copy.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..protocol.config import OptimizerConfig, RunConfig
from ..protocol.plan import SavePoint
from .model import StageModule
from .weights import Beginning


@dataclass(frozen=True, kw_only=True)
class Owned:
    """Which weights an owner answers for: shard ``replica`` of ``replicas`` in each of ``fragments`` fragments."""

    fragments: int
    replicas: int
    replica: int


@dataclass(frozen=True, kw_only=True)
class State:
    """A stage at rest. All vectors are fp32 of length n and never written to once they are in a ``State``.

    ``x``, ``unsent``, ``feedback`` and ``pending`` are this replica's own; the rest is what a newcomer needs.
    Without ``m`` and ``v`` (nobody who trained them is left) the moments begin anew at zero: AdamW corrects its bias
    from there, and the learning rate goes on by the run's steps.
    """

    point: SavePoint
    g: Tensor
    m: Tensor | None
    v: Tensor | None
    updates: int  # optimizer updates behind m and v
    x: Tensor | None = None  # None: equal to g
    momentum: Tensor | None = None  # of the outer optimizer
    unsent: Tensor | None = None  # what explicit feedback keeps beside the weights
    feedback: Tensor | None = None  # what an owner still owes, of all its shards, in the order of the fragments
    owned: Owned | None = None  # those shards
    pending: int = 0  # samples since the last round

    def shared(self) -> State:
        """Without what only its maker may use."""
        return replace(self, x=None, unsent=None, feedback=None, owned=None, pending=0)


def digest(vector: Tensor) -> bytes:
    """SHA-256 of a flat fp32 vector's bytes."""
    return hashlib.sha256(vector.detach().cpu().contiguous().numpy().data).digest()


def learning_rate(config: OptimizerConfig, steps: int, update: int) -> float:
    """Rate of the ``update``-th optimizer update (0-based): linear warm-up, then constant or cosine to a tenth."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (update - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Stage:
    """Layers [first, last) of a run on one device, ready to train.

    Parameters are views into ``x`` and their gradients views into ``grad``, so that a round sees one vector; AdamW's
    moments are views into ``m`` and ``v``. With one replica and a round every step this is plain AdamW.
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        first: int,
        last: int,
        device: str = "cpu",
        beginning: Beginning | None = None,
    ) -> None:
        self.config, self.first, self.last, self.device = config, first, last, torch.device(device)
        self.vocab_size = vocab_size
        self.module = StageModule(config.model, vocab_size, first, last, config.seed, beginning).to(self.device)
        parameters = list(self.module.parameters())
        n = sum(p.numel() for p in parameters)
        self.x, self.grad, self.m, self.v = (torch.zeros(n, device=self.device) for _ in range(4))
        self.momentum: Tensor | None = None
        self.unsent: Tensor | None = None
        self.updates = 0  # behind the moments
        self.steps = 0  # of the run: what the learning rate goes by
        c = config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        start = 0
        for p in parameters:
            window = slice(start, start + p.numel())
            self.x[window] = p.detach().flatten()
            p.data = self.x[window].view(p.shape)
            p.grad = self.grad[window].view(p.shape)
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=self.device if self.device.type == "cuda" else "cpu"),
                "exp_avg": self.m[window].view(p.shape),
                "exp_avg_sq": self.v[window].view(p.shape),
            }
            start += p.numel()
        self.g = self.x.clone()

    @property
    def size(self) -> int:
        return self.x.numel()

    def update(self, targets: int) -> None:
        """One AdamW update with the gradient of the mean loss over ``targets``, then a cleared gradient."""
        self.grad.div_(max(1, targets))
        rate = learning_rate(self.config.optimizer, self.config.steps, self.steps)
        if self.updates < self.steps:  # moments that began anew: their first updates are as large as at a run's start
            rate *= min(1.0, (self.updates + 1) / max(1, self.config.optimizer.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.updates += 1
        self.steps += 1
        self.grad.zero_()

    def state(self, point: SavePoint, *, pending: int = 0) -> State:
        """A copy of everything, named by ``point``."""

        def copy(vector: Tensor) -> Tensor:
            return vector.detach().to("cpu", copy=True)

        return State(
            point=point,
            g=self.g.detach().cpu(),
            x=copy(self.x),
            m=copy(self.m),
            v=copy(self.v),
            updates=self.updates,
            momentum=None if self.momentum is None else copy(self.momentum),
            unsent=None if self.unsent is None else copy(self.unsent),
            pending=pending,
        )

    def load(self, state: State) -> None:
        """Takes over a state made for the same layers."""
        self.g = state.g.to(self.device)
        self.x.copy_(state.g if state.x is None else state.x)
        for own, kept in ((self.m, state.m), (self.v, state.v)):
            own.zero_() if kept is None else own.copy_(kept)
        self.momentum = None if state.momentum is None else state.momentum.to(self.device, copy=True)
        self.unsent = None if state.unsent is None else state.unsent.to(self.device, copy=True)
        self.updates, self.steps = state.updates, state.point.step
        for entry in self.optimizer.state.values():
            entry["step"].fill_(state.updates)
        self.grad.zero_()

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector as checkpoint tensors, by parameter name; views, on the vector's device."""
        out, start = {}, 0
        for name, p in self.module.named_parameters():
            out[name] = vector[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return out
