"""Held-out loss of the snapshots that hosts leave: beside the training, so that no host's clock and no line carries it.

    python -m benchmarks.rivals.judge task.json FOLDER

Follows ``FOLDER/rank-*.jsonl``, evaluates as potluck does (same samples, mean nats per token), appends a line for each
snapshot to ``FOLDER/points.jsonl`` and deletes it; ends when everything is judged and there is a file ``FOLDER/ended``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from potluck.worker.data import Dataset
from potluck.worker.model import StageModule

from .record import lines
from .task import Task, read

NICENESS = 5  # hosts first


@torch.no_grad()
def heldout_loss(task: Task, data: Dataset, model: StageModule) -> float:
    """Mean nats per token over ``eval.samples`` held-out samples."""
    total = count = 0.0
    most = min(task.run.eval.samples, data.manifest.n_heldout)
    for start in range(0, most, 32):
        ids, targets, _ = data.heldout_batch(range(start, min(most, start + 32)))
        total += float(model.loss_sum(model(ids), targets))
        count += targets.numel()
    return total / count


def main() -> None:
    task, folder = read(Path(sys.argv[1])), Path(sys.argv[2])
    os.nice(NICENESS)
    torch.set_num_threads(1)
    data = Dataset(Path(task.corpus))
    model = StageModule(task.run.model, data.manifest.vocab_size, 0, task.run.model.layers, 0)
    offsets: dict[Path, int] = {}
    waiting: dict[int, list[dict[str, Any]]] = {}
    with (folder / "points.jsonl").open("a", encoding="utf-8", buffering=1) as out:
        while True:
            ended = (folder / "ended").exists()
            for path in sorted(folder.glob("rank-*.jsonl")):
                new, offsets[path] = lines(path, offsets.get(path, 0))
                for line in new:
                    if line["event"] == "snapshot":
                        waiting.setdefault(line["step"], []).append(line)
            whole = sorted(step for step, parts in waiting.items() if len(parts) == parts[0]["parts"])
            for step in whole:
                parts = waiting.pop(step)
                weights: dict[str, torch.Tensor] = {}
                for part in parts:
                    weights |= load_file(part["file"])
                    Path(part["file"]).unlink()
                model.load_state_dict(weights)
                last = max(parts, key=lambda part: part["trained"])
                point = {key: last[key] for key in ("step", "samples", "trained", "at")}
                out.write(json.dumps({**point, "loss": heldout_loss(task, data, model)}) + "\n")
            if ended and not whole:
                return
            time.sleep(0.2)


if __name__ == "__main__":
    main()
