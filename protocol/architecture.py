"""What the tensors of an architecture are, by name, shape and order, and its ``config.json``: as transformers has them.

The one place that counts weights and work: no torch here. A new architecture is a branch in each function, and its
block in ``worker/blocks.py``. Letters in shapes: D width, V vocabulary, F inside the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from .errors import ConfigError
from .model_config import PROJECTIONS, ModelConfig

INIT_STD = 0.02  # initializer_range of both
TITLES = {"gptj": "GPT-J", "llama": "Llama"}
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"  # as PEFT's checkpoints have them

Shapes = dict[str, tuple[int, ...]]


class Names(NamedTuple):
    """What the parts are called in a checkpoint: ``ROOT.EMBEDDING``, ``ROOT.LAYERS.0``, ``ROOT.NORM``, ``lm_head``."""

    root: str
    embedding: str
    layers: str
    norm: str


NAMES = {
    "gptj": Names("transformer", "wte", "h", "ln_f"),
    "llama": Names("model", "embed_tokens", "layers", "norm"),
}


class Parts(NamedTuple):
    """Tensors of a model in order; those of a block by their names inside it."""

    embedding: Shapes
    block: Shapes
    head: Shapes


def parts(model: ModelConfig, vocab_size: int) -> Parts:
    m, v, names = model.resolved(), vocab_size, NAMES[model.architecture]
    d, f, kv = m.d_model, m.d_ff, m.kv_heads * m.head_dim
    norm, block, head = f"{names.root}.{names.norm}", Shapes(), Shapes()
    if m.architecture == "gptj":
        block |= {"ln_1.weight": (d,), "ln_1.bias": (d,)}
        block |= {f"attn.{name}_proj.weight": (d, d) for name in ("k", "v", "q", "out")}
        block |= {"mlp.fc_in.weight": (f, d), "mlp.fc_in.bias": (f,)}
        block |= {"mlp.fc_out.weight": (d, f), "mlp.fc_out.bias": (d,)}
        head |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,), "lm_head.weight": (v, d), "lm_head.bias": (v,)}
    else:
        block |= {"self_attn.q_proj.weight": (d, d), "self_attn.k_proj.weight": (kv, d)}
        block |= {"self_attn.v_proj.weight": (kv, d), "self_attn.o_proj.weight": (d, d)}
        block |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        block |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        head |= {f"{norm}.weight": (d,), "lm_head.weight": (v, d)}
    return Parts({f"{names.root}.{names.embedding}.weight": (v, d)}, block, head)


def tensors(model: ModelConfig, vocab_size: int, first: int, last: int) -> Shapes:
    """Names and shapes of layers [first, last), with the embedding before layer 0 and the head after the last layer:
    what a stage's part of a checkpoint holds; of a run that trains all of it, in the order of the flat vector."""
    return _named(model, parts(model, vocab_size), first, last)


def _named(model: ModelConfig, found: Parts, first: int, last: int) -> Shapes:
    names = NAMES[model.architecture]
    out = Shapes(found.embedding) if first == 0 else Shapes()
    for i in range(first, last):
        out |= {f"{names.root}.{names.layers}.{i}.{name}": shape for name, shape in found.block.items()}
    return out | found.head if last == model.layers else out


def adapters(model: ModelConfig) -> Shapes:
    """Those of a block, by their names inside it: for each target A [rank, in], then B [out, rank]."""
    out, rank = Shapes(), model.lora.rank
    for name, shape in parts(model, 1).block.items():
        if is_target(model, name):
            root = name.removesuffix(".weight")
            out |= {f"{root}.{LORA_A}": (rank, shape[1]), f"{root}.{LORA_B}": (shape[0], rank)}
    return out


def is_target(model: ModelConfig, name: str) -> bool:
    """Whether a tensor, by its name, is a matrix with adapters."""
    return is_projection(model, name) and name.split(".")[-2] in model.targets


def is_projection(model: ModelConfig, name: str) -> bool:
    """Whether a tensor, by its name, is a matrix in a block."""
    *_, module, kind = name.split(".")
    return kind == "weight" and module in PROJECTIONS[model.architecture]


