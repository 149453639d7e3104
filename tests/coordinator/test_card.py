"""The model card: what a run says of itself to whoever finds its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from evaluations import summary
from manifests import MANIFEST
from msgspec.structs import replace

from potluck.coordinator.card import Contributor, Facts, gathered, model_card
from potluck.coordinator.events import Evaluated, PeerJoined
from potluck.coordinator.state import Commit, Journal, Lease, Mark, Point
from potluck.coordinator.store import Store
from potluck.protocol.config import ModelConfig, RunConfig
from potluck.protocol.manifest import Manifest
from potluck.protocol.objective import Objective

CONFIG = RunConfig(name="ours")


def front(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def licensed(text: str) -> Manifest:
    return replace(MANIFEST, sources=tuple(replace(source, license=text) for source in MANIFEST.sources))


@pytest.mark.parametrize("license", ["", "  ", "unknown"])
def test_a_text_without_a_license_is_said_plainly(license: str) -> None:
    card = model_card(CONFIG, licensed(license), Facts())
    assert front(card)["license"] == "unknown" and "license: unknown\n" in card
    assert "Whether the model may be used depends on that of the text" in card


def test_a_license_is_passed_on_as_it_is() -> None:
    odd = "other: {see}\n--- <b>"
    card = model_card(CONFIG, licensed(odd), Facts())
    assert front(card)["license"] == odd.strip() and "depends on that of the text" not in card


def test_what_is_in_it() -> None:
    model = ModelConfig(architecture="llama", d_model=64, heads=4, kv_heads=2)
    facts = Facts(
        run="ab12",
        base="a/model (license: mit)",
        step=3,
        tokens=1000,
        heldout_loss=3.25,
        contributors=[Contributor(name="Ann", peer="1234567890abcdef", samples=7, sent=2_500_000)],
        traffic={"weights": 3000, "activation": 1500},
        digests=["00ff"],
    )
    (stage,) = MANIFEST.stages
    stages = (replace(stage, objective=Objective(kind="prefix")),)
    card = model_card(RunConfig(name="ours", model=model), replace(MANIFEST, stages=stages), facts)
    assert front(card)["tags"] == ["potluck", "llama"]
    for line in (
        "A Llama model of ",
        "Text: `test`, license: `unknown`",
        "Objective: prefix: a text is split at random",
        "Begun from a/model (license: mit).",
        "3.2500 nats",
        "| Ann | `1234567890ab` | 7 | 2.5 |",
        "| activation | 1,500 | 1.5 |",
        "| weights | 3,000 | 3.0 |",
        "| all | 4,500 | 4.5 |",
        "`is_causal: false`",
        "- stage 0: `00ff`",
    ):
        assert line in card, line
    assert "is_causal" not in model_card(CONFIG, MANIFEST, facts)


def test_strangers_names_are_only_text() -> None:
    someone = Contributor(name="|<img src=x>\n# [a](b) `", peer="`<p>`", samples=0, sent=0)
    card = model_card(CONFIG, MANIFEST, Facts(contributors=[someone], traffic={"|": 1}))
    (row,) = [line for line in card.splitlines() if "img" in line]
    assert row.count("|") == 5 and not set("<>[]") & set(row)


def test_facts_are_those_of_the_runs_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    joined = [Journal(event=PeerJoined(peer=p, name=n, device="cpu")) for p, n in (("a", "old"), ("b", "Bob"))]
    joined.append(Journal(event=PeerJoined(peer="a", name="Ann", device="cpu")))
    leases = [Lease(generation=1, step=step, peer="a", first=4 * step, count=4, expires=9.0) for step in range(3)]
    mark = Mark(kind="round", generation=1, step=2, sample=8, digests=(b"\x01", b"\x02"))
    commit = Commit(round=1, mark=mark, replicas=1, samples=8, nbytes=1, seconds=1.0, degraded=False)
    points = [Point(step=s, tokens_samples=8, train=None, heldout=h) for s, h in ((0, 5.0), (2, 4.0))]
    rows = [("a", "s1", "weights", "out", 10, 0), ("a", "s2", "weights", "out", 20, 0), ("b", "s", "data", "in", 5, 0)]
    rows.append(("b", "s", "weights", "in", 30, 0))
    extra = [("INSERT INTO traffic VALUES (?,?,?,?,?,?)", row) for row in rows]
    store.write([*joined, *leases, commit, *points], 1.0, extra)
    assert gathered(store, 16, "run") == Facts(
        run="run",
        step=2,
        tokens=128,
        heldout_loss=4.0,
        contributors=[
            Contributor(name="Ann", peer="a", samples=8, sent=30),  # the third step is leased, not committed
            Contributor(name="Bob", peer="b", samples=0, sent=0),
        ],
        traffic={"data": 5, "weights": 30},
        digests=["01", "02"],
    )
    store.close()


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    facts = gathered(store, 16, "run")
    assert facts == Facts(run="run", traffic={}, contributors=[], digests=[]) and model_card(CONFIG, MANIFEST, facts)
    store.close()


def test_the_newest_evaluation_before_it_is_in_the_card(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    mark = Mark(kind="round", generation=1, step=8, sample=16, digests=(b"\x01",))
    commit = Commit(mark=mark, round=1, replicas=1, samples=16, nbytes=1, seconds=0.1, degraded=False)
    steps = (0, 4, 8)  # the last one is of weights that are published anew now
    found = [
        Evaluated(step=step, suite="of|fline", mean=summary(step).mean, tasks=summary(step).tasks, digest="")
        for step in steps
    ]
    store.write([commit, *(Journal(event=event) for event in found)], 0.0)
    card = model_card(CONFIG, MANIFEST, gathered(store, 8, "ab12"))
    store.close()
    assert "Of this run's model of step 4, suite `of|fline`" in card
    assert "| spam | macro-f1 | 0.500 | 0.400 … 0.600 | 60 | 0.330 | 0.800 |" in card
    assert "| mean | macro-f1 | 0.500 | 0.400 … 0.600 | 60 |  |  |" in card and "brown" not in card
    assert "## Evaluation" not in model_card(CONFIG, MANIFEST, Facts())
