from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from potluck.coordinator.recipes.chance import Chance
from potluck.coordinator.recipes.examples import Example, Task
from potluck.coordinator.recipes.render import (
    IN_PREFIXES,
    OUT_PREFIXES,
    SEPARATORS,
    Blocks,
    NiFewshot,
    P3Fewshot,
    Piece,
    Renderer,
    Split,
)
from potluck.protocol.errors import ConfigError

LABELS = ("yes", "no", "maybe")


def a_task(number: int, labels: tuple[str, ...] = ()) -> Task:
    answers = labels or tuple(f"answer {i}" for i in range(40))
    examples = [Example(prompt=f"t{number}q{i} prompt", answers=(answers[i % len(answers)],)) for i in range(40)]
    return Task(name=f"task{number}", definition=f"Do task {number}.", examples=examples, labels=labels)


def natural(*, n_few: int = 1, n_free: int = 9, classify: float = 0.3, seed: int = 0) -> NiFewshot:
    tasks = [a_task(i, LABELS) for i in range(n_few)] + [a_task(n_few + i) for i in range(n_free)]
    return NiFewshot(tasks, "ni", seed=seed, share=0.1, chars=1000, classify=classify)


def head(renderer: Renderer, number: int, n: int = 12, split: Split = "train") -> list[Piece]:
    return list(islice(renderer.sequence(split, number), n))


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_sequence_depends_on_its_number_alone() -> None:
    one, other = natural(), natural()
    backwards = {number: head(other, number) for number in reversed(range(50))}
    assert [head(one, number) for number in range(50)] == [backwards[number] for number in range(50)]
    assert len({text(head(one, number)) for number in range(50)}) == 50
    assert head(natural(seed=1), 0) != head(one, 0)


def test_definitions_and_labels_are_there_as_often_as_they_should_be() -> None:
    few = natural(n_few=5, n_free=0)
    texts = [text(head(few, number, 30)) for number in range(2000)]
    assert 0.63 < sum("Do task" in t for t in texts) / 2000 < 0.71
    assert 0.46 < sum("Possible labels:\n1. " in t for t in texts) / 2000 < 0.54
    shown = next(t for t in texts if "Possible labels" in t).split("Possible labels:\n")[1].splitlines()[:3]
    assert sorted(line.partition(". ")[2] for line in shown) == sorted(LABELS)
    assert not any("Possible labels" in text(head(natural(n_few=0), n, 30)) for n in range(200))


@pytest.mark.parametrize(("n_few", "n_free", "least"), [(1, 9, 0.3), (1, 1, 0.5), (0, 3, 0.0), (3, 0, 1.0)])
def test_tasks_of_few_labels_come_often_enough(n_few: int, n_free: int, least: float) -> None:
    renderer = natural(n_few=n_few, n_free=n_free)
    seen = Counter(
        next(p.text for p in renderer.sequence("train", n) if p.answer).strip() in LABELS for n in range(2000)
    )
    assert abs(seen[True] / 2000 - least) < 0.04


def test_every_wording_comes_and_one_sequence_keeps_to_its_own() -> None:
    renderer = natural(n_few=0)
    given, asked, between = Counter[str](), Counter[str](), Counter[str]()
    for number in range(1500):
        pieces = head(renderer, number, 13)
        prompts = [piece.text for piece in pieces if piece.starts]
        asked[prompts[0].rpartition("\n")[2]] += 1
        given[prompts[0].partition(" t")[0] if " t" in prompts[0].partition("q")[0] else ""] += 1
        between[pieces[-1].text if pieces[-1].answer and not pieces[-1].text.startswith(" ") else pieces[-2].text] += 1
        assert len({prompt.rpartition("\n")[2] for prompt in prompts}) == 1
    assert set(asked) == set(OUT_PREFIXES)
    assert set(given) == set(IN_PREFIXES)
    assert 0.45 < given[""] / 1500 < 0.55
    assert {mark for mark in between if mark in SEPARATORS} == set(SEPARATORS)


def test_answers_are_marked_with_their_end_and_nothing_else_is() -> None:
    for number in range(50):
        pieces = head(natural(), number, 40)
        for place, piece in enumerate(pieces):
            if piece.starts:
                assert not piece.answer
                assert place + 2 >= len(pieces) or (pieces[place + 1].answer and pieces[place + 2].answer)
                assert place + 1 >= len(pieces) or pieces[place + 1].text.startswith(" ")
                assert place + 2 >= len(pieces) or pieces[place + 2].text in SEPARATORS
        assert sum(piece.answer for piece in pieces) in (2 * sum(p.starts for p in pieces) - k for k in range(3))


