"""Error feedback: nothing is lost, only late."""

import pytest
import torch

from potluck.compression.feedback import ErrorFeedback
from potluck.compression.sync import SyncCodec


@pytest.mark.parametrize(
    "codec",
    [
        SyncCodec(bits=2),
        SyncCodec(bits=4),
        SyncCodec(density=0.1, bits=4),
        SyncCodec(density=0.1, topk=0.2, bits=4),
        SyncCodec(topk=0.03, bits=2),
    ],
    ids=repr,
)
def test_sent_plus_kept_is_the_total_and_stays_bounded(codec: SyncCodec) -> None:
    n, rounds = 2000, 150
    g = torch.Generator().manual_seed(0)
    feedback = ErrorFeedback(n)
    total, sent = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    norms = []
    for seed in range(rounds):
        x = torch.randn(n, generator=g) * 1e-5
        total += x
        compensated = feedback.compensated(x)
        message = codec.encode(compensated, seed).sent
        feedback.keep(compensated, message)
        sent += message.dense(n)
        kept = feedback.state()
        assert kept is not None
        norms.append(kept.norm().item())
    torch.testing.assert_close(sent + kept, total, rtol=0, atol=1e-9)
    assert norms[-1] < 3 * max(norms[: rounds // 2])


def test_an_exact_codec_leaves_nothing() -> None:
    feedback = ErrorFeedback(5)
    x = torch.randn(5)
    assert feedback.compensated(x) is x
    assert feedback.state() is None
    feedback.keep(x, SyncCodec(bits=32).encode(x, 0).sent)
    assert torch.equal(feedback.state(), torch.zeros(5))


def test_decay_forgets() -> None:
    feedback = ErrorFeedback(4, decay=0.5)
    x = torch.tensor([4.0, 3.0, 2.0, 1.0])
    feedback.keep(x, SyncCodec(topk=0.25, bits=32).encode(x, 0).sent)
    assert feedback.state().tolist() == [0.0, 1.5, 1.0, 0.5]
    assert x.tolist() == [4.0, 3.0, 2.0, 1.0]


def test_state_goes_round_and_is_checked() -> None:
    a, b = ErrorFeedback(3), ErrorFeedback(3)
    x = torch.tensor([1.0, -2.0, 0.5])
    a.keep(x, SyncCodec(topk=0.4, bits=32).encode(x, 0).sent)
    b.load(a.state())
    assert torch.equal(a.compensated(x), b.compensated(x))
    b.load(None)
    assert b.state() is None
    with pytest.raises(ValueError, match="3 elements"):
        b.load(torch.zeros(4))
    with pytest.raises(ValueError, match="NaN"):
        b.load(torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match="decay"):
        ErrorFeedback(3, decay=1.5)
