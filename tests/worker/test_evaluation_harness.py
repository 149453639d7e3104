"""lm-eval through our adapter, on tiny random models and a made-up task. Skipped without lm-eval."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import POSITIONS, build, one_by_one, save, tokenizer

from potluck.protocol.errors import ConfigError, UnreachableError
from potluck.worker.evaluation.models import Opened
from potluck.worker.evaluation.run import Plan, evaluate
from potluck.worker.evaluation.scoring import Scorer

for package in ("lm_eval", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed: potluck[eval]")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # of lm-eval and what it imports

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from potluck.worker.evaluation import harness  # noqa: E402
from potluck.worker.evaluation.harness import PrefixHFLM  # noqa: E402

PAIRS = [("Q: what is it?\nA:", " a thing"), ("Q: what is it?\nA:", " b"), ("Up", " and down"), ("Q: so?\nA:", " no")]


def ours(kind, prefix):
    model = build(kind, prefix=prefix)
    opened = Opened(model, tokenizer(), prefix, POSITIONS, None)
    return model, PrefixHFLM(opened, Scorer(model, prefix=prefix, max_length=POSITIONS, batch_size=3))


def stock(model):
    return HFLM(pretrained=model, tokenizer=tokenizer(), max_length=POSITIONS, batch_size=3, device="cpu")


def requests(kind, rows):
    return [Instance(kind, {}, row, i) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("prefix", [False, True])
def test_log_likelihoods_equal_explicit_masks_and_stock_lm_eval_leaks(kind, prefix):
    model, adapter = ours(kind, prefix)
    words = tokenizer()
    expected = [sum(one_by_one(model, words(c).input_ids, words(a).input_ids, prefix)) for c, a in PAIRS]
    found = [value for value, _ in adapter.loglikelihood(requests("loglikelihood", PAIRS))]
    assert found == pytest.approx(expected, abs=1e-5 * max(len(a) for _, a in PAIRS))
    whole = [value for value, _ in stock(model).loglikelihood(requests("loglikelihood", PAIRS))]
    off = max(abs(a - b) for a, b in zip(whole, expected, strict=True))
    assert off > 1e-2 if prefix else off < 1e-3


def test_rolling_log_likelihoods_are_causal():
    """The prefix model's equals that of the same weights under a causal mask, over several windows."""
    model, adapter = ours("gptj", True)
    text = "It rained all day and nobody went out. " * 16
    causal = build("gptj", prefix=False)
    causal.load_state_dict(model.state_dict())
    expected = stock(causal).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert len(text) > 2 * POSITIONS and found == pytest.approx(expected, rel=1e-6)
    assert adapter.loglikelihood(requests("loglikelihood", PAIRS[:1])) != stock(causal).loglikelihood(
        requests("loglikelihood", PAIRS[:1])
    )


def test_writing_reads_the_prompt_both_ways():
    """Greedy text in a left-padded batch equals, token by token, the argmax under an explicit prefix mask."""
    model, adapter = ours("gptj", True)
    words = tokenizer()
    prompts = ["Once upon a time", "Up"]
    rows = [(prompt, {"until": [], "max_gen_toks": 6, "do_sample": False}) for prompt in prompts]
    written = adapter.generate_until(requests("generate_until", rows))
    for prompt, text in zip(prompts, written, strict=True):
        context, answer = words(prompt).input_ids, []
        for _ in range(6):
            tokens = torch.tensor([[*context, *answer]])
            mask = torch.full((tokens.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
            mask[: len(context), : len(context)] = 0.0
            with torch.inference_mode():
                logits = model(tokens, attention_mask=mask[None, None], use_cache=False).logits
            answer.append(int(logits[0, -1].argmax()))
        assert text == words.decode(answer, skip_special_tokens=True)


def write_task(folder, data):
    """A multiple-choice task of one's own, on local files."""
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    train: {data}\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\nfewshot_split: train\n"
        "doc_to_text: '{{text}}\\nLabel:'\ndoc_to_choice: [red, green]\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


def test_a_task_of_one_s_own_runs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"thing {i}", "label": i % 2}) + "\n" for i in range(12)))
    write_task(tmp_path / "tasks", data)
    folder = save(tmp_path / "model", "gptj", prefix=True, is_causal=False)
    plan = Plan(model=folder, suite="lm-eval:mine", include=tmp_path / "tasks", limit=8, shots=1, device="cpu")
    found = evaluate(plan)
    [task] = found.tasks
    assert (task.name, task.metric, task.score.n, len(task.values)) == ("mine", "acc", 8, 8)
    assert task.score.value == sum(task.values) / 8
    assert task.score.low <= task.score.value <= task.score.high


def test_a_task_nobody_knows_is_refused(tmp_path, monkeypatch):
    """lm-eval's own index is left out: reading it takes longer than all tests here."""
    known = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: known(include_path=None, include_defaults=False))
    with pytest.raises(ConfigError, match="no_such_task"):
        harness.evaluate(*[None] * 2, ["no_such_task"], include=None, shots=None, limit=None)
    with pytest.raises(ConfigError, match="is no folder"):
        harness.evaluate(*[None] * 2, ["mine"], include=tmp_path / "nowhere", shots=None, limit=None)


def test_data_that_are_not_there_are_named(tmp_path):
    folder = save(tmp_path / "model", "gptj", prefix=True, is_causal=False)
    write_task(tmp_path / "tasks", tmp_path / "missing.jsonl")
    with pytest.raises(UnreachableError, match="mine") as found:
        evaluate(Plan(model=folder, suite="lm-eval:mine", include=tmp_path / "tasks", device="cpu"))
    assert "--include" in found.value.hint
