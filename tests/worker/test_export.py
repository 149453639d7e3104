"""What is published, in stock transformers: the run's own logits, causal, and with a prompt that is seen whole."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, PreTrainedModel

from potluck.coordinator.publish import Publisher
from potluck.protocol.config import ModelConfig, PipelineConfig, RunConfig
from potluck.protocol.manifest import Manifest
from potluck.protocol.objective import Objective
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule

GPTJ = ModelConfig(d_model=32, layers=3, heads=4, d_ff=80, norm_eps=1e-6, rotary_dim=4, seq_len=24)
LLAMA = ModelConfig(
    architecture="llama", d_model=32, layers=3, heads=4, kv_heads=2, rope_theta=1e5, norm_eps=1e-6, seq_len=24
)
both = pytest.mark.parametrize("model", [GPTJ, LLAMA], ids=["gptj", "llama"])


def published(
    model: ModelConfig, corpus: tuple[Path, Manifest], out: Path, *, prefix_lm: bool
) -> tuple[PreTrainedModel, StageModule]:
    """The model as stock transformers loads it from what a run of two stages publishes, and as one stage of ours."""
    folder, manifest = corpus
    if prefix_lm:
        (stage,) = manifest.stages
        stages = (msgspec.structs.replace(stage, objective=Objective(kind="prefix")),)
        manifest = msgspec.structs.replace(manifest, stages=stages)
    config = RunConfig(model=model, pipeline=PipelineConfig(stages=2), seed=5)
    done: list[Path] = []

    async def arrived(step: int, path: Path) -> None:
        done.append(path)

    async def publish() -> None:
        publisher = Publisher(out, folder, config, manifest, arrived)
        publisher.begin(1, 1, ((0, 2), (2, 3)))
        for number, layers in enumerate(publisher.layers):
            stage = StageModule(model, manifest.vocab_size, *layers, config.seed)
            publisher.part(1, number).write_bytes(save(dict(stage.state_dict()), {"format": "pt"}))
            await publisher.arrived(1, number)

    asyncio.run(publish())
    ids = json.loads((done[0] / "generation_config.json").read_text())
    assert set(ids.values()) == {manifest.eos_id} and "pad_token_id" in ids
    loaded, report = AutoModelForCausalLM.from_pretrained(done[0], output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32 and loaded.config.model_type == model.architecture
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    return loaded.eval(), StageModule(model, manifest.vocab_size, 0, model.layers, config.seed)


@both
@torch.inference_mode()
def test_a_causal_model(model: ModelConfig, corpus_folder: tuple[Path, Manifest], tmp_path: Path) -> None:
    stock, ours = published(model, corpus_folder, tmp_path, prefix_lm=False)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(stock(ids).logits, ours.logits(ours(ids)), rtol=0, atol=1e-5)


@both
@torch.inference_mode()
def test_a_prompt_that_is_seen_whole(model: ModelConfig, corpus_folder: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Read at once, as a prompt is, all sees all; and what is generated after it is what targets were trained as."""
    stock, ours = published(model, corpus_folder, tmp_path, prefix_lm=True)
    assert stock.config.is_causal is False
    length, prompt = 20, 12
    ids = torch.arange(40).view(2, length)

    def layout(prefix: int) -> Layout:
        ones = torch.ones(2, length, dtype=torch.int16)
        return Layout(ones, (torch.arange(length) < prefix).expand(2, length))

    mine = ours.logits(ours(ids, layout(length)))
    torch.testing.assert_close(stock(ids, use_cache=False).logits, mine, rtol=0, atol=1e-5)
    assert not torch.allclose(mine, ours.logits(ours(ids)), atol=1e-3)

    out = stock(ids[:, :prompt], use_cache=True)
    steps = [out.logits]
    for place in range(prompt, length):
        out = stock(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    targets = ours.logits(ours(ids, layout(prompt)))
    torch.testing.assert_close(torch.cat(steps, dim=1), targets, rtol=0, atol=1e-5)
