"""torchft's fault-tolerant data parallelism over gloo, fp32.

As its README shows: its ``DistributedDataParallel`` and ``Optimizer`` around one manager, a quorum at ``zero_grad``, a
commit at ``step``. Its hook reduces after every backward (there is no ``no_sync``), so a step's microbatches go
through the model at once.
"""

from __future__ import annotations

from typing import Any

from .ft import manager
from .model import Sketch, Whole, adamw, begin, end, rendezvous, set_rate, snapshot
from .task import Host, arrive, to_the_end


def main() -> None:
    host = arrive("torchft_ddp")
    store = rendezvous(host)
    whole = Whole(host.run, host.vocab_size, host.pace)
    inner = adamw(whole.parameters(), host.run)

    def load(state: dict[str, Any]) -> None:
        whole.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    def save() -> dict[str, Any]:
        return {"model": whole.state_dict(), "optimizer": inner.state_dict()}

    with manager(host, store, load_state_dict=load, state_dict=save) as made:
        begin(host, store)
        train(host, whole, inner, made)
        end(host, store)


def train(host: Host, whole: Whole, inner: Any, made: Any) -> None:
    from torchft import DistributedDataParallel, Optimizer

    model, optimizer = DistributedDataParallel(made, whole), Optimizer(made, inner)
    refused = alone = 0
    sketch = Sketch(whole.parameters())
    while made.current_step() < host.task.steps:
        step = made.current_step()
        set_rate(inner, host.run, step)
        mine = host.task.share(step, host.rank, host.world)
        optimizer.zero_grad()
        loss = model(*host.data.batch([i for indices in mine for i in indices], host.run.seed)[:2])
        loss.backward()
        optimizer.step()
        done = made.current_step()
        if done == step:
            refused += 1
            host.progress.say("note", text=f"step {step} was not committed")
            continue
        alone += made.num_participants() < host.world
        host.progress.step(done, done * host.task.samples_per_step, float(loss.detach()))
        if done % 10 == 0:
            host.progress.say("round", step=done, values=sketch(whole.parameters()), peers=made.num_participants())
        if host.rank == 0 and host.is_snapshot(done):
            snapshot(host, done, done * host.task.samples_per_step, whole.state_dict())
    if refused or alone:
        host.progress.say("note", text=f"{refused} steps not committed, {alone} without everybody")


if __name__ == "__main__":
    to_the_end(main)
