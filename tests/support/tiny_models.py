"""Tiny random models with a byte tokenizer, saved as a published folder is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 256


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, in byte-level spelling, and an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


def build(kind: str, *, prefix: bool, seed: int = 0):
    """A GPT-J or Llama of two layers with weights large enough that its attention matters."""
    torch.manual_seed(seed)
    common = {"vocab_size": 257, "initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 256}
    if kind == "gptj":
        model = GPTJForCausalLM(
            GPTJConfig(
                n_embd=32,
                n_layer=2,
                n_head=2,
                rotary_dim=8,
                n_positions=POSITIONS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=POSITIONS,
                attn_implementation="sdpa",
                **common,
            )
        )
    if prefix:
        model.config.is_causal = False
    return model.eval()


def save(folder: Path, kind: str, *, prefix: bool, seed: int = 0, **extra) -> Path:
    build(kind, prefix=prefix, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | extra))
    return folder


def one_by_one(model, context, answer, prefix):
    """The plain way: one sequence, one explicit mask written position by position, no packing, no padding."""
    tokens = [*context, *answer]
    mask = torch.full((1, 1, len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for q, k in itertools.product(range(len(tokens)), repeat=2):
        if k <= q or (prefix and max(q, k) < len(context)):
            mask[0, 0, q, k] = 0.0
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0]
    return [float(logits[len(context) - 1 + i].double().log_softmax(0)[token]) for i, token in enumerate(answer)]
