"""``README.md`` of a published model, the model card: what it is, of what text, by whom, and what was sent for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..protocol.architecture import TITLES, tensors, weights
from ..protocol.config import ModelConfig, RunConfig
from ..protocol.evaluation import Score
from ..protocol.manifest import Manifest
from ..protocol.plan import Shape
from .adapters import FOLDER
from .dashboard.scores import Scores
from .events import Evaluated
from .store import Store

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Contributor:
    """``samples``: committed ones that it read, as a replica of the first stage. ``sent``: bytes, as it last said."""

    name: str
    peer: str
    samples: int
    sent: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run can say of itself. ``traffic``: bytes sent by all machines together, by purpose. ``digests``: SHA-256
    of each stage's fp32 weights as the last committed round has them, in hex. ``evaluation``: of the newest model of
    this run that somebody evaluated, which is an earlier one."""

    run: str = ""
    base: str = ""  # the checkpoint that it began from, with its license
    step: int = 0
    tokens: int = 0
    heldout_loss: float | None = None
    contributors: Sequence[Contributor] = ()
    traffic: Mapping[str, int] | None = None
    digests: Sequence[str] = ()
    evaluation: Evaluated | None = None


OBJECTIVES = {
    "causal": "causal: every token is predicted from those before it",
    "prefix": "prefix: a text is split at random, and its end is predicted from its beginning, which is seen whole",
    "answers": "answers: answers to instructions are predicted from what stands before them, which is seen whole",
    "ul2r": "UL2R: a mixture of denoisers (R, S, X) with mode tokens",
    "ul2": "UL2: a mixture of seven denoisers (R, S, X) with mode tokens",
}


def gathered(store: Store, seq_len: int, run: str) -> Facts:
    """The facts as of the last committed round, from the run's file. ``StateError`` if it cannot be read."""
    names = {}
    for (data,) in store.rows("SELECT data FROM events WHERE kind = 'PeerJoined' ORDER BY id"):
        event = json.loads(data)
        names[event["peer"]] = event["name"]
    samples = dict(store.rows("SELECT peer, SUM(count) FROM ledger WHERE state = 'committed' GROUP BY peer"))
    sent = dict(store.rows("SELECT peer, SUM(nbytes) FROM traffic WHERE direction = 'out' GROUP BY peer"))
    # The coordinator, who gives out the corpus, keeps no meter: who receives it does.
    purposes = "SELECT purpose, SUM(nbytes) FROM traffic WHERE direction = 'out' OR purpose = 'data' GROUP BY purpose"
    last = store.rows("SELECT step, sample, digests FROM rounds ORDER BY step DESC LIMIT 1")
    heldout = store.rows("SELECT heldout FROM points WHERE heldout IS NOT NULL ORDER BY step DESC, id DESC LIMIT 1")
    step, sample, digests = last[0] if last else (0, 0, "[]")
    return Facts(
        run=run,
        step=step,
        tokens=sample * seq_len,
        heldout_loss=heldout[0][0] if heldout else None,
        contributors=[
            Contributor(name=name, peer=peer, samples=samples.get(peer, 0), sent=sent.get(peer, 0))
            for peer, name in names.items()
        ],
        traffic=dict(store.rows(purposes)),
        digests=json.loads(digests),
        evaluation=Scores.read(store).newest(before=step),
    )