def test_examples_do_not_repeat_until_all_of_a_task_were_there() -> None:
    pieces = head(natural(n_few=0, n_free=1), 3, 3 * 30)
    prompts = [p.text.partition("\n")[0] for p in pieces if p.starts]
    assert len(set(prompts)) == len(prompts) >= 25


def test_what_is_held_out_is_in_no_training_sequence() -> None:
    rows = [Task(name="rows", examples=a_task(0).examples * 2)]
    for renderer in (natural(n_few=0), P3Fewshot(rows, "p3", seed=0, share=0.1, chars=1000)):
        sides = []
        for split in ("train", "heldout"):
            pieces = [p for n in range(60) for p in head(renderer, n, 60, split)]  # type: ignore[arg-type]
            sides.append(
                {word for p in pieces if p.starts for word in p.text.split() if word[0] == "t" and "q" in word}
            )
        assert len(sides[0]) > 20
        assert sides[1]
        assert not sides[0] & sides[1]
        assert renderer.size("train") + renderer.size("heldout") in (360, 80)


def test_a_prompt_that_ends_in_a_colon_is_answered_at_once() -> None:
    examples = [Example(prompt=f"Say {i}{':' if i % 2 else '.'}", answers=(str(i),)) for i in range(30)]
    renderer = P3Fewshot([Task(name="rows", examples=examples)], "p3", seed=0, share=0.1, chars=1000)
    between = set()
    for number in range(300):
        first, answer, end = head(renderer, number, 3)
        between.add(end.text)
        number_said = first.text.split()[1].rstrip(":.")
        if first.text.rstrip().endswith(f"{number_said}:"):
            assert (first.text, answer.text) == (f"Say {number_said}:", f" {number_said}")
        else:
            assert first.text.startswith(f"Say {number_said}.\n")
            assert answer.text.strip() == number_said
    assert between == set(SEPARATORS)


def test_examples_that_are_too_long_are_left_out() -> None:
    long = Task(name="long", examples=[Example(prompt="x" * 2000, answers=("y",))])
    with pytest.raises(ConfigError, match="too few examples"):
        P3Fewshot([long], "p3", seed=0, share=0.1, chars=1000)
    renderer = P3Fewshot([long, a_task(0)], "p3", seed=0, share=0.1, chars=1000)
    assert renderer.size("train") + renderer.size("heldout") == 40


def test_blocks_are_shuffled_and_their_answers_marked() -> None:
    texts = [f"About {i}.\n\nQ: what is {i}?\nA: It is\n{i}.\n\nMore of {i}.\n\nQ: b?\nA: c{i}" for i in range(20)]
    renderer = Blocks(texts, "cot", seed=0, share=0.1)
    assert renderer.answers
    pieces = head(renderer, 0, 5 * renderer.size("train"))
    said = [p.text for p in pieces if p.starts]
    assert len(set(said)) == len(said) == renderer.size("train") == 20 - renderer.size("heldout")
    assert [p.text for p in head(renderer, 1, 5) if p.starts] != said[:1]
    number = said[0].split()[1].rstrip(".")
    assert [(p.text, p.answer) for p in pieces[:5]] == [
        (f"About {number}.\n\nQ: what is {number}?\nA:", False),
        (f" It is\n{number}.\n\nMore of {number}.", True),
        ("\n\nQ: b?\nA:", False),
        (f" c{number}", True),
        ("\n\n", True),
    ]
    plain = Blocks(["one text", "another text"], "plain", seed=0, share=0.1)
    assert not plain.answers
    assert not any(piece.answer for piece in head(plain, 0))
    with pytest.raises(ConfigError, match="too few examples"):
        Blocks(["only one"], "cot", seed=0, share=0.1)


def test_chance_is_the_same_everywhere() -> None:
    chance = Chance("ni", 1, "train", 2)
    assert [chance.below(100) for _ in range(8)] == GOLDEN
    assert sorted(Chance("x").order(50)) == list(range(50))
    firsts = Counter(next(Chance("first", n).order(4)) for n in range(4000))
    assert all(900 < count < 1100 for count in firsts.values())


GOLDEN = [68, 28, 39, 59, 0, 10, 98, 35]
