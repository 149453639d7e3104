from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potluck import cli
from potluck.protocol.errors import ConfigError
from potluck.worker import pmi
from potluck.worker.pmi import Scorer

PAIRS = [
    ("what is a potato?", "a root"),
    ("say nothing", "no"),
    ("say nothing", "a longer answer, of some more words than the others have, until the end"),
    ("x", "a root"),
    ("a question that is long enough to make the others be padded by a lot of tokens behind it. " * 3, "yes"),
]


def letters() -> PreTrainedTokenizerFast:
    """A word for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=512, initializer_range=0.3, **shape)
    return LlamaForCausalLM(config)


def gptj() -> GPTJForCausalLM:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}
    return GPTJForCausalLM(GPTJConfig(vocab_size=257, initializer_range=0.3, **shape))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores several are slower than one for models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    letters().save_pretrained(path)
    return path


def by_hand(model: Any, context: list[int], said: list[int]) -> float:
    """One sequence, nothing beside or behind it."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + said])).logits[0].double()
    places = range(len(context) - 1, len(context) + len(said) - 1)
    return sum(float(torch.log_softmax(logits[at], 0)[token]) for at, token in zip(places, said, strict=True))


@pytest.mark.parametrize("make", [llama, gptj])
def test_batches_score_as_one_by_one_does(make: Any) -> None:
    model, tokenizer = make().eval(), letters()
    found = Scorer(model, tokenizer).score(PAIRS)
    for (x, y), score in zip(PAIRS, found, strict=True):
        x_ids, y_ids, line = tokenizer(x)["input_ids"], tokenizer(y)["input_ids"], tokenizer("\n")["input_ids"]
        given, alone = by_hand(model, [256, *x_ids, *line], y_ids), by_hand(model, [256, *line], y_ids)
        assert score.given == pytest.approx(given, abs=1e-4)
        assert score.alone == pytest.approx(alone, abs=1e-4)
        assert score.pmi == pytest.approx((given - alone) / len(y_ids), abs=1e-4)
        assert (score.x_tokens, score.y_tokens) == (len(x_ids), len(y_ids))
    assert len({round(score.pmi, 6) for score in found}) == len(PAIRS)


def test_neither_order_nor_size_of_batches_matters() -> None:
    model, tokenizer = llama(), letters()
    want = Scorer(model, tokenizer).score(PAIRS)
    said: list[float] = []
    for batch_tokens in (1, 200, 10_000):
        found = Scorer(model, tokenizer, batch_tokens=batch_tokens).score(PAIRS[::-1], said.append)[::-1]
        for one, other in zip(found, want, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert said[-1] == 1.0


def test_what_is_too_long_is_cut_and_padding_says_nothing() -> None:
    scorer = Scorer(llama(), letters())
    (score,) = scorer.score([("q" * 2000, "a" * 2000)])
    assert (score.x_tokens, score.y_tokens) == (2000, 2000)
    half = scorer.score([("q" * 254, "a" * 256)])[0]  # what remains of both: 512 with the beginning and a line break
    assert score.pmi == pytest.approx(half.pmi, abs=1e-4)
    assert score.given == pytest.approx(half.given * 2000 / 256, rel=1e-5)
    with pytest.raises(ValueError, match="without tokens"):
        scorer.score([("x", "")])


def test_of_questions_the_one_that_an_answer_was_learned_for_scores_highest() -> None:
    model, tokenizer = llama(), letters()
    pairs = [("one?", "first"), ("two?", "second"), ("three?", "third"), ("four?", "fourth")]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = [[256, *tokenizer(f"{x}\n{y}")["input_ids"]] for x, y in pairs]
    for step in range(60):
        row = torch.tensor([rows[step % 4]])
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
    scorer = Scorer(model, tokenizer)
    for place, (_, y) in enumerate(pairs):
        found = [score.pmi for score in scorer.score([(x, y) for x, _ in pairs])]
        assert max(found) == found[place] > 0.5


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="no beginning or end"):
        Scorer(llama(), PreTrainedTokenizerFast(tokenizer_object=letters().backend_tokenizer))


def test_folders_without_a_safe_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no model"):
        pmi.load(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no usable model") as caught:
        pmi.load(tmp_path)
    assert "\n" not in caught.value.one_line()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="no usable model"):
        pmi.load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="no usable model"):
        pmi.load(tmp_path)


def test_models_with_other_weights_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert pmi.fingerprint(tmp_path) == pmi.fingerprint(folder)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert pmi.fingerprint(tmp_path) != pmi.fingerprint(folder)


# potluck data score


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"inputs": f"question {i}:", "targets": f"answer {i % 7}"} for i in range(20)]
    (tmp_path / "p3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "web.txt").write_text("text", encoding="utf-8")
    raw = {
        "seq_len": 16,
        "tokenizer": {"vocab_size": 300},
        "sources": {
            "p3": {"loader": "p3", "path": "p3.jsonl", "license": "x"},
            "web": {"loader": "text", "path": "web.txt", "license": "x"},
        },
        "stages": [{"name": "s", "tokens": 100, "mix": {"p3": 0.5, "web": 0.5}}],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def score(recipe: Path, model: Path, *words: object) -> Any:
    return CliRunner().invoke(cli.main, ["data", "score", str(recipe), "--model", str(model), *map(str, words)])


def test_scores_are_written_by_pair_and_gone_on_with(folder: Path, recipe: Path) -> None:
    from potluck.coordinator.recipes.pairs import key

    first = score(recipe, folder)
    assert first.exit_code == 0, first.output
    out = recipe.parent / "mine.scores.jsonl"
    assert "scores of 20 pairs" in first.output
    assert "keep: {pmi: mine.scores.jsonl, share: 0.9}" in first.output
    header, *rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert header["model_sha256"] == pmi.fingerprint(folder)
    assert {row["key"] for row in rows} == {key(f"question {i}:", f"answer {i % 7}") for i in range(20)}
    assert all(row["pmi"] == pytest.approx((row["given"] - row["alone"]) / row["y_tokens"]) for row in rows)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:9]) + lines[9][:30])  # killed in between
    again = score(recipe, folder, "--source", "p3")
    assert again.exit_code == 0, again.output
    assert out.read_bytes().startswith(b"".join(lines[:9]))
    done = {row["key"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines()[1:])}
    assert done.keys() == {row["key"] for row in rows}
    assert all(done[row["key"]]["pmi"] == pytest.approx(row["pmi"], abs=1e-4) for row in rows)


def test_scores_of_another_model_are_not_added_to(folder: Path, recipe: Path) -> None:
    out = recipe.parent / "s.jsonl"
    out.write_text('{"model": "other", "model_sha256": "00"}\n', encoding="utf-8")
    found = score(recipe, folder, "--out", out)
    assert found.exit_code == 1
    assert "scores of another model, other" in found.output
    assert out.read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "web"], "source web has no questions and answers. With pairs there are: p3"),
        (["--source", "cot"], "no source is called cot"),
    ],
)
def test_sources_without_pairs_are_refused(folder: Path, recipe: Path, words: list[str], message: str) -> None:
    found = score(recipe, folder, *words)
    assert found.exit_code == 1
    assert message in found.output


def test_without_torch_it_says_what_to_install(folder: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "potluck.worker.pmi")
    monkeypatch.delattr("potluck.worker.pmi")
    monkeypatch.setitem(sys.modules, "torch", None)
    found = score(recipe, folder)
    assert found.exit_code == 1
    assert "torch is not installed. In potluck's checkout: pip install -e '.[worker]'" in found.output
