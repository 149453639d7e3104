"""GPT-JT's way with real processes: a recipe's corpus, a causal run, and a UL2R run that begins from its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_texts import recipe_of, write_sources

from potluck.protocol.config import convert, dump
from potluck.protocol.manifest import MANIFEST_FILE, Manifest

STEPS = 6


def built(network: Any, folder: Path, kind: str, tokenizer: dict[str, Any]) -> Path:
    """The corpus that ``potluck data build`` makes, with one objective."""
    raw = recipe_of(tokenizer=tokenizer, seq_len=64)
    raw["sources"] = {"web": raw["sources"]["web"]}
    raw["stages"] = [{"name": kind, "tokens": 8000, "mix": {"web": 1.0}, "objective": {"kind": kind}}]
    path, out = folder / f"{kind}.yaml", folder / kind
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    process = network.start(f"build-{kind}", "data", "build", path, "--out", out)
    assert process.wait(60.0) == 0, process.output
    return out


def finished(network: Any, corpus: Path, init: str) -> Path:
    """The model that two workers of two stages publish."""
    network.configure(STEPS, init=init)
    path = network.folder / "run.yaml"
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw["data"]["source"], raw["model"]["seq_len"] = str(corpus), 64
    path.write_text(dump(convert(raw)), encoding="utf-8")
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    assert [process.wait(60.0) for process in (coordinator, *crew)] == [0, 0, 0], network.story([])
    assert network.committed_samples() == STEPS * 4
    return network.published()[-1]


@pytest.mark.timeout(180)
def test_a_ul2r_run_begins_from_a_causal_ones_model(network: Any, tmp_path: Path) -> None:
    texts = write_sources(tmp_path / "texts")
    causal = built(network, texts, "causal", {"kind": "train", "vocab_size": 400, "spare": 16})
    ul2r = built(network, texts, "ul2r", {"kind": "folder", "path": "causal"})
    manifest = Manifest.decode((ul2r / MANIFEST_FILE).read_bytes(), "manifest")
    assert manifest.masked and manifest.special.sentinels

    first = finished(network, causal, "")
    assert "is_causal" not in json.loads((first / "config.json").read_text())
    begun = tmp_path / "begun"
    first.rename(begun)
    (tmp_path / "second").mkdir()
    again = type(network)(tmp_path / "second")
    again.processes = network.processes  # which end with the test
    second = finished(again, ul2r, str(begun))

    about = json.loads((second / "config.json").read_text())
    assert about["is_causal"] is False
    assert about["potluck_special"]["modes"].keys() == {"R", "S", "X"}
    before = again.published()[0]
    assert before.name == "step-00000000"
    assert differing(begun, before) == 0
    assert differing(begun, second) > 0


def differing(one: Path, other: Path) -> int:
    """How many tensors differ between two models of the same tensors."""
    import safetensors.torch

    def tensors(folder: Path) -> dict[str, Any]:
        files = folder.glob("*.safetensors")
        return {name: tensor for path in files for name, tensor in safetensors.torch.load_file(path).items()}

    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    return sum(not left[name].equal(right[name]) for name in left)
