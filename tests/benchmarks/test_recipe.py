"""The benchmark of the recipe: examples are one denoiser's, and losses are those written out by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tiny_models import build

from benchmarks import recipe, recipe_data, recipe_report
from benchmarks.recipe_scores import Loss, example, target_loss, title, whole
from potluck.protocol.objective import Special
from potluck.worker.denoise import UL2R, Denoiser
from potluck.worker.packing import Packed, describe

LENGTH = 48
SPECIAL = Special(eos=256, pad=256, sentinels=tuple(range(200, 240)), modes={"R": (240,), "X": (241,), "S": (242,)})


def row(seed: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, 200, LENGTH + 1)
    tokens[5] = SPECIAL.eos  # a document ends there; the longer one is what follows
    return tokens


def by_hand(model: torch.nn.Module, sample: Packed, *, both: bool) -> tuple[float, int]:
    """Summed loss of a sample with one document: its own sequence without padding, the mask position by position."""
    size = int((sample.segments > 0).sum())
    mask = torch.full((1, 1, size, size), torch.finfo(torch.float32).min)
    for q, k in itertools.product(range(size), repeat=2):
        if k <= q or (both and sample.is_prefix[k]):
            mask[0, 0, q, k] = 0.0
    with torch.inference_mode():
        logits = model(torch.from_numpy(sample.tokens[:size])[None], attention_mask=mask, use_cache=False).logits[0]
    total, count = 0.0, 0
    for t, target in enumerate(sample.targets[:size]):
        if target >= 0:
            total -= float(logits[t].double().log_softmax(0)[target])
            count += 1
    return total, count


@pytest.mark.parametrize("denoiser", UL2R, ids=title)
def test_losses_under_both_masks_are_those_by_hand(denoiser: Denoiser) -> None:
    model = build("gptj", prefix=False)
    made = [example(row(i), denoiser, SPECIAL, (1, i)) for i in range(3)]
    samples = [sample for sample in made if sample is not None]
    assert len(samples) == 3
    found = target_loss(model, samples)
    for both, value in ((True, found.prefix), (False, found.causal)):
        each = [by_hand(model, sample, both=both) for sample in samples]
        assert found.targets == sum(count for _, count in each)
        assert value == pytest.approx(sum(total for total, _ in each) / found.targets, abs=1e-4)
    assert abs(found.gain) > 1e-3  # random weights, but the masks do differ


def test_where_there_is_no_prefix_there_is_no_gain() -> None:
    found = target_loss(build("gptj", prefix=False), [whole(row(i)) for i in range(3)])
    assert found.gain == 0.0 and found.targets == 3 * LENGTH
    assert found.causal == pytest.approx(by_hand_causal(), abs=1e-4)


def by_hand_causal() -> float:
    model = build("gptj", prefix=False)
    losses = []
    for i in range(3):
        tokens = torch.from_numpy(row(i))
        with torch.inference_mode():
            logits = model(tokens[None, :-1], use_cache=False).logits[0]
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[1:])))
    return sum(losses) / 3


@pytest.mark.parametrize("denoiser", UL2R, ids=title)
def test_an_example_is_one_documents_and_one_denoisers(denoiser: Denoiser) -> None:
    sample = example(row(0), denoiser, SPECIAL, (1, 2))
    assert sample is not None and sample.modes == (denoiser.mode,)
    assert sample.tokens[0] == SPECIAL.modes[denoiser.mode][0]
    (segment,) = describe(sample)
    assert segment.prefix.start == 0 and segment.targets.start == segment.prefix.stop - 1
    document = set(row(0)[6:].tolist())
    words = set(sample.tokens[1:].tolist()) - set(SPECIAL.sentinels) - {SPECIAL.eos}
    assert words <= document
    again = example(row(0), denoiser, SPECIAL, (1, 2))
    other = example(row(0), denoiser, SPECIAL, (1, 3))
    assert again is not None and other is not None
    assert (again.targets == sample.targets).all() and (other.targets != sample.targets).any()
    assert example(np.full(LENGTH + 1, SPECIAL.eos), denoiser, SPECIAL, (1, 2)) is None


def test_the_ways_differ_in_their_objective_alone() -> None:
    tokenizer = {"kind": "folder", "path": "causal"}
    causal, ul2r = (recipe_data.recipe(kind, tokenizer, 10_000) for kind in ("causal", "ul2r"))
    assert ul2r.stages[0].objective.kind == "ul2r" and causal.stages[0].objective.kind == "causal"
    assert msgspec.structs.replace(ul2r, stages=causal.stages) == causal
    assert ul2r.stages[0].mix == causal.stages[0].mix and ul2r.stages[0].tokens == causal.stages[0].tokens
    runs = [recipe.config(w, Path(w), recipe.CHECKPOINT, seed=1, init=Path("start")) for w in ("ul2r", "causal")]
    named = [msgspec.structs.replace(run, name="run", data=runs[0].data) for run in runs]
    assert named[0] == named[1] and runs[0].data != runs[1].data


def test_the_page_has_the_numbers_of_all_parts(tmp_path: Path) -> None:
    def losses(at: float) -> dict[str, dict[str, float]]:
        loss = Loss(prefix=at, causal=at + 0.25, targets=1000)
        return {name: msgspec.to_builtins(loss) for name in (*map(title, UL2R), "causal")}

    conditions = dict.fromkeys(
        ["parameters", "pretrain", "steps", "step_tokens", "pretrain_lr", "lr", "warmup", "seeds"], 7
    )
    ways = {
        way: [{"losses": losses(at + i), "seconds": 10.0} for i in range(3)]
        for way, at in (("ul2r", 4.0), ("causal", 4.5))
    }
    ways["causal"][1]["losses"]["S"] = losses(4.9)["S"]
    found = {"conditions": conditions | {"examples": 256}, "start": {"losses": losses(8.5)}, "ways": ways}
    recipe_report.update(tmp_path, "training", found)
    stage = {"layers": [0, 7], "own": 100e6, "bare": 200e6, "peak": 310e6}
    loading = {"d_model": 64, "layers": 28, "stored_nbytes": 200e6, "files": 3, "stages": [stage]}
    recipe_report.update(tmp_path, "loading", loading | {"coordinator": stage | {"peak": 204e6}})
    better = {way: [result | {"losses": losses(1.0)} for result in results] for way, results in ways.items()}
    of_checkpoint = found | {"conditions": found["conditions"] | {"model": "SmolLM2"}, "ways": better}
    recipe_report.update(tmp_path, "checkpoint", of_checkpoint)
    page = (tmp_path / "RECIPE.md").read_text()
    assert "| + 7 steps UL2R | 5.000 (4.000 to 6.000)" in page and "| start | 8.500 |" in page
    assert "+0.2500" in page
    second = page[page.index("## From a really pretrained model") :]
    assert "The same from SmolLM2" in second and "| + 7 steps UL2R | 1.000 (1.000 to 1.000)" in second
    said = " ".join(page.split())
    assert "above 0 for: S, R (3, 0.15), X (32, 0.15), X (3, 0.5); above the control's for: none." in said
    assert "below the control's for: R (3, 0.15), X (32, 0.15), X (3, 0.5); above it for: none." in said
    assert "| stage 0: layers 0 to 6 | 100 | 110 | 1.10 | 28% |" in page
    assert "| coordinator, hashing all | - | 4 | - | 1.0% |" in page
    assert max(map(len, page.splitlines())) <= 200