def trained(model: ModelConfig, vocab_size: int) -> Parts:
    """What is trained of :func:`parts`, and so is in the flat vector: all of it, or the blocks' adapters."""
    return Parts({}, adapters(model), {}) if model.train == "lora" else parts(model, vocab_size)


def trained_tensors(model: ModelConfig, vocab_size: int, first: int, last: int) -> Shapes:
    """Names and shapes of what layers [first, last) train, in the order of the flat vector."""
    return _named(model, trained(model, vocab_size), first, last)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def work(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-adds of a token: every number of a matrix once (of an embedding this is not true: it is looked up)."""
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def of_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The shape that a checkpoint's ``config.json`` says. ``ConfigError`` if it is none that we train."""
    kind = config.get("model_type")
    unknown = [key for key, wanted in _PLAIN.get(str(kind), {}).items() if config.get(key, wanted[0]) not in wanted]
    if kind not in TITLES or unknown:
        what = f"{unknown[0]} {config[unknown[0]]}" if unknown else f"architecture {kind}"
        raise ConfigError(f"the checkpoint has {what}", hint=f"Name one of {' or '.join(TITLES.values())}.")
    try:
        if kind == "gptj":
            shape: dict[str, Any] = {
                "d_model": config["n_embd"],
                "layers": config["n_layer"],
                "heads": config["n_head"],
                "rotary_dim": config["rotary_dim"],
                "d_ff": config.get("n_inner") or 4 * config["n_embd"],
                "norm_eps": config.get("layer_norm_epsilon", 1e-5),
                "seq_len": config["n_positions"],
            }
        else:
            rope = config.get("rope_parameters") or config
            if rope.get("rope_type", "default") != "default":
                raise ConfigError(f"the checkpoint has rope_type {rope['rope_type']}", hint="It is not supported.")
            shape = {
                "d_model": config["hidden_size"],
                "layers": config["num_hidden_layers"],
                "heads": config["num_attention_heads"],
                "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
                "d_ff": config["intermediate_size"],
                "rope_theta": rope.get("rope_theta", 10_000.0),
                "norm_eps": config.get("rms_norm_eps", 1e-6),
                "seq_len": config["max_position_embeddings"],
            }
        if config.get("head_dim") not in (None, shape["d_model"] // shape["heads"]):
            raise ConfigError("the checkpoint's heads have a width of their own", hint="Such a model is not supported.")
        return msgspec.convert({"architecture": kind, **shape}, ModelConfig)
    except (KeyError, TypeError, ZeroDivisionError, msgspec.ValidationError) as error:
        raise ConfigError(f"the checkpoint's config.json is not usable: {error}", hint="Download it again.") from None


# What a config.json may say besides its shape: anything else would be another model.
_PLAIN: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptj": {"activation_function": ("gelu_new",), "tie_word_embeddings": (False,)},
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "pretraining_tp": (1,),
    },
}


def hf_config(model: ModelConfig, vocab_size: int, eos_id: int, *, prefix_lm: bool = False) -> dict[str, Any]:
    """``config.json`` of the whole model. ``prefix_lm``: what stock transformers reads at once, as a prompt or as a
    sequence to be scored, all sees all, and what it generates sees what was before.

    No padding id: transformers would leave that word's embedding out of any later training of a Llama.
    """
    m = model.resolved()
    common = {
        "vocab_size": vocab_size,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": False,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
        "use_cache": True,
        **({"is_causal": False} if prefix_lm else {}),
    }
    if m.architecture == "gptj":
        return {
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "n_positions": m.seq_len,
            "n_embd": m.d_model,
            "n_layer": m.layers,
            "n_head": m.heads,
            "n_inner": m.d_ff,
            "rotary_dim": m.rotary_dim,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "layer_norm_epsilon": m.norm_eps,
            **common,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": m.seq_len,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.d_ff,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "rms_norm_eps": m.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        **common,
    }
