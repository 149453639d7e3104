"""Adapters beside a frozen base: the plain loop's losses and weights, and nothing else than adapters in rounds."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from msgspec.structs import replace as changed
from plain_loop import adamw, stock_model, train_step
from plain_lora import LLAMA, Wrapped, lora, merged, wrap

from potluck.coordinator import dividing, events, state
from potluck.protocol import architecture
from potluck.protocol.frames import Kind
from potluck.protocol.model_config import LoraConfig
from potluck.protocol.plan import SavePoint, Shape
from potluck.worker.data import Dataset
from potluck.worker.initial import initial
from potluck.worker.lora import Held
from potluck.worker.model import StageModule
from potluck.worker.stage import Stage, digest, initial_state

both = pytest.mark.parametrize("model", [{}, LLAMA], ids=["gptj", "llama"])
ROUNDS = {"preset": "diloco", "every": 3, "delay": 0}


def plain(config, corpus) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Wrapped]]:
    """Losses, merged weights and adapters of the same run in one process."""
    folder, manifest = corpus
    whole = changed(config, model=changed(config.model, train="full", lora=LoraConfig()))
    data, model = Dataset(folder), stock_model(whole, manifest)
    wrapped = wrap(model, config)
    optimizer = adamw(model, config)
    per_step = config.pipeline.microbatches * config.pipeline.microbatch_size
    losses = []
    for step in range(config.steps):
        loss_sum, targets = train_step(model, optimizer, data, config, step, step * per_step)
        losses.append(loss_sum / targets)
    return losses, merged(model, wrapped), wrapped


@pytest.mark.parametrize(
    ("stages", "recompute", "model", "targets"),
    [
        (1, True, {}, ()),
        (2, True, {}, ()),
        (4, False, {}, ("q_proj", "v_proj")),
        (2, True, LLAMA, ()),
        (4, False, LLAMA, ("down_proj", "q_proj")),
    ],
)
def test_one_chain_equals_the_plain_loop(local_run, make_config, corpus_folder, stages, recompute, model, targets):
    config = make_config(
        steps=5,
        model=lora(model=model, targets=targets),
        pipeline={"stages": stages, "recompute": recompute},
        coordinator={"wait_for": stages},
    )
    ours = local_run(config)
    ours.join(*[f"peer{i}" for i in range(stages)])
    ours.finish()
    losses, weights, adapters = plain(config, corpus_folder)
    assert ours.losses() == losses

    found = {}
    for worker in ours.workers.values():
        stage = worker.engine.stage
        found |= stage.named(stage.g)
    assert found.keys() == {f"{name}.lora_{x}.weight" for name in adapters for x in "AB"}
    for name, one in adapters.items():
        assert torch.equal(found[f"{name}.lora_A.weight"], one.a), name
        assert torch.equal(found[f"{name}.lora_B.weight"], one.b), name
        assert one.b.any()
    published = ours.weights()
    assert published.keys() == weights.keys() | found.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(published[name], tensor, rtol=0, atol=1e-6)


@both
def test_before_the_first_step_it_is_the_base(make_config, model):
    """To the bit where the base is held as it is; near it in four bits."""
    full = make_config(model=model).model
    ids = torch.arange(32).view(2, 16)
    with torch.inference_mode():
        whole = StageModule(full, 300, 0, 4, 1)
        wanted = whole.logits(whole(ids))
        off = {}
        for base in ("fp32", "bf16", "4bit"):
            config = make_config(model=lora(base, model)).model
            ours = StageModule(config, 300, 0, 4, 1)
            off[base] = float((ours.logits(ours(ids)) - wanted).abs().max() / wanted.abs().max())
    assert off["fp32"] == 0.0
    assert 0 < off["bf16"] < 0.02 < off["4bit"] < 0.3


@both
def test_what_is_trained_is_as_the_architecture_says(make_config, model):
    config = make_config(model=lora(model=model, targets=["q_proj"]))
    shape = Shape.of(config.model, 300)
    for layers in ((0, 4), (0, 1), (1, 3), (3, 4)):
        module = StageModule(config.model, 300, *layers, 1)
        shapes = {name: tuple(p.shape) for name, p in module.trained()}
        assert list(shapes.items()) == list(architecture.trained_tensors(config.model, 300, *layers).items())
        assert shape.size(*layers) == architecture.weights(shapes) == (layers[1] - layers[0]) * 2 * 4 * 32
    assert shape.start(2) == 2 * shape.block and shape.embedding == shape.head == 0
    full = Shape.of(make_config(model=model).model, 300)
    assert (shape.block_work, shape.head_work) == (full.block_work + shape.block, full.head_work)


@pytest.mark.parametrize("model", [{}, LLAMA, lora("4bit"), lora("4bit", LLAMA)], ids=str)
def test_the_first_state_is_the_stages_own(make_config, model):
    """Made without the model around it: what a keeper begins with, and who begins a run."""
    config = make_config(model=model)
    for first, last in ((0, 2), (2, 4)):
        point = SavePoint(kind="round", generation=0, step=0, first_layer=first, last_layer=last)
        theirs, ours = Stage(config, 300, first, last).state(point), initial_state(config, 300, point, None)
        assert torch.equal(initial(config.model, 300, first, last, config.seed, None), theirs.g)
        assert ours.x is None and torch.equal(ours.g, theirs.x)
        for name in ("g", "m", "v"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert (ours.point, ours.updates) == (theirs.point, theirs.updates)


@pytest.mark.parametrize("base", ["4bit", "bf16"])
@both
def test_a_held_base_is_trained_against(make_config, model, base):
    """Gradients of adapters, and of what comes in, as autograd has them with the very matrices that are held."""
    config = make_config(model=lora(base, model))
    ours = Stage(config, 300, 1, 3)
    whole = make_config(model=lora("fp32", model))
    theirs = Stage(whole, 300, 1, 3)
    with torch.no_grad():
        ours.x.add_(0.01), theirs.x.add_(0.01)
        for (_, held), (_, plain) in zip(of_kind(ours), of_kind(theirs), strict=True):
            assert held.packed.dtype == {"4bit": torch.uint8, "bf16": torch.bfloat16}[base]
            plain.packed.copy_(held.weight(torch.float32))
    out = []
    for stage in (ours, theirs):
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        stage.module(x).square().sum().backward()
        out.append((x.grad, stage.grad.clone()))
    for mine, wanted in zip(*out, strict=True):
        assert wanted.any()
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    ours.update(10)
    frozen = [p for p in ours.module.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def of_kind(stage: Stage) -> list[tuple[str, Held]]:
    return [(name, part) for name, part in stage.module.named_modules() if isinstance(part, Held)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sync", [{"preset": "potluck", "every": 4, "delay": 1}, {"preset": "dense"}], ids=lambda s: s["preset"]
)
def test_replicas_agree_and_send_adapters_only(local_run, make_config, sync, dtype):
    config = make_config(
        steps=6, sync=sync, model={**lora("4bit"), "dtype": dtype}, coordinator={"wait_for": 4}, pipeline={"stages": 2}
    )
    ours = local_run(config)
    sent: dict[Kind, int] = {}

    def posted(sender, frame) -> None:
        if frame.header.kind in (Kind.SHARD, Kind.REDO, Kind.STATE):
            sent[frame.header.kind] = max(sent.get(frame.header.kind, 0), len(frame.payload))

    ours.on_post = posted
    ours.join("a", "b", "c", "d")
    ours.finish()
    assert ours.seen(events.RoundCommitted) and not ours.seen(events.RoundRefused)
    stages = {}
    for worker in ours.workers.values():
        stage = worker.engine.stage
        stages.setdefault(stage.first, []).append(stage)
    for first, second in stages.values():
        assert torch.equal(first.g, second.g)
        both = zip(of_kind(first), of_kind(second), strict=True)
        assert all(torch.equal(mine.packed, theirs.packed) for (_, mine), (_, theirs) in both)
        base = architecture.weights(architecture.tensors(config.model, 300, first.first, first.last))
        assert max(sent.values()) <= 4 * first.size < 2 * base


def test_a_stopped_run_goes_on_to_the_same_weights(local_run, make_config):
    config = make_config(steps=6, model=lora("4bit"), sync=ROUNDS, coordinator={"wait_for": 4})
    peers = ("a", "b", "c", "d")
    whole = local_run(config, home="whole")
    whole.join(*peers)
    whole.finish()

    first = local_run(config, home="stopped")
    first.on_event = lambda event: (
        first.put(state.StopAsked()) if isinstance(event, events.RoundCommitted) and event.round == 1 else None
    )
    first.join(*peers)
    first.finish()
    stop = first.machine.stop
    assert stop is not None and 0 < stop.step < config.steps
    second = local_run(config, home="stopped")
    second.machine = state.RunState(
        generation=first.machine.generation,
        committed=first.machine.committed,
        stop=stop,
        rounds=first.machine.rounds,
        published=0,
    )
    second.join(*peers)
    second.finish()
    assert first.losses() + second.losses() == whole.losses()
    for name, tensor in whole.weights().items():
        assert torch.equal(second.weights()[name], tensor), name


def test_a_newcomer_is_sent_adapters_only(local_run, make_config):
    ours = local_run(
        make_config(
            steps=40,
            model=lora("4bit", rank=1),
            sync={"preset": "potluck", "every": 4, "delay": 1},
            coordinator={"wait_for": 2, "prepare_seconds": 1e6},
        )
    )
    sent = {"c": 0, "d": 0}
    ours.join("a", "b")
    ours.wait(lambda: ours.machine.rounds >= 1)
    ours.join("c", "d")
    for peer in sent:
        put = ours.workers[peer].states.put

        def counted(sender, frame, peer=peer, put=put):
            sent[peer] += len(frame.payload)
            put(sender, frame)

        ours.workers[peer].states.put = counted
    ours.finish()
    assert ours.machine.plan.peers == {"a", "b", "c", "d"}
    assert not ours.seen(events.RoundRefused) and not ours.seen(events.RolledBack)
    assert len({(w.engine.stage.first, digest(w.engine.stage.g)) for w in ours.workers.values()}) == 2
    n = Shape.of(ours.config.model, 300).size(0, 2)
    base = architecture.weights(architecture.tensors(ours.config.model, 300, 0, 2))
    for nbytes in sent.values():  # g, m and v, perhaps twice (a keeper's base), and rounds
        assert 3 * 4 * n <= nbytes < 8 * 4 * n < 4 * base


def test_layers_are_divided_anew(local_run, make_config, monkeypatch, corpus_folder):
    """The flat vector of adapters is cut, the base comes from the checkpoint: the plain loop's losses."""
    config = make_config(
        steps=30,
        model=lora(),
        pipeline={"stages": {"min": 2, "max": 3}},
        coordinator={"wait_for": 2, "patience_seconds": 0.0, "prepare_seconds": 1e6},
    )
    ours = local_run(config)
    ours.rules = replace(ours.rules, divide_seconds=0.0)

    def better(rules, now):
        count = min(len(now.members), 3)
        same = count == len(now.plan.stages)
        return None if same else state.Redivide(stages=count, since=0.0, why="a test wants it")

    monkeypatch.setattr(dividing, "better_division", better)
    monkeypatch.setattr(dividing, "LOOK_SECONDS", 0.0)
    ours.join("a", "b")
    ours.wait(lambda: ours.machine.rounds >= 1)
    ours.join("c")
    ours.workers["c"].states.joiner.follow = lambda prospect: None
    for _ in range(1200):
        ours.put(state.Tick())
        plan = ours.machine.plan
        if plan and len(plan.stages) == 3 and ours.machine.committed.generation == plan.generation:
            break
        time.sleep(0.05)
    ours.finish()
    assert len(ours.seen(events.Redivided)) == 1 and not ours.seen(events.RolledBack)
    losses, weights, _ = plain(config, corpus_folder)
    assert ours.losses() == losses
    for name, tensor in weights.items():
        torch.testing.assert_close(ours.weights()[name], tensor, rtol=0, atol=1e-6)


def test_moments_of_8_bits(local_run, make_config):
    pytest.importorskip("bitsandbytes")
    config = make_config(steps=6, model={**lora("4bit"), "dtype": "bf16"}, optimizer={"bits": 8})
    ours = local_run(config)
    ours.join("a", "b")
    ours.finish()
    assert ours.seen(events.RoundCommitted)
    assert all(torch.isfinite(t).all() for t in ours.weights().values())
