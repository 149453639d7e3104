"""``run.yaml``'s section ``model``: the shape of what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .errors import ConfigError
from .sync_config import Section

Architecture = Literal["gptj", "llama"]
GPTJ_ROPE_THETA = 10_000.0  # the only one that GPT-J knows


class ModelConfig(Section, frozen=True, kw_only=True):
    """A shape. The vocabulary's size comes from the tokenizer. 0: what is usual for the architecture."""

    # gptj: attention and MLP side by side, LayerNorm, biases in the MLP and the head. llama: one after the other,
    # RMSNorm, SwiGLU, no biases (SmolLM2, TinyLlama, Llama 2).
    architecture: Architecture = "gptj"
    # A checkpoint that the run begins from: a folder in the hub's layout with safetensors, or a hub's id. Its shape is
    # the run's, so the rest but seq_len may be left out. Empty: weights are drawn from the seed.
    init: Annotated[str, Meta(max_length=1024)] = ""
    d_model: Annotated[int, Meta(ge=8, le=65536)] = 256
    layers: Annotated[int, Meta(ge=1, le=1024)] = 4
    heads: Annotated[int, Meta(ge=1, le=1024)] = 4
    # Heads of keys and values, each for several of queries (grouped-query attention). Usual: as many as heads.
    kv_heads: Annotated[int, Meta(ge=0, le=1024)] = 0
    # Width inside the MLP. Usual: gptj 4 d_model, llama 8/3 d_model, rounded up to a multiple of 256.
    d_ff: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    # Dimensions of a head that are rotated by their place. Usual: gptj half the head, 64 at most; llama all of it.
    rotary_dim: Annotated[int, Meta(ge=0, le=1024)] = 0
    rope_theta: Annotated[float, Meta(ge=0, le=1e12)] = 0.0  # usual: 10,000
    norm_eps: Annotated[float, Meta(ge=0, le=1e-2)] = 0.0  # usual: 1e-5
    seq_len: Annotated[int, Meta(ge=8, le=65536)] = 128
    # Of the weights that train, their gradients and the arithmetic of the blocks. What the replicas share stays fp32,
    # and so does what is published. bf16 halves the memory; updates are rounded by chance (worker/rounding.py).
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    def resolved(self) -> ModelConfig:
        """The same without a 0."""
        llama = self.architecture == "llama"
        return msgspec.structs.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            d_ff=self.d_ff or (-(-8 * self.d_model // (3 * 256)) * 256 if llama else 4 * self.d_model),
            rotary_dim=self.rotary_dim or (self.head_dim if llama else max(2, min(64, self.head_dim // 4 * 2))),
            rope_theta=self.rope_theta or GPTJ_ROPE_THETA,
            norm_eps=self.norm_eps or 1e-5,
        )

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise ConfigError(
                f"model.d_model {self.d_model} is not a multiple of model.heads {self.heads}",
                hint="Change one of the two.",
            )
        if self.architecture == "llama":
            self._check_llama()
        else:
            self._check_gptj()

    def _check_gptj(self) -> None:
        if self.head_dim < 2 or self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ConfigError(
                f"model.rotary_dim {self.rotary_dim or 2} must be even and at most d_model / heads = {self.head_dim}",
                hint="Lower model.rotary_dim." if self.head_dim > 1 else "Lower model.heads.",
            )
        if self.kv_heads not in (0, self.heads):
            raise ConfigError(
                f"model.kv_heads {self.kv_heads}: GPT-J has as many heads of keys and values as model.heads",
                hint="Leave model.kv_heads out, or take model.architecture: llama.",
            )
        if self.rope_theta not in (0, GPTJ_ROPE_THETA):
            raise ConfigError(
                f"model.rope_theta {self.rope_theta:g}: GPT-J has {GPTJ_ROPE_THETA:g}",
                hint="Leave model.rope_theta out, or take model.architecture: llama.",
            )

    def _check_llama(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(
                f"model.d_model / model.heads = {self.head_dim} must be even: Llama rotates pairs",
                hint="Change one of the two.",
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}",
                hint="Change one of the two.",
            )
        if self.rotary_dim not in (0, self.head_dim):
            raise ConfigError(
                f"model.rotary_dim {self.rotary_dim}: Llama rotates the whole head, d_model / heads = {self.head_dim}",
                hint="Leave model.rotary_dim out.",
            )
