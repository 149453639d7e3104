"""The section ``model``: what is usual for an architecture, what does not fit together, and how it is counted."""

from __future__ import annotations

import pytest

from potluck.protocol.architecture import hf_config, parts, tensors, weights, work
from potluck.protocol.config import ModelConfig, dump, parse
from potluck.protocol.errors import ConfigError
from potluck.protocol.plan import Shape

SMOLLM2 = ModelConfig(
    architecture="llama", d_model=576, layers=30, heads=9, kv_heads=3, rope_theta=100_000, seq_len=2048
)
GPTJ_6B = ModelConfig(d_model=4096, layers=28, heads=16, seq_len=2048)


def test_what_is_usual() -> None:
    known = GPTJ_6B.resolved()
    assert (known.rotary_dim, known.d_ff, known.kv_heads, known.rope_theta, known.norm_eps) == (
        *(64, 4 * 4096, 16),
        *(10_000, 1e-5),
    )
    small = SMOLLM2.resolved()
    assert (small.rotary_dim, small.d_ff, small.kv_heads, small.norm_eps) == (64, 1536, 3, 1e-5)
    assert ModelConfig(architecture="llama", d_model=4096, heads=32).resolved().d_ff == 11008  # Llama 2 7B
    assert ModelConfig().resolved().rotary_dim == 32
    assert small.resolved() == small and known.resolved() == known


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("d_model: 100, heads: 3", "not a multiple of model.heads"),
        ("heads: 512, d_model: 256", "not a multiple of model.heads"),
        ("rotary_dim: 65", "must be even"),
        ("rotary_dim: 66", "at most d_model / heads = 64"),
        ("d_model: 8, heads: 8", "at most d_model / heads = 1"),
        ("kv_heads: 2", "as many heads of keys and values"),
        ("rope_theta: 5000", "GPT-J has 10000"),
        ("architecture: llama, kv_heads: 3", "not a multiple of model.kv_heads"),
        ("architecture: llama, kv_heads: 8", "not a multiple of model.kv_heads"),
        ("architecture: llama, rotary_dim: 32", "rotates the whole head"),
        ("architecture: llama, d_model: 12", "must be even"),
        ("architecture: gpt2", "must be one of gptj, llama"),
        ("architecure: llama", "Did you mean `model.architecture`"),
        ("rope_theta: -1", "model.rope_theta"),
        ("norm_eps: .nan", "model.norm_eps"),
        ("rope_theta: .inf", "model.rope_theta"),
    ],
)
def test_what_does_not_fit_is_named(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"model: {{{text}}}")
    assert what in f"{error.value} {error.value.hint}" and error.value.hint


def test_a_configuration_survives_its_text() -> None:
    text = "model: {architecture: llama, kv_heads: 2, rope_theta: 1.0e+5}"
    assert parse(dump(parse(text))) == parse(text)


def test_known_models_have_as_many_weights_as_they_are_known_for() -> None:
    """GPT-J-6B: 6,050,882,784. SmolLM2-135M: 134,515,008 with one matrix as embedding and head, here two."""
    assert Shape.of(GPTJ_6B, 50_400).size(0, 28) == 6_050_882_784
    assert Shape.of(SMOLLM2, 49_152).size(0, 30) == 134_515_008 + 49_152 * 576


@pytest.mark.parametrize("model", [SMOLLM2, GPTJ_6B], ids=["llama", "gptj"])
def test_counts_are_those_of_the_tensors(model: ModelConfig) -> None:
    shape, n = Shape.of(model, 300), model.layers
    for first, last in ((0, n), (0, 3), (3, 7), (n - 1, n)):
        assert shape.size(first, last) == weights(tensors(model, 300, first, last))
    flat = list(tensors(model, 300, 0, n))
    assert flat == [name for i in range(n) for name in tensors(model, 300, i, i + 1)]
    assert shape.work(0, n) == n * work(parts(model, 300).block) + 300 * model.d_model


def test_work_follows_the_architecture() -> None:
    assert Shape.of(GPTJ_6B, 50_400).block_work == 12 * 4096**2
    assert Shape.of(SMOLLM2, 300).block_work == 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536
    assert Shape.of(SMOLLM2, 49_152).split(2) == [(0, 19), (19, 30)]  # the head is as much work as eight blocks


def test_a_prefix_model_says_so() -> None:
    assert hf_config(SMOLLM2, 300, 7, prefix_lm=True)["is_causal"] is False
    plain = hf_config(SMOLLM2, 300, 7)
    assert "is_causal" not in plain and plain["eos_token_id"] == plain["bos_token_id"] == 7
