from __future__ import annotations

from typing import Any

import msgspec
import pytest
from manifests import manifest

from potluck.protocol.errors import StateError
from potluck.protocol.manifest import WHOLE, Manifest, Shard, Source, Stage, is_sha256
from potluck.protocol.objective import Objective, Special


def a_manifest(**changes: Any) -> Manifest:
    return msgspec.structs.replace(manifest(37, 5, 8), **changes)


SHARD = Shard("a" * 64, 10)
RENDERED = Source(name="ni", origin="ni", license="Apache-2.0", answers=True, train=(SHARD,), heldout=(SHARD,))


def test_a_manifest_survives_its_encoding() -> None:
    text = a_manifest().sources[0]
    stage = Stage(name="mixed", rows=100, mix={"text": 9_000, "ni": 1_000}, objective=Objective(kind="answers"))
    mixed = a_manifest(sources=(text, RENDERED), stages=(stage,), locations=("https://example.org/shards",))
    for one in (a_manifest(), mixed):
        assert Manifest.decode(one.encode()) == one
        assert Manifest.decode(msgspec.json.encode(one)) == one


def test_what_it_says_of_its_shards() -> None:
    text = a_manifest().sources[0]
    both = a_manifest(sources=(text, RENDERED), stages=(Stage(name="mixed", rows=9, mix={"text": 5_000, "ni": 5_000}),))
    # Nine tokens of two bytes a row; with answers two more bytes of bits.
    assert both.shards == {"0" * 64: 37 * 18, "1" * 64: 5 * 18, "a" * 64: 10 * 20}
    assert (both.n_train, both.n_heldout, both.n_tokens) == (47, 15, 62 * 8)
    assert (both.source, both.license, both.masked) == ("test, ni", "unknown, Apache-2.0", False)
    denoised = a_manifest(stages=(Stage(name="s", rows=9, mix={"text": WHOLE}, objective=Objective(kind="prefix")),))
    assert denoised.masked


def test_its_hash_is_of_the_text_not_of_where_it_lies() -> None:
    one = a_manifest()
    assert one.sha256 == a_manifest(locations=("https://example.org/x",)).sha256
    assert one.sha256 != a_manifest(vocab_size=301).sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 1},
        {"surprise": 1},
        {"dtype": "float32"},
        {"tokenizer_sha256": "A" * 64},
        {"seq_len": -8},
        {"seq_len": "8"},
        {"vocab_size": 70_000},
        {"special": {"eos": 300, "pad": 0}},
        {"special": {"eos": 0, "pad": 0, "sentinels": [5, 300]}},
        {"sources": []},
        {"sources": [{"name": "text", "origin": "x" * 5000, "license": "", "train": [["0" * 64, 1]]}]},
        {"sources": [{"name": "text", "origin": "", "license": "", "train": [["../../etc/passwd", 1]]}]},
        {"sources": [{"name": "text", "origin": "", "license": "", "train": [["0" * 64, 0]]}]},
        {"sources": [{"name": "text", "origin": "", "license": "", "train": []}]},
        {"sources": [{"name": "text", "origin": "", "license": "", "train": [["0" * 64, 1 << 40]]}]},
        {"sources": [{"name": "text", "origin": "", "license": "", "train": [["0" * 64, 9]]}]},  # nothing held out
        {"sources": 2 * [msgspec.to_builtins(manifest(9, 9, 8).sources[0])]},
        {"stages": []},
        {"stages": [{"name": "s", "rows": 0, "mix": {"text": WHOLE}}]},
        {"stages": [{"name": "s", "rows": 9, "mix": {"text": WHOLE - 1}}]},
        {"stages": [{"name": "s", "rows": 9, "mix": {"test": WHOLE}}]},
        {"stages": [{"name": "s", "rows": 9, "mix": {"text": WHOLE}, "objective": {"kind": "ul2r"}}]},
    ],
    ids=str,
)
def test_a_manifest_that_is_not_right_is_refused(changes: dict[str, Any]) -> None:
    wrong = msgspec.json.encode(msgspec.to_builtins(a_manifest()) | changes)
    with pytest.raises(StateError, match="not a usable corpus manifest"):
        Manifest.decode(wrong)


@pytest.mark.parametrize("wrong", [b"", b"[]", b"\xff\xfe", b'{"schema":2}'])
def test_bytes_that_are_no_manifest_are_refused(wrong: bytes) -> None:
    with pytest.raises(StateError, match="not a usable corpus manifest"):
        Manifest.decode(wrong)


def test_special_tokens_are_kept() -> None:
    special = Special(eos=0, pad=0, sentinels=(5, 6), modes={"R": (1,), "X": (2, 3), "S": (4,)})
    stage = Stage(name="s", rows=9, mix={"text": WHOLE}, objective=Objective(kind="ul2r"))
    one = a_manifest(special=special, stages=(stage,))
    assert Manifest.decode(one.encode()).special == special


def test_only_hex_names_pass_as_sha256() -> None:
    assert is_sha256("0a" * 32)
    assert not any(map(is_sha256, ("0a" * 32 + "\n", "0A" * 32, "0" * 63, "../" + "0" * 61)))
