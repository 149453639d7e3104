"""What a stage really takes in memory, beside what ``potluck estimate`` says: ``python -m benchmarks.memory``.

Each case is a process of its own that builds a stage, trains, and makes rounds alone (two: the second one has a state
to go back to beside it). On a CPU the peaks are of the resident set above that of the process with everything loaded
and a tiny stage; on a GPU (``--device cuda``) torch's own, without CUDA's context.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

BASE = {"steps": 100, "sync": {"preset": "diloco", "every": 2, "delay": 0}, "checkpoint": {"keepers": 0}}
GPTJ = {"d_model": 512, "heads": 8, "layers": 12, "seq_len": 512}
LLAMA = {"architecture": "llama", "d_model": 512, "heads": 8, "kv_heads": 2, "layers": 12, "seq_len": 512}
LEAN = {"dtype": "bf16", "bits": 8}
# model, vocabulary, layers, microbatch size, and what differs from fp32, 32 bits, recompute
CASES: list[tuple[dict[str, Any], int, tuple[int, int], int, dict[str, Any]]] = [
    (GPTJ, 8000, (4, 8), 2, {}),
    (GPTJ, 8000, (4, 8), 2, {"bits": 8}),
    (GPTJ, 8000, (4, 8), 2, {"dtype": "bf16"}),
    (GPTJ, 8000, (4, 8), 2, LEAN),
    (GPTJ, 8000, (4, 8), 2, {"recompute": False}),
    (GPTJ, 50400, (9, 12), 4, {}),
    (GPTJ, 50400, (9, 12), 4, LEAN),
    (GPTJ, 50400, (0, 2), 4, LEAN),
    (LLAMA, 8000, (4, 9), 4, {}),
    (LLAMA, 8000, (4, 9), 4, LEAN),
    (LLAMA, 32000, (8, 12), 4, {"recompute": False, **LEAN}),
    (LLAMA, 32000, (0, 5), 4, {}),
]
WINDOW = 2


def config_of(model: dict[str, Any], size: int, choices: dict[str, Any]) -> Any:
    from potluck.protocol.config import convert

    return convert(
        {
            **BASE,
            "model": {**model, "dtype": choices.get("dtype", "fp32")},
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


def measured(case: int, device: str) -> tuple[float, float]:
    """Peaks of training and of rounds, in bytes."""
    import torch

    from potluck.protocol.plan import Plan, Replica, SavePoint, StagePlan
    from potluck.worker.boundary import Seat
    from potluck.worker.stage import Stage
    from potluck.worker.sync import Synchronizer, apply

    model, vocab_size, (first, last), size, choices = CASES[case]
    tiny = {**model, "d_model": 64, "heads": 2, "kv_heads": 0, "layers": 12, "seq_len": 16}
    torch.set_num_threads(1)
    _train(Stage(config_of(tiny, 1, choices), 300, first, last, device), 300, 1, 16)
    peak = Peak(device)
    config = config_of(model, size, choices)
    stage = Stage(config, vocab_size, first, last, device)
    peak.reset()
    for _ in range(2):
        _train(stage, vocab_size, size, config.model.seq_len)
    training = peak.above()

    replica = Replica(peer="a", addresses=())
    plan = Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        microbatches=config.pipeline.microbatches,
        microbatch_size=size,
        stages=(StagePlan(first_layer=first, last_layer=last, replicas=(replica,)),),
    )
    point = SavePoint(kind="round", generation=1, step=0, first_layer=first, last_layer=last)
    kept = stage.state(point)
    stage.load(kept)
    synchronizer = Synchronizer(config, Seat(plan=plan, stage=0, replica=0, run=b"benchmrk"), stage, kept, None)  # type: ignore[arg-type]
    peak.reset()
    for step in (2, 4):
        synchronizer.counted_from = None
        outcome = synchronizer.exchange(synchronizer.capture(stage, step, 8, range(1)))
        apply(stage, outcome, late=False)
        kept = outcome.state
        del outcome
    return training, peak.above()


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
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measured(options.case, options.device)))
        return
    from potluck.protocol.footprint import CONTEXT_NBYTES, footprint

    print(
        f"{platform.machine()}, {options.device}, Python {platform.python_version()}, {WINDOW} microbatches under way"
    )
    print(
        f"{'':3}{'stage':38}{'choices':34}{'training':>9}{'said':>8}{'off':>7}{'rounds':>9}{'said':>8}{'off':>7}   (MB)"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    for i, (model, vocab_size, (first, last), size, choices) in enumerate(CASES):
        if options.only and i not in options.only:
            continue
        command = [sys.executable, "-m", __spec__.name, "--case", str(i), "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"case {i}: {done.stderr.strip().splitlines()[-1]}")
            continue
        training, rounds = json.loads(done.stdout.splitlines()[-1])
        said = footprint(config_of(model, size, choices), vocab_size, first, last, WINDOW, options.device)
        if options.device == "cuda":
            pairs = [(training, said.on_gpu - CONTEXT_NBYTES)]
        else:
            own = said.weights + said.gradients + said.moments + said.reference
            pairs = [(training, said.on_cpu - said.rounds), (rounds, own + said.rounds)]
        kind, millions = model.get("architecture", "gptj"), said.parameters / 1e6
        what = f"{kind} {first}-{last}, {millions:.0f} M, V {vocab_size}, {size} x {model['seq_len']}"
        chosen = ", ".join(f"{key} {value}" for key, value in choices.items()) or "fp32, 32 bits, recompute"
        numbers = "".join(f"{a / 1e6:9,.0f}{b / 1e6:8,.0f}{b / a - 1:+7.1%}" for a, b in pairs)
        print(f"{i:2} {what:38}{chosen:34}{numbers}", flush=True)


if __name__ == "__main__":
    main()
