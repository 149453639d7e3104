"""hivemind.Optimizer: gradients averaged by whoever finds each other, with hivemind's own codecs.

As its configuration guide and its ALBERT example advise: ``step`` after every microbatch, a swarm-wide target batch,
the scheduler inside, an offloaded optimizer, 3 to 5 s of matchmaking for small runs, an averaging timeout of twice
what an all-reduce takes, ``--delayed`` to average beside the next epoch's computation. 8 bits are for large tensors,
with 16 for the rest. What it logs about its rounds is kept, as it goes on with local gradients when one fails.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import re
from functools import partial
from typing import Any

from potluck.worker.stage import learning_rate

from .model import Sketch, Whole, adamw, begin, end, rendezvous, snapshot
from .rounds import AVERAGED
from .swarm_dht import join
from .task import Host, arrive, to_the_end

LARGE = 2**16 + 1  # values from which a tensor goes in 8 bits
# Its 8 bits leave 0.3 to 0.6 of the ranks' differences, with everybody in the round: they cut off what is beyond
# 3 sigma, and each rank gets its mean with another error.
TOLERANCE = {"8bit": 0.75}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser()
    out.add_argument("--compression", choices=("8bit", "powersgd", "fp16", "none"), default="8bit")
    out.add_argument("--matchmaking-time", type=float, default=5.0, help="seconds (guide: 3-5 local, 10-15 internet)")
    out.add_argument("--averaging-timeout", type=float, default=60.0, help="seconds (guide: 2x an all-reduce)")
    out.add_argument("--batch-factor", type=int, default=1, help="target batch, in steps' batches of the task")
    out.add_argument(
        "--average-state-every", type=int, default=1, help="epochs from one averaging of weights to another"
    )
    out.add_argument("--powersgd-rank", type=int, default=32, help="guide: 1-8 is low, sqrt of the longest side high")
    out.add_argument("--delayed", action="store_true", help="average and update beside the next epoch's computation")
    out.add_argument("--bandwidth", type=float, help="of this host, in 10^6 bits a second, for load balancing")
    return out


class Heard(logging.Handler):
    """What the optimizer says of its rounds."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.peers = 0  # of the newest gradient round; 0: it went on alone
        self.out_of_sync = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := re.match(r"Averaged gradients with (\d+) peers", text):
            self.peers = int(found[1])
        elif text.startswith("Proceeding with local gradients"):
            self.peers = 0
        elif text.startswith("Peer is out of sync"):
            self.out_of_sync = True


def make(host: Host, model: Whole, dht: Any) -> Any:
    """The optimizer."""
    import hivemind
    from hivemind.compression import (
        Float16Compression,
        NoCompression,
        SizeAdaptiveCompression,
        Uniform8BitQuantization,
    )
    from hivemind.optim.power_sgd_averager import PowerSGDGradientAverager
    from torch.optim.lr_scheduler import LambdaLR

    options, config = host.options, host.run
    codec = {
        "8bit": SizeAdaptiveCompression(LARGE, less=Float16Compression(), greater_equal=Uniform8BitQuantization()),
        "powersgd": Float16Compression(),
        "fp16": Float16Compression(),
        "none": NoCompression(),
    }[options.compression]
    extra: dict[str, Any] = {}
    if options.compression == "powersgd":
        extra["grad_averager_factory"] = partial(PowerSGDGradientAverager, averager_rank=options.powersgd_rank)
    if options.bandwidth:
        extra["averager_opts"] = {"bandwidth": options.bandwidth}
    return hivemind.Optimizer(
        dht=dht,
        run_id="rivals",
        batch_size_per_step=config.pipeline.microbatch_size,
        target_batch_size=host.task.samples_per_step * options.batch_factor,
        params=model.parameters(),
        optimizer=lambda parameters: adamw(parameters, config),
        scheduler=lambda own: LambdaLR(
            own,
            lambda epoch: (
                learning_rate(config.optimizer, config.steps, epoch * options.batch_factor) / config.optimizer.lr
            ),
        ),
        grad_compression=codec,
        state_averaging_compression=codec,
        average_state_every=options.average_state_every,
        matchmaking_time=options.matchmaking_time,
        averaging_timeout=options.averaging_timeout,
        offload_optimizer=True,
        delay_optimizer_step=options.delayed,
        delay_grad_averaging=options.delayed,
        verbose=True,
        **extra,
    )


def main() -> None:
    host = arrive("hivemind_dp", parser())
    store = rendezvous(host)
    heard = Heard()
    logging.getLogger("hivemind.optim.optimizer").addHandler(heard)
    dht = join(host, store)
    model = Whole(host.run, host.vocab_size, host.pace)
    optimizer = make(host, model, dht)
    begin(host, store)
    train(host, model, optimizer, heard)
    end(host, store)
    optimizer.shutdown()
    dht.shutdown()


def shown(host: Host, model: Whole, optimizer: Any, own: list[list[float]]) -> dict[str, Any]:
    """What a round is judged by: gradients, before and after. If it is not over yet (``--delayed``), the weights."""
    sketch, tolerance = Sketch(model.parameters()), TOLERANCE.get(host.options.compression, AVERAGED)
    if host.options.delayed:
        return {"values": sketch(model.parameters()), "tolerance": 0.75}
    with optimizer.grad_averager.get_tensors() as gradients:
        after = sketch(gradients)
    before = [sum(values) / len(own) for values in zip(*own, strict=True)]
    return {"values": after, "own": before, "tolerance": tolerance}


def train(host: Host, model: Whole, optimizer: Any, heard: Heard) -> None:
    """Until the swarm has made the task's steps. Every rank goes through its own share of the samples, in order."""
    factor, size = host.options.batch_factor, host.run.pipeline.microbatch_size
    committed = epoch = alone = 0
    losses: list[float] = []
    sketch = Sketch(model.parameters())
    own: list[list[float]] = []  # sketches of this epoch's local gradients
    for step in itertools.count():
        for indices in host.task.share(step, host.rank, host.world):
            loss = model(*host.data.batch(indices, host.run.seed)[:2])
            loss.backward()
            losses.append(float(loss.detach()))
            own.append(sketch(p.grad for p in model.parameters() if p.grad is not None))
            gathered = optimizer.grad_averager.local_samples_accumulated + size
            heard.out_of_sync = False
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.local_epoch == epoch:
                continue
            epoch = optimizer.local_epoch
            if heard.out_of_sync:
                host.progress.say("note", text=f"out of sync before epoch {epoch}: {gathered} samples thrown away")
            else:
                committed += gathered
                alone += not heard.peers
                host.progress.say("round", step=epoch, peers=heard.peers, **shown(host, model, optimizer, own))
            own.clear()
            done = epoch * factor
            host.progress.step(done, done * host.task.samples_per_step, sum(losses) / len(losses), own=committed)
            losses.clear()
            if host.rank == 0 and any(host.is_snapshot(d) for d in range(done - factor + 1, done + 1)):
                snapshot(host, done, done * host.task.samples_per_step, model.state_dict())
            if done >= host.task.steps:
                if alone:
                    host.progress.say("note", text=f"{alone} of {epoch} epochs with local gradients")
                return


if __name__ == "__main__":
    to_the_end(main)
