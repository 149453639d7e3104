"""What a run's weights are at first: of its checkpoint, or drawn from its seed, each as a pure function of its name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..protocol import architecture
from ..protocol.architecture import INIT_STD, LORA_A, LORA_B
from ..protocol.config import ModelConfig
from ..protocol.schedule import draw
from .weights import Beginning


@torch.no_grad()
def fill(name: str, out: Tensor, seed: int, beginning: Beginning | None) -> None:
    """Writes a tensor's first values, of any float dtype.

    An adapter's B is zero, so that the model is its base at first; A's numbers have the variance that the authors of
    LoRA take, 1 / (3 in).
    """
    if name.endswith(LORA_B):
        out.zero_()
    elif name.endswith(LORA_A):
        out.copy_(_drawn(name, out, seed).mul_(1 / math.sqrt(3 * out.shape[1])))
    elif beginning is not None:
        beginning.fill(name, out)
    elif name.endswith("bias"):
        out.zero_()
    elif out.dim() == 1:  # of a norm
        out.fill_(1.0)
    else:
        out.copy_(_drawn(name, out, seed).mul_(INIT_STD))


def initial(
    model: ModelConfig, vocab_size: int, first: int, last: int, seed: int, beginning: Beginning | None
) -> Tensor:
    """The first reference of layers [first, last), fp32 [n]: of what is trained, without the model around it."""
    shapes = architecture.trained_tensors(model, vocab_size, first, last)
    out, start = torch.empty(architecture.weights(shapes)), 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        fill(name, out[start:end].view(shape), seed, beginning)
        start = end
    return out


def _drawn(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(seed, "init", name) % 2**63)
    return bell_shaped(like.numel(), generator).view(like.shape)


def bell_shaped(n: int, generator: torch.Generator) -> Tensor:
    """n numbers of mean 0 and variance 1, near to normal (a sum of four uniform ones), float32.

    Made of integers: ``normal_`` has other bits on a CPU with AVX than on one without, and all replicas must begin
    with the same.
    """
    out = torch.empty(n)
    for start in range(0, n, 1 << 22):
        part = out[start : start + (1 << 22)]
        total = torch.randint(0, 1 << 16, (4, part.numel()), generator=generator).sum(0)
        part.copy_(total.sub_(2 * ((1 << 16) - 1)))
    return out.mul_((3.0 / 4.0) ** 0.5 / (1 << 15))  # the sum's variance is 4 (2^32 - 1) / 12
