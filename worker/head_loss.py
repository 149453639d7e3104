"""The loss and its gradient without all logits at once: one part of the positions after the other.

As each part's logits are there, so is their gradient; it goes into the hidden states' and the head's at once, and the
logits are let go of (Liger Kernel, arXiv 2410.10989). Letters in shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocol.footprint import LOGITS_PART_NBYTES
from .packing import IGNORED


def loss_in_parts(hidden_BTD: Tensor, head: nn.Linear, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of the head's logits summed over the targets that are not ``IGNORED``; a scalar in fp32."""
    flat_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    loss: Tensor = _Loss.apply(flat_ND, head.weight, head.bias, targets_N, torch.is_grad_enabled())
    return loss


class _Loss(torch.autograd.Function):
    """Makes the gradients in forward, for a loss that counts once; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, wanted: bool
    ) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        inputs = zip((hidden_ND, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        grads = [torch.zeros_like(t) if wanted and t is not None and needed else None for t, needed in inputs]
        of_hidden_ND, of_weight_VD, of_bias_V = grads
        part = max(1, LOGITS_PART_NBYTES // (4 * weight_VD.shape[0]))
        for start in range(0, len(hidden_ND), part):
            here = slice(start, start + part)
            logs_PV = F.log_softmax(F.linear(hidden_ND[here], weight_VD, bias_V), dim=-1, dtype=torch.float32)
            counts_P1 = (targets_N[here] != IGNORED)[:, None]
            wanted_P1 = targets_N[here].clamp_min(0)[:, None]
            total -= (logs_PV.gather(1, wanted_P1) * counts_P1).sum()
            if all(grad is None for grad in grads):
                continue
            exact_PV = logs_PV.exp_()
            exact_PV.scatter_add_(1, wanted_P1, torch.full_like(wanted_P1, -1.0, dtype=torch.float32))
            grad_PV = exact_PV.mul_(counts_P1).to(hidden_ND.dtype)
            if of_hidden_ND is not None:
                torch.mm(grad_PV, weight_VD, out=of_hidden_ND[here])
            if of_weight_VD is not None:
                of_weight_VD.addmm_(grad_PV.T, hidden_ND[here])
            if of_bias_V is not None:
                of_bias_V.add_(grad_PV.sum(0))
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(scale.to(g.dtype)) for g in grads), None, None)
