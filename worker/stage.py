"""What a replica owns: its layers' weights as one flat vector, the shared reference, and its local AdamW.

``x`` are the weights that train, ``g`` the reference that all replicas of the stage share bit for bit: fp32, and in the
machine's memory where the stage is on a GPU. It is never written to, only replaced, so that a :class:`State` may hold
it without a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..protocol.config import OptimizerConfig, RunConfig
from ..protocol.footprint import recomputes
from ..protocol.plan import SavePoint, Shape
from ..protocol.schedule import draw
from .initial import initial
from .lora import ARITHMETIC
from .model import StageModule
from .moments import Moment, Moments32, moments
from .rounding import round_into
from .shards import layout
from .weights import Beginning

PART = {
    "cpu": 1 << 20,
    "cuda": 1 << 22,
}  # weights updated at a time, where they need a copy in fp32; of Moments' blocks


@dataclass(frozen=True, kw_only=True)
class Owned:
    """Which weights an owner answers for: shard ``replica`` of ``replicas`` in each of ``fragments`` fragments."""

    fragments: int
    replicas: int
    replica: int

    def shards(self, n: int) -> list[tuple[int, int]]:
        """[start, end) of each, in the order of their pieces' numbers, in a stage of n weights."""
        pieces = layout(n, self.fragments, self.replicas)
        return [piece.shards[self.replica] for fragment in pieces for piece in fragment]


@dataclass(frozen=True, kw_only=True)
class State:
    """A stage at rest. All vectors are of length n, and never written to once they are in a ``State``, except by the
    round that makes a new one of it. They are fp32, but for ``x`` in ``model.dtype`` and moments in 8 bits.

    ``x``, ``unsent``, ``feedback`` and ``pending`` are this replica's own; the rest is what a newcomer needs.
    Without ``m`` and ``v`` (nobody who trained them is left) the moments begin anew at zero: AdamW corrects its bias
    from there, and the learning rate goes on by the run's steps.
    """

    point: SavePoint
    g: Tensor
    m: Moment | None
    v: Moment | None
    updates: int  # optimizer updates behind m and v
    x: Tensor | None = None  # None: equal to g
    momentum: Tensor | None = None  # of the outer optimizer
    unsent: Tensor | None = None  # what explicit feedback keeps beside the weights
    feedback: tuple[Tensor | None, ...] = ()  # what an owner still owes, shard by shard; None: nothing
    owned: Owned | None = None  # those shards
    pending: int = 0  # samples since the last round

    def shared(self) -> State:
        """Without what only its maker may use."""
        return replace(self, x=None, unsent=None, feedback=(), owned=None, pending=0)


