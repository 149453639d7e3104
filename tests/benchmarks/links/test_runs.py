"""One short run behind lines: real processes, and a critical path without holes. Nothing here asserts a speed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.links.path import CLOSE_SECONDS, Records
from benchmarks.links.runs import measure, read_trace
from benchmarks.links.scale import CARDS, LAYOUTS, Layout
from benchmarks.netlab.lab import LabError
from benchmarks.netlab.profiles import PROFILES

SMALL = Layout(
    stages=2, replicas=1, card=CARDS["3090"], layers=2, vocab=512, width=256, seq_len=64, compute_seconds=0.03
)


@pytest.mark.timeout(300)
def test_a_run_behind_home_lines_and_where_its_time_went(tmp_path: Path) -> None:
    try:
        cell = measure(PROFILES["home-fibre"], SMALL, "default", steps=5, warmup=1, folder=tmp_path)
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
    assert cell.steps >= 5 and len(cell.steps_seen) == cell.steps
    assert cell.sent_per_token > 256 / 2, "half a byte a value, at the least, crosses the only boundary each way"
    records = Records({path.stem: read_trace(path) for path in sorted(tmp_path.glob("*.trace"))})
    assert sorted(records.stage.values()) == [0, 1]
    path = records.path(3)
    assert {"compute", "update"} <= {segment.what for segment in path}
    for later, earlier in itertools.pairwise(path):
        assert earlier.start <= earlier.end and abs(earlier.end - later.start) <= 2 * CLOSE_SECONDS, (earlier, later)
    before = [steps[2]["end"] for steps in records.steps.values()]
    assert any(abs(path[-1].start - t) <= 2 * CLOSE_SECONDS for t in before)


def test_the_small_lines_are_as_hard_as_the_real_ones() -> None:
    """Seconds of transfer over seconds of compute, of a microbatch and of a round, small and real."""
    for layout in LAYOUTS.values():
        real_bits, small_bits = 2048 * 4096 * 4.25, layout.seq_len * layout.width * 4.25
        real = real_bits / 20e6 / layout.real_seconds
        assert small_bits / (20e6 * layout.rate_factor) / layout.compute_seconds == pytest.approx(real)
        assert 3.2 < layout.thin < 4.8, "four fragments at once stand for one of four"
