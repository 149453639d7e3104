"""LoRA the plain way: a stock model whose projections are wrapped, as the paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potluck.protocol.config import RunConfig
from potluck.worker.initial import fill

LLAMA = {"architecture": "llama", "kv_heads": 1, "d_ff": 64, "rotary_dim": 0}


def lora(base: str = "fp32", model: dict[str, object] | None = None, **lora: object) -> dict[str, object]:
    """A run's section ``model``. The base is drawn from the seed: in tests nobody hands engines a checkpoint."""
    return {**(model or {}), "train": "lora", "init": "base", "lora": {"rank": 4, "alpha": 12.0, "base": base, **lora}}


class Wrapped(nn.Module):
    """h = W x + B A x alpha / r, W frozen."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + nn.functional.linear(nn.functional.linear(x, self.a) * self.scale, self.b)


def wrap(model: PreTrainedModel, config: RunConfig) -> dict[str, Wrapped]:
    """Freezes a model and wraps the run's targets in it, the A with the run's first values; by module name."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.split(".")[-1] in config.model.targets:
            found[name] = Wrapped(module, config.model.lora.rank, config.model.lora.alpha)
            fill(f"{name}.lora_A.weight", found[name].a, config.seed, None)
            model.set_submodule(name, found[name])
    return found


@torch.no_grad()
def merged(model: PreTrainedModel, wrapped: dict[str, Wrapped]) -> dict[str, Tensor]:
    """The state dict of the model as it was, with what the adapters add."""
    for name, one in wrapped.items():
        one.linear.weight += one.scale * (one.b @ one.a)
        model.set_submodule(name, one.linear)
    return dict(model.state_dict())
