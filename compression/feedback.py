"""Error feedback for the owner of a shard: what a lossy message left out is added to the next one.

Invariant, with decay 1: sent + kept = total. Over any number of rounds, the sum of everything sent plus the
buffer equals the sum of everything that was to be sent, up to float32 rounding. (Seide et al., 2014;
Karimireddy et al., 2019.)
"""

import torch
from torch import Tensor

from .mask import Mask
from .sync import Sparse


class ErrorFeedback:
    """The residual of one shard of `n` float32 elements; no memory until something was left out.

    A round concerns the positions of its mask only. `decay` below 1 forgets old residuals (SparseLoCo, arXiv
    2508.15706), and gives up the invariant.
    """

    def __init__(self, n: int, decay: float = 1.0) -> None:
        if n < 0 or not 0.0 <= decay <= 1.0:
            raise ValueError(f"error feedback needs n >= 0 and a decay from 0 to 1, not n={n}, decay={decay}")
        self.n = n
        self.decay = decay
        self._kept: Tensor | None = None

    def compensated(self, mask: Mask, values: Tensor) -> Tensor:
        """`values` [mask.count] plus what earlier rounds left out there: what the codec should be given.

        `values` itself, not a copy, while nothing was left out.
        """
        self._check(mask, values)
        return values if self._kept is None else mask.gather(self._kept) + values

    def keep(self, mask: Mask, compensated: Tensor, sent: Sparse) -> None:
        """Remember `compensated - sent`, decayed, at the mask's positions; others keep what they had.

        Call it once the message counts as sent.
        """
        self._check(mask, compensated)
        left = sent.add_to(compensated.detach().to(torch.float32, copy=True), -1.0)
        if self.decay != 1.0:
            left.mul_(self.decay)
        if mask.count == self.n:
            self._kept = left
            return
        kept = torch.zeros(self.n) if self._kept is None else self._kept.clone()
        mask.put(kept, left)
        self._kept = kept

    def state(self) -> Tensor | None:
        """The buffer for a checkpoint, or None while it is zero. It is replaced, never written to."""
        return self._kept

    def load(self, state: Tensor | None) -> None:
        """Take up the buffer that `state` returned; ValueError if it is of another shard or not finite."""
        if state is not None:
            if state.shape != (self.n,):
                raise ValueError(f"a shard of {self.n} elements was given a state of shape {tuple(state.shape)}")
            if not torch.isfinite(state).all():
                raise ValueError("the residual has infinite or NaN elements")
            state = state.detach().to(torch.float32)
        self._kept = state

    def _check(self, mask: Mask, values: Tensor) -> None:
        if mask.n != self.n:
            raise ValueError(f"a shard of {self.n} elements was given a mask of {mask.n}")
        if values.shape != (mask.count,):
            raise ValueError(f"a mask of {mask.count} positions was given a tensor of shape {tuple(values.shape)}")
