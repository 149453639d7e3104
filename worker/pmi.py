"""How much a question says about its answer: pointwise mutual information by a language model, per token of the answer,
``(log p(y|x) - log p(y)) / |y|`` (the measure by which InfoSumm filters pairs, Jung et al., 2024, arXiv 2403.13780).

Both probabilities are of the same tokens of y: behind ``x`` and a line break, and behind a line break alone, so that
what is left is what x itself does. Logarithms are natural. A pair whose answer fits any question scores about 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..protocol.errors import ConfigError

MAX_TOKENS = 2048  # of a sequence; of a longer x the end is taken, of a y that fills more than half its beginning
BATCH_TOKENS = 2048  # of a batch, padding included: its logits are that times the vocabulary
_WEIGHTS = ("*.safetensors", "*.gguf")
_HINT = "Name a folder with config.json, model.safetensors and a tokenizer, as save_pretrained writes them."


class Score(NamedTuple):
    """``given``: log p(y|x), ``alone``: log p(y), in nats. Tokens are those of the model that scored."""

    given: float
    alone: float
    x_tokens: int
    y_tokens: int

    @property
    def pmi(self) -> float:
        return (self.given - self.alone) / self.y_tokens


class Scorer:
    """``model``: a causal language model of transformers, whose logits at t say token t + 1; ``tokenizer``: its own.

    Raises ConfigError for a tokenizer that has neither a beginning nor an end of text.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self._model, self._tokenizer, self._batch_tokens = model.eval(), tokenizer, batch_tokens
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise ConfigError("the tokenizer of --model has no beginning or end of text", hint="Use another model.")
        self._begin = [int(begin)]
        limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
        self._longest = max(8, min(MAX_TOKENS, int(limit or MAX_TOKENS)))
        self._break = self._ids("\n")

    def score(self, pairs: Sequence[tuple[str, str]], say: Callable[[float], None] = lambda share: None) -> list[Score]:
        """One score each of pairs (x, y). ``say`` gets the share done. ``ValueError`` for a y without tokens."""
        wanted: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # a sequence that recurs is computed once
        lengths, places = [], []
        for x, y in pairs:
            x_ids, y_ids = self._ids(x), self._ids(y)
            if not y_ids:
                raise ValueError("an answer without tokens")
            lengths.append((len(x_ids), len(y_ids)))
            said = tuple(y_ids[: self._longest // 2])
            room = self._longest - len(said) - len(self._begin) - len(self._break)
            x_ids = x_ids[max(0, len(x_ids) - room) :]
            contexts = ((*self._begin, *x_ids, *self._break), (*self._begin, *self._break))
            places.append([wanted.setdefault((context, said), len(wanted)) for context in contexts])
        found = self._all(list(wanted), say)
        taken = [min(n_y, self._longest // 2) for _, n_y in lengths]
        return [
            # Of a y that was cut, both are of its beginning; they are scaled so that pmi stays their mean per token.
            Score(found[given] * n_y / n, found[alone] * n_y / n, n_x, n_y)
            for (given, alone), (n_x, n_y), n in zip(places, lengths, taken, strict=True)
        ]

    def _all(
        self, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], say: Callable[[float], None]
    ) -> dict[int, float]:
        found: dict[int, float] = {}
        order = sorted(range(len(sequences)), key=lambda place: sum(map(len, sequences[place])))
        for batch in self._batches(order, [sum(map(len, one)) for one in sequences]):
            sums = self.log_likelihoods([sequences[place] for place in batch])
            found.update(zip(batch, sums.tolist(), strict=True))
            say(len(found) / len(sequences))
        return found

    def _batches(self, order: list[int], sizes: list[int]) -> Iterator[list[int]]:
        """Places in ascending size, as many together as fit a batch."""
        batch: list[int] = []
        for place in order:
            if batch and (len(batch) + 1) * sizes[place] > self._batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.inference_mode()
    def log_likelihoods(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """fp64 [B]: of each (context, said), the log likelihood of ``said`` behind ``context`` (one token or more).

        One batch; shorter sequences are padded behind their end, where no causal position looks.
        """
        width = max(len(context) + len(said) for context, said in sequences)
        device = self._model.device
        tokens = torch.zeros(len(sequences), width, dtype=torch.long)
        real = torch.zeros(len(sequences), width, dtype=torch.long)
        is_said = torch.zeros(len(sequences), width, dtype=torch.bool)
        for place, (context, said) in enumerate(sequences):
            end = len(context) + len(said)
            tokens[place, :end] = torch.tensor([*context, *said])
            real[place, :end] = 1
            is_said[place, len(context) : end] = True
        logits = self._model(input_ids=tokens.to(device), attention_mask=real.to(device), use_cache=False).logits
        rows, columns = is_said.nonzero(as_tuple=True)
        at = logits[rows.to(device), columns.to(device) - 1].float()
        chosen = at.gather(1, tokens[rows, columns].to(device)[:, None])[:, 0] - at.logsumexp(1)
        return torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, rows, chosen.double().cpu())

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def load(folder: Path) -> Scorer:
    """The model in ``folder``, in fp32, on the first GPU if there is one. ConfigError if there is none to be used: code
    of its own is not run, pickled weights are not read."""
    if not (folder / "config.json").is_file() and not list(folder.glob("*.gguf")):
        raise ConfigError(f"{folder} has no model", hint=_HINT)
    one = sorted(folder.glob("*.gguf"))
    quantized = {} if (folder / "config.json").is_file() or len(one) != 1 else {"gguf_file": one[0].name}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **quantized)
        safe = {} if quantized else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, **safe, **quantized
        )
    except Exception as error:  # the libraries raise of many kinds
        raise ConfigError(f"{folder} has no usable model ({error})", hint=_HINT) from error
    return Scorer(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def fingerprint(folder: Path) -> str:
    """SHA-256 over configuration, tokenizer and weights: equal models, equal scores."""
    names = ["config.json", "tokenizer.json", *(path.name for kind in _WEIGHTS for path in sorted(folder.glob(kind)))]
    digest = hashlib.sha256()
    try:
        for name in names:
            if (folder / name).is_file():
                with (folder / name).open("rb") as file:
                    digest.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}", hint=_HINT) from error
    return digest.hexdigest()
