"""Error feedback: nothing is lost, only late."""

import pytest
import torch

from potluck.compression.feedback import ErrorFeedback
from potluck.compression.mask import Mask
from potluck.compression.sync import SyncCodec

CODECS = {
    "2 bits": (1.0, SyncCodec(bits=2)),
    "4 bits": (1.0, SyncCodec(bits=4)),
    "mask": (0.1, SyncCodec(bits=4)),
    "cocktail": (0.1, SyncCodec(topk=0.2, bits=4)),
    "topk": (1.0, SyncCodec(topk=0.03, bits=2)),
    "sparseloco": (1.0, SyncCodec(topk=0.03, chunk=256, bits=2)),
}


def run(rounds: int, n: int, codecs: list[tuple[float, SyncCodec]]) -> list[float]:
    """Rounds with the codecs in turn; the invariant holds after each. The norms of what was kept."""
    g = torch.Generator().manual_seed(0)
    feedback = ErrorFeedback(n)
    total, sent = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    norms = []
    for seed in range(rounds):
        density, codec = codecs[seed % len(codecs)]
        mask = Mask(n, density, seed)
        x = torch.randn(mask.count, generator=g) * 1e-5
        total[mask.indices()] += x
        compensated = feedback.compensated(mask, x)
        message = codec.encode(compensated).sent
        feedback.keep(mask, compensated, message)
        sent[mask.indices()] += message.dense(mask.count)
        kept = feedback.state()
        assert kept is not None
        torch.testing.assert_close(sent + kept, total, rtol=0, atol=1e-9)
        norms.append(kept.norm().item())
    return norms


@pytest.mark.parametrize("name", CODECS)
def test_sent_plus_kept_is_the_total_and_stays_bounded(name: str) -> None:
    norms = run(150, 2000, [CODECS[name]])
    assert norms[-1] < 3 * max(norms[:75])


def test_sent_plus_kept_is_the_total_with_any_mask_and_codec_in_turn() -> None:
    run(60, 1501, [(density, codec) for density in (0.013, 1.0, 0.37) for _, codec in CODECS.values()])


def test_an_exact_codec_leaves_nothing() -> None:
    feedback, mask = ErrorFeedback(5), Mask(5, 1.0, 0)
    x = torch.randn(5)
    assert feedback.compensated(mask, x) is x
    assert feedback.state() is None
    feedback.keep(mask, x, SyncCodec(bits=32).encode(x).sent)
    assert torch.equal(feedback.state(), torch.zeros(5))


def test_decay_forgets_only_where_the_mask_is() -> None:
    feedback, all_ = ErrorFeedback(4, decay=0.5), Mask(4, 1.0, 0)
    x = torch.tensor([4.0, 3.0, 2.0, 1.0])
    feedback.keep(all_, x, SyncCodec(topk=0.25, bits=32).encode(x).sent)
    assert feedback.state().tolist() == [0.0, 1.5, 1.0, 0.5]
    assert x.tolist() == [4.0, 3.0, 2.0, 1.0]
    half = Mask(4, 0.5, 1)
    owed = feedback.compensated(half, torch.zeros(2))
    before = feedback.state()
    assert torch.equal(owed, before[half.indices()])
    feedback.keep(half, owed, SyncCodec(topk=0.5, bits=32).encode(owed).sent)
    after = feedback.state()
    assert after[half.indices()].max() == 0.5 * owed.min()
    outside = torch.ones(4).index_fill(0, half.indices(), 0.0).bool()
    assert torch.equal(after[outside], before[outside])


def test_state_goes_round_and_is_checked() -> None:
    a, b, mask = ErrorFeedback(3), ErrorFeedback(3), Mask(3, 1.0, 0)
    x = torch.tensor([1.0, -2.0, 0.5])
    a.keep(mask, x, SyncCodec(topk=0.4, bits=32).encode(x).sent)
    b.load(a.state())
    assert torch.equal(a.compensated(mask, x), b.compensated(mask, x))
    b.load(None)
    assert b.state() is None
    with pytest.raises(ValueError, match="3 elements"):
        b.load(torch.zeros(4))
    with pytest.raises(ValueError, match="NaN"):
        b.load(torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match="decay"):
        ErrorFeedback(3, decay=1.5)
    with pytest.raises(ValueError, match="mask of 4"):
        a.compensated(Mask(4, 1.0, 0), torch.zeros(4))
    with pytest.raises(ValueError, match="3 positions"):
        a.keep(mask, torch.zeros(2), SyncCodec().encode(torch.zeros(2)).sent)
