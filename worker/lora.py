"""Adapters beside a frozen base (LoRA, Hu et al., arXiv 2106.09685), the base's matrices in 4 bits if the run has it so
(QLoRA, Dettmers et al., arXiv 2305.14314).

Shape letters: I what a matrix takes, O what it gives, R rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocol.architecture import is_projection, is_target
from ..protocol.config import ModelConfig
from . import nf4

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ARITHMETIC = {**DTYPES, "mixed": torch.bfloat16}  # of the blocks, by model.dtype


class Fill(Protocol):
    def __call__(self, name: str, out: Tensor) -> None:
        """Writes a tensor's first values."""


class Held(nn.Module):
    """A frozen matrix [O, I]: in 4 bits, or as it is in a float dtype."""

    packed: Tensor  # codes, or the matrix
    scales: Tensor  # of codes

    def __init__(self, values_OI: Tensor, base: str, device: torch.device) -> None:
        """``values_OI``: on the CPU. ``base``: as ``model.lora.base`` has it."""
        super().__init__()
        self.shape, self.is_quantized = values_OI.shape, base == "4bit"
        tensors = nf4.quantized(values_OI) if self.is_quantized else (values_OI.to(DTYPES[base]),)
        for name, tensor in zip(("packed", "scales"), tensors, strict=False):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix in the dtype of the arithmetic."""
        if self.is_quantized:
            return nf4.dequantized(self.packed, self.scales, self.shape, dtype)
        return self.packed.to(dtype)

    def is_of(self, dtype: torch.dtype) -> bool:
        return self.packed.dtype == dtype


class _Product(torch.autograd.Function):
    """The product with a held matrix, which is made for forward and again for backward, and let go of between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Held, bias_O: Tensor | None) -> Tensor:
        ctx.held = held
        return F.linear(x, held.weight(x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.held.weight(gradient.dtype), None, None


class Adapted(nn.Module):
    """In place of a block's ``nn.Linear``: x W' + b, and x A' B' alpha / R where the matrix has adapters."""

    bias: nn.Parameter | None

    def __init__(self, held: Held, bias_O: nn.Parameter | None, model: ModelConfig | None) -> None:
        """``model``: of whose ``lora`` adapters are made, on the CPU and not filled; None: there are none."""
        super().__init__()
        self.held = held
        self.register_parameter("bias", bias_O)
        self.adapts = model is not None
        if model is not None:
            outer, inner = held.shape
            self.scale = model.lora.alpha / model.lora.rank
            self.lora_A = nn.utils.skip_init(nn.Linear, inner, model.lora.rank, bias=False)
            self.lora_B = nn.utils.skip_init(nn.Linear, model.lora.rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.held.is_of(x.dtype):
            out = F.linear(x, self.held.packed, self.bias)
        else:
            out = _Product.apply(x, self.held, self.bias)
        return out + self.lora_B(self.lora_A(x) * self.scale) if self.adapts else out


@torch.no_grad()
def freeze(module: nn.Module, model: ModelConfig, make: Fill, device: torch.device) -> None:
    """Makes a module that was built on the meta device real, tensor by tensor: frozen on ``device``, the blocks'
    matrices as ``model.lora.base`` says and with adapters. ``model`` is resolved."""
    dtype = ARITHMETIC[model.dtype]

    def frozen(name: str, like: Tensor) -> nn.Parameter:
        values = torch.empty(like.shape, dtype=dtype)
        make(name, values)
        return nn.Parameter(values.to(device), requires_grad=False)

    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear) and is_projection(model, weight := f"{name}.weight"):
            values = torch.empty(part.weight.shape)
            make(weight, values)
            held = Held(values, model.lora.base, device)
            bias = None if part.bias is None else frozen(f"{name}.bias", part.bias)
            module.set_submodule(name, Adapted(held, bias, model if is_target(model, weight) else None))
            del values, held
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            root, _, last = name.rpartition(".")
            setattr(module.get_submodule(root), last, frozen(name, parameter))
