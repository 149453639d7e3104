"""How much memory a stage is said to take: counted by hand, and what must hold between choices."""

from __future__ import annotations

import pytest

from potluck.protocol.config import RunConfig, convert
from potluck.protocol.footprint import CHOICES, Choice, fits, flight_nbytes, footprint, footprints, recomputes
from potluck.protocol.plan import Shape

V = 50400
GPTJ = {
    "model": {"d_model": 4096, "layers": 28, "heads": 16, "seq_len": 2048},
    "pipeline": {"stages": 7, "microbatch_size": 1, "microbatches": 8},
}
LEAN = Choice("bf16", 8, True)


@pytest.fixture
def config() -> RunConfig:
    return convert(GPTJ)


def test_four_blocks_of_gptj_are_trained_in_8_gb(config):
    """The middle stages and the last one, whatever microbatches the first ones have under way."""
    layers = Shape.of(config.model, V).split(7)
    found = footprints(LEAN.within(config), V, layers, "cuda")
    four = [f for f, (first, last) in zip(found, layers, strict=True) if first and last - first <= 4]
    assert len(four) >= 4 and all(fits(f, 8) for f in four)
    assert not any(fits(f, 12) for f in footprints(Choice("fp32", 32, True).within(config), V, layers, "cuda"))


def test_a_weight_takes_what_its_parts_take(config):
    n = Shape.of(config.model, V).size(4, 8)
    plain, lean = (footprint(c.within(config), V, 4, 8) for c in (Choice("fp32", 32, True), LEAN))
    assert plain.parameters == n
    assert (plain.weights, plain.gradients, plain.moments, plain.reference) == (4 * n, 4 * n, 8 * n, 4 * n)
    assert (lean.weights, lean.gradients, lean.reference) == (2 * n, 2 * n, 4 * n)
    assert lean.moments == pytest.approx(2.03 * n, rel=1e-3)
    assert plain.rounds - lean.rounds == pytest.approx(2 * (2 + 8 - 2.03) * n, rel=1e-3)  # in two states


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [(0, 4), (4, 8), (24, 28)])
def test_every_choice_saves_memory(config, layers, device):
    total = {c: footprint(c.within(config), V, *layers, window=3, device=device).on_cpu for c in CHOICES}
    for dtype, bits, recompute, _ in CHOICES:
        assert total[Choice("bf16", bits, recompute)] < total[Choice("fp32", bits, recompute)]
        assert total[Choice(dtype, 8, recompute)] < total[Choice(dtype, 32, recompute)]
        assert total[Choice(dtype, bits, True)] <= total[Choice(dtype, bits, False)]


def test_a_flight_is_what_the_blocks_begin_with(config):
    hidden = 2048 * 4096
    assert flight_nbytes(config, 4, 8, "cuda") == 4 * hidden * 5  # four inputs, the first came in, and what goes out
    assert flight_nbytes(config, 0, 4, "cuda") == 4 * hidden * 5  # ids come in
    assert flight_nbytes(LEAN.within(config), 4, 8, "cuda") == hidden * (4 + 4 + 4 * 2)


def test_the_last_stage_keeps_small_graphs(config):
    tiny = convert({"model": {"d_model": 32, "layers": 4, "heads": 2}})
    assert recomputes(tiny, 300, 0, 2, "cpu") and not recomputes(tiny, 300, 2, 4, "cpu")
    assert recomputes(config, V, 24, 28, "cuda")
    assert not recomputes(Choice("fp32", 32, False).within(config), V, 24, 28, "cuda")
    assert not recomputes(Choice("fp32", 32, False).within(config), V, 4, 8, "cuda")
