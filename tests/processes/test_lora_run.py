"""A run of real processes that trains adapters beside a checkpoint in four bits."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

LORA = {"rank": 4, "alpha": 32.0, "base": "4bit"}


@pytest.mark.timeout(90)
def test_adapters_are_trained_and_a_whole_model_is_published(network: Any, tmp_path: Path) -> None:
    """Before the first step it is the checkpoint, bit for bit; afterwards only the blocks' matrices differ."""
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 16}
    before = GPTJForCausalLM(GPTJConfig(**shape)).half()
    before.save_pretrained(tmp_path / "hub")
    network.configure(12, init=str(tmp_path / "hub"), lora=LORA)
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    assert network.committed_samples() == 12 * 4
    folders = network.published()
    first, last = (AutoModelForCausalLM.from_pretrained(folders[i], dtype="auto").state_dict() for i in (0, -1))
    for name, tensor in before.state_dict().items():
        assert first[name].dtype == last[name].dtype == torch.float16
        assert torch.equal(first[name], tensor), name
        assert torch.equal(last[name], tensor) == (not name.endswith(("proj.weight", "fc_in.weight", "fc_out.weight")))

    about = json.loads((folders[-1] / "adapter" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 4, 32.0)
    adapters = safetensors.torch.load_file(folders[-1] / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 6 * 2
    root = "base_model.model.transformer.h.1.mlp.fc_in"
    a, b = (adapters[f"{root}.lora_{x}.weight"] for x in "AB")
    name = "transformer.h.1.mlp.fc_in.weight"
    wanted = torch.addmm(before.state_dict()[name].float(), b, a, alpha=8.0).half()
    assert torch.equal(last[name], wanted)
    if importlib.util.find_spec("peft"):  # no dependency of ours: where it is, it must agree
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what it asks of transformers
            adapted = PeftModel.from_pretrained(before.float(), folders[-1] / "adapter")
        merged = adapted.merge_and_unload().state_dict()
        assert merged.keys() == last.keys()
        for name, tensor in merged.items():
            assert torch.allclose(tensor, last[name].float(), rtol=2e-3, atol=1e-6), name
    assert not list(folders[-1].glob(".*"))
    assert "adapters (LoRA) of rank 4" in (folders[-1] / "README.md").read_text(encoding="utf-8")
    for worker in ("anna", "ben"):  # what a worker keeps of the run are adapters: less than the base in any dtype
        kept = list((network.folder / worker).rglob("round-*.safetensors"))
        assert kept and all(path.stat().st_size < 20 * 4 * 2304 for path in kept)
        assert not list((network.folder / worker).rglob("*.merged"))


def test_a_run_without_a_base_is_refused(network: Any) -> None:
    path = network.folder / "run.yaml"
    path.write_text("model: {train: lora}\n", encoding="utf-8")
    process = network.start("refused", "coordinator", "up", path, "--data-dir", network.data_dir)
    assert process.wait(20.0) == 1
    assert "there is no base" in process.output and "Name a checkpoint in model.init" in process.output
