"""A published model opened for scoring: stock transformers, safetensors only, nothing from the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...protocol.errors import ConfigError
from .scoring import KINDS

_NAME_A_MODEL = "Name a folder that transformers loads, such as a step's folder in the run's checkpoints."


class Opened(NamedTuple):
    """``prefix``: the model reads contexts in both directions (``"is_causal": false`` in its config).
    ``special``: the config's ``potluck_special`` (ids of sentinels, modes, end of text), or None."""

    model: Any
    tokenizer: Any
    prefix: bool
    max_length: int
    special: dict[str, Any] | None


def device_of(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name} cannot be used", hint="Take --device cpu or auto.") from error
    return device


def open_model(folder: Path, device: str = "auto") -> Opened:
    """Loads ``folder``; fp32 on a CPU, the stored dtype elsewhere. Raises ConfigError for what cannot be scored."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no published model: config.json is missing", hint=_NAME_A_MODEL)
    where = device_of(device)
    transformers.utils.logging.disable_progress_bar()
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type not in KINDS:
            raise ConfigError(f"{folder} is a {config.model_type} model", hint=f"Known are {', '.join(KINDS)}.")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if where.type == "cpu" else "auto",
            attn_implementation="eager" if config.model_type == "gptj" else "sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}", hint=_NAME_A_MODEL) from error
    special = stored.get("potluck_special")
    return Opened(
        model.to(where).eval(),
        tokenizer,
        stored.get("is_causal") is False,
        int(config.max_position_embeddings),
        special if isinstance(special, dict) else None,
    )


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of ``context`` and of what ``continuation`` adds to it; spaces at the context's end go to the continuation.

    A byte-pair vocabulary may merge over the seam, so the whole is encoded and the context's length cut off
    (as lm-eval does).
    """
    bare = context.rstrip(" ")
    whole = tokenizer(context + continuation).input_ids
    head = tokenizer(bare).input_ids
    return head, whole[len(head) :]


def first_token(tokenizer: Any) -> int:
    """What a text begins after: the beginning-of-text token, or the end of the one before."""
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ConfigError("the model's tokenizer has neither a beginning nor an end of text", hint="Export one with it.")
