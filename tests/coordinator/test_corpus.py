from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from potluck.coordinator import corpus
from potluck.coordinator.corpus import prepare
from potluck.coordinator.recipes import streams, texts
from potluck.coordinator.recipes.build import RECIPE_FILE
from potluck.coordinator.recipes.words import CONFIG_FILE, EOS
from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, TOKENIZER_FILE, Manifest
from potluck.worker.data import Dataset

SMALL: dict[str, Any] = {"vocab_size": 300, "seq_len": 16, "seed": 0}


def write_jsonl(path: Path, n_documents: int = 60) -> Path:
    lines = [json.dumps({"text": f"marker{i:04d} " + f"word{i % 7} and more of it, " * 12}) for i in range(n_documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def stream(folder: Path, part: str) -> list[int]:
    """The tokens of one part: rows overlap in one token."""
    manifest = Manifest.decode((folder / MANIFEST_FILE).read_bytes())
    (shard,) = getattr(manifest.sources[0], part)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    rows = np.fromfile(folder / SHARDS_FOLDER / shard.sha256, dtype=dtype).reshape(-1, manifest.seq_len + 1)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    return [*map(int, rows[:, :-1].flatten()), int(rows[-1, -1])]


def parts(folder: Path) -> tuple[str, str]:
    """The text of the train part and of the held-out part."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    train, heldout = (
        tokenizer.decode(stream(folder, part), skip_special_tokens=False) for part in ("train", "heldout")
    )
    return train, heldout


def markers(text: str) -> set[str]:
    return {text[at : at + 10] for at in range(len(text)) if text.startswith("marker", at)}


@pytest.fixture(scope="session")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, float]:
    folder = tmp_path_factory.mktemp("corpus") / "builtin"
    start = time.process_time()
    manifest = prepare("builtin", folder, vocab_size=2048, seq_len=128, seed=0)
    return folder, manifest, time.process_time() - start


def test_builtin_is_some_megabytes_in_some_seconds(builtin: tuple[Path, Manifest, float]) -> None:
    folder, manifest, cpu_seconds = builtin
    assert manifest.n_tokens > 500_000
    assert (manifest.vocab_size, manifest.dtype, manifest.license) == (2048, "uint16", "PSF-2.0")
    assert 0.015 < manifest.n_heldout / manifest.n_train < 0.06
    assert all((folder / SHARDS_FOLDER / name).stat().st_size == nbytes for name, nbytes in manifest.shards.items())
    assert sum(map(len, parts(folder))) > 2_500_000
    assert cpu_seconds < 15
    assert sorted(path.name for path in folder.iterdir()) == [
        MANIFEST_FILE,
        RECIPE_FILE,
        SHARDS_FOLDER,
        TOKENIZER_FILE,
        CONFIG_FILE,
    ]


def test_transformers_loads_the_tokenizer_and_every_text_survives(
    builtin: tuple[Path, Manifest, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, manifest, _ = builtin
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == manifest.vocab_size
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id} == {manifest.eos_id}
    assert tokenizer.model_max_length == 128
    own = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    for text in ("def f(x):\n\treturn x  # two  spaces .", " Ünïcode 漢字 🍲 ! ?", "", "\r\n\x00 n't ."):
        ids = tokenizer(text)["input_ids"]
        assert ids == own.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(EOS) == [manifest.eos_id]


def test_the_coordinator_needs_no_torch_to_prepare(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from potluck.coordinator.corpus import prepare;"
        f"prepare({str(write_jsonl(tmp_path / 'a.jsonl'))!r}, Path({str(tmp_path / 'out')!r}),"
        "vocab_size=300, seq_len=16, seed=0);"
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_heldout_documents_are_in_no_training_sample(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    doubled = tmp_path / "b.jsonl"  # every document twice: a copy stays on the side of the other
    doubled.write_text(source.read_text(encoding="utf-8") * 2, encoding="utf-8")
    for path in (source, doubled):
        prepare(str(path), tmp_path / path.stem, heldout_share=0.2, **SMALL)
        train, heldout = map(markers, parts(tmp_path / path.stem))
        assert len(train) > 40
        assert len(heldout) >= 10
        assert not train & heldout
        assert max(train) > min(heldout)  # chosen by hash, not from the end


def test_another_seed_holds_out_other_documents(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    sides = []
    for seed in (0, 1):
        prepare(source, tmp_path / str(seed), **(SMALL | {"seed": seed}))
        sides.append(markers(parts(tmp_path / str(seed))[1]))
    assert sides[0] != sides[1]


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    assert prepare(source, tmp_path / "1", **SMALL) == prepare(source, tmp_path / "2", **SMALL)


def test_documents_end_where_they_end(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"{i} says {EOS} in the middle " * 5}) for i in range(40)]
    source.write_text("\n".join(lines), encoding="utf-8")
    manifest = prepare(str(source), tmp_path / "out", **SMALL)
    ends = sum(stream(tmp_path / "out", part).count(manifest.eos_id) for part in ("train", "heldout"))
    assert 30 <= ends <= 40


def test_the_same_parameters_reuse_what_is_there(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    said: list[tuple[str, float]] = []
    first = prepare(str(source), out, progress=lambda line, share: said.append((line, share)), **SMALL)
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)

    source.unlink()  # the prepared corpus is all that a restart needs
    said.clear()
    again = prepare(str(source), out, progress=lambda line, share: said.append((line, share)), **SMALL)
    assert again == first
    assert [line for line, _ in said] == [f"{source}: reused, {first.n_tokens:,} tokens"]


@pytest.mark.parametrize("change", [{"vocab_size": 290}, {"seq_len": 8}, {"seed": 1}, {"heldout_share": 0.3}], ids=str)
def test_other_parameters_rebuild(tmp_path: Path, change: dict[str, Any]) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    first = prepare(source, tmp_path / "out", **SMALL)
    second = prepare(source, tmp_path / "out", **(SMALL | change))
    assert second != first
    assert second == prepare(source, tmp_path / "fresh", **(SMALL | change))
    assert Manifest.decode((tmp_path / "out" / MANIFEST_FILE).read_bytes()) == second


@pytest.mark.parametrize("name", ["shard", TOKENIZER_FILE, MANIFEST_FILE, RECIPE_FILE])
def test_damaged_files_are_built_again(tmp_path: Path, name: str) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    first = prepare(source, tmp_path / "out", **SMALL)
    name = f"{SHARDS_FOLDER}/{next(iter(first.shards))}" if name == "shard" else name
    whole = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).write_bytes(b"\x00" + whole[1:])
    assert prepare(source, tmp_path / "out", **SMALL) == first
    assert (tmp_path / "out" / name).read_bytes() == whole


def test_folders_and_plain_text(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    write_jsonl(root / "a.jsonl", 20)
    (root / "deep" / "b.txt").write_text(
        "\ufeffplain text\r\n\r\n" + "Of this there is more. \n\n" * 900, encoding="utf-8"
    )
    (root / "c.MD").write_text("# nowhere\n", encoding="utf-8")
    (root / "d.csv").write_text("not,this", encoding="utf-8")
    (root / ".git" / "e.txt").write_text("nor this", encoding="utf-8")
    (root / "empty.txt").write_text("", encoding="utf-8")
    manifest = prepare(str(root), tmp_path / "out", **SMALL)
    assert (manifest.source, manifest.license) == ("texts", "unknown")
    train, heldout = parts(tmp_path / "out")
    everything = train + heldout
    assert "plain text\n\nOf this" in everything
    assert "# nowhere\n" in everything
    assert not any(absent in everything for absent in ("\ufeff", "not,this", "nor this"))


@pytest.mark.parametrize("text", ["abc def. " * 40_000, "x" * 300_000, "line\n" * 60_000, "a\n\nb\n\n" * 50_000])
def test_plain_text_is_cut_without_losing_a_character(text: str) -> None:
    blocks = [text[at : at + 70_001] for at in range(0, len(text), 70_001)]
    pieces = list(texts._pieces(iter(blocks)))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert max(map(len, pieces)) <= texts._PIECE_CHARS_MAX + 2


def the_error(source: str, out: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(source, out, **(SMALL | changes))
    assert caught.value.hint
    line = caught.value.one_line()
    assert "\n" not in line
    assert not (out / MANIFEST_FILE).exists()
    return line


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "No such file" in the_error(str(tmp_path / "nowhere.txt"), out)

    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    assert "too little text" in the_error(str(empty), out)
    empty.write_text("one sentence " * 20, encoding="utf-8")
    assert "too little text" in the_error(str(empty), out)
    (tmp_path / "folder").mkdir()
    assert "too little text" in the_error(str(tmp_path / "folder"), out)

    garbage = tmp_path / "garbage.bin"
    garbage.write_bytes(bytes(range(256)) * 100)
    assert "garbage.bin is not UTF-8" in the_error(str(garbage), out)

    for bad in ('{"text": 3}', '{"other": "x"}', "not json", '["text"]', '{"text": "\\ud800"}'):
        lines = tmp_path / "bad.jsonl"
        lines.write_text('{"text": "fine"}\n\n' + bad + "\n", encoding="utf-8")
        assert "bad.jsonl line 3: " in the_error(str(lines), out)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 100}, {"seq_len": 1}, {"heldout_share": 0.0}, {"heldout_share": 0.9}]
)
def test_parameters_outside_their_range_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    assert f"{next(iter(change))} = " in the_error("builtin", tmp_path / "out", **change)


def test_a_folder_that_cannot_be_written_is_a_state_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("", encoding="utf-8")
    with pytest.raises(StateError, match="cannot write the corpus in") as caught:
        prepare(source, in_the_way, **SMALL)
    assert caught.value.hint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    first = prepare(source, out, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StateError, match="No space left"):
            prepare(source, out, **(SMALL | {"seed": 1}))
    assert prepare(source, out, **SMALL) == first
    assert not (out / ".building").exists()


def test_hf_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install -e '.[data]'" in the_error("hf:some/set", tmp_path / "out")


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the datasets library opens without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its dependencies say when they are imported
        pytest.importorskip("datasets")
    folder = tmp_path / "dishes"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", 30)
    return folder


def test_hf_reads_a_data_set(tmp_path: Path, hf: Path) -> None:
    train = prepare(f"hf:{hf}", tmp_path / "train", **SMALL)
    test = prepare(f"hf:{hf}:test", tmp_path / "test", **SMALL)
    assert train.source == "hf:dishes"  # not where it lies on the operator's machine
    assert 1.5 < train.n_tokens / test.n_tokens < 2.5
    same = prepare(str(hf / "train.jsonl"), tmp_path / "same", **SMALL)
    assert same.sources[0].train == train.sources[0].train


def test_hf_stops_at_the_limit_and_says_so(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_HF_TOKENS", 2000)
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 4)
    said: list[str] = []
    manifest = prepare(f"hf:{hf}", tmp_path / "out", progress=lambda line, share: said.append(line), **SMALL)
    assert 1500 < manifest.n_tokens < 4000
    assert any("stopped at the limit of 2,000 tokens" in line for line in said)


def test_hf_errors_are_one_line(tmp_path: Path, hf: Path) -> None:
    assert "cannot open" in the_error(f"hf:{tmp_path / 'nowhere'}", tmp_path / "out")
    assert "cannot open" in the_error(f"hf:{hf}:nosplit", tmp_path / "out")
    for file in hf.iterdir():
        file.write_text('{"body": "x"}\n', encoding="utf-8")
    assert 'no string "text" but body' in the_error(f"hf:{hf}", tmp_path / "out")


def test_a_plain_run_reads_the_samples_that_it_always_read(tmp_path: Path) -> None:
    """Golden values of the time before there were recipes, when a corpus was one file of tokens."""
    value, lines = 12345, []
    for number in range(150):
        words = []
        for _ in range(40):
            value = (value * 1103515245 + 12345) % 2**31
            words.append(f"w{(value >> 16) % 97}")
        lines.append(json.dumps({"text": f"doc {number} " + " ".join(words)}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=320, seq_len=16, seed=5, heldout_share=0.1)
    data = Dataset(tmp_path / "out")
    n = data.manifest.n_train
    assert (n, data.manifest.n_heldout) == (795, 88)
    train, heldout = hashlib.sha256(), hashlib.sha256()
    for index in (*range(2 * n + 5), 10**6, 10**9 + 7):
        train.update(data.sample(index, 3).astype("<i8").tobytes())
    for index in range(data.manifest.n_heldout):
        heldout.update(data.heldout(index).astype("<i8").tobytes())
    assert train.hexdigest() == "e03bb1dcf2977cea665cd3dac8f2a2d97a8fefc5752c1843d0bc310d9a0c4544"
    assert heldout.hexdigest() == "e9c9ad04d08c53e87274a953c72601110c15c72a88f67bf79b4c007a9e5afb33"
