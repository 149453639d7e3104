"""Text from a published model, with stock transformers and nothing of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(folder: Path, prompt: str, tokens: int, seed: int) -> str:
    """``prompt`` and up to ``tokens`` more, sampled at temperature 0.8 from the 40 likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = model.config.max_position_embeddings - ids.shape[1]
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(tokens, room)),
            do_sample=True,
            temperature=0.8,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)
