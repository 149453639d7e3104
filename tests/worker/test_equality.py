"""Uncompressed, the distributed run is the plain PyTorch loop: same losses, same weights, bit for bit on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from plain_loop import adamw, stock_model, train_step
from recipe_texts import recipe_of, write_sources

from potluck.coordinator import corpus, events
from potluck.protocol.config import convert
from potluck.protocol.manifest import Manifest
from potluck.worker.data import Dataset

LLAMA = {"architecture": "llama", "kv_heads": 1, "d_ff": 64, "rotary_dim": 0}


@pytest.mark.parametrize(
    ("stages", "recompute", "model"),
    [
        *((stages, recompute, {}) for stages in (1, 2, 4) for recompute in (True, False)),
        (2, True, LLAMA),
        (4, False, LLAMA),
    ],
)
def test_one_chain_equals_the_plain_loop(local_run, make_config, corpus_folder, stages, recompute, model):
    config = make_config(
        steps=5,
        model=model,
        pipeline={"stages": stages, "recompute": recompute},
        coordinator={"wait_for": stages},
    )
    ours = local_run(config)
    ours.join(*[f"peer{i}" for i in range(stages)])
    ours.finish()

    folder, manifest = corpus_folder
    data, model = Dataset(folder), stock_model(config, manifest)
    optimizer = adamw(model, config)
    per_step = config.pipeline.microbatches * config.pipeline.microbatch_size
    losses = []
    for step in range(config.steps):
        loss_sum, targets = train_step(model, optimizer, data, config, step, step * per_step)
        losses.append(loss_sum / targets)

    assert ours.losses() == losses
    weights = ours.weights()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.fixture(scope="module")
def recipe_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Three stages: documents, denoising, answers to instructions."""
    folder = tmp_path_factory.mktemp("recipe")
    stages = [
        {"name": "text", "tokens": 400, "mix": {"web": 1.0}},
        {"name": "noise", "tokens": 400, "mix": {"web": 1.0}, "objective": {"kind": "ul2r"}},
        {"name": "tasks", "tokens": 6400, "mix": {"web": 0.5, "p3": 0.5}, "objective": {"kind": "answers"}},
    ]
    made = recipe_of(stages=stages)
    made["sources"] = {name: made["sources"][name] for name in ("web", "p3")}
    (write_sources(folder) / "recipe.yaml").write_text(yaml.safe_dump(made))
    source = {"model": {"seq_len": 32}, "data": {"source": str(folder / "recipe.yaml")}}
    return corpus.of_run(convert(source), folder / "prepared")


@pytest.mark.parametrize("stages", [1, 3])
def test_prefixes_and_documents_are_those_of_the_whole_mask(local_run, make_config, recipe_corpus, stages):
    """Against stock GPT-J under a mask that is spelled out, through every stage of a recipe."""
    folder, manifest = recipe_corpus
    config = make_config(steps=6, model={"seq_len": 32}, pipeline={"stages": stages}, coordinator={"wait_for": stages})
    ours = local_run(config, corpus=recipe_corpus)
    ours.join(*[f"peer{i}" for i in range(stages)])
    ours.finish()

    data, model = Dataset(folder), stock_model(config, manifest)
    optimizer, losses = adamw(model, config), []
    per_step = config.pipeline.microbatches * config.pipeline.microbatch_size
    assert {data.mixture(config.seed).place(i).stage for i in range(6 * per_step)} == {0, 1, 2}
    for step in range(config.steps):
        loss_sum, targets = train_step(model, optimizer, data, config, step, step * per_step)
        losses.append(loss_sum / targets)
    assert ours.losses() == pytest.approx(losses, rel=1e-5)
    weights = ours.weights()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-4)


