"""What is published where adapters were trained: the checkpoint's own weights with what the adapters add, whole."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from manifests import manifest
from msgspec.structs import replace
from tiny_models import save
from transformers import AutoModelForCausalLM

from potluck.coordinator.publish import Publisher
from potluck.coordinator.weights import Checkpoint, open_checkpoint, shaped
from potluck.protocol.config import ModelConfig, RunConfig
from potluck.protocol.errors import ConfigError, StateError, WireError
from potluck.protocol.model_config import LoraConfig
from potluck.protocol.plan import SavePoint, Shape
from potluck.protocol.weights import StoredTensor
from potluck.worker.joiner import Joiner, Prospect
from potluck.worker.merging import Merging
from potluck.worker.stage import Stage, State, initial_state
from potluck.worker.transfer import Desk, Wanted
from potluck.worker.weights import Beginning

VOCAB, LAYERS = 257, ((0, 1), (1, 2))
MANIFEST = manifest(8, 1, 16, vocab_size=VOCAB, eos=256)
both = pytest.mark.parametrize("kind", ["gptj", "llama"])


class Run:
    """Two stages that begin from a checkpoint, and their adapters after some training."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype, base: str) -> None:
        hub = save(folder / "hub", kind, prefix=False)
        stock = AutoModelForCausalLM.from_pretrained(hub).to(dtype)
        stock.save_pretrained(hub)
        self.folder, self.stock = folder, stock
        model = ModelConfig(init=str(hub), seq_len=16, train="lora", lora=LoraConfig(rank=3, alpha=6.0, base=base))
        self.config = RunConfig(model=shaped(model))
        found = open_checkpoint(self.config.model, VOCAB, folder)
        assert found is not None
        self.checkpoint: Checkpoint = found
        self.fetched: list[str] = []
        self.beginning = Beginning(found.weights, folder / "weights", self._fetch)
        self.stages = [Stage(self.config, VOCAB, *layers, beginning=self.beginning) for layers in LAYERS]
        for stage in self.stages:
            generator = torch.Generator().manual_seed(stage.first)
            stage.g = stage.g + 0.05 * torch.randn(stage.size, generator=generator)
            stage.place(stage.g)

    def _fetch(self, tensor: StoredTensor, path: Path) -> None:
        self.fetched.append(tensor.name)
        span = self.checkpoint.spans[tensor.sha256]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(span.path.read_bytes()[span.start : span.start + span.nbytes])

    def merging(self, stage: Stage) -> Merging:
        point = SavePoint(kind="round", generation=1, step=3, first_layer=stage.first, last_layer=stage.last)
        return Merging(self.config.model, VOCAB, point, stage.named(stage.g), self.beginning)

    def publisher(self) -> Publisher:
        async def arrived(step: int, path: Path) -> None:
            pass

        publisher = Publisher(
            self.folder / "out", self.folder / "hub", self.config, MANIFEST, arrived, base=self.checkpoint.weights
        )
        publisher.begin(3, 1, LAYERS)
        return publisher

    def published(self) -> Path:
        publisher = self.publisher()

        async def publish() -> None:
            for number, stage in enumerate(self.stages):
                with self.merging(stage).packed(self.folder / "made") as data:
                    assert len(data) <= publisher.stage_nbytes(number)
                    publisher.part(3, number).write_bytes(data)
                await publisher.arrived(3, number)

        asyncio.run(publish())
        assert not list((self.folder / "made").iterdir())
        return publisher.path(3)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.stages[1].module.logits(self.stages[1].module(self.stages[0].module(ids)))


@both
@torch.inference_mode()
def test_stock_transformers_says_what_the_run_says(tmp_path: Path, kind: str) -> None:
    run, ids = Run(tmp_path, kind, torch.float32, "fp32"), torch.arange(32).view(2, 16)
    stock, report = AutoModelForCausalLM.from_pretrained(run.published(), output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(stock(ids).logits, run.logits(ids), rtol=0, atol=2e-4)
    assert not torch.allclose(run.logits(ids), run.stock(ids).logits, atol=0.1)  # they do something


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_base_in_4_bits_is_published_from_the_checkpoints_own_weights(tmp_path: Path, kind: str, dtype) -> None:
    run = Run(tmp_path, kind, dtype, "4bit")
    folder, before = run.published(), run.stock.state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    adapters = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in before.items():
        root = f"base_model.model.{name.removesuffix('weight')}lora_"
        wanted = tensor
        if f"{root}A.weight" in adapters:
            wanted = (tensor.float() + 2.0 * adapters[f"{root}B.weight"] @ adapters[f"{root}A.weight"]).to(dtype)
            assert not torch.equal(wanted, tensor)
        assert after[name].dtype == dtype
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=0.01)
    own = {f"base_model.model.{name}": t for s in run.stages for name, t in s.named(s.g).items()}
    assert adapters.keys() == own.keys() and all(torch.equal(adapters[name], t) for name, t in own.items())
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"], about["bias"]) == ("LORA", 3, 6.0, "none")
    assert about["target_modules"] == list(run.config.model.targets)
    card = (folder / "README.md").read_text()
    assert "adapters (LoRA) of rank 3" in card and "rounded to four bits (NF4)" in card
    assert not list(folder.glob(".*"))


