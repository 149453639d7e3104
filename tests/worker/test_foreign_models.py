"""A model's folder may come from anybody: no code of its own is run, nothing is asked, pickled weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from potluck.protocol.errors import ConfigError
from potluck.worker import pmi
from potluck.worker.evaluation.models import open_model
from potluck.worker.sampling import write

READERS: list[Callable[[Path], object]] = [open_model, pmi.load, lambda folder: write(folder, "a", 1, 0)]
REFUSED = (ConfigError, OSError, ValueError)


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(prompt: str = "") -> str:
        pytest.fail(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.parametrize("read", READERS, ids=["evaluation", "pmi", "sample"])
def test_code_beside_the_weights_is_not_run(tmp_path: Path, read: Callable[[Path], object]) -> None:
    ran = tmp_path / "ran"
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(REFUSED):
        read(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("read", READERS, ids=["evaluation", "pmi", "sample"])
def test_pickled_weights_are_not_read(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPTJForCausalLM(GPTJConfig(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    # The model is asked for whatever its tokenizer says.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(REFUSED, match="safetensors"):
        read(tmp_path)
