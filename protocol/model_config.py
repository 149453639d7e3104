"""``run.yaml``'s section ``model``: the shape of what is trained."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .errors import ConfigError
from .sync_config import Section

Architecture = Literal["gptj", "llama"]
Precision = Literal["fp32", "mixed", "bf16"]
GPTJ_ROPE_THETA = 10_000.0  # the only one that GPT-J knows
# The matrices in a block, in the order that an adapter for each has in the flat vector, by the names in a checkpoint.
PROJECTIONS = {
    "gptj": ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


class LoraConfig(Section, frozen=True, kw_only=True):
    """Adapters beside a frozen base (Hu et al., arXiv 2106.09685): for a matrix W [out, in], B A alpha / rank is added,
    with A [rank, in] drawn from the seed and B [out, rank] zero at first."""

    rank: Annotated[int, Meta(ge=1, le=4096)] = 16
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 32.0
    # Which matrices of every block: gptj k_proj, v_proj, q_proj, out_proj, fc_in, fc_out; llama q_proj, k_proj, v_proj,
    # o_proj, gate_proj, up_proj, down_proj. Empty: all of them.
    targets: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=16)] = ()
    # What the blocks' matrices are held in: 4bit is NF4 with a scale for every 64 weights (worker/nf4.py), 4.5 bits a
    # weight. Embedding, norms, biases and head are held in the arithmetic's dtype (model.dtype).
    base: Literal["4bit", "bf16", "fp32"] = "4bit"


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
    # full: all weights. lora: adapters only, beside a base that stays as the checkpoint has it. The base is neither
    # exchanged nor saved: every worker gets its own layers' part from the checkpoint. What is published is whole again.
    train: Literal["full", "lora"] = "full"
    lora: LoraConfig = LoraConfig()
    # Of the weights that train, their gradients and the arithmetic of the blocks. What the replicas share stays fp32,
    # and so does what is published. mixed: weights train in fp32, the rest is in bf16; as much memory as fp32, several
    # times as fast on most hardware. bf16 halves the memory; updates are rounded by chance (worker/rounding.py).
    dtype: Precision = "fp32"

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
            lora=msgspec.structs.replace(self.lora, targets=self.targets) if self.train == "lora" else self.lora,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the projections that have adapters, in their order."""
        known = PROJECTIONS[self.architecture]
        return tuple(name for name in known if name in self.lora.targets) or known

    def __post_init__(self) -> None:
        self._check_lora()
        if self.d_model % self.heads:
            raise ConfigError(
                f"model.d_model {self.d_model} is not a multiple of model.heads {self.heads}",
                hint="Change one of the two.",
            )
        if self.architecture == "llama":
            self._check_llama()
        else:
            self._check_gptj()

    def check_targets(self) -> None:
        """``ConfigError`` for a target that the architecture does not have. Called once that is known: where
        ``model.init`` names a checkpoint, ``model.architecture`` may be left out."""
        known = PROJECTIONS[self.architecture]
        if strange := sorted(set(self.lora.targets) - set(known)):
            raise ConfigError(
                f"model.lora.targets: {strange[0]} is no matrix of {self.architecture}'s blocks",
                hint=f"Name some of {', '.join(known)}.",
            )

    def _check_lora(self) -> None:
        known = dict.fromkeys(itertools.chain(*PROJECTIONS.values()))
        if self.train == "full":
            if self.lora != LoraConfig():
                raise ConfigError(
                    "model.lora is set, and model.train is full",
                    hint="Set model.train: lora, or leave model.lora out.",
                )
            return
        if not self.init:
            raise ConfigError(
                "model.train is lora, and there is no base: model.init is empty",
                hint="Name a checkpoint in model.init, or take model.train: full.",
            )
        if strange := sorted(set(self.lora.targets) - set(known)):
            raise ConfigError(
                f"model.lora.targets: {strange[0]} is no matrix of a block", hint=f"Name some of {', '.join(known)}."
            )
        if self.lora.base == "fp32" and self.dtype != "fp32":
            raise ConfigError(
                f"model.lora.base is fp32, and with model.dtype {self.dtype} the blocks compute in bf16",
                hint="Take model.lora.base: bf16, or model.dtype: fp32.",
            )

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
