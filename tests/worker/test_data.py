from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import manifest, write_corpus

from potluck.protocol.errors import StateError, UnreachableError
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER
from potluck.worker.data import Dataset

SEQ_LEN, N_TRAIN, N_HELDOUT, VOCAB = 8, 37, 5, 1000
TOKENS = np.arange((N_TRAIN + N_HELDOUT) * SEQ_LEN + 2) * 7919 % VOCAB
TRAIN, HELDOUT = np.split(TOKENS, [N_TRAIN * SEQ_LEN + 1])


def write(folder: Path, **changes: Any) -> Path:
    write_corpus(folder, TRAIN, HELDOUT, SEQ_LEN, **{"vocab_size": VOCAB} | changes)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(write(tmp_path))


def position(data: Dataset, index: int, seed: int) -> int:
    return data.mixture(seed).place(index).number


def test_every_sample_comes_once_per_epoch_and_epochs_differ(data: Dataset) -> None:
    epochs = [[position(data, index, seed=3) for index in range(first, first + N_TRAIN)] for first in (0, N_TRAIN)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N_TRAIN))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [position(data, index, seed=4) for index in range(N_TRAIN)]


def test_a_sample_is_a_window_of_the_train_part(data: Dataset) -> None:
    for index in range(2 * N_TRAIN):
        start = position(data, index, seed=3) * SEQ_LEN
        sample = data.sample(index, seed=3)
        assert sample.dtype == np.int64
        assert sample.tolist() == TOKENS[start : start + SEQ_LEN + 1].tolist()
        assert start + SEQ_LEN + 1 <= len(TRAIN)


def test_an_index_means_the_same_bytes_whoever_asks(tmp_path: Path, data: Dataset) -> None:
    other = Dataset(write(tmp_path / "other"))
    backwards = {index: other.sample(index, seed=1).tobytes() for index in reversed(range(100))}
    assert backwards == {index: data.sample(index, seed=1).tobytes() for index in range(100)}
    assert [position(data, index, seed=1) for index in (0, 7, 41)] == [2, 29, 11]


def test_batches_are_the_samples_shifted_by_one(data: Dataset) -> None:
    inputs_BT, targets_BT, layout = data.batch([5, 40, 2], seed=9)
    assert inputs_BT.shape == targets_BT.shape == (3, SEQ_LEN)
    assert inputs_BT.dtype == targets_BT.dtype == torch.int64
    assert layout is None
    for row, index in enumerate([5, 40, 2]):
        sample = data.sample(index, seed=9).tolist()
        assert inputs_BT[row].tolist() == sample[:-1]
        assert targets_BT[row].tolist() == sample[1:]


def test_heldout_sequences_follow_the_train_part_in_order(data: Dataset) -> None:
    inputs_BT, targets_BT, layout = data.heldout_batch(range(N_HELDOUT))
    heldout = HELDOUT.tolist()
    assert layout is None
    assert inputs_BT.flatten().tolist() == heldout[:-1]
    assert targets_BT.flatten().tolist() == heldout[1:]
    assert data.heldout(1).tolist() == heldout[SEQ_LEN : 2 * SEQ_LEN + 1]
    for index in (-1, N_HELDOUT):
        with pytest.raises(IndexError, match="held-out"):
            data.heldout(index)
    with pytest.raises(IndexError, match="negative"):
        data.sample(-1, seed=0)


def test_large_vocabularies_use_four_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path, TRAIN + 70_000, HELDOUT + 70_000, SEQ_LEN, dtype="uint32", vocab_size=71_000)
    assert int(Dataset(tmp_path).sample(0, seed=0).min()) >= 70_000


def test_damage_is_found_when_a_shard_is_used(tmp_path: Path) -> None:
    flipped, short, outside = (write(tmp_path / name) for name in ("flipped", "short", "outside"))
    (name,) = (shard.sha256 for shard in Dataset(flipped).manifest.sources[0].train)
    whole = (flipped / SHARDS_FOLDER / name).read_bytes()
    (flipped / SHARDS_FOLDER / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (short / SHARDS_FOLDER / name).write_bytes(whole[:-2])
    write(outside, vocab_size=int(TRAIN.max()))
    cases = {flipped: "damaged", short: "bytes, its manifest says", outside: f"outside {TRAIN.max()} words"}
    for folder, message in cases.items():
        with pytest.raises(StateError, match=message) as caught:
            Dataset(folder).sample(0, seed=0)
        assert caught.value.hint


def test_missing_files_are_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"manifest\.json"):
        Dataset(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(manifest(N_TRAIN, N_HELDOUT, SEQ_LEN).encode())
    with pytest.raises(StateError, match=r"cannot read .*0000"):
        Dataset(tmp_path).sample(0, seed=0)


def test_missing_and_damaged_shards_are_fetched(tmp_path: Path) -> None:
    """Each once, the next one ahead; what cannot be had is said when it is needed."""
    there, here = write(tmp_path / "there", rows_each=10), tmp_path / "here"
    (here / SHARDS_FOLDER).mkdir(parents=True)
    (here / MANIFEST_FILE).write_bytes((there / MANIFEST_FILE).read_bytes())
    asked: list[str] = []

    def fetch(name: str, nbytes: int) -> None:
        asked.append(name)
        data = (there / SHARDS_FOLDER / name).read_bytes()
        assert nbytes == len(data)
        (here / SHARDS_FOLDER / name).write_bytes(data)

    whole, lazy = Dataset(there), Dataset(here, fetch)
    lazy.prepare(0, seed=3, n_heldout=2)
    assert 2 <= len(asked) <= 3
    for index in range(3 * N_TRAIN):
        assert lazy.sample(index, seed=3).tolist() == whole.sample(index, seed=3).tolist()
    assert len(asked) == len(set(asked)) == 5
    name = whole.manifest.sources[0].train[0].sha256
    (here / SHARDS_FOLDER / name).write_bytes(b"damaged")
    assert Dataset(here, fetch).heldout(0).tolist() == whole.heldout(0).tolist()
    again = Dataset(here, fetch)
    assert [again.sample(i, 3).tolist() for i in range(N_TRAIN)] == [
        whole.sample(i, 3).tolist() for i in range(N_TRAIN)
    ]
    assert asked[5:] == [name]

    def refuse(name: str, nbytes: int) -> None:
        raise UnreachableError("nobody has it")

    with pytest.raises(UnreachableError, match="nobody has it"):
        Dataset(write_manifest(tmp_path / "none", there), refuse).sample(0, seed=0)


def write_manifest(folder: Path, of: Path) -> Path:
    (folder / SHARDS_FOLDER).mkdir(parents=True)
    (folder / MANIFEST_FILE).write_bytes((of / MANIFEST_FILE).read_bytes())
    return folder
