"""What is learned from a sample: which tokens are given, which are targets. Part of a recipe and of a manifest.

``causal``: every token from those before it. ``prefix``: a document is split at random, the part before is given and
seen whole, the rest are targets; ``short_prefix`` of them have a prefix of less than 20 tokens, which keeps writing
from nothing alive (GPT-JT). ``answers``: of rendered instructions the answers are targets, everything before the
first of them is given; a row without answers is learned as with ``prefix``. ``ul2r``: a mixture of denoisers (UL2R,
arXiv 2210.11399) at the rates of Levanter's re-creation: half S (a split, as with ``prefix``), a quarter R (15 % in
short spans), an eighth each X with long spans and X with half of the tokens gone. ``ul2``: the seven of UL2 (arXiv
2205.05131, table 1), uniformly.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .sync_config import Section

Kind = Literal["causal", "prefix", "answers", "ul2r", "ul2"]
Mode = Literal["R", "S", "X"]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Ids = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 32)], ...], Meta(max_length=1024)]


class Objective(Section, frozen=True, kw_only=True):
    """``mode_dropout``: share of denoised examples without their mode tokens, so that a user needs none (Flan-UL2).
    ``split_sentinel``: whether S examples, too, have a sentinel between prefix and targets."""

    kind: Kind = "causal"
    short_prefix: _Share = 0.2
    mode_dropout: _Share = 0.0
    split_sentinel: bool = False


class Special(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids with a meaning of their own. ``sentinels`` and ``modes`` may be empty: then nothing can be denoised.

    A mode is written as one token or as several (``[S2S]`` as text).
    """

    eos: Annotated[int, Meta(ge=0)]
    pad: Annotated[int, Meta(ge=0)]
    sentinels: _Ids = ()
    modes: dict[Mode, _Ids] = {}