def initial_state(config: RunConfig, vocab_size: int, point: SavePoint, beginning: Beginning | None) -> State:
    """What layers are before the first step: as a :class:`Stage` of them would say, without one."""
    g = initial(config.model, vocab_size, point.first_layer, point.last_layer, config.seed, beginning)
    return State(point=point, g=g, m=torch.zeros_like(g), v=torch.zeros_like(g), updates=0)


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

    Parameters that are trained are views into ``x`` and their gradients views into ``grad``, both of ``model.dtype``,
    so that a round sees one vector. With one replica, fp32 and a round every step this is plain AdamW. If the dtype is
    mixed, ``x`` is fp32, and the parameters are views into ``low``, which is the nearest bf16 (master weights:
    Micikevicius et al., arXiv 1710.03740).
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
        self.module = StageModule(config.model, vocab_size, first, last, config.seed, beginning, device)
        self.module.recomputes = recomputes(config, vocab_size, first, last, self.device.type)
        parameters = [p for _, p in self.module.trained()]
        n = sum(p.numel() for p in parameters)
        dtype, is_mixed = ARITHMETIC[config.model.dtype], config.model.dtype == "mixed"
        self.x = torch.zeros(n, dtype=torch.float32 if is_mixed else dtype, device=self.device)
        self.low = torch.zeros(n, dtype=dtype, device=self.device) if is_mixed else None
        self.grad = torch.zeros(n, dtype=dtype, device=self.device)
        self.g = torch.empty(n)
        self.moments = moments(config.optimizer, n, self.device)
        self.momentum: Tensor | None = None
        self.unsent: Tensor | None = None
        self.updates = 0  # behind the moments
        self.steps = 0  # of the run: what the learning rate goes by
        start = 0
        for p in parameters:
            window = slice(start, start + p.numel())
            self.g[window] = p.detach().flatten()
            for held in (self.x, self._used):
                held[window] = self.g[window]
            p.data = self._used[window].view(p.shape)
            p.grad = self.grad[window].view(p.shape)
            start += p.numel()
        self.place_in_model = Shape.of(config.model, vocab_size).start(first)  # of the first weight in the model
        self._optimizer = self._adamw(parameters) if config.model.dtype == "fp32" else None

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW | None:
        """torch's own, on the moments' vectors: updates each tensor as it is."""
        if not isinstance(self.moments, Moments32):
            return None
        c = self.config.optimizer
        optimizer = torch.optim.AdamW(
            parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        start = 0
        for p in parameters:
            window = slice(start, start + p.numel())
            optimizer.state[p] = {
                "step": torch.zeros((), device=self.device if self.device.type == "cuda" else "cpu"),
                "exp_avg": self.moments.m[window].view(p.shape),
                "exp_avg_sq": self.moments.v[window].view(p.shape),
            }
            start += p.numel()
        return optimizer

    @property
    def _used(self) -> Tensor:
        """What the blocks compute with."""
        return self.x if self.low is None else self.low

    @property
    def size(self) -> int:
        return self.x.numel()

    @torch.no_grad()
    def update(self, targets: int) -> None:
        """One AdamW update with the gradient of the mean loss over ``targets``, then a cleared gradient."""
        rate = learning_rate(self.config.optimizer, self.config.steps, self.steps)
        if self.updates < self.steps:  # moments that began anew: their first updates are as large as at a run's start
            rate *= min(1.0, (self.updates + 1) / max(1, self.config.optimizer.warmup_steps))
        if self._optimizer is not None:
            self.grad.div_(max(1, targets))
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        else:
            for here in self._parts():
                weights, grad = self.x[here].float(), self.grad[here].float().div_(max(1, targets))
                self.moments.step(weights, grad, here.start, rate=rate, update=self.updates + 1)
                self._put(here, weights, "update")
        self.updates += 1
        self.steps += 1
        self.grad.zero_()

    def place(self, weights: Tensor) -> None:
        """Makes these, [n] on any device, the weights that train."""
        for here in self._parts():
            self._put(here, weights[here].to(self.device, torch.float32), "round")

    def shift(self, start: int, by: Tensor) -> None:
        """Adds to the weights that train, from the one at ``start`` on; fp32 [k] on any device."""
        for part in self._parts(by.numel()):
            here = slice(start + part.start, start + part.stop)
            self._put(here, self.x[here].float() + by[part].to(self.device), "round")

    @contextlib.contextmanager
    def at_reference(self) -> Iterator[None]:
        """Between updates: the blocks compute with the reference, for as long as it takes. The cleared gradient's
        memory holds what they computed with."""
        self.grad.copy_(self._used)
        self._used.copy_(self.g)
        try:
            yield
        finally:
            self._used.copy_(self.grad)
            self.grad.zero_()

    def _parts(self, size: int | None = None) -> Iterator[slice]:
        """Of ``size`` weights, or of all."""
        size, part = self.size if size is None else size, PART.get(self.device.type, PART["cpu"])
        for start in range(0, size, part):
            yield slice(start, min(size, start + part))

    def _put(self, here: slice, weights: Tensor, what: str) -> None:
        """Writes fp32 weights to ``x``; as bf16 by a chance that the step, what is done in it, and the place decide."""
        key = draw(self.config.seed, "rounding", what, self.steps)
        round_into(self.x[here], weights, key, self.place_in_model + here.start)
        if self.low is not None:
            self.low[here] = weights

    def state(self, point: SavePoint, *, pending: int = 0) -> State:
        """A copy of everything, named by ``point``."""
        m, v = self.moments.copies()
        return State(
            point=point,
            g=self.g,
            x=self.x.detach().to("cpu", copy=True),
            m=m,
            v=v,
            updates=self.updates,
            momentum=None if self.momentum is None else self.momentum.clone(),
            unsent=None if self.unsent is None else self.unsent.clone(),
            pending=pending,
        )

    def load(self, state: State) -> None:
        """Takes over a state made for the same layers."""
        self.g = state.g
        self.x.copy_(state.g if state.x is None else state.x)
        if self.low is not None:
            self.low.copy_(self.x)
        self.moments.load(state.m, state.v)
        self.momentum = None if state.momentum is None else state.momentum.clone()
        self.unsent = None if state.unsent is None else state.unsent.clone()
        self.updates, self.steps = state.updates, state.point.step
        for entry in self._optimizer.state.values() if self._optimizer is not None else ():
            entry["step"].fill_(state.updates)
        self.grad.zero_()

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector as checkpoint tensors, by parameter name; views, on the vector's device."""
        out, start = {}, 0
        for name, p in self.module.trained():
            out[name] = vector[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return out
