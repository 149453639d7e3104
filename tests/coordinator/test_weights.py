"""A run that begins from a checkpoint: what is stored is found, hashed, served by range, and is the model's."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_models import build
from transformers import AutoModelForCausalLM, PreTrainedModel

from potluck.coordinator.weights import Checkpoint, open_checkpoint, shaped
from potluck.protocol.config import ModelConfig
from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.weights import StoredTensor, Weights
from potluck.worker.convert import convert
from potluck.worker.model import StageModule
from potluck.worker.weights import Beginning

VOCAB = 257


def a_checkpoint(folder: Path, kind: str = "gptj", **how: Any) -> tuple[PreTrainedModel, ModelConfig]:
    model = build(kind, prefix=False)
    model.to(how.pop("dtype", torch.float32)).save_pretrained(folder, **how)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a model\n")
    return model, ModelConfig(init=str(folder), seq_len=16)


def brought(checkpoint: Checkpoint, folder: Path) -> tuple[Beginning, list[str]]:
    """As a worker has it: what it asks for comes from the spans; and the names that it asked for."""
    asked = []

    def fetch(tensor: StoredTensor, path: Path) -> None:
        span = checkpoint.spans[tensor.sha256]
        asked.append(tensor.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(span.path.read_bytes()[span.start : span.start + span.nbytes])

    return Beginning(Weights.decode(checkpoint.weights.encode()), folder, fetch), asked


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stages_read_their_own_tensors_and_together_are_the_model(tmp_path, kind, dtype):
    _, config = a_checkpoint(tmp_path / "hub", kind, dtype=dtype, max_shard_size="40KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    shape = shaped(config)
    assert (shape.architecture, shape.layers, shape.d_model, shape.seq_len) == (kind, 2, 32, 16)
    checkpoint = open_checkpoint(shape, VOCAB, tmp_path)
    assert checkpoint is not None and checkpoint.weights.license == "apache-2.0"
    stages, asked = [], []
    for first, last in ((0, 1), (1, 2)):
        beginning, names = brought(checkpoint, tmp_path / f"worker{first}")
        stages.append(StageModule(shape, VOCAB, first, last, 1, beginning))
        asked.append(names)
    hashes = {t.name: t.sha256 for t in checkpoint.weights.tensors}
    for stage, names in zip(stages, asked, strict=True):  # tensors of the same bytes are fetched once
        own = {hashes[name] for name, _ in stage.named_parameters()}
        assert sorted(hashes[name] for name in names) == sorted(own)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        ours = stages[1].logits(stages[1](stages[0](ids)))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
        wanted = stock(ids, use_cache=False).logits
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_a_tied_head_is_the_embedding(tmp_path):
    model, config = a_checkpoint(tmp_path / "hub", "llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    shutil.rmtree(tmp_path / "hub")
    model.save_pretrained(tmp_path / "hub")
    checkpoint = open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert checkpoint is not None
    named = {t.name: t for t in checkpoint.weights.tensors}
    assert named["lm_head.weight"].sha256 == named["model.embed_tokens.weight"].sha256


def test_hashes_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    from potluck.coordinator import weights as module

    _, config = a_checkpoint(tmp_path / "hub")
    first = open_checkpoint(shaped(config), VOCAB, tmp_path)
    hashed = []
    inner = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda span: hashed.append(span) or inner(span))
    again = open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert first is not None and again is not None
    assert again.weights == first.weights and not hashed
    path = tmp_path / "hub" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    changed = open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert changed is not None and hashed
    assert changed.weights.sha256 != first.weights.sha256


def test_a_damaged_file_on_a_workers_disk_is_fetched_again(tmp_path):
    _, config = a_checkpoint(tmp_path / "hub")
    checkpoint = open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert checkpoint is not None
    name, out = "transformer.h.0.ln_1.weight", torch.empty(32)
    beginning, asked = brought(checkpoint, tmp_path / "worker")
    beginning.fill(name, out)
    beginning.fill(name, out)
    assert asked == [name]
    (path,) = (tmp_path / "worker").iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    beginning.fill(name, out)
    assert asked == [name, name] and bool((out == 1).all())
    for wrong in (torch.empty(31), torch.empty(2, 16)):
        with pytest.raises(StateError, match="no transformer"):
            beginning.fill(name, wrong)


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "told"),
    {
        "another architecture": (lambda f: spoil_config(f, model_type="opt"), "architecture opt"),
        "another activation": (lambda f: spoil_config(f, activation_function="relu"), "activation_function relu"),
        "another shape": (lambda f: spoil_config(f, n_embd=48, n_head=4), "is [257, 32], and the run's is [257, 48]"),
        "more layers": (lambda f: spoil_config(f, n_layer=3), "no tensor transformer.h.2"),
        "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors"),
        "cut off": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), ""),
        "no config": (lambda f: (f / "config.json").write_text("[1]"), "no object"),
        "another folder's files": (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "outside of its folder",
        ),
    }.values(),
    ids=str,
)
def test_what_is_no_checkpoint_of_ours_is_said(tmp_path, spoil, told):
    _, config = a_checkpoint(tmp_path / "hub")
    spoil(tmp_path / "hub")
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert told in str(caught.value) and caught.value.hint


def test_a_shape_that_is_not_the_checkpoints_is_refused(tmp_path):
    _, config = a_checkpoint(tmp_path / "hub")
    assert shaped(msgspec.structs.replace(config, d_model=32)).d_model == 32
    with pytest.raises(ConfigError, match="layers is 7"):
        shaped(msgspec.structs.replace(config, layers=7))
    with pytest.raises(ConfigError, match="is no folder"):
        shaped(ModelConfig(init="/nowhere/at/all"))


def test_bin_files_are_converted_once(tmp_path):
    model, config = a_checkpoint(tmp_path / "hub")
    source = tmp_path / "old"
    source.mkdir()
    state = dict(model.state_dict()) | {"transformer.h.0.attn.bias": torch.ones(4, dtype=torch.bool)}
    halves = list(state.items())[:9], list(state.items())[9:]
    names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        torch.save(dict(half), source / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key, _ in half}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copyfile(tmp_path / "hub" / "config.json", source / "config.json")
    with pytest.raises(ConfigError, match="no safetensors") as caught:
        open_checkpoint(msgspec.structs.replace(shaped(config), init=str(source)), VOCAB, tmp_path)
    assert "potluck model convert" in str(caught.value.hint)
    assert convert(source, tmp_path / "new", lambda what, share: None) == len(state) - 1
    new = msgspec.structs.replace(shaped(config), init=str(tmp_path / "new"))
    found, wanted = (open_checkpoint(m, VOCAB, tmp_path) for m in (new, shaped(config)))
    assert found is not None and wanted is not None
    assert found.weights.sha256 == wanted.weights.sha256
    with pytest.raises(ConfigError, match="there already"):
        convert(source, tmp_path / "new", lambda what, share: None)


def test_two_threads_that_need_the_same_bytes_fetch_them_once(tmp_path):
    """A worker's own stage and one that it keeps: all fresh norms are the same file."""
    _, config = a_checkpoint(tmp_path / "hub")
    checkpoint = open_checkpoint(shaped(config), VOCAB, tmp_path)
    assert checkpoint is not None
    beginning, asked = brought(checkpoint, tmp_path / "worker")
    inner, barrier, outs = beginning._fetch, threading.Barrier(2), [torch.empty(32) for _ in range(2)]

    def slow(tensor: StoredTensor, path: Path) -> None:
        time.sleep(0.2)  # for the other to come in, if it could
        inner(tensor, path)

    def fill(layer: int) -> None:
        barrier.wait(5)
        beginning.fill(f"transformer.h.{layer}.ln_1.weight", outs[layer])

    beginning._fetch = slow
    threads = [threading.Thread(target=fill, args=(layer,)) for layer in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(asked) == 1 and all(bool((out == 1).all()) for out in outs)


def test_a_bin_file_that_would_run_code_is_refused(tmp_path):
    """Converting opens a pickle: torch's restricted reader makes nothing but tensors and containers."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    source = tmp_path / "old"
    source.mkdir()
    torch.save({"weight": torch.ones(2), "more": Hostile()}, source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        convert(source, tmp_path / "new", lambda what, share: None)
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "new").glob("*.safetensors"))
