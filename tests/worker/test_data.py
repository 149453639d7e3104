from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from potluck.protocol.errors import StateError
from potluck.protocol.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest, is_sha256
from potluck.worker.data import Dataset

SEQ_LEN, N_TRAIN, N_HELDOUT, VOCAB = 8, 37, 5, 1000
N_TOKENS = (N_TRAIN + N_HELDOUT) * SEQ_LEN + 2
TOKENS = (np.arange(N_TOKENS) * 7919 % VOCAB).astype("<u2")


def a_manifest(tokens: bytes = TOKENS.tobytes(), **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "source": "test",
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "n_tokens": N_TOKENS,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "seq_len": SEQ_LEN,
        "n_train": N_TRAIN,
        "n_heldout": N_HELDOUT,
        "tokenizer_sha256": "0" * 64,
        "eos_id": 0,
        "license": "unknown",
    }
    return Manifest(**(fields | changes))


def write(folder: Path, manifest: Manifest, tokens: bytes = TOKENS.tobytes()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENS_FILE).write_bytes(tokens)
    (folder / MANIFEST_FILE).write_bytes(manifest.encode())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(write(tmp_path, a_manifest()))


def test_every_sample_comes_once_per_epoch_and_epochs_differ(data: Dataset) -> None:
    epochs = [[data.position(index, seed=3) for index in range(first, first + N_TRAIN)] for first in (0, N_TRAIN)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N_TRAIN))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [data.position(index, seed=4) for index in range(N_TRAIN)]


def test_a_sample_is_a_window_of_the_train_part(data: Dataset) -> None:
    for index in range(2 * N_TRAIN):
        start = data.position(index, seed=3) * SEQ_LEN
        sample = data.sample(index, seed=3)
        assert sample.dtype == np.int64
        assert sample.tolist() == TOKENS[start : start + SEQ_LEN + 1].tolist()
        assert start + SEQ_LEN + 1 <= data.manifest.heldout_start


def test_an_index_means_the_same_bytes_whoever_asks(tmp_path: Path, data: Dataset) -> None:
    other = Dataset(write(tmp_path / "other", a_manifest()))
    backwards = {index: other.sample(index, seed=1).tobytes() for index in reversed(range(100))}
    assert backwards == {index: data.sample(index, seed=1).tobytes() for index in range(100)}
    assert [data.position(index, seed=1) for index in (0, 7, 41)] == [2, 29, 11]


def test_batches_are_the_samples_shifted_by_one(data: Dataset) -> None:
    inputs_BT, targets_BT, _ = data.batch([5, 40, 2], seed=9)
    assert inputs_BT.shape == targets_BT.shape == (3, SEQ_LEN)
    assert inputs_BT.dtype == targets_BT.dtype == torch.int64
    for row, index in enumerate([5, 40, 2]):
        sample = data.sample(index, seed=9).tolist()
        assert inputs_BT[row].tolist() == sample[:-1]
        assert targets_BT[row].tolist() == sample[1:]


def test_heldout_sequences_follow_the_train_part_in_order(data: Dataset) -> None:
    inputs_BT, targets_BT, _ = data.heldout_batch(range(N_HELDOUT))
    heldout = TOKENS[N_TRAIN * SEQ_LEN + 1 :].tolist()
    assert inputs_BT.flatten().tolist() == heldout[:-1]
    assert targets_BT.flatten().tolist() == heldout[1:]
    assert data.heldout(1).tolist() == heldout[SEQ_LEN : 2 * SEQ_LEN + 1]
    for index in (-1, N_HELDOUT):
        with pytest.raises(IndexError, match="held-out"):
            data.heldout(index)
    with pytest.raises(IndexError, match="negative"):
        data.sample(-1, seed=0)


def test_large_vocabularies_use_four_bytes(tmp_path: Path) -> None:
    tokens = (TOKENS.astype("<u4") + 70_000).tobytes()
    manifest = a_manifest(tokens, dtype="uint32", vocab_size=71_000)
    assert int(Dataset(write(tmp_path, manifest, tokens)).sample(0, seed=0).min()) >= 70_000


def test_damage_is_found_when_the_corpus_is_opened(tmp_path: Path) -> None:
    flipped = bytearray(TOKENS.tobytes())
    flipped[100] ^= 1
    too_large = np.full(N_TOKENS, VOCAB, dtype="<u2").tobytes()
    cases = {
        "damaged": (a_manifest(), bytes(flipped)),
        "bytes, its manifest says": (a_manifest(), TOKENS.tobytes()[:-2]),
        "outside": (a_manifest(too_large), too_large),
    }
    for number, (message, (manifest, tokens)) in enumerate(cases.items()):
        with pytest.raises(StateError, match=message) as caught:
            Dataset(write(tmp_path / str(number), manifest, tokens))
        assert caught.value.hint


def test_missing_files_are_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"manifest\.json"):
        Dataset(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(a_manifest().encode())
    with pytest.raises(StateError, match=r"tokens\.bin"):
        Dataset(tmp_path)


def test_a_manifest_survives_its_encoding() -> None:
    manifest = a_manifest()
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.nbytes == len(TOKENS.tobytes())


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"surprise": 1},
        {"dtype": "float32"},
        {"tokens_sha256": "../../etc/passwd"},
        {"tokenizer_sha256": "A" * 64},
        {"n_tokens": N_TOKENS + 1},
        {"n_train": 0},
        {"seq_len": -8},
        {"vocab_size": 70_000},
        {"eos_id": VOCAB},
        {"n_train": "37"},
        {"source": "x" * 5000},
    ],
)
def test_a_manifest_that_is_not_right_is_refused(changes: dict[str, Any]) -> None:
    wrong = msgspec.json.encode(msgspec.to_builtins(a_manifest()) | changes)
    with pytest.raises(StateError, match="not a usable corpus manifest"):
        Manifest.decode(wrong)


@pytest.mark.parametrize("wrong", [b"", b"[]", b"\xff\xfe", b'{"schema":1}'])
def test_bytes_that_are_no_manifest_are_refused(wrong: bytes) -> None:
    with pytest.raises(StateError, match="not a usable corpus manifest"):
        Manifest.decode(wrong)


def test_only_hex_names_pass_as_sha256() -> None:
    assert is_sha256("0a" * 32)
    assert not any(map(is_sha256, ("0a" * 32 + "\n", "0A" * 32, "0" * 63, "../" + "0" * 61)))
