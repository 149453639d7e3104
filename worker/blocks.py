"""The blocks of each architecture: transformers' own, given what is the same for all blocks of a forward pass once.

Parameter names are those of transformers. Shape letters: B samples, H heads, T positions, D width, K width of a head,
R rotated dimensions of a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTJConfig, LlamaConfig, PreTrainedConfig
from transformers.models.gptj.modeling_gptj import GPTJMLP, create_sinusoidal_positions, rotate_every_two
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from ..protocol.config import ModelConfig
from .layout import Layout


class View(NamedTuple):
    """What the blocks of a forward pass share. ``mask``: added to the attention scores, [B, 1, T, T], 0 or -inf; None:
    causal. ``sin``, ``cos``: of the rotation, [1 or B, T, R]. All of the hidden states' dtype."""

    mask: Tensor | None
    sin: Tensor
    cos: Tensor


class GPTJAttention(nn.Module):
    """As transformers' ``GPTJAttention``, which has no fused attention: that of torch, with any mask."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, self.heads, self.rotary_dim = model.d_model, model.heads, model.rotary_dim
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, hidden_BTD: Tensor, view: View) -> Tensor:
        q, k, v = (p(hidden_BTD).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotated(q, view), self._rotated(k, view)
        out_BHTK = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), view.mask)
        return self.out_proj(out_BHTK.transpose(1, 2).flatten(2))

    def _rotated(self, x_BTHK: Tensor, view: View) -> Tensor:
        turned, rest = x_BTHK[..., : self.rotary_dim], x_BTHK[..., self.rotary_dim :]
        turned = turned * view.cos[:, :, None] + rotate_every_two(turned) * view.sin[:, :, None]
        return torch.cat([turned, rest], dim=-1)


class GPTJBlock(nn.Module):
    """Attention and MLP side by side, after one norm."""

    def __init__(self, model: ModelConfig, config: GPTJConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(model.d_model, eps=model.norm_eps)
        self.attn = GPTJAttention(model)
        self.mlp = GPTJMLP(model.d_ff, config)

    def forward(self, hidden_BTD: Tensor, view: View) -> Tensor:
        normed = self.ln_1(hidden_BTD)
        return self.attn(normed, view) + self.mlp(normed) + hidden_BTD


class LlamaBlock(LlamaDecoderLayer):
    """transformers' own: with ``sdpa`` it takes the mask, or None for causal, as it is."""

    def forward(self, hidden_BTD: Tensor, view: View) -> Tensor:
        return super().forward(hidden_BTD, attention_mask=view.mask, position_embeddings=(view.cos, view.sin))


def block(model: ModelConfig, config: PreTrainedConfig, index: int) -> nn.Module:
    """Block ``index``: hidden states [B, T, D] and a :class:`View` to hidden states. ``model`` is resolved."""
    if isinstance(config, LlamaConfig):
        return LlamaBlock(config, layer_idx=index)
    return GPTJBlock(model, config)


def final_norm(model: ModelConfig) -> nn.Module:
    if model.architecture == "llama":
        return LlamaRMSNorm(model.d_model, eps=model.norm_eps)
    return nn.LayerNorm(model.d_model, eps=model.norm_eps)


def view_of(model: ModelConfig, hidden_BTD: Tensor, layout: Layout | None) -> View:
    """The view for a batch; without a layout every sequence is one causal document. ``model`` is resolved."""
    sin, cos = (part.to(hidden_BTD.dtype) for part in rotation(model, hidden_BTD.device))
    if layout is None:
        length = hidden_BTD.shape[1]
        return View(None, sin[None, :length], cos[None, :length])
    positions = layout.positions()
    mask = torch.zeros((), dtype=hidden_BTD.dtype, device=hidden_BTD.device)
    return View(torch.where(layout.mask(), mask, float("-inf")), sin[positions], cos[positions])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries, keys and values [B, H, T, K] under an additive mask; None: causal.

    Causal on a CPU it is the arithmetic of transformers' GPT-J, so that a run is the plain loop bit for bit.
    """
    if mask is None and q.device.type == "cpu":
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) / q.shape[-1] ** 0.5
        weights = F.softmax(scores + causal_mask(q.shape[2]), dim=-1)
        return torch.matmul(weights.to(v.dtype), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def causal_mask(length: int) -> Tensor:
    """Additive, on the CPU, float32 [T, T]: 0 = may look, the smallest float = may not."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def rotation(model: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine of every place in a sequence, float32 [seq_len, R] each, in the order that the architecture
    rotates pairs in: GPT-J neighbours, Llama the halves of a head."""
    if model.architecture == "gptj":
        table = create_sinusoidal_positions(model.seq_len, model.rotary_dim)
        sin, cos = (part.repeat_interleave(2, dim=1) for part in table.chunk(2, dim=1))
        return sin.to(device), cos.to(device)
    powers = torch.arange(0, model.rotary_dim, 2, dtype=torch.float32) / model.rotary_dim
    angles = torch.outer(torch.arange(model.seq_len).float(), 1.0 / model.rope_theta**powers).repeat(1, 2)
    return angles.sin().to(device), angles.cos().to(device)
