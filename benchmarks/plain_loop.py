"""The ordinary loop that :mod:`benchmarks.overhead` compares with: stock transformers, one process, no network.

Reads a run's configuration as JSON from stdin; prints tokens/s.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import torch
from torch.nn import functional as F
from transformers import GPTJForCausalLM

from potluck.protocol.config import RunConfig
from potluck.worker.data import Dataset
from potluck.worker.model import hf_config


def main() -> None:
    corpus, threads, warmup = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    run = msgspec.json.decode(sys.stdin.buffer.read(), type=RunConfig)
    torch.set_num_threads(threads)
    data = Dataset(corpus) if (corpus / "manifest.json").exists() else None
    assert data is not None, corpus
    model = GPTJForCausalLM(hf_config(run.model, data.manifest.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optimizer.lr, fused=True)
    size, index, started = run.pipeline.microbatch_size, 0, 0.0
    for step in range(run.steps):
        if step == warmup:
            started = time.perf_counter()
        for _ in range(run.pipeline.microbatches):
            inputs, targets, _ = data.batch(range(index, index + size), run.seed)
            index += size
            logits = model(inputs, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        per_step = run.pipeline.microbatches * size * run.model.seq_len
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(per_step)
        optimizer.step()
        optimizer.zero_grad()
    print((run.steps - warmup) * per_step / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
