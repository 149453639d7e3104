"""Special tokens of known tokenizers, what denoising needs of them, and a name for the whole choice.

GPT-J's embedding has 50,400 rows; its tokenizer is GPT-2's with eos 50256 and 143 words more, ``<|extratoken_1|>`` =
50257 to ``<|extratoken_143|>`` = 50399, that no text was trained on.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import msgspec

from .errors import ConfigError
from .objective import Mode, Objective, Special

MODES: tuple[Mode, ...] = ("R", "S", "X")
MIN_SENTINELS = 2  # the shortest text may have its only span cut in two
VERSION = 1  # of the samplers in worker/denoise.py: another way of drawing is another objective

_GPTJ_EOS = 50256
_GPTJ_SENTINELS = {
    "extra": tuple(range(50257, 50397)),  # <|extratoken_1|> to <|extratoken_140|>
    "tail_vocab": tuple(range(50156, 50236)),  # GPT-JT: 80 rare words, which a text may contain too
}
_GPTJ_MODES: dict[str, dict[Mode, tuple[int, ...]]] = {
    "tokens": {"R": (50397,), "X": (50398,), "S": (50399,)},  # <|extratoken_141|> to <|extratoken_143|>
    # GPT-JT: "[NLU]", "[NLG]" and "[S2S]" as ordinary text
    "text": {"R": (58, 32572, 52, 60), "X": (58, 32572, 38, 60), "S": (58, 50, 17, 50, 60)},
}


def gptj_special(
    sentinels: Literal["extra", "tail_vocab"] = "extra", modes: Literal["tokens", "text"] = "tokens"
) -> Special:
    """The special tokens of a GPT-J: those it has never seen, or those that GPT-JT used. Padding is eos."""
    return Special(eos=_GPTJ_EOS, pad=_GPTJ_EOS, sentinels=_GPTJ_SENTINELS[sentinels], modes=dict(_GPTJ_MODES[modes]))


def check_denoising(objective: Objective, special: Special) -> None:
    """Raises ConfigError when ``objective`` needs sentinels or mode tokens that ``special`` lacks."""
    if objective.kind not in ("ul2", "ul2r"):
        return
    n_sentinels = len(special.sentinels)
    if n_sentinels < MIN_SENTINELS or len(set(special.sentinels)) < n_sentinels:
        raise ConfigError(
            f"objective {objective.kind} needs at least {MIN_SENTINELS} sentinel tokens, all different: "
            f"there are {n_sentinels}",
            hint="Give the tokenizer's spare ids as sentinels, or choose the objective prefix or causal.",
        )
    missing = [mode for mode in MODES if not special.modes.get(mode)]
    if missing and objective.mode_dropout < 1:
        raise ConfigError(
            f"objective {objective.kind} has no tokens for the modes {', '.join(missing)}",
            hint="Give ids for the modes R, S and X, or set mode_dropout to 1 to train without them.",
        )


def digest(objective: Objective, special: Special) -> str:
    """64 hex digits that name objective and special tokens together: whoever infills with a model needs the same."""
    spec = msgspec.to_builtins({"version": VERSION, "objective": objective, "special": special})
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
