"""Log-probabilities under explicit masks, on tiny random GPT-J and Llama."""

from __future__ import annotations

import pytest
import torch
from tiny_models import POSITIONS, build, one_by_one

from potluck.protocol.errors import ConfigError
from potluck.worker.evaluation.scoring import Query, Scorer, windows

KINDS = [(kind, prefix) for kind in ("gptj", "llama") for prefix in (False, True)]


def naive(model, context, answer):
    """Context and answer through the model as a whole, under the model's own mask."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*context, *answer]]), use_cache=False).logits[0]
    return sum(float(logits[len(context) - 1 + i].double().log_softmax(0)[t]) for i, t in enumerate(answer))


def some_queries(seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(0, 256, (n,), generator=generator).tolist()

    sizes = [(5, (1, 4)), (40, (3, 1, 7)), (1, (2,)), (23, (9, 2)), (40, (1, 1))]
    return [Query(draw(n), [draw(m) for m in answers]) for n, answers in sizes]


@pytest.mark.parametrize(("kind", "prefix"), KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_and_shared_contexts_equal_one_by_one(kind, prefix, batch_size):
    model = build(kind, prefix=prefix)
    queries = some_queries()
    found = Scorer(model, prefix=prefix, max_length=POSITIONS, batch_size=batch_size).score(queries)
    for query, scores in zip(queries, found, strict=True):
        for answer, score in zip(query.continuations, scores, strict=True):
            expected = one_by_one(model, query.context, answer, prefix)
            assert score.logprobs.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_a_prefix_model_run_over_the_whole_sees_its_answer(kind):
    """The leak: the same weights, the same tokens, another number. For a causal model there is none."""
    query = some_queries()[3]
    for prefix in (True, False):
        model = build(kind, prefix=prefix)
        [scores] = Scorer(model, prefix=prefix, max_length=POSITIONS).score([query])
        leak = abs(naive(model, query.context, query.continuations[0]) - scores[0].total)
        assert leak > 1e-2 if prefix else leak < 1e-4


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_the_answer_of_a_prefix_model_hides_its_own_future(kind):
    """Another last token changes nothing before it but the last bit: they are two rows of one product, and threads may
    round them differently. What leaks is above 1e-2."""
    model = build(kind, prefix=True)
    scorer = Scorer(model, prefix=True, max_length=POSITIONS)
    [[first, second]] = scorer.score([Query([1, 2, 3, 4], [[5, 6, 7, 8], [5, 6, 7, 200]])])
    torch.testing.assert_close(first.logprobs[:3], second.logprobs[:3], atol=1e-5, rtol=0)
    assert abs(first.total - second.total) > 1e-3


def test_greedy_is_what_the_model_would_write():
    model = build("gptj", prefix=True)
    context = [10, 20, 30, 40]
    written = model.generate(
        torch.tensor([context]), attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=5, do_sample=False
    )[0, 4:].tolist()
    other = [*written[:-1], (written[-1] + 1) % 256]
    [[same, changed]] = Scorer(model, prefix=True, max_length=POSITIONS).score([Query(context, [written, other])])
    assert same.is_greedy and not changed.is_greedy


def test_a_context_that_is_too_long_loses_its_beginning():
    model = build("gptj", prefix=False)
    scorer = Scorer(model, prefix=False, max_length=16)
    long = list(range(100))
    [[found]] = scorer.score([Query(long, [[7, 8, 9]])])
    [[cut]] = scorer.score([Query(long[-14:], [[7, 8, 9]])])
    assert torch.equal(found.logprobs, cut.logprobs)
    with pytest.raises(ConfigError, match="17 tokens"):
        scorer.score([Query([1], [list(range(17))])])


def test_many_answers_are_cut_into_several_sequences():
    model = build("llama", prefix=True)
    query = Query(list(range(10)), [[i, i + 1, i + 2] for i in range(40)])
    small = Scorer(model, prefix=True, max_length=16).score([query])
    whole = Scorer(model, prefix=True, max_length=POSITIONS).score([query])
    assert [s.total for s in small[0]] == pytest.approx([s.total for s in whole[0]], abs=1e-5)


def test_windows_score_every_token_once():
    tokens = list(range(50, 73))
    pairs = list(windows(tokens, 9, 10))
    assert [token for _, part in pairs for token in part] == tokens
    assert [context for context, _ in pairs] == [[9], [59], [69]]


def test_an_unknown_kind_of_model_is_refused():
    model = build("gptj", prefix=False)
    model.config.model_type = "gemma2"
    with pytest.raises(ConfigError, match="gemma2"):
        Scorer(model, prefix=False, max_length=8)
