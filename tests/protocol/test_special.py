from __future__ import annotations

from itertools import product

import msgspec
import pytest

from potluck.protocol.errors import ConfigError
from potluck.protocol.objective import Objective, Special
from potluck.protocol.special import check_denoising, digest, gptj_special

GOLDEN = "ae0a2a549beadb059e7b5a05739744c5306161fa923ac31392c2deee8e836209"
READY = Special(eos=0, pad=0, sentinels=(90, 91), modes={"R": (1,), "S": (2,), "X": (3,)})


def test_gptj_has_its_spare_words_as_sentinels() -> None:
    special = gptj_special()
    assert (special.eos, special.pad) == (50256, 50256)
    assert special.sentinels == tuple(50256 + n for n in range(1, 141))
    assert special.modes == {"R": (50397,), "X": (50398,), "S": (50399,)}


def test_gptjts_choice_is_rare_words_and_modes_as_text() -> None:
    special = gptj_special(sentinels="tail_vocab", modes="text")
    assert special.sentinels == tuple(50256 - 100 + n for n in range(80))
    assert special.modes["S"] == (58, 50, 17, 50, 60)  # [S2S]
    assert special.modes["R"] == (58, 32572, 52, 60)  # [NLU]
    assert special.modes["X"] == (58, 32572, 38, 60)  # [NLG]


@pytest.mark.parametrize(("sentinels", "modes"), list(product(("extra", "tail_vocab"), ("tokens", "text"))))
def test_every_choice_can_denoise_and_is_read_back(sentinels, modes) -> None:
    special = gptj_special(sentinels, modes)
    check_denoising(Objective(kind="ul2r"), special)
    assert msgspec.json.decode(msgspec.json.encode(special), type=Special) == special
    assert max(special.sentinels) < 50400
    assert not set(special.sentinels) & {special.eos, *(one for ids in special.modes.values() for one in ids)}


@pytest.mark.parametrize("kind", ["ul2", "ul2r"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sentinels": ()}, "sentinel"),
        ({"sentinels": (90,)}, "sentinel"),
        ({"sentinels": (90, 91, 90)}, "all different"),
        ({"modes": {}}, "R, S, X"),
        ({"modes": {"R": (1,), "S": (2,)}}, "modes X"),
        ({"modes": {"R": (1,), "S": (), "X": (3,)}}, "modes S"),
    ],
)
def test_what_is_missing_is_named_with_its_fix(kind, change, words) -> None:
    lacking = msgspec.structs.replace(READY, **change)
    with pytest.raises(ConfigError, match=words) as caught:
        check_denoising(Objective(kind=kind), lacking)
    assert caught.value.hint
    for other in ("causal", "prefix", "answers"):
        check_denoising(Objective(kind=other), lacking)


def test_without_modes_in_use_none_are_needed() -> None:
    check_denoising(Objective(kind="ul2r", mode_dropout=1.0), msgspec.structs.replace(READY, modes={}))
    with pytest.raises(ConfigError):
        check_denoising(Objective(kind="ul2r", mode_dropout=0.99), msgspec.structs.replace(READY, modes={}))


def test_the_digest_names_every_part_of_the_choice() -> None:
    choices = [
        (Objective(kind="ul2r"), gptj_special()),
        (Objective(kind="ul2"), gptj_special()),
        (Objective(kind="ul2r", short_prefix=0.1), gptj_special()),
        (Objective(kind="ul2r", mode_dropout=0.1), gptj_special()),
        (Objective(kind="ul2r", split_sentinel=True), gptj_special()),
        (Objective(kind="ul2r"), gptj_special(sentinels="tail_vocab")),
        (Objective(kind="ul2r"), gptj_special(modes="text")),
        (Objective(kind="ul2r"), msgspec.structs.replace(gptj_special(), pad=0)),
    ]
    assert len({digest(*choice) for choice in choices}) == len(choices)
    shuffled = {"S": (50399,), "X": (50398,), "R": (50397,)}
    again = msgspec.structs.replace(gptj_special(), modes=shuffled)
    assert digest(Objective(kind="ul2r"), again) == digest(*choices[0]) == GOLDEN
