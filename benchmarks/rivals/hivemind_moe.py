"""hivemind's remote experts as a pipeline: a stage of GPT-J is an expert, trainers call one after the other.

The first ranks serve a stage each, the others train; if all serve, all train as well. The embedding is in the first
expert, the head and the loss in the last, so that trainers hold no weights: hivemind has no way to keep several
trainers' or several servers' copies equal but its Optimizer. As its documentation has it, a server's backward computes
the forward again, and activations pass through the trainer, each way. A server would update after every backward;
here its optimizer counts to a step's microbatches first, as the task has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from potluck.protocol.plan import split_layers

from .model import Part, adamw, begin, end, rendezvous, set_rate, snapshot
from .swarm_dht import join
from .task import Host, arrive, to_the_end

HANDLERS = 8  # processes that take requests; hivemind's own default for one expert


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser()
    out.add_argument("--stages", type=int, help="servers (default: the task's stages)")
    out.add_argument("--in-flight", type=int, default=4, help="microbatches of a trainer under way at once")
    out.add_argument("--compression", choices=("8bit", "fp16", "none"), default="none", help="of what goes between")
    return out


class Expert(nn.Module):
    """A stage as a function of batches: ids or hidden states, with targets at the last; hidden states or losses [B]."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        out = self.part(x)
        if targets_BT is None:
            return out
        logits_BVT = self.part.logits(out).transpose(1, 2)
        return F.cross_entropy(logits_BVT, targets_BT, reduction="none").mean(1)


class Counting:
    """What a server calls after each backward: one update for each step's microbatches."""

    def __init__(self, host: Host, part: Part, stage: int, stages: int) -> None:
        self.host, self.part, self.stage, self.stages = host, part, stage, stages
        self.inner = adamw(part.parameters(), host.run)
        self.calls = self.done = 0

    def step(self) -> None:
        self.calls += 1
        host, task = self.host, self.host.task
        if self.calls % task.microbatches_per_step:
            return
        set_rate(self.inner, host.run, self.done)
        self.inner.step()
        self.inner.zero_grad()
        self.done += 1
        samples = self.done * task.samples_per_step
        host.progress.step(self.done, samples, None)
        if host.is_snapshot(self.done):
            snapshot(host, self.done, samples, self.part.state_dict(), self.stage, self.stages)

    def zero_grad(self) -> None:
        """Gradients add up until a step's last microbatch."""


def serve(host: Host, dht: Any, stage: int, stages: int) -> Any:
    """A running server of one stage."""
    from hivemind.moe.server.module_backend import ModuleBackend
    from hivemind.moe.server.server import Server
    from hivemind.proto.runtime_pb2 import CompressionType
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    shape, name = host.run.model, {"8bit": "UNIFORM_8BIT", "fp16": "FLOAT16", "none": "NONE"}
    codec = CompressionType.Value(name[host.options.compression])
    cuts = split_layers(shape.layers, stages, d_model=shape.d_model, vocab_size=host.vocab_size)
    part = Part(host.run, host.vocab_size, *cuts[stage], host.pace)
    ids = BatchTensorDescriptor(shape.seq_len, dtype=torch.int64)
    hidden = BatchTensorDescriptor(
        shape.seq_len, shape.d_model, dtype=torch.float32, requires_grad=True, compression=codec
    )
    size = host.run.pipeline.microbatch_size
    backend = ModuleBackend(
        uid(stage),
        Expert(part),
        optimizer=Counting(host, part, stage, stages),
        args_schema=(*((ids,) if part.is_first else (hidden,)), *((ids,) if part.is_last else ())),
        outputs_schema=BatchTensorDescriptor(dtype=torch.float32, requires_grad=True) if part.is_last else hidden,
        min_batch_size=1,
        max_batch_size=size,  # a microbatch at a time
    )
    return Server(dht, {backend.name: backend}, num_connection_handlers=HANDLERS, start=True)


def uid(stage: int) -> str:
    return f"stage.{stage}"


def main() -> None:
    host = arrive("hivemind_moe", parser())
    store = rendezvous(host)
    stages = host.options.stages or host.run.pipeline.stages
    if stages > host.world:
        raise SystemExit(f"{stages} stages need as many hosts")
    dht = join(host, store)
    trainers = list(range(stages, host.world)) or list(range(host.world))
    server = serve(host, dht, host.rank, stages) if host.rank < stages else None
    # A trainer cannot call an expert of its own peer ("dial to self attempted"): it is another peer there.
    own = join(host, store, 1) if server is not None and host.rank in trainers else dht
    store.set(f"serving/{host.rank}", "1")
    wait(store, "serving", range(host.world))
    begin(host, store)
    if host.rank in trainers:
        train(host, own, store, trainers, stages)
    wait(store, "trained", trainers)
    end(host, store)
    if own is not dht:
        own.shutdown()
    if server is not None:
        server.shutdown()
    else:
        dht.shutdown()


def wait(store: dist.Store, what: str, ranks: Iterable[int]) -> None:
    store.wait([f"{what}/{rank}" for rank in ranks])


def train(host: Host, dht: Any, store: dist.Store, trainers: list[int], stages: int) -> None:
    """This trainer's share of every step, some microbatches at once; a step begins when all trainers are done."""
    from hivemind.moe.server.dht_handler import get_experts

    experts = get_experts(dht, [uid(stage) for stage in range(stages)])
    if None in experts:
        raise SystemExit(f"not all experts were found: {experts}")
    count, me = host.task.microbatches_per_step, trainers.index(host.rank)

    def pass_through(indices: range) -> float:
        x, targets, _ = host.data.batch(indices, host.run.seed)
        for expert in experts[:-1]:
            x = expert(x)
        loss = experts[-1](x, targets).mean()
        (loss / count).backward()
        return float(loss.detach())

    with ThreadPoolExecutor(host.options.in_flight) as pool:
        for step in range(host.task.steps):
            mine = host.task.share(step, me, len(trainers))
            losses = list(pool.map(pass_through, mine))
            host.progress.say("loss", step=step + 1, loss=sum(losses) / len(losses))
            store.set(f"done-{step}/{host.rank}", "1")
            wait(store, f"done-{step}", trainers)
    store.set(f"trained/{host.rank}", "1")


if __name__ == "__main__":
    to_the_end(main)
