"""How much memory it takes to begin a run from a checkpoint: no process holds the whole model.

    python -m benchmarks.loading                     (Linux; GPT-J's 28 layers at width 1,024: 0.9 GB on disk)
    python -m benchmarks.loading --d-model 4096      (its real width: 12 GB on disk, and a stage's 3 GB again)

Writes a checkpoint of random fp16 weights as the hub has them, sharded safetensors, tensor by tensor. Then the
coordinator's part (``open_checkpoint``, which hashes all) and each stage's (``StageModule`` with a ``Beginning``, fp32)
run in a process of their own; what is measured is its peak resident memory above what it had after its imports.
The stages' table goes into docs/RECIPE.md. With ``--base 4bit`` the stages are those of a run that trains adapters.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from potluck.protocol import architecture
from potluck.protocol.config import ModelConfig
from potluck.protocol.model_config import LoraConfig
from potluck.protocol.plan import Shape
from potluck.protocol.weights import StoredTensor, Weights

VOCABULARY = 50_400
_DRAW = 1 << 20  # numbers drawn at a time
_BLOCK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child process is asked: with ``stage`` a worker's part, else the coordinator's."""

    checkpoint: str
    data_dir: str
    vocab_size: int
    stages: int
    stage: int | None = None
    base: Literal["", "4bit", "bf16", "fp32"] = ""  # of a run that trains adapters: what it is held in


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes. ``bare``: resident after imports; ``peak``: the most after that; ``own``: weights, as held, or 0."""

    layers: tuple[int, int]
    bare: int
    peak: int
    own: int

    @property
    def above(self) -> int:
        return self.peak - self.bare


def write_checkpoint(folder: Path, model: ModelConfig, vocab_size: int, shard_nbytes: int) -> int:
    """A checkpoint of random fp16 weights in ``folder``; its tensors' bytes. Holds a block of one tensor at a time."""
    folder.mkdir(parents=True)
    shapes = architecture.tensors(model, vocab_size, 0, model.layers)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > shard_nbytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(folder / file, {name: shapes[name] for name in names}, number)
    total = 2 * architecture.weights(shapes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(architecture.hf_config(model, vocab_size, 0)))
    return total


def _write_shard(path: Path, shapes: architecture.Shapes, seed: int) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for n in _pieces(math.prod(shape), _DRAW):
                values = (random.random(n, dtype=np.float32) - 0.5) * np.float32(architecture.INIT_STD * 12**0.5)
                file.write(values.astype("<f2").tobytes())


def _pieces(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, most):
        yield min(most, total - start)


def bare() -> int:
    """Bytes that this process has in memory; what it had at most before is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def most() -> int:
    """The most bytes that this process had in memory since then. Not ``ru_maxrss``: that begins with the parent's."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def hashing(job: Job) -> Peak:
    """The coordinator's part. Writes its list of tensors into ``data_dir``."""
    from potluck.coordinator.weights import open_checkpoint, shaped

    model, before = shaped(ModelConfig(init=job.checkpoint)), bare()
    found = open_checkpoint(model, job.vocab_size, Path(job.data_dir))
    assert found is not None
    peak = most()
    (Path(job.data_dir) / "list.json").write_text(found.weights.encode())
    return Peak(layers=(0, model.layers), bare=before, peak=peak, own=0)


def loading(job: Job) -> Peak:
    """A worker's part, as in a run: files are brought by their places in the checkpoint, then mapped one by one."""
    from potluck.worker.model import StageModule
    from potluck.worker.weights import Beginning

    assert job.stage is not None
    folder = Path(job.data_dir)
    kept, weights = folder / f"stage-{job.stage}", Weights.decode((folder / "list.json").read_text())
    model = architecture.of_hf(json.loads((Path(job.checkpoint) / "config.json").read_text()))
    if job.base:
        lora = LoraConfig(base=job.base)
        model = msgspec.structs.replace(model, init=job.checkpoint, dtype="bf16", train="lora", lora=lora)
    first, last = Shape.of(model, job.vocab_size).split(job.stages)[job.stage]
    tiny = msgspec.structs.replace(model, d_model=32 * model.heads, layers=1, d_ff=0, rotary_dim=0)
    StageModule(tiny, 300, 0, 1, 0)  # what torch allocates at its first use is part of a bare process
    kept.mkdir()

    def fetch(tensor: StoredTensor, path: Path) -> None:
        with (Path(job.checkpoint) / tensor.file).open("rb") as source, path.open("wb") as out:
            source.seek(tensor.start)
            for n in _pieces(tensor.nbytes, _BLOCK):
                out.write(source.read(n))

    before = bare()
    module = StageModule(model, job.vocab_size, first, last, 0, Beginning(weights, kept, fetch))
    peak = most()
    own = sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))
    shutil.rmtree(kept)
    return Peak(layers=(first, last), bare=before, peak=peak, own=own)


def measured(job: Job) -> Peak:
    """``job`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    return msgspec.json.decode(done.stdout, type=Peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--base", default="", choices=("4bit", "bf16"), help="of a run with adapters; only printed")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where RECIPE.md and recipe.json go")
    parser.add_argument("--folder", type=Path, default=None, help="for the checkpoint  [default: a temporary one]")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = msgspec.json.decode(arguments.job, type=Job)
        peak = hashing(job) if job.stage is None else loading(job)
        print(json.dumps(asdict(peak)))
        return
    from . import recipe_report

    model = ModelConfig(d_model=arguments.d_model, layers=arguments.layers, heads=16, seq_len=2048)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        stored = write_checkpoint(folder / "hub", model, VOCABULARY, shard_nbytes=1 << 28)
        files = len(list((folder / "hub").glob("*.safetensors")))
        print(f"{stored / 1e9:.2f} GB in {files} files; written with a peak of {most() / 1e6:.0f} MB", flush=True)
        (folder / "data").mkdir()
        job = Job(
            checkpoint=str(folder / "hub"),
            data_dir=str(folder / "data"),
            vocab_size=VOCABULARY,
            stages=arguments.stages,
            base=arguments.base,
        )
        coordinator = measured(job)
        print(f"coordinator: {coordinator.above / 1e6:.0f} MB above {coordinator.bare / 1e6:.0f}", flush=True)
        stages = []
        for number in range(arguments.stages):
            peak = measured(dataclasses.replace(job, stage=number))
            stages.append(peak)
            print(
                f"stage {number}: {peak.above / 1e6:.0f} MB above {peak.bare / 1e6:.0f}; own {peak.own / 1e6:.0f}",
                flush=True,
            )
    if arguments.base:
        return
    found = {
        "d_model": model.d_model,
        "layers": model.layers,
        "vocab_size": VOCABULARY,
        "stored_nbytes": stored,
        "files": files,
        "coordinator": asdict(coordinator),
        "stages": [asdict(peak) for peak in stages],
    }
    recipe_report.update(arguments.docs, "loading", found)


if __name__ == "__main__":
    main()
