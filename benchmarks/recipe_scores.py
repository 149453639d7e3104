"""What a model has learned of each denoiser: its loss on the targets of held-out examples, and the prefix gain.

Every example is one denoiser's, made of one held-out row from fixed seeds, so all models are asked the same. Models are
opened and run with stock transformers, under masks that are always given (``worker/evaluation/scoring.py``).

Prefix gain: mean target loss with a causal mask minus that with the prefix mask, same weights, same targets. Losses are
nats per target token. Shapes: T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.protocol.objective import Special
from potluck.worker.data import Dataset
from potluck.worker.denoise import UL2R, Denoiser, most_raw, noise_mask, span_example, split_place
from potluck.worker.evaluation.models import open_model
from potluck.worker.evaluation.scoring import selected
from potluck.worker.layout import Layout
from potluck.worker.packing import Example, Packed, Packer
from potluck.worker.randomness import Random

SEED = 20260101
EXAMPLES = 256
MIN_TEXT = 32  # tokens of a document in a row, or the row is passed over
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Means over all targets."""

    prefix: float
    causal: float
    targets: int

    @property
    def gain(self) -> float:
        return self.causal - self.prefix


def title(denoiser: Denoiser) -> str:
    """As the paper writes it: mode, mean span, corruption."""
    return denoiser.mode if denoiser.mode == "S" else f"{denoiser.mode} ({denoiser.mean_span}, {denoiser.corruption:g})"


def example(row: NDArray[np.int64], denoiser: Denoiser, special: Special, key: tuple[int, ...]) -> Packed | None:
    """One example of ``denoiser`` in a sample of T positions, of the longest document in ``row``, [T + 1] tokens; None
    if none is of ``MIN_TEXT`` tokens. Chance is a function of ``key``."""
    pieces = np.split(row, np.flatnonzero(row == special.eos))
    text = max((piece[piece != special.eos] for piece in pieces), key=len)
    if len(text) < MIN_TEXT:
        return None
    random, packer = Random(key), Packer(len(row) - 1, special.pad)
    mode = special.modes[denoiser.mode]
    if denoiser.mode == "S":
        text = text[: packer.free + 1 - len(mode)]
        at = split_place(len(text), 0.0, random)
        packer.add(Example(np.concatenate([np.array(mode, np.int64), text]), len(mode) + at, "S"))
    else:
        n = most_raw(denoiser, packer.free - len(mode), len(special.sentinels), len(text))
        noise = noise_mask(n, denoiser, random)
        packer.add(span_example(text[:n], noise, denoiser.mode, mode, special.sentinels, special.eos))
    return packer.packed()


def examples(data: Dataset, denoiser: Denoiser, count: int = EXAMPLES) -> list[Packed]:
    """``count`` held-out examples; fewer if the corpus holds out less."""
    found: list[Packed] = []
    number = UL2R.index(denoiser)
    for index in range(data.manifest.n_heldout):
        made = example(data.heldout(index), denoiser, data.manifest.special, (SEED, number, index))
        if made is not None:
            found.append(made)
        if len(found) == count:
            break
    return found


@torch.inference_mode()
def target_loss(model: Any, samples: Sequence[Packed]) -> Loss:
    """Of ``model`` (stock GPT-J or Llama) over all targets of ``samples``, at least one."""
    totals, count = [0.0, 0.0], 0
    for start in range(0, len(samples), _BATCH):
        some = samples[start : start + _BATCH]
        tokens, targets, segments, is_prefix = (
            torch.from_numpy(np.stack([sample[field] for sample in some])) for field in range(4)
        )
        where = (targets >= 0).nonzero().T
        count += where.shape[1]
        for i, seen in enumerate((is_prefix, torch.zeros_like(is_prefix))):
            layout = Layout(segments, seen)
            wanted = targets[where[0], where[1]]
            logprobs, _ = selected(model, tokens, layout.mask(), layout.positions(), where, wanted)
            totals[i] -= float(logprobs.double().sum())
    return Loss(prefix=totals[0] / count, causal=totals[1] / count, targets=count)


def whole(row: NDArray[np.int64]) -> Packed:
    """A row [T + 1] as a causal run has it: one document, every token a target."""
    packer = Packer(len(row) - 1, 0)
    packer.add(Example(row, 0, "causal"))
    return packer.packed()


def scores(folder: Path, corpus: Path, count: int = EXAMPLES) -> dict[str, Loss]:
    """Of a published model: each UL2R denoiser by its title, and ``causal``."""
    data, model = Dataset(corpus), open_model(folder, "cpu").model
    found = {title(denoiser): target_loss(model, examples(data, denoiser, count)) for denoiser in UL2R}
    rows = range(min(count, data.manifest.n_heldout))
    return found | {"causal": target_loss(model, [whole(data.heldout(index)) for index in rows])}
