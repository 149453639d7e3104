"""What a stage really takes in memory, beside what ``potluck estimate`` says: ``python -m benchmarks.memory``.

Each case is two processes, replicas of a stage. One trains, then both make rounds with one another: of every fragment,
and one that ends a run; there is a state to go back to beside them. On a CPU the peaks are of the resident set above
that of the process with everything loaded and a tiny stage; on a GPU (``--device cuda``) torch's own, without CUDA's
context, and of training alone: rounds are in the machine's memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import threading
from pathlib import Path
from typing import Any

STEPS = 100
GPTJ = {"d_model": 512, "heads": 8, "layers": 12, "seq_len": 512}
LLAMA = {"architecture": "llama", "d_model": 512, "heads": 8, "kv_heads": 2, "layers": 12, "seq_len": 512}
LEAN = {"dtype": "bf16", "bits": 8}
MIXED = {"dtype": "mixed", "bits": 8}
NF4 = {"dtype": "bf16", "lora": "4bit"}  # of adapters of rank 16 at all matrices: what their base is held in
WIDE = {"d_model": 2048, "heads": 16, "layers": 12, "seq_len": 256}
# model, vocabulary, layers, microbatch size, and what differs from fp32, 32 bits, recompute
CASES: list[tuple[dict[str, Any], int, tuple[int, int], int, dict[str, Any]]] = [
    (GPTJ, 8000, (4, 8), 2, {}),
    (GPTJ, 8000, (4, 8), 2, {"bits": 8}),
    (GPTJ, 8000, (4, 8), 2, {"dtype": "bf16"}),
    (GPTJ, 8000, (4, 8), 2, LEAN),
    (GPTJ, 8000, (4, 8), 2, MIXED),
    (GPTJ, 8000, (4, 8), 2, {"recompute": False}),
    (GPTJ, 8000, (4, 8), 2, {"sync": "diloco"}),
    (GPTJ, 8000, (4, 8), 2, {"sync": "sparseloco", **LEAN}),
    (GPTJ, 50400, (9, 12), 4, {}),
    (GPTJ, 50400, (9, 12), 4, LEAN),
    (GPTJ, 50400, (0, 2), 4, LEAN),
    (LLAMA, 8000, (4, 9), 4, {}),
    (LLAMA, 8000, (4, 9), 4, LEAN),
    (LLAMA, 32000, (8, 12), 4, MIXED),
    (LLAMA, 32000, (8, 12), 4, {"recompute": False, **LEAN}),
    (LLAMA, 32000, (0, 5), 4, {}),
    (GPTJ, 8000, (4, 8), 2, {"lora": "4bit"}),
    (GPTJ, 8000, (4, 8), 2, {"recompute": False, **NF4}),
    (GPTJ, 50400, (9, 12), 4, NF4),
    (LLAMA, 8000, (4, 9), 4, NF4),
    (LLAMA, 32000, (0, 5), 4, {"dtype": "bf16", "lora": "bf16"}),
    (WIDE, 8000, (4, 10), 1, NF4),
]
WINDOW = 2


def config_of(model: dict[str, Any], size: int, choices: dict[str, Any]) -> Any:
    from potluck.protocol.config import convert

    model = {**model, "dtype": choices.get("dtype", "fp32")}
    if "lora" in choices:
        model |= {"init": "drawn from the seed", "train": "lora", "lora": {"base": choices["lora"]}}
    return convert(
        {
            "steps": STEPS,
            "sync": {"preset": choices.get("sync", "potluck")},
            "checkpoint": {"keepers": 0},
            "model": model,
            "optimizer": {"bits": choices.get("bits", 32)},
            "pipeline": {
                "stages": 2,
                "microbatch_size": size,
                "recompute": choices.get("recompute", True),
                "in_flight_gb": 0.0,
            },
        }
    )


class Peak:
    """Of the memory in use, above that at the beginning."""

    def __init__(self, device: str) -> None:
        self.device, self.bare = device, 0.0
        self.bare = self.reset()

    def reset(self) -> float:
        """What is in use now."""
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return float(torch.cuda.memory_allocated())
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS")

    def above(self) -> float:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() - self.bare
        return self._read("VmHWM") - self.bare

    @staticmethod
    def _read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class Wire:
    """To the other replica's process."""

    def __init__(self, there: Any, here: Any) -> None:
        from potluck.worker.mailbox import Address, Mailbox

        self.mailbox, self._there = Mailbox(), there

        def receive() -> None:
            while (came := here.get()) is not None:
                peer, frame = came
                self.mailbox.put(Address.of(frame.header, peer), frame)

        threading.Thread(target=receive, daemon=True).start()

    def post(self, peer: str, frame: Any) -> None:
        self._there.put(("ab".replace(peer, ""), frame))

    def take(self, wanted: Any, attempt: int = 0) -> Any:
        return self.mailbox.take(wanted, attempt, timeout_seconds=300.0)