def model_card(config: RunConfig, manifest: Manifest, facts: Facts) -> str:
    """Markdown with YAML front matter, as model hubs read it."""
    model = config.model.resolved()
    license = manifest.license.strip() or UNKNOWN
    front: dict[str, Any] = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["potluck", model.architecture],
    }
    count = weights(tensors(model, manifest.vocab_size, 0, model.layers))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {config.name}",
        "",
        f"A {TITLES[model.architecture]} model of {count / 1e6:,.1f} million parameters ({model.layers} layers,"
        f" d = {model.d_model}, {model.heads} heads, sequences of {model.seq_len} tokens, a vocabulary of"
        f" {manifest.vocab_size:,}), trained by volunteers over internet lines with potluck.",
        "",
        "## Training",
        "",
        f"- Text: {code(manifest.source)}, license: {code(license)}."
        + (" Whether the model may be used depends on that of the text: find out." if license == UNKNOWN else ""),
        f"- Objective: {'; '.join(dict.fromkeys(OBJECTIVES[s.objective.kind] for s in manifest.stages))}.",
        f"- Steps: {facts.step:,}, tokens: {facts.tokens:,}.",
    ]
    if facts.heldout_loss is not None:
        lines.append(f"- Held-out loss: {facts.heldout_loss:.4f} nats per token.")
    if facts.base:
        lines.append(f"- Begun from {plain(facts.base)}.")
    if model.train == "lora":
        lines.append(adapted(model, manifest.vocab_size))
    if facts.run:
        lines.append(f"- Run: {code(facts.run)}, seed {config.seed}.")
    if manifest.masked:
        lines += [
            "",
            "A prompt is seen whole (`is_causal: false` in `config.json`). To score a text, give the model an explicit"
            " mask: without one, what is to be predicted is seen, too.",
        ]
    if facts.evaluation:
        lines += evaluated(facts.evaluation)
    if facts.contributors:
        lines += ["", "## Contributors", "", "| name | id | samples read | sent, MB |", "| --- | --- | ---: | ---: |"]
        lines += [
            f"| {plain(c.name)} | `{plain(c.peer)[:12]}` | {c.samples:,} | {c.sent / 1e6:,.1f} |"
            for c in sorted(facts.contributors, key=lambda c: (-c.samples, -c.sent, c.peer))
        ]
        lines += [
            "",
            "Replicas of the first stage read the samples; others compute on what these send. Bytes are of the"
            " machines' last reports, a few seconds old.",
        ]
    if facts.traffic:
        tokens = max(1, facts.tokens)
        lines += ["", "## Sent", "", "| purpose | bytes | bytes per token |", "| --- | ---: | ---: |"]
        lines += [
            f"| {plain(purpose)} | {nbytes:,} | {nbytes / tokens:,.1f} |"
            for purpose, nbytes in sorted(facts.traffic.items())
        ]
        total = sum(facts.traffic.values())
        lines.append(f"| all | {total:,} | {total / tokens:,.1f} |")
    if facts.digests:
        what = "fp32 adapters" if model.train == "lora" else "fp32 weights"
        lines += ["", "## Weights", "", f"SHA-256 of each stage's {what} after step {facts.step:,}:", ""]
        lines += [f"- stage {i}: `{plain(digest)}`" for i, digest in enumerate(facts.digests)]
    return "\n".join(lines) + "\n"


def adapted(model: ModelConfig, vocab_size: int) -> str:
    """A line on what was trained where it is not the whole model."""
    count, lora = Shape.of(model, vocab_size).size(0, model.layers), model.lora
    line = (
        f"- Trained: adapters (LoRA) of rank {lora.rank}, alpha {lora.alpha:g}, at"
        f" {', '.join(map(code, model.targets))}: {count / 1e6:,.1f} million weights. They are merged into the"
        f" checkpoint's own weights, in its dtype; by themselves they lie in `{FOLDER}`, in the layout of PEFT."
    )
    if lora.base == "fp32":
        return line
    base = "four bits (NF4)" if lora.base == "4bit" else "bf16"
    return line + (
        f" While they were trained, the base's matrices were rounded to {base}: held-out losses of the run are of that"
        " base, and this model's own may differ a little."
    )


def evaluated(found: Evaluated) -> list[str]:
    """A section on an evaluation."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    def line(name: str, metric: str, score: Score, *baselines: float | None) -> str:
        interval = f"{score.low:.3f} … {score.high:.3f}"
        cells = [plain(name), plain(metric), number(score.value), interval, f"{score.n:,}", *map(number, baselines)]
        return f"| {' | '.join(cells)} |"

    lines = [
        *("", "## Evaluation", ""),
        f"Of this run's model of step {found.step:,}, suite {code(found.suite)}, with 95 % intervals over n rows;"
        " beside it what the commonest label and a linear model (TF-IDF) score on the same ones.",
        *("", "| task | metric | score | interval | n | majority | TF-IDF |"),
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for task in found.tasks:
        if task.score:
            metric = task.metric + (" (lower is better)" if task.lower_is_better else "")
            lines.append(line(task.name, metric, task.score, task.majority, task.tfidf))
    if found.mean:
        lines.append(line("mean", "macro-f1", found.mean, None, None))
    return lines


def plain(text: str) -> str:
    """One line that Markdown and HTML leave as it is; names are strangers' words."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]<>&|#!" else c for c in " ".join(text.split()) if c.isprintable())


def code(text: str) -> str:
    """One line in code style."""
    return "`" + "".join(c for c in " ".join(text.split()) if c.isprintable() and c != "`") + "`"