def test_two_replicas_equal_the_loop_with_the_double_batch(local_run, make_config, corpus_folder):
    """The rule with two replicas: each trains its half with its own AdamW, then both take the mean of differences."""
    config = make_config(steps=4, coordinator={"wait_for": 4})
    ours = local_run(config)
    ours.join("a", "b", "c", "d")
    ours.finish()

    folder, manifest = corpus_folder
    data = Dataset(folder)
    models = [stock_model(config, manifest) for _ in range(2)]
    optimizers = [adamw(m, config) for m in models]
    per_head = config.pipeline.microbatches * config.pipeline.microbatch_size
    reference = {k: v.clone() for k, v in models[0].state_dict().items()}
    losses = []
    for step in range(config.steps):
        sums = [
            train_step(m, o, data, config, step, (2 * step + i) * per_head)
            for i, (m, o) in enumerate(zip(models, optimizers, strict=True))
        ]
        losses.append(sum(s for s, _ in sums) / sum(t for _, t in sums))
        with torch.no_grad():
            for name, g in reference.items():
                differences = [m.state_dict()[name] - g for m in models]
                g += differences[0] * 0.5 + differences[1] * 0.5
                for model in models:
                    model.state_dict()[name].copy_(g)

    assert ours.losses() == losses
    for name, tensor in reference.items():
        assert torch.equal(ours.weights()[name], tensor), name
    assert len(ours.seen(events.RoundCommitted)) == config.steps


@pytest.mark.parametrize(
    "sync",
    [
        {"preset": "potluck"},
        {"preset": "cocktail", "density": 0.25, "topk": 1.0, "every": 2},
        {"preset": "cocktail", "density": 0.25, "topk": 1.0, "every": 2, "delay": 0},
        {"preset": "cocktail"},
        {"preset": "diloco", "every": 3},
        {"preset": "gptjt", "coin": 0.4},
        {"preset": "diloco", "every": 4, "fragments": 4},
        {"preset": "diloco", "every": 6, "fragments": 2, "delay": 3},
        {"preset": "sparseloco", "every": 3, "delay": 2, "chunk": 256},
    ],
    ids=str,
)
def test_replicas_agree_after_every_compressed_round(local_run, make_config, sync):
    """Every committed round means: all replicas of every stage reported the same digest of g."""
    config = make_config(
        steps=8,
        sync=sync,
        activations={"forward": "int4:tile=32", "backward": "int8:tile=32"},
        pipeline={"microbatches": 1},
        coordinator={"wait_for": 4},
    )
    ours = local_run(config)
    ours.join("a", "b", "c", "d")
    ours.finish()
    assert not ours.seen(events.RoundRefused)
    assert ours.seen(events.RoundCommitted)
    stages = {}
    for worker in ours.workers.values():
        stage = worker.engine.stage
        stages.setdefault((stage.first, stage.last), []).append(stage.g)
    for first, second in stages.values():
        assert torch.equal(first, second)


def test_a_late_round_keeps_what_was_trained_meanwhile(local_run, make_config):
    """With one replica a round changes nothing, early or late: the delay must not lose a step."""
    results = []
    for delay in (0, 1, 2):
        config = make_config(steps=7, sync={"preset": "dense", "every": 3, "delay": delay})
        ours = local_run(config, home=f"delay{delay}")
        ours.join("a", "b")
        results.append(ours.finish().weights())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        assert torch.equal(tensor, results[2][name]), name


@pytest.mark.parametrize("model", [{}, LLAMA], ids=["gptj", "llama"])
def test_export_gives_the_runs_own_logits(local_run, make_config, corpus_folder, tmp_path: Path, model):
    """The folder a run publishes, in stock transformers, against the run's own stages."""
    import asyncio

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from potluck.coordinator.publish import Publisher

    config = make_config(steps=3, model=model)
    ours = local_run(config)
    ours.join("a", "b")
    ours.finish()
    folder, manifest = corpus_folder
    done: list[Path] = []

    async def arrived(step: int, path: Path) -> None:
        done.append(path)

    async def publish() -> None:
        publisher = Publisher(tmp_path / "out", folder, config, manifest, arrived)
        publisher.begin(3, 1, ours.rules.divisions[0].layers)
        for stage, data in ours.published[3].items():
            publisher.part(3, stage).write_bytes(data)
            await publisher.arrived(3, stage)

    asyncio.run(publish())
    model = AutoModelForCausalLM.from_pretrained(done[0])
    assert model.config.model_type == config.model.architecture
    tokenizer = AutoTokenizer.from_pretrained(done[0])
    ids = tokenizer("the quick brown fox jumps", return_tensors="pt").input_ids[:, :16]

    hidden = ids
    stages = sorted((w.engine.stage for w in ours.workers.values()), key=lambda s: s.first)
    with torch.inference_mode():
        for stage in stages:
            stage.x.copy_(stage.g)
            hidden = stage.module(hidden)
        torch.testing.assert_close(model(ids).logits, stages[-1].module.logits(hidden), rtol=0, atol=1e-5)
