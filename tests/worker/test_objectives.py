"""Samples for what is not denoised, and what holds for every sample."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.protocol.errors import ConfigError
from potluck.protocol.objective import Objective, Special
from potluck.worker.objectives import Packed, Segment, describe, make_sample
from potluck.worker.packing import IGNORED

EOS, PAD = 1, 0
SPECIAL = Special(
    eos=EOS, pad=PAD, sentinels=tuple(range(900, 940)), modes={"R": (991,), "S": (992, 993), "X": (994, 995, 996)}
)
JOINED = Special(eos=EOS, pad=EOS, sentinels=SPECIAL.sentinels, modes=SPECIAL.modes)  # padded with eos
KINDS = ("causal", "prefix", "answers", "ul2r", "ul2")
CAUSAL = Objective(kind="causal")


def row_of(*lengths: int, more: int = 0, pad: int = PAD) -> np.ndarray:
    """Documents of this many words and an eos each, ``more`` words of another one, all words different."""
    tokens, word = [], 10
    for length in lengths:
        tokens += [*range(word, word + length), EOS]
        word += length
    return np.array([*tokens, *range(word, word + more)], np.int64)


def holds(packed: Packed, special: Special, length: int) -> None:
    """What is true of every sample."""
    tokens, targets, segments, is_prefix, modes = packed
    assert [part.dtype for part in packed[:4]] == [np.int64, np.int64, np.int16, np.bool_]
    assert [part.shape for part in packed[:4]] == [(length,)] * 4
    n_used = int(np.count_nonzero(segments))
    assert np.all(np.diff(segments[:n_used]) >= 0) and np.all(segments[n_used:] == 0)
    assert sorted(set(segments[:n_used].tolist())) == list(range(1, len(modes) + 1))
    assert np.all(tokens[n_used:] == special.pad) and np.all(targets[n_used:] == IGNORED)
    assert not is_prefix[n_used:].any()
    for number in range(1, len(modes) + 1):
        here = np.flatnonzero(segments == number)
        n_given = int(is_prefix[here].sum())
        assert is_prefix[here[:n_given]].all()
        learned = here[targets[here] != IGNORED]
        assert len(learned) and learned[0] >= here[0] + max(n_given - 1, 0)
        inside = learned[learned < here[-1]]
        assert np.array_equal(targets[inside], tokens[inside + 1])
        if modes[number - 1] != "answers":
            assert np.array_equal(learned, here[max(n_given - 1, 0) :])


def same(one: Packed, other: Packed) -> bool:
    return one.modes == other.modes and all(np.array_equal(*pair) for pair in zip(one[:4], other[:4], strict=True))


@st.composite
def rows(draw: st.DrawFn, longest: int = 200) -> np.ndarray:
    words = draw(st.lists(st.sampled_from([EOS, EOS, PAD, *range(10, 60)]), min_size=2, max_size=longest))
    return np.array(words + [draw(st.sampled_from([EOS, PAD]))] * draw(st.integers(0, 9)), draw(DTYPES))


DTYPES = st.sampled_from([np.uint16, np.int64])
OBJECTIVES = st.builds(
    Objective,
    kind=st.sampled_from(KINDS),
    short_prefix=st.sampled_from([0.0, 0.2, 1.0]),
    mode_dropout=st.sampled_from([0.0, 0.5, 1.0]),
    split_sentinel=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(row=rows(), objective=OBJECTIVES, special=st.sampled_from([SPECIAL, JOINED]), data=st.data())
def test_every_sample_is_sound_and_a_function_of_its_key(row, objective, special, data) -> None:
    answers = data.draw(st.none() | st.lists(st.booleans(), min_size=len(row), max_size=len(row)).map(np.array))
    key = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 2**40)))
    before = row.copy()
    packed = make_sample(row, answers, objective, special, key)
    holds(packed, special, len(row) - 1)
    assert same(packed, make_sample(row, answers, objective, special, key))
    assert np.array_equal(row, before)
    assert len(describe(packed)) == len(packed.modes)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_rows_of_every_make(kind: str) -> None:
    """All rows of nine tokens that are words and eos, padded: every tiny document, all eos, all padding."""
    objective = Objective(kind=kind)
    texts = [text for n in range(10) for text in product((10, EOS), repeat=n)]
    for place, text in enumerate(texts):
        for special in (SPECIAL, JOINED):
            row = np.array([*text, *[special.pad] * (9 - len(text))])
            answers = (row == 10) & (np.arange(9) % 2 == 1) if kind == "answers" else None
            holds(make_sample(row, answers, objective, special, (place,)), special, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filling", [EOS, PAD])
def test_a_row_without_text_has_no_targets(kind: str, filling: int) -> None:
    row = np.full(33, filling, np.int64)
    packed = make_sample(row, None, Objective(kind=kind), Special(**dict_of(SPECIAL, pad=filling)), (1,))
    assert packed.modes == () and not packed.segments.any() and np.all(packed.targets == IGNORED)
    assert np.all(packed.tokens == filling) and describe(packed) == []


def dict_of(special: Special, **change: object) -> dict:
    return {name: getattr(special, name) for name in special.__struct_fields__} | change


def test_another_key_is_another_sample() -> None:
    row = row_of(40, 60, more=50)
    for kind in ("prefix", "ul2r", "ul2"):
        samples = [make_sample(row, None, Objective(kind=kind), SPECIAL, key) for key in ((0, 1), (0, 2), (1, 1), (0,))]
        assert not any(same(samples[0], other) for other in samples[1:]), kind


def test_causal_learns_every_token_that_follows_one() -> None:
    packed = make_sample(row_of(3, 1, 0, more=3), None, CAUSAL, SPECIAL, (0,))
    assert packed.tokens.tolist() == [10, 11, 12, 13, 14, 15, PAD, PAD, PAD]
    assert packed.targets.tolist() == [11, 12, EOS, EOS, 15, 16, IGNORED, IGNORED, IGNORED]
    assert packed.segments.tolist() == [1, 1, 1, 2, 3, 3, 0, 0, 0]
    assert not packed.is_prefix.any() and packed.modes == ("causal",) * 3
    assert describe(packed)[1:] == [
        Segment(2, "causal", slice(3, 3), slice(3, 4)),
        Segment(3, "causal", slice(4, 4), slice(4, 6)),
    ]


def test_a_whole_window_is_as_without_objectives() -> None:
    row = row_of(more=65)
    packed = make_sample(row, None, CAUSAL, SPECIAL, (0,))
    assert np.array_equal(packed.tokens, row[:-1]) and np.array_equal(packed.targets, row[1:])
    assert np.all(packed.segments == 1)


def test_padding_is_no_text() -> None:
    row = np.array([10, 11, EOS, PAD, PAD, PAD])
    assert make_sample(row, None, CAUSAL, SPECIAL, (0,)).targets.tolist() == [11, EOS, *[IGNORED] * 3]
    row = np.array([10, 11, EOS, EOS, EOS, EOS])
    assert make_sample(row, None, CAUSAL, JOINED, (0,)).targets.tolist() == [11, EOS, *[IGNORED] * 3]
    row = np.array([10, PAD, 11, EOS, PAD])  # inside the text it is a token like others
    assert make_sample(row, None, CAUSAL, SPECIAL, (0,)).targets.tolist() == [PAD, 11, EOS, IGNORED]


def prefix_lengths(row: np.ndarray, n: int, short_prefix: float) -> list[list[int]]:
    """For each of n keys the prefix length of every document."""
    objective = Objective(kind="prefix", short_prefix=short_prefix)
    found = []
    for key in range(n):
        packed = make_sample(row, None, objective, SPECIAL, (key,))
        found.append([one.prefix.stop - one.prefix.start for one in describe(packed)])
    return found


def test_a_split_is_uniform_in_every_document() -> None:
    lengths = np.array(prefix_lengths(row_of(9, 4, more=10), 3000, 0.0))
    for column, n in enumerate((10, 5, 10)):
        counts = np.bincount(lengths[:, column], minlength=n)
        assert len(counts) == n  # 0 to n - 1: never the whole piece
        assert ((counts - 3000 / n) ** 2 / (3000 / n)).sum() < 27.9  # 9 d.f., p = 0.001
    assert abs(np.corrcoef(lengths.T)[0, 2]) < 0.08  # every document has a draw of its own


def test_short_prefixes_have_their_share() -> None:
    row = row_of(more=401)
    lengths = np.array(prefix_lengths(row, 4000, 0.2))[:, 0]
    expected = 0.2 + 0.8 * 20 / 401
    assert abs((lengths < 20).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert lengths.min() == 0 and lengths.max() > 380
    always = np.array(prefix_lengths(row, 1000, 1.0))[:, 0]
    assert set(always) == set(range(20))
    assert np.array(prefix_lengths(row_of(4), 200, 1.0)).max() == 4  # of five tokens


def test_a_prefix_is_given_and_the_rest_learned() -> None:
    row = row_of(30)
    for key in range(50):
        packed = make_sample(row, None, Objective(kind="prefix"), SPECIAL, (key,))
        (one,) = describe(packed)
        n = one.prefix.stop
        assert packed.modes == ("prefix",) and one.prefix.start == 0
        assert packed.is_prefix.tolist() == [place < n for place in range(30)]
        assert packed.targets[max(n - 1, 0) :].tolist() == row[max(n, 1) :].tolist()
        assert np.all(packed.targets[: max(n - 1, 0)] == IGNORED)


def test_answers_are_learned_from_the_first_one_on() -> None:
    #        question      answer   question  answer        padding
    row = np.array([10, 11, 12, 20, 21, 13, 14, 22, 23, EOS, PAD, PAD])
    answers = np.isin(row, [20, 21, 22, 23])
    packed = make_sample(row, answers, Objective(kind="answers"), SPECIAL, (0,))
    no = IGNORED
    assert packed.tokens.tolist() == [10, 11, 12, 20, 21, 13, 14, 22, 23, PAD, PAD]
    assert packed.targets.tolist() == [no, no, 20, 21, no, no, 22, 23, EOS, no, no]
    assert packed.is_prefix.tolist() == [True] * 3 + [False] * 8
    assert packed.segments.tolist() == [1] * 9 + [0] * 2 and packed.modes == ("answers",)
    assert describe(packed) == [Segment(1, "answers", slice(0, 3), slice(2, 9))]


def test_an_eos_behind_a_question_is_no_answer() -> None:
    row = np.array([10, 20, 11, 12, EOS, EOS, EOS])
    packed = make_sample(row, row == 20, Objective(kind="answers"), JOINED, (0,))
    assert packed.targets.tolist() == [20, *[IGNORED] * 5]


def test_an_answer_without_a_question_has_no_prefix() -> None:
    row = np.array([20, 21, 22, EOS, PAD])
    packed = make_sample(row, row >= 20, Objective(kind="answers"), SPECIAL, (0,))
    assert packed.targets.tolist() == [21, 22, EOS, IGNORED] and not packed.is_prefix.any()


def test_a_document_without_answers_is_left_out_beside_others() -> None:
    row = np.array([10, 11, EOS, 12, 20, EOS, 13])
    packed = make_sample(row, row == 20, Objective(kind="answers"), SPECIAL, (0,))
    assert packed.tokens.tolist() == [12, 20, *[PAD] * 4] and packed.modes == ("answers",)


def test_a_row_without_answers_is_split() -> None:
    row = row_of(20, more=30)
    split = make_sample(row, None, Objective(kind="prefix"), SPECIAL, (3,))
    assert split.modes == ("prefix", "prefix")
    for answers in (None, np.zeros(len(row), np.bool_)):
        assert same(make_sample(row, answers, Objective(kind="answers"), SPECIAL, (3,)), split)
    padded = np.append(row, [PAD] * 4)
    in_padding = np.arange(len(padded)) >= len(row)
    assert make_sample(padded, in_padding, Objective(kind="answers"), SPECIAL, (3,)).modes == split.modes


@pytest.mark.parametrize(
    ("row", "answers"),
    [(np.zeros(1, int), None), (np.zeros((2, 4), int), None), (np.zeros(4, int), np.zeros(3, bool))],
)
def test_other_shapes_are_refused(row: np.ndarray, answers: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="shape"):
        make_sample(row, answers, CAUSAL, SPECIAL, (0,))


def test_denoising_without_sentinels_is_refused() -> None:
    with pytest.raises(ConfigError, match="sentinel"):
        make_sample(row_of(20), None, Objective(kind="ul2r"), Special(eos=EOS, pad=PAD), (0,))


def test_more_documents_than_segments_can_count() -> None:
    row = np.tile([10, EOS], 33_000)
    packed = make_sample(row, None, CAUSAL, SPECIAL, (0,))
    assert packed.segments.max() == len(packed.modes) == 32_767
    assert np.count_nonzero(packed.segments) == 32_767
