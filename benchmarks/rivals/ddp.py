"""torch's DistributedDataParallel over gloo, fp32: what nothing compressed costs.

As its documentation advises: ``no_sync`` for all microbatches but a step's last, gradients reduced while the last one's
backward goes on.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .model import Sketch, Whole, adamw, begin, end, rendezvous, set_rate, snapshot
from .task import arrive, to_the_end


def main() -> None:
    host = arrive("ddp")
    store = rendezvous(host)
    dist.init_process_group("gloo", store=dist.PrefixStore("ddp", store), rank=host.rank, world_size=host.world)
    whole = Whole(host.run, host.vocab_size, host.pace)
    model = DistributedDataParallel(whole, gradient_as_bucket_view=True)
    optimizer = adamw(model.parameters(), host.run)
    sketch = Sketch(whole.parameters())
    begin(host, store)
    for step in range(host.task.steps):
        set_rate(optimizer, host.run, step)
        mine, total = host.task.share(step, host.rank, host.world), 0.0
        for i, indices in enumerate(mine):
            with nullcontext() if i == len(mine) - 1 else model.no_sync():
                loss = model(*host.data.batch(indices, host.run.seed)[:2]) / len(mine)
                loss.backward()
                total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        host.progress.step(done, done * host.task.samples_per_step, total)
        if done % 10 == 0:
            host.progress.say("round", step=done, values=sketch(whole.parameters()))
        if host.rank == 0 and host.is_snapshot(done):
            snapshot(host, done, done * host.task.samples_per_step, whole.state_dict())
    end(host, store)
    dist.destroy_process_group()


if __name__ == "__main__":
    to_the_end(main)
