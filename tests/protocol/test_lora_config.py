"""``model.train: lora``: what does not fit together, what is counted as trained, and what it takes in memory."""

from __future__ import annotations

import pytest

from potluck.protocol import architecture
from potluck.protocol.config import ModelConfig, RunConfig, convert, dump, parse
from potluck.protocol.errors import ConfigError
from potluck.protocol.footprint import LORA_CHOICES, Choice, fits, footprint
from potluck.protocol.model_config import LoraConfig
from potluck.protocol.plan import Shape

V = 50400
GPTJ = {"d_model": 4096, "layers": 28, "heads": 16, "seq_len": 2048, "init": "EleutherAI/gpt-j-6b"}


def gptj(**lora: object) -> RunConfig:
    model = {**GPTJ, "dtype": "bf16", "train": "lora", "lora": lora}
    return convert({"model": model, "pipeline": {"stages": 1, "microbatch_size": 1, "microbatches": 8}})


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("train: lora", "there is no base", "Name a checkpoint in model.init"),
        ("lora: {rank: 4}", "model.train is full", "model.train: lora"),
        ("train: lora, init: x, lora: {targets: [c_attn]}", "c_attn is no matrix of a block", "k_proj, v_proj"),
        ("train: lora, init: x, dtype: bf16, lora: {base: fp32}", "base is fp32", "model.lora.base: bf16"),
        ("train: lora, init: x, lora: {base: 8bit}", "must be one of 4bit, bf16, fp32", ""),
        ("train: lora, init: x, lora: {rank: 0}", "model.lora.rank", ""),
        ("train: lora, init: x, lora: {alpha: 0}", "model.lora.alpha", ""),
        ("train: lora, init: x, lora: {rang: 8}", "unknown key `model.lora.rang`", "model.lora.rank"),
        ("train: qlora", "must be one of full, lora", ""),
    ],
)
def test_what_does_not_fit_is_said_with_its_fix(text: str, what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"model: {{{text}}}")
    assert what in str(error.value) and hint in error.value.hint


def test_a_run_is_written_and_read_again() -> None:
    config = gptj(rank=8, targets=["q_proj", "v_proj"])
    assert parse(dump(config)) == config
    assert config.model.targets == ("v_proj", "q_proj")  # in the order of the flat vector
    assert config.model.resolved().resolved() == config.model.resolved()
    assert ModelConfig().lora == LoraConfig() and ModelConfig().train == "full"


def test_targets_are_the_architectures() -> None:
    """Which a checkpoint may decide: only then are they held to it."""
    config = parse("model: {train: lora, init: x, lora: {targets: [gate_proj]}}")
    with pytest.raises(ConfigError, match="gate_proj is no matrix of gptj") as error:
        config.model.check_targets()
    assert "fc_out" in error.value.hint
    parse("model: {architecture: llama, train: lora, init: x, lora: {targets: [gate_proj]}}").model.check_targets()


def test_what_is_trained_is_counted() -> None:
    model, rank = gptj().model, 16
    a_block = rank * (4 * (4096 + 4096) + 2 * (4096 + 16384))
    shape = Shape.of(model, V)
    assert (shape.embedding, shape.block, shape.head) == (0, a_block, 0)
    assert shape.size(0, 28) == 28 * a_block == 33_030_144
    whole = architecture.weights(architecture.tensors(model, V, 0, 28))
    assert whole == 6_050_882_784  # what is published stays GPT-J
    assert Shape.of(gptj(targets=["q_proj"]).model, V).size(3, 5) == 2 * rank * 8192


def test_the_base_is_counted_by_what_it_is_held_in() -> None:
    matrices = 28 * (4 * 4096**2 + 2 * 4096 * 16384)
    rest = 6_050_882_784 - matrices
    for base, nbytes in (("4bit", 0.5625), ("bf16", 2.0)):
        found = footprint(gptj(base=base), V, 0, 28, device="cuda")
        assert found.base == matrices * nbytes + 2 * rest
        assert (found.parameters, found.weights, found.reference) == (33_030_144, 2 * 33_030_144, 4 * 33_030_144)
    full = convert({"model": {**GPTJ, "dtype": "bf16"}, "pipeline": {"stages": 1}})
    assert footprint(full, V, 0, 28).base == 0.0
    assert Choice.of(full) == Choice("bf16", 32, True) and Choice.of(gptj()) == Choice("bf16", 32, True, "4bit")
    assert Choice.of(gptj()).within(full).model.train == "lora"
    assert Choice("bf16", 8, True).within(gptj()).model.train == "full"


def test_gptj_as_one_stage_fits_a_card_of_8_gb_in_4_bits_and_of_16_in_bf16() -> None:
    held = {c.base: footprint(c.within(gptj()), V, 0, 28, device="cuda") for c in LORA_CHOICES if c.recompute}
    assert fits(held["4bit"], 8) and not fits(held["4bit"], 4)
    assert fits(held["bf16"], 16) and not fits(held["bf16"], 12)
