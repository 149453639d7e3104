"""Twelve classification tasks that need no network, shaped like RAFT: 50 training rows, up to 200 test rows.

Which rows are taken is a pure function of the pinned assets and ``SEED``: candidates are put in the order of a hash,
a quarter of the groups (documents, plays, threads) is for training, and labels take turns, so classes are as equal
as the source allows. ``ROWS`` pins the chosen ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ...protocol.errors import StateError
from . import sources
from .assets import absent
from .prompts import Row, Task, key
from .sources import Candidate, clip

SEED = 20260101
TRAIN, TEST = 50, 200

Fields = tuple[tuple[str, str], ...]


def _text(raw: str) -> Fields | None:
    shown = clip(raw)
    return (("Text", shown),) if len(shown) > 40 else None


def _subject(raw: str) -> Fields | None:
    fields = sources.mail_fields(raw)
    return fields[:1] if fields else None


def _dialogue(raw: str) -> Fields:
    question, answer = raw.split("\n")
    return ("Question", question), ("Reply", answer)


class Definition(NamedTuple):
    """``labels``: label to the source's kinds it stands for. ``asset``: what it is made of."""

    name: str
    asset: str
    source: Callable[[Path], Iterator[Candidate]]
    render: Callable[[str], Fields | None]
    labels: dict[str, str]
    instructions: str


_GENRES = {
    "press report": "a",
    "editorial": "b",
    "review": "c",
    "religion": "d",
    "hobbies": "e",
    "popular lore": "f",
    "belles lettres": "g",
    "government document": "h",
    "learned": "j",
    "general fiction": "k",
    "mystery": "l",
    "science fiction": "m",
    "adventure": "n",
    "romance": "p",
    "humor": "r",
}
_TOPICS = ("ai", "emotion", "food", "literature", "movies", "science", "sports", "tech_support")
_BROWN = "The text is a passage from something printed in the United States in 1961."

TASKS = (
    Definition(
        "spam",
        "spam",
        sources.mails,
        sources.mail_fields,
        {"spam": "spam", "not spam": "easy-ham"},
        "Decide whether the e-mail is unsolicited advertising or fraud (spam) or an ordinary message.",
    ),
    Definition(
        "spam_hard",
        "spam",
        sources.mails,
        sources.mail_fields,
        {"spam": "spam", "not spam": "hard-ham"},
        "Decide whether the e-mail is spam. Newsletters and offers that the reader asked for are not spam.",
    ),
    Definition(
        "spam_subject",
        "spam",
        sources.mails,
        _subject,
        {"spam": "spam", "not spam": "easy-ham hard-ham"},
        "Decide from its subject alone whether an e-mail is spam.",
    ),
    Definition(
        "brown_fiction",
        "brown",
        sources.brown,
        _text,
        {"fiction": "k l m n p r", "non-fiction": "a b c d e f g h j"},
        f"{_BROWN} Decide whether it is fiction.",
    ),
    Definition(
        "brown_press",
        "brown",
        sources.brown,
        _text,
        {"report": "a", "editorial": "b", "review": "c"},
        "The text is a passage from an American newspaper of 1961. Decide which kind of article it is from.",
    ),
    Definition(
        "brown_genre4",
        "brown",
        sources.brown,
        _text,
        {"news": "a", "religion": "d", "learned": "j", "romance": "p"},
        f"{_BROWN} Decide what kind of text it is from.",
    ),
    Definition(
        "brown_story",
        "brown",
        sources.brown,
        _text,
        {"mystery": "l", "adventure": "n", "romance": "p"},
        "The text is a passage from a story. Decide what kind of story it is.",
    ),
    Definition("brown_genre15", "brown", sources.brown, _text, _GENRES, f"{_BROWN} Decide what genre it is from."),
    Definition(
        "chat_topic",
        "chatterbot",
        sources.chats,
        _dialogue,
        {topic: topic for topic in _TOPICS},
        "A person asks and a program replies. Decide what they talk about.",
    ),
    Definition(
        "chat_reply",
        "chatterbot",
        sources.pairs,
        _dialogue,
        {"fits": "answer", "does not fit": "other"},
        "Decide whether the reply fits the question or belongs to another one.",
    ),
    Definition(
        "shakespeare_genre",
        "shakespeare",
        sources.plays,
        _text,
        {"comedy": "comedy", "history": "history", "tragedy": "tragedy"},
        "The text is a passage from a play by Shakespeare. Decide which kind of play it is from.",
    ),
    Definition(
        "shakespeare_spelling",
        "shakespeare",
        sources.spellings,
        _text,
        {"modern": "modern", "original": "original"},
        "The text is a passage from a play by Shakespeare. Decide whether it is in modern spelling or that of 1623.",
    ),
)

