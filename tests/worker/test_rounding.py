"""bf16: rounding by chance is unbiased, the same everywhere, and trains where rounding to nearest stalls; so do fp32
weights beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPTJForCausalLM

from potluck.protocol.plan import SavePoint
from potluck.worker import rounding
from potluck.worker.checkpoint import SavePoints
from potluck.worker.model import hf_config
from potluck.worker.moments import Coded, dense
from potluck.worker.rounding import noise, round_by_chance
from potluck.worker.stage import Stage, State

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_noise_is_that_of_wrapping_unsigned_words():
    """In numpy, where wrapping is defined."""
    key, start, n = 0x9E3779B97F4A7C15, 2**32 - 5, 1000

    def mixed(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    place = (np.arange(n, dtype=np.uint64) + np.uint64(start) + np.uint64(key & 0xFFFFFFFF)).astype(np.uint32)
    wanted = mixed(mixed(place) + np.uint32(key >> 32)) & np.uint32(0xFFFF)
    assert (noise(key, start, n, CPU).numpy() == wanted).all()


def test_noise_belongs_to_the_place():
    whole = noise(7, 1000, 500, CPU)
    assert torch.equal(whole[123:], noise(7, 1123, 377, CPU))
    assert (whole != noise(8, 1000, 500, CPU)).float().mean() > 0.99


def test_noise_is_uniform_and_neighbours_are_strangers():
    values = noise(3, 0, 1 << 18, CPU).double() / 2**16
    counts = torch.histc(values, 256, 0, 1)
    chi_square = float(((counts - 1024) ** 2 / 1024).sum())
    assert 150 < chi_square < 400  # 255 in the mean, 23 its deviation
    for lag in (1, 2, 256):
        assert abs(float(torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1])) < 0.01
    next_step = noise(4, 0, 1 << 18, CPU).double()
    assert abs(float(torch.corrcoef(torch.stack([values, next_step]))[0, 1])) < 0.01


def test_rounding_is_right_in_the_mean_and_to_a_neighbour():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros(1000, dtype=torch.float64)
    for key in range(400):
        rounded = round_by_chance(values, key << 32, 0).float()
        assert (rounded - values).abs().max() <= values.abs().max() * 2**-7
        mean += rounded.double() / 400
    unit = values.abs() * 2**-7
    assert float(((mean - values) / unit).abs().max()) < 0.12
    assert abs(float(((mean - values) / unit).mean())) < 0.005


def test_what_bf16_can_say_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e38, float("inf"), float("-inf"), 2.0**-130]).bfloat16().float()
    for key in range(20):
        assert torch.equal(round_by_chance(values, key, 5).float(), values)
    assert torch.isnan(round_by_chance(torch.tensor([float("nan")]), 1, 0)).all()


def trained(config, steps, *, nearest=False, monkeypatch=None):
    """The loss of a tiny language model before and after."""
    if nearest:
        monkeypatch.setattr(rounding, "round_by_chance", lambda values, key, start: values.bfloat16())
    torch.manual_seed(0)
    stage, losses = Stage(config, 300, 0, config.model.layers), []
    for _ in range(steps):
        ids = torch.randint(0, 20, (8, 16)) * 3
        ids[:, 1::2] = ids[:, ::2] + 1  # every second word follows from the first
        targets = torch.full_like(ids, -100)
        targets[:, :-1:2] = ids[:, 1::2]
        loss = stage.module.loss_sum(stage.module(ids), targets)
        loss.backward()
        stage.update(int((targets >= 0).sum()))
        losses.append(float(loss.detach()) / int((targets >= 0).sum()))
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("bits", [32, 8])
def test_bf16_trains_as_fp32_where_nearest_stalls(make_config, monkeypatch, bits):
    """Updates of 3e-5 against weights of 0.02, whose bf16 neighbours are 1e-4 away."""
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    settings = {"lr": 3e-5, "warmup_steps": 0, "weight_decay": 0.0, "bits": bits}
    model = {"d_model": 64, "layers": 2, "heads": 2}

    def config(dtype):
        return make_config(200, model={**model, "dtype": dtype}, optimizer=settings, pipeline={"stages": 1})

    exact, ours, mixed = (trained(config(dtype), 200) for dtype in ("fp32", "bf16", "mixed"))
    nearest = trained(config("bf16"), 200, nearest=True, monkeypatch=monkeypatch)
    start = np.log(300)
    assert start - exact > 0.3
    assert start - ours > 0.9 * (start - exact)
    assert start - mixed > 0.95 * (start - exact)
    assert start - nearest < 0.75 * (start - exact)


def vectors(state: State) -> list[torch.Tensor]:
    return [state.g, state.x, dense(state.m), dense(state.v)]


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 32), ("fp32", 8), ("bf16", 8), ("mixed", 32), ("mixed", 8)])
def test_a_resumed_stage_goes_on_bit_for_bit(make_config, tmp_path, dtype, bits):
    """From a file."""
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    config = make_config(20, model={"dtype": dtype}, optimizer={"bits": bits}, pipeline={"stages": 1})
    point = SavePoint(kind="step", generation=1, step=4, first_layer=1, last_layer=3)

    def work(stage: Stage, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        stage.grad.copy_(
            torch.randn(stage.size, generator=generator) * torch.rand(stage.size, generator=generator) ** 8
        )
        stage.update(3)

    unbroken, stopped = Stage(config, 300, 1, 3), Stage(config, 300, 1, 3)
    saved: State | None = None
    for number in range(8):
        work(unbroken, number)
        if number < 4:
            work(stopped, number)
    saved = stopped.state(point)
    assert saved.x is not None and saved.x.dtype == stopped.x.dtype and saved.g.dtype == torch.float32
    assert saved.m is not None and saved.v is not None and isinstance(saved.m, Coded) == (bits == 8)
    points = SavePoints(tmp_path)
    points.save(saved)
    saved = points.find("step", point.generation, point.step, (1, 3))
    assert saved is not None
    resumed = Stage(config, 300, 1, 3)
    resumed.load(saved)
    again = resumed.state(point)
    assert all(torch.equal(a, b) for a, b in zip(vectors(again), vectors(saved), strict=True))
    for number in range(4, 8):
        work(resumed, number)
    one, other = unbroken.state(replace(point, step=8)), resumed.state(replace(point, step=8))
    assert all(torch.equal(a, b) for a, b in zip(vectors(one), vectors(other), strict=True))
    assert not torch.equal(one.x, saved.x)


def test_chance_does_not_depend_on_the_stages(make_config):
    """A layer of a stage of one and of a stage of two is rounded alike."""
    config = make_config(20, model={"dtype": "bf16"}, pipeline={"stages": 1})
    both, second = Stage(config, 300, 1, 3), Stage(config, 300, 2, 3)
    part = slice(both.size - second.size, both.size)
    assert torch.equal(both.x[part], second.x)
    for number in range(3):
        grad = torch.randn(both.size, generator=torch.Generator().manual_seed(number))
        both.grad.copy_(grad)
        second.grad.copy_(grad[part])
        both.update(1)
        second.update(1)
    assert torch.equal(both.x[part], second.x)


def test_a_round_is_rounded_by_chance_too(make_config):
    """What moves the weights by less than bf16 can say moves them in the mean."""
    config = make_config(20, model={"dtype": "bf16"}, pipeline={"stages": 1})
    for late in (False, True):
        stage = Stage(config, 300, 1, 3)
        before, by = stage.x.double(), 2e-5
        if late:
            stage.shift(0, torch.full((stage.size,), by))
        else:
            stage.place(stage.x.float() + by)
        assert abs(float((stage.x.double() - before).mean()) / by - 1) < 0.1


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_evaluation_gives_the_weights_back(make_config, dtype):
    stage = Stage(make_config(20, model={"dtype": dtype}, pipeline={"stages": 1}), 300, 1, 3)
    stage.shift(0, torch.full((stage.size,), 0.01))
    before, used = stage.x.clone(), parameters(stage)
    with stage.at_reference():
        assert torch.equal(parameters(stage), stage.g.bfloat16())
    assert torch.equal(stage.x, before) and torch.equal(parameters(stage), used) and not stage.grad.any()


def parameters(stage: Stage) -> torch.Tensor:
    """What the blocks compute with."""
    return torch.cat([p.detach().flatten() for _, p in stage.module.trained()])


def test_mixed_keeps_the_weights_in_fp32_and_computes_with_the_nearest_of_bf16(make_config):
    """After an update, a round, one that is late, and from a state."""
    config = make_config(20, model={"dtype": "mixed"}, pipeline={"stages": 1})
    stage, other = Stage(config, 300, 1, 3), Stage(config, 300, 1, 3)
    seen = [stage.x.clone()]

    def check(stage: Stage) -> None:
        assert stage.x.dtype == torch.float32 and stage.grad.dtype == torch.bfloat16
        assert torch.equal(parameters(stage), stage.x.bfloat16())
        assert not any(torch.equal(stage.x, before) for before in seen)
        seen.append(stage.x.clone())

    stage.grad.copy_(torch.randn(stage.size))
    stage.update(1)
    check(stage)
    stage.place(stage.x + 1e-6)
    check(stage)
    stage.shift(5, torch.full((stage.size - 5,), 1e-6))
    check(stage)
    other.load(stage.state(SavePoint(kind="step", generation=1, step=1, first_layer=1, last_layer=3)))
    assert torch.equal(other.x, stage.x) and torch.equal(parameters(other), parameters(stage))


def test_mixed_is_the_plain_loop_with_master_weights(make_config):
    """A stock GPT-J in bf16 whose gradients AdamW puts into fp32 weights."""
    config = make_config(4, model={"dtype": "mixed"}, pipeline={"stages": 1}, optimizer={"warmup_steps": 0})
    stage = Stage(config, 300, 0, config.model.layers)
    stock = GPTJForCausalLM(hf_config(config.model, 300)).bfloat16()
    stock.load_state_dict(stage.module.state_dict())
    masters = [p.detach().float() for p in stage.named(stage.x).values()]
    assert [name for name, _ in stock.named_parameters()] == list(stage.named(stage.x))
    c = config.optimizer
    adamw = torch.optim.AdamW(
        masters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
    )
    for number in range(4):
        ids_BT = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(number))
        stage.module.loss_sum(stage.module(ids_BT), ids_BT.roll(-1, 1)).backward()
        stage.update(ids_BT.numel())
        logits = stock(ids_BT).logits.float()
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids_BT.roll(-1, 1).flatten(), reduction="sum"
        ).backward()
        for master, p in zip(masters, stock.parameters(), strict=True):
            master.grad, p.grad = p.grad.float() / ids_BT.numel(), None
        adamw.step()
        for master, p in zip(masters, stock.parameters(), strict=True):
            p.data.copy_(master)
        assert torch.equal(torch.cat([m.flatten() for m in masters]), stage.x), number