def test_a_stage_fetches_its_own_tensors_once_and_a_keeper_none(tmp_path: Path) -> None:
    run = Run(tmp_path, "gptj", torch.float16, "4bit")
    hashes = {t.name: t.sha256 for t in run.checkpoint.weights.tensors}
    assert len(run.fetched) == len(set(hashes.values()))
    assert {hashes[name] for name in run.fetched} == set(hashes.values())
    before = list(run.fetched)
    run.published()
    assert run.fetched == before  # they lie on the disk


def test_a_newcomer_has_its_part_of_the_base_before_its_state(tmp_path: Path) -> None:
    """So that nobody waits while it downloads."""
    run = Run(tmp_path, "gptj", torch.float16, "4bit")
    shutil.rmtree(tmp_path / "weights")
    run.fetched.clear()
    told: list[list[str]] = []
    ready = threading.Event()

    def fetch(wanted: Wanted, donors: Sequence[str], stopped: Callable[[], bool]) -> State:
        told.append(list(run.fetched))
        return initial_state(run.config, VOCAB, wanted.point, run.beginning)

    shape = Shape.of(run.config.model, VOCAB)
    own = {t.name for t in run.checkpoint.weights.tensors if ".h.1." in t.name or "ln_f" in t.name or "head" in t.name}
    joiner = Joiner(
        run.config,
        shape,
        Desk(b"testrun1", lambda peer, frame: None),
        fetch,
        lambda layers, step: None,
        lambda **body: ready.set(),
        run.beginning,
    )
    point = SavePoint(kind="round", generation=1, step=3, first_layer=1, last_layer=2)
    joiner.follow(Prospect(1, point, ()))
    assert ready.wait(20.0)
    joiner.close()
    hashes = {t.name: t.sha256 for t in run.checkpoint.weights.tensors}
    assert [{hashes[name] for name in before} for before in told] == [{hashes[name] for name in own}]


def test_adapters_that_stand_elsewhere_are_refused(tmp_path: Path) -> None:
    """The coordinator cuts the file before them: nothing of the model may stand behind."""
    run = Run(tmp_path, "gptj", torch.float32, "fp32")
    with run.merging(run.stages[0]).packed(tmp_path / "made") as data:
        whole = safetensors.torch.load(data[:])
    model, adapters = ([n for n in whole if ("lora_" in n) == which] for which in (False, True))
    names = [*model, *adapters]

    def upload(order: list[str], **changed: torch.Tensor) -> bytes:
        entries, blobs, end = {}, [], 0
        for name in order:
            tensor = changed.get(name, whole[name])
            kind = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
            nbytes = tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
            blobs.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            end += nbytes
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(blobs)

    adapter = adapters[0]
    halved = {adapter: whole[adapter].half()}
    bad = [
        upload([adapter, *[n for n in names if n != adapter]]),
        upload([n for n in names if n != adapter]),
        upload(names, **halved),
        upload(names, **{names[0]: whole[names[0]].half()}),
    ]
    publisher = run.publisher()
    for data in bad:
        publisher.part(3, 0).write_bytes(data)
        with pytest.raises(WireError):
            asyncio.run(publisher.arrived(3, 0))
    publisher.part(3, 0).write_bytes(upload([*reversed(model), *adapters]))  # any order otherwise
    asyncio.run(publisher.arrived(3, 0))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, "gptj", torch.float32, "fp32")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError), run.merging(run.stages[0]).packed(tmp_path / "file" / "below"):
        pass


def test_a_checkpoint_says_only_its_shape(tmp_path: Path) -> None:
    """What is trained, and in which dtype, is the run's to say."""
    hub = save(tmp_path / "hub", "gptj", prefix=False)
    model = ModelConfig(init=str(hub), seq_len=16, dtype="bf16", train="lora", lora=LoraConfig(rank=2))
    found = shaped(model)
    assert (found.dtype, found.train, found.lora.rank, found.layers, found.d_model) == ("bf16", "lora", 2, 2, 32)
    assert shaped(ModelConfig(init=str(hub), dtype="bf16")).dtype == "bf16"
    with pytest.raises(ConfigError, match="heads"):
        shaped(replace(model, heads=8))
    llama = save(tmp_path / "llama", "llama", prefix=False)
    with pytest.raises(ConfigError, match="fc_in is no matrix of llama"):
        shaped(replace(model, init=str(llama), lora=LoraConfig(targets=("fc_in",))))
