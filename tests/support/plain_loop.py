"""What a run must equal: the plain PyTorch loop over a stock model, in one process."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from potluck.protocol.config import RunConfig
from potluck.protocol.manifest import Manifest
from potluck.worker.data import Dataset
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule, hf_config
from potluck.worker.stage import learning_rate


def stock_model(config: RunConfig, manifest: Manifest) -> PreTrainedModel:
    """Transformers' own model with the run's initial weights."""
    described = hf_config(config.model, manifest.vocab_size, manifest.eos_id)
    model = AutoModelForCausalLM.from_config(described, attn_implementation=described._attn_implementation)
    whole = StageModule(config.model, manifest.vocab_size, 0, config.model.layers, config.seed)
    model.load_state_dict(whole.state_dict())
    return model


def adamw(model: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    c = config.optimizer
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=c.lr,
        betas=(c.beta1, c.beta2),
        eps=c.eps,
        weight_decay=c.weight_decay,
        fused=True,
    )


def spelled_out(layout: Layout) -> dict[str, torch.Tensor]:
    """What stock transformers needs to see of a layout what we see: an additive mask, and every token's place."""
    may = layout.mask()
    mask = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)
    return {"attention_mask": mask, "position_ids": layout.positions()}


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, data: Dataset, config: RunConfig, step: int, start: int
) -> tuple[float, int]:
    """One ordinary step over the microbatches from sample ``start`` on; (summed loss, targets)."""
    size, loss_sum, targets = config.pipeline.microbatch_size, 0.0, 0
    optimizer.zero_grad()
    for m in range(config.pipeline.microbatches):
        first = start + m * size
        inputs_BT, targets_BT, layout = data.batch(range(first, first + size), config.seed)
        seen = {} if layout is None else spelled_out(layout)
        logits = model(inputs_BT, use_cache=False, **seen).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        loss.backward()
        loss_sum += float(loss.detach())
        targets += int((targets_BT >= 0).sum())
    for p in model.parameters():
        if p.requires_grad:
            p.grad.div_(targets)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, config.steps, step)
    optimizer.step()
    return loss_sum, targets
