"""torchft's DiLoCo over gloo: AdamW on every host, an outer Nesterov step on the mean difference every so many steps.

As its documentation and its ``train_diloco.py`` example advise: synchronous quorum, outer SGD with a learning rate of
0.7 and Nesterov momentum of 0.9. ``--fragments`` makes it Streaming DiLoCo; its quantized all-reduce needs a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from .ft import manager
from .model import Sketch, Whole, adamw, begin, end, rendezvous, set_rate, snapshot
from .task import Host, arrive, to_the_end


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser()
    out.add_argument("--sync-every", type=int, default=20, help="steps from one exchange of all weights to the next")
    out.add_argument("--fragments", type=int, default=1, help="parts of the model that take turns")
    out.add_argument("--delay", type=int, default=0, help="steps that go on while a fragment is exchanged")
    out.add_argument("--outer-lr", type=float, default=0.7)
    out.add_argument("--outer-momentum", type=float, default=0.9)
    return out


def main() -> None:
    host = arrive("torchft_diloco", parser())
    store = rendezvous(host)
    whole = Whole(host.run, host.vocab_size, host.pace)
    inner = adamw(whole.parameters(), host.run)
    parts, options = fragments(whole, host.options.fragments), host.options
    outer = [
        torch.optim.SGD(p.parameters(), lr=options.outer_lr, momentum=options.outer_momentum, nesterov=True)
        for p in parts
    ]

    def load(state: dict[str, Any]) -> None:
        whole.load_state_dict(state["model"])
        inner.load_state_dict(state["inner"])
        for one, kept in zip(outer, state["outer"], strict=True):
            one.load_state_dict(kept)

    def save() -> dict[str, Any]:
        return {
            "model": whole.state_dict(),
            "inner": inner.state_dict(),
            "outer": [one.state_dict() for one in outer],
        }

    with manager(host, store, load_state_dict=load, state_dict=save, use_async_quorum=False) as made:
        begin(host, store)
        train(host, whole, parts, inner, outer, made)
        end(host, store)


def fragments(whole: Whole, count: int) -> list[nn.Module]:
    """The model in so many parts of neighbouring layers; the embedding goes with the first, the head with the last."""
    if count == 1:
        return [whole]
    blocks = whole.blocks
    cuts = [len(blocks) * i // count for i in range(count + 1)]
    parts = [nn.ModuleList(blocks[cuts[i] : cuts[i + 1]]) for i in range(count)]
    parts[0].append(whole.transformer["wte"])
    parts[-1].extend([whole.transformer["ln_f"], whole.lm_head])
    return list(parts)


def train(host: Host, whole: Whole, parts: list[nn.Module], inner: Any, outer: list[Any], made: Any) -> None:
    """All steps; the weights that are judged are those of host 0 right after an exchange, or where it is in between."""
    from torchft.local_sgd import DiLoCo

    options, rounds, refused, sketch = host.options, 0, 0, Sketch(whole.parameters())
    wrapped = DiLoCo(
        made,
        parts,
        inner,
        outer if len(outer) > 1 else outer[0],
        sync_every=options.sync_every,
        fragment_sync_delay=options.delay,
        pin_memory=False,
    )
    gap = options.sync_every // options.fragments
    with wrapped:
        for step in range(host.task.steps):
            set_rate(inner, host.run, step)
            mine, total = host.task.share(step, host.rank, host.world), 0.0
            inner.zero_grad()
            for indices in mine:
                loss = whole(*host.data.batch(indices, host.run.seed)[:2]) / len(mine)
                loss.backward()
                total += float(loss.detach())
            inner.step()  # DiLoCo's hooks exchange in here
            done = step + 1
            host.progress.step(done, done * host.task.samples_per_step, total)
            if done % gap == 0:
                if made.current_step() == rounds:
                    refused += 1
                    host.progress.say("note", text=f"the round after step {done} was not committed")
                rounds = made.current_step()
                if len(parts) == 1:  # otherwise most of the weights have been apart for a while
                    shown = sketch(whole.parameters())
                    host.progress.say("round", step=done, values=shown, peers=made.num_participants())
            if host.rank == 0 and host.is_snapshot(done):
                snapshot(host, done, done * host.task.samples_per_step, whole.state_dict())
    if refused:
        host.progress.say("note", text=f"{refused} rounds not committed")


if __name__ == "__main__":
    to_the_end(main)
