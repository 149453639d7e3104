"""What denoising makes of text: nothing is lost, spans and rates are as published, samples are full."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

from potluck.protocol.objective import Objective, Special
from potluck.protocol.special import gptj_special
from potluck.worker.denoise import UL2, UL2R, Denoiser, most_raw, noise_mask
from potluck.worker.objectives import Packed, make_sample
from potluck.worker.packing import IGNORED
from potluck.worker.randomness import Random

EOS, PAD = 1, 0
MODES = {"R": (10**6,), "S": (10**6 + 1, 10**6 + 2), "X": (10**6 + 3, 10**6 + 4, 10**6 + 5)}
SPECIAL = Special(eos=EOS, pad=PAD, sentinels=tuple(range(2 * 10**6, 2 * 10**6 + 140)), modes=MODES)
SPANNING = [one for one in (*UL2R, *UL2) if one.mode != "S"]


def documents(lengths: list[int], n_tokens: int) -> np.ndarray:
    """[n_tokens], documents of these many words and an eos each: the word at place i is 10 + i."""
    row = 10 + np.arange(n_tokens)
    ends = np.cumsum(np.array(lengths, np.int64) + 1) - 1
    row[ends[ends < n_tokens]] = EOS
    return row


def examples(packed: Packed) -> list[tuple[str, list[int], list[int]]]:
    """(mode, given, targets) of every segment."""
    found = []
    for number, mode in enumerate(packed.modes, 1):
        here = packed.segments == number
        tokens = [*packed.tokens[here].tolist(), int(packed.targets[here][-1])]
        n_given = int(packed.is_prefix[here].sum())
        found.append((mode, tokens[:n_given], tokens[n_given:]))
    return found


def raw_text(mode: str, given: list[int], targets: list[int], special: Special, split_sentinel: bool) -> list[int]:
    """The text that an example was made of: what a reader who knows only the format puts together again."""
    mode_ids = list(special.modes.get(mode, ()))
    if mode_ids and given[: len(mode_ids)] == mode_ids:
        given = given[len(mode_ids) :]
    if mode == "S":
        if split_sentinel:
            assert given[-1] == special.sentinels[0]
            given = given[:-1]
        return given + targets
    assert targets[-1] == EOS and targets[0] == special.sentinels[0]
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in special.sentinels:
            assert token not in spans
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert all(spans.values())
    marks = [token for token in given if token in special.sentinels]
    assert marks == list(spans) == list(special.sentinels[: len(spans)])
    return [one for token in given for one in (spans[token] if token in special.sentinels else [token])]


@settings(max_examples=150, deadline=None)
@given_(
    lengths=st.lists(st.integers(0, 300), max_size=12),
    n_tokens=st.sampled_from([9, 65, 257, 1025]),
    objective=st.builds(
        Objective,
        kind=st.sampled_from(["ul2r", "ul2"]),
        mode_dropout=st.sampled_from([0.0, 0.5, 1.0]),
        split_sentinel=st.booleans(),
    ),
    n_sentinels=st.sampled_from([2, 5, 140]),
    key=st.tuples(st.integers(0, 10**6)),
)
def test_every_example_gives_its_text_back(lengths, n_tokens, objective, n_sentinels, key) -> None:
    """Words are numbered by place, so a lost, doubled or moved one shows, and so does one of another document."""
    row = documents(lengths, n_tokens)
    special = Special(eos=EOS, pad=PAD, sentinels=SPECIAL.sentinels[:n_sentinels], modes=MODES)
    packed = make_sample(row, None, objective, special, key)
    place, words = 0, row.tolist()
    for mode, given, targets in examples(packed):
        while words[place] == EOS:
            place += 1
        text = raw_text(mode, given, targets, special, objective.split_sentinel)
        assert text == words[place : place + len(text)]
        assert EOS not in text[:-1] and len(text) > 0
        place += len(text)
        if mode == "S":
            assert objective.split_sentinel or text[-1] == targets[-1]
    learned = int(np.count_nonzero(packed.targets != IGNORED))
    assert learned == sum(len(targets) - (not given) for _, given, targets in examples(packed))


@settings(max_examples=60, deadline=None)
@given_(n=st.integers(8, 400), key=st.integers(0, 999), dropout=st.sampled_from([0.0, 1.0]))
def test_modes_stand_before_every_example_unless_dropped(n: int, key: int, dropout: float) -> None:
    packed = make_sample(documents([], n), None, Objective(kind="ul2r", mode_dropout=dropout), SPECIAL, (key,))
    for mode, given, targets in examples(packed):
        named = given[: len(MODES[mode])] == list(MODES[mode])
        assert named == (dropout == 0.0)
        assert not any(token in ids for ids in MODES.values() for token in targets)


def test_modes_are_dropped_at_their_rate() -> None:
    objective = Objective(kind="ul2r", mode_dropout=0.3)
    special = Special(eos=EOS, pad=PAD, sentinels=SPECIAL.sentinels, modes=dict.fromkeys(MODES, (10**6,)))
    row = documents([], 40)
    n_dropped = sum(int(make_sample(row, None, objective, special, (key,)).tokens[0] != 10**6) for key in range(3000))
    assert abs(n_dropped - 900) < 4 * np.sqrt(3000 * 0.3 * 0.7)


def cuts(denoisers: tuple[Denoiser, ...], n: int) -> dict[tuple[str, int, int], Denoiser]:
    """Which denoiser of a mixture cuts this many tokens in this many spans out of n: no two do the same."""
    spanning = [(one, *one.noise(n), turned) for one in denoisers if one.mode != "S" for turned in (0, 1)]
    found = {(one.mode, n_noise, n_spans + turned): one for one, n_noise, n_spans, turned in spanning}
    assert len(found) == len(spanning)
    return found


SENTINELS = frozenset(SPECIAL.sentinels)


@pytest.mark.parametrize(("kind", "denoisers", "n"), [("ul2r", UL2R, 64), ("ul2", UL2, 200)])
def test_denoisers_come_at_their_rates(kind: str, denoisers: tuple[Denoiser, ...], n: int) -> None:
    n_draws = 20_000 if kind == "ul2r" else 7_000
    row = np.concatenate([10 + np.arange(n), [EOS], np.full(n, PAD)])
    by_cut, split = cuts(denoisers, n), next(one for one in denoisers if one.mode == "S")
    counts: Counter[Denoiser] = Counter()
    for key in range(n_draws):
        packed = make_sample(row, None, Objective(kind=kind), SPECIAL, (key,))
        n_spans = int(np.count_nonzero(packed.targets >= SPECIAL.sentinels[0]))
        n_noise = int(np.count_nonzero(packed.targets != IGNORED)) - n_spans - 1
        (mode,) = packed.modes
        counts[split if mode == "S" else by_cut[mode, n_noise, n_spans]] += 1
    total = sum(one.rate for one in denoisers)
    for one in denoisers:
        share = one.rate / total
        assert abs(counts[one] - n_draws * share) < 4 * np.sqrt(n_draws * share * (1 - share)), one
    if kind == "ul2r":
        assert [(one.mode, one.mean_span, one.corruption, one.rate) for one in denoisers] == [
            ("S", 0, 0.0, 0.5),
            ("R", 3, 0.15, 0.25),
            ("X", 32, 0.15, 0.125),
            ("X", 3, 0.5, 0.125),
        ]


def runs(mask: np.ndarray) -> int:
    return int(mask[0]) + int(np.count_nonzero(mask[1:] & ~mask[:-1]))


@pytest.mark.parametrize("denoiser", SPANNING, ids=lambda one: f"{one.mode}-{one.mean_span}-{one.corruption}")
def test_spans_and_corruption_are_as_published(denoiser: Denoiser) -> None:
    n, n_masks = 800, 600
    masks = [noise_mask(n, denoiser, Random((key,))) for key in range(n_masks)]
    shares = np.array([mask.mean() for mask in masks])
    assert np.allclose(shares, denoiser.corruption, atol=0.5 / n)
    n_runs = np.array([runs(mask) for mask in masks])
    wrapped = np.array([bool(mask[0] and mask[-1]) for mask in masks])
    spans = n_runs - wrapped  # as drawn, before the turn cut one in two
    assert len(set(spans)) == 1
    assert abs(n * denoiser.corruption / spans[0] / denoiser.mean_span - 1) < 0.07
    # Every place is cut out as often as any other. Spans make places depend on each other, draws do not.
    often = np.mean(masks, axis=0)
    error = np.sqrt(denoiser.corruption * (1 - denoiser.corruption) / n_masks)
    assert np.abs(often - denoiser.corruption).max() < 4.8 * error
    assert abs(wrapped.mean() - often[0]) < 0.2 and len({mask.tobytes() for mask in masks}) == n_masks


@pytest.mark.parametrize("denoiser", SPANNING, ids=lambda one: f"{one.mode}-{one.mean_span}-{one.corruption}")
def test_the_most_text_that_fits_is_found(denoiser: Denoiser) -> None:
    def fits(n: int, room: int, n_sentinels: int) -> bool:
        _, n_spans = denoiser.noise(n)
        return n_spans + 1 <= n_sentinels and n + 2 * (n_spans + 1) <= room

    for room in (*range(40), 100, 1000):
        for n_sentinels in (2, 3, 140):
            best = max((n for n in range(2, room + 1) if fits(n, room, n_sentinels)), default=0)
            assert most_raw(denoiser, room, n_sentinels, 10**6) == best
            assert most_raw(denoiser, room, n_sentinels, 17) == max(
                (n for n in range(2, min(room, 17) + 1) if fits(n, room, n_sentinels)), default=0
            )


@pytest.mark.parametrize("n", range(2, 60))
def test_short_texts_keep_a_token_and_lose_one(n: int) -> None:
    for denoiser in SPANNING:
        for key in range(4):
            mask = noise_mask(n, denoiser, Random((key, n)))
            n_noise, n_spans = denoiser.noise(n)
            assert len(mask) == n and mask.sum() == n_noise and 0 < n_noise < n
            assert runs(mask) in (n_spans, n_spans + 1)


def test_sentinels_are_never_used_twice() -> None:
    """Of 140 sentinels X with half of the tokens gone can use 139: the turn may need one more. Longer text is cut."""
    dense = UL2R[3]
    longest = most_raw(dense, 10**4, 140, 10**4)
    assert 830 <= longest <= 840 and dense.noise(longest)[1] == 139
    n_used = 0
    for key in range(60):
        for mode, given, targets in examples(
            make_sample(documents([], 2049), None, Objective(kind="ul2r"), SPECIAL, (key,))
        ):
            marks = [token for token in given if token in SENTINELS and mode != "S"]
            assert len(marks) == len(set(marks)) <= 140
            assert len([token for token in targets if token in SENTINELS]) == len(marks)
            n_used = max(n_used, len(marks))
    assert n_used >= 139


def test_an_s_example_ends_with_eos_only_where_its_document_does() -> None:
    whole, cut = documents([50], 60), documents([], 60)
    ends = {name: set() for name in ("whole", "cut")}
    for key in range(40):
        for name, row in (("whole", whole), ("cut", cut)):
            mode, _, targets = examples(make_sample(row, None, Objective(kind="ul2r"), SPECIAL, (key,)))[0]
            if mode == "S":
                ends[name].add(targets[-1] == EOS)
    assert ends == {"whole": {True}, "cut": {False}}


def test_a_split_sentinel_is_given_and_makes_the_first_word_a_target() -> None:
    objective = Objective(kind="ul2r", split_sentinel=True, mode_dropout=1.0, short_prefix=1.0)
    empty = 0
    for key in range(300):
        mode, given, targets = examples(make_sample(documents([50], 60), None, objective, SPECIAL, (key,)))[0]
        if mode == "S":
            assert given[-1] == SPECIAL.sentinels[0] and len(given) <= 20
            empty += len(given) == 1 and targets[0] == 10
    assert empty > 0


def fill(objective: Objective, special: Special, mean: float, n_rows: int) -> float:
    """Share of positions used, over rows of 2048 of documents of exponential length."""
    lengths = np.random.default_rng(0).exponential(mean, 2048 * n_rows // 5).astype(int).tolist()
    stream = np.where(documents(lengths, 2048 * n_rows + 1) == EOS, special.eos, 10)
    rows = [stream[2048 * n :][:2049] for n in range(n_rows)]
    samples = [make_sample(row, None, objective, special, (key,)) for key, row in enumerate(rows)]
    return float(np.mean([packed.segments > 0 for packed in samples]))


@pytest.mark.parametrize("kind", ["ul2r", "ul2"])
@pytest.mark.parametrize("mean", [15, 100, 700, 5000])
def test_samples_are_full(kind: str, mean: float) -> None:
    for special in (SPECIAL, gptj_special()):
        assert fill(Objective(kind=kind), special, mean, 20) > 0.985
