"""A stage's part of GPT-J, built from transformers' own blocks under the names a checkpoint uses.

Shape letters: B samples, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTJConfig
from transformers.models.gptj.modeling_gptj import GPTJBlock

from ..protocol.config import ModelConfig
from ..protocol.schedule import draw
from .packing import IGNORED as IGNORED

INIT_STD = 0.02  # GPT-J's initializer_range


def hf_config(model: ModelConfig, vocab_size: int, eos_id: int = 0) -> GPTJConfig:
    """The transformers configuration of this shape, as a published checkpoint carries it."""
    return GPTJConfig(
        vocab_size=vocab_size,
        n_positions=model.seq_len,
        n_embd=model.d_model,
        n_layer=model.layers,
        n_head=model.heads,
        rotary_dim=model.rotary_dim,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


class StageModule(nn.Module):
    """Layers [first, last) of GPT-J, with the embedding before layer 0 and the head after the last layer.

    Parameter names equal those of ``GPTJForCausalLM``, so the stages' state dicts together are a checkpoint.
    Every parameter is drawn from a seed of its own (run seed and name): any peer can make any layer.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, first: int, last: int, seed: int) -> None:
        super().__init__()
        config = hf_config(model, vocab_size)
        self.is_first, self.is_last = first == 0, last == model.layers
        self.transformer = nn.ModuleDict()
        if self.is_first:
            self.transformer["wte"] = nn.Embedding(vocab_size, model.d_model)
        self.blocks = [GPTJBlock(config, layer_idx=i) for i in range(first, last)]
        self.transformer["h"] = nn.ModuleDict(
            {str(i): block for i, block in zip(range(first, last), self.blocks, strict=True)}
        )
        if self.is_last:
            self.transformer["ln_f"] = nn.LayerNorm(model.d_model, eps=config.layer_norm_epsilon)
            self.lm_head = nn.Linear(model.d_model, vocab_size)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(draw(seed, "init", name) % 2**63)
                parameter.copy_(bell_shaped(parameter.numel(), generator).view(parameter.shape).mul_(INIT_STD))

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [B, T] (first stage) or hidden states [B, T, D] to hidden states [B, T, D].

        The last stage's output is normalized (``ln_f``) but not yet projected: see :meth:`logits`.
        """
        hidden_BTD = self.transformer["wte"](x) if self.is_first else x
        mask, positions = causal_mask(hidden_BTD.shape[1], hidden_BTD.device)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, attention_mask=mask, position_ids=positions)[0]
        return self.transformer["ln_f"](hidden_BTD) if self.is_last else hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Last stage only: normalized hidden states to logits [B, T, V]."""
        return self.lm_head(hidden_BTD)

    def loss_sum(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy summed over the targets that are not ``IGNORED``; a scalar in fp32."""
        logits = self.logits(hidden_BTD).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


@functools.lru_cache(maxsize=8)
def causal_mask(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Additive mask [1, 1, T, T] (0 = may look, the smallest float = may not) and position ids [1, T]."""
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(length, length, device=device).masked_fill(future, torch.finfo(torch.float32).min)
    return mask[None, None], torch.arange(length, device=device)[None]


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