def replica(case: int, device: str, number: int, there: Any, here: Any, told: Any) -> None:
    """A process: peaks of training (0 for the second replica) and of rounds, in bytes."""
    import torch

    from potluck.worker.stage import Stage

    model, vocab_size, (first, last), size, choices = CASES[case]
    tiny = {**model, "d_model": 64, "heads": 2, "kv_heads": 0, "layers": 12, "seq_len": 16}
    torch.set_num_threads(1)
    wire, config = Wire(there, here), config_of(tiny, 1, choices)
    stage = Stage(config, 300, first, last, device)
    _train(stage, 300, 1, 16)
    _rounds(stage, config, number, wire)
    peak = Peak(device)
    config = config_of(model, size, choices)
    stage = Stage(config, vocab_size, first, last, device)
    peak.reset()
    training = 0.0
    if number == 0:
        for _ in range(2):
            _train(stage, vocab_size, size, config.model.seq_len)
        training = peak.above()
    peak.reset()
    if device == "cpu":
        _rounds(stage, config, number, wire)
    told.put((number, training, peak.above()))
    there.put(None)


def _rounds(stage: Any, config: Any, number: int, wire: Wire) -> None:
    from potluck.protocol.plan import Plan, Replica, SavePoint, StagePlan
    from potluck.protocol.schedule import fragments, is_round
    from potluck.worker.boundary import Seat
    from potluck.worker.sync import Synchronizer, apply

    replicas = tuple(Replica(peer=peer, addresses=()) for peer in "ab")
    plan = Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        microbatches=config.pipeline.microbatches,
        microbatch_size=config.pipeline.microbatch_size,
        stages=(StagePlan(first_layer=stage.first, last_layer=stage.last, replicas=replicas),),
    )
    point = SavePoint(kind="round", generation=1, step=0, first_layer=stage.first, last_layer=stage.last)
    kept = stage.state(point)
    stage.load(kept)
    seat, sync = Seat(plan=plan, stage=0, replica=number, run=b"benchmrk"), config.sync.resolved()
    synchronizer = Synchronizer(config, seat, stage, kept, wire)  # type: ignore[arg-type]
    steps = [step for step in range(STEPS) if is_round(sync, config.seed, step)]
    for step in [*steps[: sync.fragments + 1], STEPS - 1]:
        is_last = step == STEPS - 1
        synchronizer.counted_from = None
        stage.x.add_(1e-3)  # something to tell
        which = fragments(sync, config.seed, step, is_last)
        outcome = synchronizer.exchange(synchronizer.capture(stage, step + 1, 8, which, full=is_last))
        apply(stage, outcome, late=sync.delay > 0 and not is_last)
        kept = outcome.state
        del outcome


def measured(case: int, device: str) -> tuple[float, float]:
    """Peaks of the first replica's training and rounds, in bytes."""
    spawn = multiprocessing.get_context("spawn")
    a, b, told = spawn.Queue(), spawn.Queue(), spawn.Queue()
    both = [
        spawn.Process(target=replica, args=(case, device, n, *ends, told)) for n, ends in enumerate([(b, a), (a, b)])
    ]
    for process in both:
        process.start()
    found = {}
    try:
        for _ in both:
            number, *peaks = told.get(timeout=900.0)
            found[number] = peaks
    finally:
        for process in both:
            process.join(10.0)
            process.kill()
    training, rounds = found[0]
    return training, rounds


def _train(stage: Any, vocab_size: int, size: int, length: int) -> None:
    """A step with as many microbatches under way as 1F1B has."""
    import torch

    module, device = stage.module, stage.device

    def batch() -> Any:
        if module.is_first:
            return torch.randint(0, vocab_size, (size, length), device=device)
        return torch.randn(size, length, module.model_config.d_model, device=device).requires_grad_()

    for _ in range(2):
        if module.is_last:
            loss = module.loss_sum(module(batch()), torch.randint(0, vocab_size, (size, length), device=device))
            loss.backward()
            continue
        flights = [module(batch()) for _ in range(WINDOW)]
        gradient = torch.randn_like(flights[0])
        while flights:
            flights.pop(0).backward(gradient)
    stage.update(size * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    options = parser.parse_args()
    from potluck.protocol.footprint import CONTEXT_NBYTES, footprint

    print(
        f"{platform.machine()}, {options.device}, Python {platform.python_version()}, {WINDOW} microbatches under way"
    )
    print(
        f"{'':3}{'stage':38}{'choices':34}{'training':>9}{'said':>8}{'off':>7}{'rounds':>9}{'said':>8}{'off':>7}   (MB)"
    )
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}  # as a worker has them
    for i, (model, vocab_size, (first, last), size, choices) in enumerate(CASES):
        if options.only and i not in options.only:
            continue
        training, rounds = measured(i, options.device)
        said = footprint(config_of(model, size, choices), vocab_size, first, last, WINDOW, options.device)
        if options.device == "cuda":
            pairs = [(training, said.on_gpu - CONTEXT_NBYTES)]
        else:
            own = said.base + said.weights + said.gradients + said.moments + said.reference
            pairs = [(training, said.on_cpu - said.rounds), (rounds, own + said.rounds)]
        kind, millions = model.get("architecture", "gptj"), said.parameters / 1e6
        what = f"{kind} {first}-{last}, {millions:.0f} M, V {vocab_size}, {size} x {model['seq_len']}"
        chosen = ", ".join(f"{key} {value}" for key, value in choices.items()) or "fp32, 32 bits, recompute"
        numbers = "".join(f"{a / 1e6:9,.0f}{b / 1e6:8,.0f}{b / a - 1:+7.1%}" for a, b in pairs)
        print(f"{i:2} {what:38}{chosen:34}{numbers}", flush=True)


if __name__ == "__main__":
    main()