ROWS = {
    "spam": "b7f8513c244605124eaed7d3a1830d2c",
    "spam_hard": "cece058db806a728fac953ec08bd5167",
    "spam_subject": "95618a5dd0cc632a226378c0ae4c6a8e",
    "brown_fiction": "8e1cde3ccbaad2220485ceb698ca576f",
    "brown_press": "38870e1e077338c3f80cba8927c5b288",
    "brown_genre4": "16ecbee7a72ddd3fbe71021b4d82d357",
    "brown_story": "aa279d94e8cf8d77792b3ace23b2e4af",
    "brown_genre15": "841827b2be40393a06d102df658bc656",
    "chat_topic": "4ebd923660900fedb147c147f08ceef6",
    "chat_reply": "cc0715dc0b78c5dd40ee06fe07df9d29",
    "shakespeare_genre": "f586d8abd45106bbee95bbe477f652a1",
    "shakespeare_spelling": "42dc0b4d9ac38608133b8c7429104388",
}


def build(folder: Path) -> tuple[list[Task], dict[str, str]]:
    """The tasks that the assets in ``folder`` allow, and why the others are left out, by name."""
    why = {name: absent(name, folder) for name in dict.fromkeys(task.asset for task in TASKS)}
    read: dict[Callable[[Path], Iterator[Candidate]], list[Candidate]] = {}
    found, skipped = [], {}
    for task in TASKS:
        if why[task.asset]:
            skipped[task.name] = why[task.asset]
            continue
        if task.source not in read:
            read[task.source] = list(task.source(folder))
        chosen = choose(task, read[task.source])
        if digest(chosen) != ROWS[task.name]:
            raise StateError(f"{task.name} has other rows than those of this suite", hint="Install potluck again.")
        found.append(chosen)
    return found, skipped


def choose(task: Definition, candidates: list[Candidate]) -> Task:
    """``task``'s rows out of ``candidates``: the same ones whatever order those come in."""
    label_of = {kind: i for i, kinds in enumerate(task.labels.values()) for kind in kinds.split()}
    pools: dict[tuple[bool, int], list[Candidate]] = {}
    for row in candidates:
        if row.kind in label_of:
            is_train = int(key(SEED, task.asset, "group", row.group)[:8], 16) % 4 == 0
            pools.setdefault((is_train, label_of[row.kind]), []).append(row)
    for rows in pools.values():
        rows.sort(key=lambda row: key(SEED, task.name, row.id), reverse=True)
    parts = []
    for is_train, size in ((True, TRAIN), (False, TEST)):
        chosen: list[Row] = []
        turns = [pools.get((is_train, i), []) for i in range(len(task.labels))]
        while len(chosen) < size and any(turns):
            for label, rows in enumerate(turns):
                found = _next(task, rows, label) if len(chosen) < size else None
                if found:
                    chosen.append(found)
        parts.append(tuple(sorted(chosen, key=lambda row: key(SEED, "order", row.id))))
    return Task(task.name, task.instructions, tuple(task.labels), parts[0], parts[1])


def _next(task: Definition, rows: list[Candidate], label: int) -> Row | None:
    while rows:
        candidate = rows.pop()
        fields = task.render(candidate.raw)
        if fields:
            return Row(candidate.id, fields, label)
    return None


def digest(task: Task) -> str:
    """Of the ids of ``task``'s rows, training rows first."""
    ids = [row.id for row in task.train] + ["--"] + [row.id for row in task.test]
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32]
