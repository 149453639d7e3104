"""torch.distributed.pipelining over gloo, fp32: 1F1B through the stages, DistributedDataParallel among replicas.

As its documentation advises: a ``PipelineStage`` of each host's own module, ``Schedule1F1B`` with the mean loss, and
the stage's module wrapped in DDP over the hosts of the same stage (which it reduces at the last backward).
Rank = stage * replicas + replica.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from potluck.protocol.plan import split_layers

from .model import Part, Sketch, adamw, begin, end, rendezvous, set_rate, snapshot
from .task import Host, arrive, to_the_end


class Piece(nn.Module):
    """A stage: ids or hidden states to hidden states, or to logits [B, T, V] at the last."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part.logits(self.part(x)) if self.part.is_last else self.part(x)


def mean_loss(logits: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def main() -> None:
    host = arrive("torch_pipeline")
    store = rendezvous(host)
    dist.init_process_group("gloo", store=dist.PrefixStore("pipe", store), rank=host.rank, world_size=host.world)
    task, config = host.task, host.run
    stages, replicas = config.pipeline.stages, task.replicas
    stage, replica = divmod(host.rank, replicas)
    pipes = [dist.new_group([s * replicas + r for s in range(stages)]) for r in range(replicas)]
    peers = [dist.new_group([s * replicas + r for r in range(replicas)]) for s in range(stages)]
    cuts = split_layers(config.model.layers, stages, d_model=config.model.d_model, vocab_size=host.vocab_size)
    part = Part(config, host.vocab_size, *cuts[stage], host.pace)
    piece: nn.Module = Piece(part)
    if replicas > 1:
        piece = DistributedDataParallel(piece, process_group=peers[stage])
    schedule = Schedule1F1B(
        PipelineStage(piece, stage, stages, torch.device("cpu"), group=pipes[replica]),
        config.pipeline.microbatches,
        loss_fn=mean_loss,
    )
    begin(host, store)
    train(host, stage, replica, part, schedule)
    end(host, store)
    dist.destroy_process_group()


def train(host: Host, stage: int, replica: int, part: Part, schedule: Any) -> None:
    task, sketch = host.task, Sketch(part.parameters())
    optimizer = adamw(part.parameters(), host.run)
    for step in range(task.steps):
        set_rate(optimizer, host.run, step)
        mine = task.share(step, replica, task.replicas)
        losses: list[Tensor] = []
        ids, targets, _ = host.data.batch([i for indices in mine for i in indices], host.run.seed)
        schedule.step(
            *([ids] if part.is_first else []),
            target=targets if part.is_last else None,
            losses=losses if part.is_last else None,
            return_outputs=False,
        )
        optimizer.step()
        optimizer.zero_grad()
        done, loss = step + 1, sum(float(loss.detach()) for loss in losses) / len(losses) if losses else None
        host.progress.step(done, done * task.samples_per_step, loss)
        if done % 10 == 0 and task.replicas > 1:
            host.progress.say("round", step=done, values=sketch(part.parameters()), group=stage)
        if replica == 0 and host.is_snapshot(done):
            parts = host.run.pipeline.stages
            snapshot(host, done, done * task.samples_per_step, part.state_dict(), stage, parts)


if __name__ == "__main__":
    to_the_end(main)
